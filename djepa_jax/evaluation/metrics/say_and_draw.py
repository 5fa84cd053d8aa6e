"""Pictures and sounds of digits in pairs: is what is drawn what was heard, and said what was seen?

What is given are pairs of the source that are held out; of these are the same figures, `_real`.
Classifiers, one of pictures and one of spectrograms, learn from the others.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from djepa_jax.core.modalities.programs import tokenized
from djepa_jax.core.sampler import Known
from djepa_jax.data.paired import rows_of
from djepa_jax.data.records import unwrapped
from djepa_jax.evaluation.features.classifier import Classifier
from djepa_jax.evaluation.metrics import intervals
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.metrics.spoken_digits import (
    DIGITS,
    MOST,
    WORDS,
    open_recogniser,
    understood,
)
from djepa_jax.evaluation.previews import preview

TRAINING_PICTURES, BATCH = 10_000, 50


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Samples that were drawn beside the same kind of given tokens."""

    taken: list[dict[str, np.ndarray]]

    def update(self, arrays: dict[str, np.ndarray], conditions: Any) -> None:
        """Take in samples."""
        self.taken.append({name: arrays[name] for name in ("images", "log_mel", "sound")})


class SayAndDraw:
    """Shares of pairs.

    `drawn`: the picture shows the digit of the sound that was given; `said`: the sound is of the
    digit of the picture that was given; `heard`: a speech recogniser, if it is installed, finds so,
    too; `agree`: both are of the same digit where nothing was given.
    """

    def __init__(self, source):
        self._source = source
        self._pairs = {name: Pairs([]) for name in ("agree", "drawn", "said")}

    @classmethod
    def from_data(cls, source) -> "SayAndDraw":
        """Against pairs of digits; ValueError for other data."""
        source = unwrapped(source)
        if not hasattr(source, "held_out") or source.sounds.labels.max() >= len(WORDS):
            raise ValueError(
                'evaluation.kind "say_and_draw" judges pairs of drawn and spoken digits (the '
                "source paired), these data are none; use --config.evaluation.kind=none."
            )
        return cls(source)

    def given(self, count: int) -> list[tuple[Pairs, Known]]:
        """As many pairs of which the sound is given, and of which the picture is."""
        examples, modality = self._source.held_out(count)[0], self._source.modality
        starts = range(0, count, BATCH)
        tokens = [tokenized(modality, examples[start : start + BATCH]) for start in starts]
        known = {"drawn": (False, True), "said": (True, False)}  # picture, sound
        masks = {name: modality.tokens_at(np.tile(k, (count, 1))) for name, k in known.items()}
        tokens = np.concatenate(tokens)
        return [(self._pairs[name], Known(tokens, mask)) for name, mask in masks.items()]

    def update(self, arrays: dict[str, np.ndarray], conditions: Any) -> None:
        """Take in samples beside which nothing was given."""
        self._pairs["agree"].update(arrays, conditions)

    def merge(self, other: "SayAndDraw") -> None:
        """Take in the samples of another one."""
        for name, pairs in self._pairs.items():
            pairs.taken.extend(other._pairs[name].taken)

    def result(self) -> dict[str, float]:
        """The figures."""
        figures: dict[str, float] = {}
        for name, pairs in self._pairs.items():
            if not pairs.taken:
                continue
            keys = pairs.taken[0]
            arrays = {key: np.concatenate([each[key] for each in pairs.taken]) for key in keys}
            examples, labels = self._source.held_out(len(arrays["images"]))
            real = self._right(name, self._source.modality.named(examples), labels)
            for figure, right in self._right(name, arrays, labels).items():
                low, high = intervals.bootstrap(right)
                figures |= {figure: right.mean(), f"{figure}_low": low, f"{figure}_high": high}
                figures[f"{figure}_real"] = real[figure].mean()
        return {name: float(value) for name, value in figures.items()}

    def _right(self, name: str, arrays: dict, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Which pairs, of samples or as the source gives them, are right, by figure: bool `[n]`."""
        sounds = self._source.modality.second
        looking, listening = train_judges(self._source)
        seen = looking(arrays["images"])["logits"].argmax(-1)
        told = listening(sounds.preview(arrays))["logits"].argmax(-1)
        if name != "said":
            return {name: seen == (labels if name == "drawn" else told)}
        try:
            open_recogniser(DIGITS)
        except MetricError:  # not installed
            return {name: told == labels}
        waves = arrays["sound"] / (2**15 if arrays["sound"].dtype == np.int16 else 1)
        return {name: told == labels, "heard": understood(waves[:MOST], labels, sounds.rate)}


@functools.lru_cache(maxsize=1)  # for several evaluations while training
def train_judges(source) -> tuple[Classifier, Classifier]:
    """Classifiers of the pictures and of the sounds that are not held out."""
    rows = rows_of(source.pictures, False)[:TRAINING_PICTURES]
    looking = Classifier.train(source.pictures.images[rows], source.pictures.labels[rows])
    rows = rows_of(source.sounds, False)
    spectrograms = preview(source.modality.second, source.sounds.images[rows])
    return looking, Classifier.train(spectrograms, source.sounds.labels[rows])
