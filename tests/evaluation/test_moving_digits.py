"""The judge of moving digits: real clips, shuffled, frozen and wrong ones are told apart."""

import numpy as np
import pytest

from djepa_jax.core.modalities.video import VideoPixels
from djepa_jax.data.arrays import ArraySource
from djepa_jax.data.moving_mnist import MovingMNIST
from djepa_jax.data.sources import SingleClass
from djepa_jax.evaluation.features import classifier
from djepa_jax.evaluation.metrics import METRICS
from djepa_jax.evaluation.metrics.moving_digits import MovingDigits, read_clips, velocity_error

SOURCE = MovingMNIST("", VideoPixels(8, 16, 1, 4), num_digits=1, digit_size=36, num_clips=900)
TRAINED, COUNT = 150, 100
FIGURES = ("digit_kept", "velocity_error", "frozen", "fd_frames")


def judged(clips, labels) -> dict[str, float]:
    metric, other = (MovingDigits(SOURCE, TRAINED) for _ in range(2))
    metric.update({"clips": clips[:30]}, labels[:30])
    other.update({"clips": clips[30:]}, labels[30:])
    metric.merge(other)
    return metric.result()


def test_controls_are_told_apart_and_samples_are_judged_as_they_are(monkeypatch):
    narrow = classifier.Recipe(widths=(32, 64, 64, 64))  # learns in a third of the time
    monkeypatch.setattr(classifier, "recipe_of", lambda *given: narrow)
    clips, labels = read_clips(SOURCE, 600, COUNT)
    figures = judged(clips, labels)
    suffixes = ("", "_real", "_shuffled", "_frozen")
    assert figures.keys() == {name + suffix for name in FIGURES for suffix in suffixes}
    assert figures["velocity_error_shuffled"] > 2 * figures["velocity_error_real"] > 0
    assert figures["frozen_real"] < 0.05 and figures["frozen_frozen"] == 1
    assert figures["fd_frames_shuffled"] == pytest.approx(figures["fd_frames_real"], rel=1e-3)
    assert figures["digit_kept_frozen"] > figures["digit_kept_real"] > 0.2
    for name in ("velocity_error", "frozen", "digit_kept"):  # these are real, too
        assert abs(figures[name] - figures[f"{name}_real"]) < 0.2, name
    wrong = judged(np.full_like(clips, 90), (labels + 1) % 10)
    assert wrong["digit_kept"] <= 0.2 and wrong["frozen"] == 1
    assert wrong["fd_frames"] > 5 * figures["fd_frames"]
    assert wrong["velocity_error_real"] == figures["velocity_error_real"]


def test_constant_velocity_has_no_error_and_jumps_have_theirs():
    clip = np.zeros((1, 6, 8, 8, 1), np.uint8)
    for frame in range(6):
        clip[0, frame, 1 + frame, 7 - frame] = 255
    hazy = np.where(clip == 0, 100, clip).astype(np.uint8)
    assert velocity_error(clip) == velocity_error(hazy) == 0
    clip[0, ::2] = np.roll(clip[0, ::2], 2, axis=1)  # two rows down in every second frame
    assert velocity_error(clip) == pytest.approx(2.0)  # 4 by rows, 0 by columns
    assert np.isfinite(velocity_error(np.zeros_like(clip)))


def test_what_it_cannot_judge_is_refused():
    two = MovingMNIST("", VideoPixels(8, 16, 1, 4), num_digits=2, num_clips=9)
    pictures = ArraySource(np.zeros((3, 8, 8, 1), np.uint8), np.arange(3))
    for source in (two, SingleClass(SOURCE), pictures):
        with pytest.raises(ValueError, match="evaluation.kind"):
            METRICS["moving_digits"].from_data(source)
    assert isinstance(METRICS["moving_digits"].from_data(SOURCE), MovingDigits)
