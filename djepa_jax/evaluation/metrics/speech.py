"""Speech from text judged by ear: how many of the words does a speech recogniser understand?

Real recordings, and the same after they were made tokens and sound again, show how many it
understands at best. The recogniser is PocketSphinx with its models of American English.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from djepa_jax.core.modalities.programs import heard
from djepa_jax.core.models.text import Text
from djepa_jax.data.captions import captioned
from djepa_jax.data.records import unwrapped
from djepa_jax.evaluation.metrics import intervals
from djepa_jax.evaluation.metrics.spoken_digits import hear, open_recogniser

MOST, BATCH = 100, 10  # recordings or samples that are listened to; at a time


class Speech:
    """Mean share of the words of a caption that the recogniser hears, in their order.

    Of samples (`words`), recordings of the same captions, and these after they were made tokens and
    sound again.
    """

    def __init__(self, pairs, modality):
        self._pairs, self._modality = pairs, modality
        self._sounds: list[np.ndarray] = []
        self._asked: list[str] = []

    @classmethod
    def from_data(cls, source) -> "Speech":
        """Against recordings of what their captions say; ValueError for other examples."""
        pairs, modality = captioned(source), getattr(unwrapped(source), "modality", None)
        if pairs is None or not isinstance(pairs.reader, Text) or not hasattr(modality, "rate"):
            raise ValueError(
                'evaluation.kind "speech" judges recordings with captions (model.condition "text"),'
                " these data are none; use spoken_digits or classifier."
            )
        open_recogniser()  # now, and not after hours of training
        return cls(pairs, modality)

    def update(self, arrays: dict[str, np.ndarray], conditions: Any) -> None:
        """Keep `sound` `[n, S]` and the texts asked for, of at most `MOST`."""
        left = MOST - len(self._asked)
        self._sounds.extend(arrays["sound"][:left])
        self._asked += map(self._pairs.reader.decode, np.asarray(conditions)[:left])

    def merge(self, other: "Speech") -> None:
        """Take in the samples of another one."""
        self._sounds += other._sounds
        self._asked += other._asked

    def result(self) -> dict[str, float]:
        """The figures."""
        rate = self._modality.rate
        found = words_heard(self._sounds, self._asked, rate)
        low, high = intervals.bootstrap(found)
        figures = {"words": found.mean(), "words_low": low, "words_high": high}
        reader = self._pairs.reader
        read = [reader.decode(reader.encode(caption)) for caption in self._pairs.captions]
        rows = [row for row, caption in enumerate(read) if caption in set(self._asked)][:MOST]
        waves, captions = self._pairs.pairs(rows)
        figures["words_real"] = words_heard(waves / 2**15, captions, rate).mean()
        starts = range(0, len(waves), BATCH)
        decoded = [heard(self._modality, waves[start : start + BATCH]) for start in starts]
        figures["words_codec"] = words_heard(np.concatenate(decoded), captions, rate).mean()
        return {name: float(value) for name, value in figures.items()}


def words_heard(waves: Iterable[np.ndarray], texts: Iterable[str], rate: int) -> np.ndarray:
    """Shares of the words of texts that are heard in waves in [-1, 1], in their order: `[n]`."""
    decoder = open_recogniser()
    pairs = zip(waves, texts, strict=False)
    return np.array([_share(_words(text), _words(hear(decoder, w, rate))) for w, text in pairs])


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def _share(said: list[str], heard: list[str]) -> float:
    blocks = difflib.SequenceMatcher(None, said, heard, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(len(said), 1)
