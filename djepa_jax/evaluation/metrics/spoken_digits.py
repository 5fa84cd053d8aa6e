"""Spoken digits judged by ear: does a speech recogniser understand the digit, is it the speaker?

Real recordings, and the same after they were made tokens and sound again, show how much it
understands at best. The recogniser is PocketSphinx with its model of American English, and knows
ten words.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from djepa_jax.core.modalities.programs import heard
from djepa_jax.data.records import unwrapped
from djepa_jax.evaluation.features.classifier import Classifier
from djepa_jax.evaluation.metrics import intervals
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.previews import preview

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = f"#JSGF V1.0; grammar digits; public <digit> = {' | '.join(WORDS)};"
RATE, PAUSE = 16_000, 1_600  # what the recogniser hears; samples of silence before and after
MOST, BATCH = 500, 50  # recordings or samples that are listened to; at a time


class SpokenDigits:
    """Shares of samples and of real recordings, at most `MOST`, of which the recogniser hears the
    right digit; and of samples that a classifier of spectrograms gives their second label.
    """

    def __init__(self, source):
        self._source, self._modality = source, source.modality
        self._sounds: list[np.ndarray] = []
        self._pictures: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []  # [n, 1 or 2]

    @classmethod
    def from_data(cls, source) -> "SpokenDigits":
        """Against recordings of digits; ValueError for other examples."""
        source = unwrapped(source)
        labels = getattr(source, "labels", None)
        if not hasattr(source, "modality") or labels is None or labels.max() >= len(WORDS):
            raise ValueError(
                'evaluation.kind "spoken_digits" judges recordings of the digits 0 to 9, these '
                "data are none; use classifier, which learns their classes."
            )
        open_recogniser(DIGITS)  # now, and not after hours of training
        return cls(source)

    def update(self, arrays: dict[str, np.ndarray], conditions: Any) -> None:
        """Keep `sound` `[n, S]`, its spectrograms `images`, and the labels asked for."""
        self._sounds.append(np.asarray(arrays["sound"]))
        self._pictures.append(np.asarray(arrays["images"]))
        self._labels.append(np.stack(jax.tree.leaves(conditions), axis=1))

    def merge(self, other: "SpokenDigits") -> None:
        """Take in the samples of another one."""
        self._sounds += other._sounds
        self._pictures += other._pictures
        self._labels += other._labels

    def result(self) -> dict[str, float]:
        """The figures."""
        labels, rate = np.concatenate(self._labels), self._modality.rate
        correct = understood(np.concatenate(self._sounds)[:MOST], labels[:, 0], rate)
        low, high = intervals.bootstrap(correct)
        figures = {"recognised": correct.mean(), "recognised_low": low, "recognised_high": high}
        waves, digits = self._source.images, self._source.labels
        chosen = np.random.default_rng(0).permutation(len(waves))[:MOST]
        waves, digits = waves[chosen], digits[chosen]
        figures["recognised_real"] = understood(waves / 2**15, digits, rate).mean()
        starts = range(0, len(waves), BATCH)
        decoded = [heard(self._modality, waves[start : start + BATCH]) for start in starts]
        figures["recognised_codec"] = understood(np.concatenate(decoded), digits, rate).mean()
        if labels.shape[1] > 1:
            figures |= self._second(labels[:, 1])
        return {name: float(value) for name, value in figures.items()}

    def _second(self, labels: np.ndarray) -> dict[str, float]:
        pictures = preview(self._modality, self._source.images)
        classifier = Classifier.train(pictures, self._source.all_labels[1])
        found = classifier(np.concatenate(self._pictures))["logits"].argmax(-1)
        accuracy = {"second_accuracy": (found == labels).mean()}
        return accuracy | {"second_accuracy_held_out": classifier.held_out_accuracy}


@functools.cache
def open_recogniser(grammar: str = ""):
    """The recogniser, for all of English or for a grammar; MetricError if it is not installed."""
    try:
        import pocketsphinx
    except ImportError as error:
        raise MetricError(
            "evaluation.kind listens with PocketSphinx, which is not installed; "
            'pip install "djepa_jax[evaluation]".'
        ) from error
    how = {"lm": None} if grammar else {}
    decoder = pocketsphinx.Decoder(samprate=float(RATE), loglevel="FATAL", **how)
    if grammar:
        decoder.add_jsgf_string("grammar", grammar)
        decoder.activate_search("grammar")
    return decoder


def understood(waves: Iterable[np.ndarray], digits: Iterable[int], rate: int) -> np.ndarray:
    """Of which waves in [-1, 1] the recogniser hears the right digit: bool, for each wave."""
    decoder = open_recogniser(DIGITS)
    heard = [hear(decoder, wave, rate) for wave in waves]
    return np.array([word == WORDS[digit] for word, digit in zip(heard, digits, strict=False)])


def hear(decoder, wave: np.ndarray, rate: int) -> str:
    """Words in a wave in [-1, 1]."""
    from scipy.signal import resample_poly

    values = np.pad(resample_poly(wave.astype(np.float64), RATE, rate), PAUSE)
    decoder.start_utt()
    samples = np.clip(np.round(values * 2**15), -(2**15), 2**15 - 1).astype("<i2")
    decoder.process_raw(samples.tobytes(), full_utt=True)
    decoder.end_utt()
    return decoder.hyp().hypstr if decoder.hyp() else ""
