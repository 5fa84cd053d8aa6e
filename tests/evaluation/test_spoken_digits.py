"""Spoken digits judged by ear, and spectrograms judged as pictures."""

import sys
import types

import numpy as np
import pytest
from tiny import load_config

from djepa_jax.core.modalities.audio import AudioMel
from djepa_jax.data.arrays import load_digits
from djepa_jax.data.sounds import Sounds
from djepa_jax.evaluation.judges import open_metric
from djepa_jax.evaluation.metrics import METRICS, spoken_digits
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.metrics.pictures import Pictures, is_picture, read_pictures
from djepa_jax.evaluation.metrics.spoken_digits import WORDS, understood
from djepa_jax.evaluation.previews import Previews

SMALL = AudioMel(frames=32, patch_frames=8)
PITCH = 350  # Hz from one digit to the next


def tones(digits) -> np.ndarray:
    """A tone for each digit, in [-1, 1]."""
    time = np.arange(*SMALL.example_shape) / SMALL.rate
    return 0.5 * np.sin(2 * np.pi * PITCH * (np.asarray(digits)[:, None] + 1) * time)


class Ear:
    """In place of the recogniser: it knows a digit by its pitch, and hears nothing in silence."""

    def start_utt(self):
        self._heard = None

    def process_raw(self, samples, full_utt):
        values = np.frombuffer(samples, "<i2").astype(float)
        spectrum = np.abs(np.fft.rfft(values))
        frequency = spectrum.argmax() * 16_000 / len(values)
        digit = round(frequency / PITCH) - 1
        if full_utt and np.abs(values).max() > 8000:
            self._heard = types.SimpleNamespace(hypstr=WORDS[digit])

    def end_utt(self):
        pass

    def hyp(self):
        return self._heard


class Judge:
    """In place of a trained classifier: it says that all are of class 1."""

    held_out_accuracy = 0.75

    def __call__(self, pictures):
        assert is_picture(pictures[0])
        return {"logits": np.tile([0.0, 1.0], (len(pictures), 1))}


@pytest.fixture
def source(monkeypatch):
    monkeypatch.setattr(spoken_digits, "open_recogniser", lambda grammar: Ear())
    monkeypatch.setattr(spoken_digits.Classifier, "train", lambda images, labels: Judge())
    digits = np.arange(20) % 10
    waves = np.round(tones(digits) * 32767).astype(np.int16)
    return Sounds(waves, [digits, np.arange(20) % 2], SMALL, [])


def test_what_is_understood_is_counted(source):
    digits = np.array([3, 7, 0, 9])
    waves = tones(digits)
    waves[3] = 0
    assert understood(waves, digits, SMALL.rate).tolist() == [True, True, True, False]
    assert understood(waves[:1], [4], SMALL.rate).tolist() == [False]


def test_samples_are_judged_beside_real_recordings_and_those_made_of_tokens(source):
    metric, other = (METRICS["spoken_digits"].from_data(source) for _ in range(2))
    for each, said, asked in ((metric, [1, 2], [1, 2]), (other, [3, 4, 5], [3, 4, 6])):
        pictures = np.zeros((len(said), *SMALL.picture_shape), np.uint8)
        arrays = {"sound": tones(said), "images": pictures}
        each.update(arrays, (np.array(asked), np.arange(len(said)) % 2))
    metric.merge(other)
    figures = metric.result()
    assert figures["recognised"] == pytest.approx(4 / 5)
    assert figures["recognised_low"] <= 0.8 <= figures["recognised_high"]
    assert figures["recognised_real"] == figures["recognised_codec"] == 1
    assert figures["second_accuracy"] == pytest.approx(2 / 5)
    assert figures["second_accuracy_held_out"] == 0.75


def test_other_data_are_refused(source):
    with pytest.raises(ValueError, match="judges recordings of the digits"):
        METRICS["spoken_digits"].from_data(load_digits())


def test_an_absent_recogniser_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    spoken_digits.open_recogniser.cache_clear()
    with pytest.raises(MetricError, match="pip install"):
        spoken_digits.open_recogniser()


def test_the_recogniser_knows_ten_words_and_hears_none_in_silence():
    pytest.importorskip("pocketsphinx")
    spoken_digits.open_recogniser.cache_clear()
    assert not understood(np.zeros((1, 8192)), [0], 8000).any()


def test_spectrograms_are_pictures_for_judges_of_pictures(source):
    previews = Previews(source, SMALL)
    images, labels = read_pictures(previews)
    assert images.shape == (20, *SMALL.picture_shape) and is_picture(images[0])
    assert sorted(labels.tolist()) == sorted(source.labels.tolist())
    experiment = load_config("spoken_digits", "--config.evaluation.kind=classifier")
    assert experiment.picture_shape == (40, 128, 1)
    assert isinstance(open_metric(experiment, source), Pictures)
