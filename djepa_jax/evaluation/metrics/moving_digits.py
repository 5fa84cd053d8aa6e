"""Clips of one moving digit: is it the digit that was asked for, and does it move as real ones do?

Each figure stands beside the same one of other real clips (`_real`), of these with their frames in
a random order (`_shuffled`), and with their first frame in place of all (`_frozen`).
"""

import functools

import numpy as np

from djepa_jax.data.records import unwrapped
from djepa_jax.evaluation.features.classifier import Classifier
from djepa_jax.evaluation.metrics.moments import Moments, frechet_distance

TRAINING_CLIPS = 10_000  # of which the classifier sees one frame each
INK = 128  # darker pixels are background
FROZEN_BELOW = 0.2  # of the median motion of real clips


def velocity_error(clips: np.ndarray) -> float:
    """How far the centre of the ink is from constant velocity, in pixels, of `[n, T, H, W, C]`.

    Its second difference from frame to frame, by axis: the median over a clip, which leaves out the
    few frames at the walls, averaged over clips.
    """
    ink = np.where(clips < INK, 0, clips).sum(-1, dtype=np.float32)  # [n, T, H, W]
    mass = np.maximum(ink.sum((2, 3)), 1)  # [n, T]
    rows = ink.sum(3) @ np.arange(ink.shape[2]) / mass
    columns = ink.sum(2) @ np.arange(ink.shape[3]) / mass
    centres = np.stack([rows, columns], -1)  # [n, T, 2]
    return float(np.median(np.abs(np.diff(centres, 2, axis=1)), axis=1).mean())


def motion(clips: np.ndarray) -> np.ndarray:
    """The mean difference of pixels from frame to frame, of each clip: `[n]`."""
    return np.abs(np.diff(clips.astype(np.int16), axis=1)).mean((1, 2, 3, 4))


class MovingDigits:
    """Figures of clips of one digit.

    `digit_kept`: share of clips of which the classifier gives every frame the label asked for.
    `velocity_error`: see there. `frozen`: share of clips with less than a fifth of the median
    motion of real ones. `fd_frames`: Frechet distance of the classifier's features of single
    frames, which is blind to motion.
    """

    def __init__(self, source, training_clips: int = TRAINING_CLIPS):
        self._source, self._training_clips = source, min(training_clips, len(source) // 2)
        self._clips: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    @classmethod
    def from_data(cls, source) -> "MovingDigits":
        """Against clips of one digit, of which one is read now; ValueError for other examples."""
        example, labels = source[0]["example"], source.labels
        if example.dtype != np.uint8 or example.ndim != 4 or len(example) < 3:
            raise ValueError(
                'evaluation.kind "moving_digits" judges uint8 clips [T, H, W, C] of 3 frames or '
                f"more, these are {example.dtype} {list(example.shape)}; use "
                "--config.evaluation.kind=none, and look at samples (--mode=sample)."
            )
        if getattr(unwrapped(source), "num_digits", 1) != 1 or len(np.unique(labels)) < 2:
            raise ValueError(
                'evaluation.kind "moving_digits" judges clips of one digit whose label is told; '
                "use --config.evaluation.kind=none, and look at samples (--mode=sample)."
            )
        return cls(source)

    def update(self, arrays: dict[str, np.ndarray], conditions: np.ndarray) -> None:
        """Keep samples `clips` `[n, T, H, W, C]` and the labels `[n]` asked for."""
        self._clips.append(np.asarray(arrays["clips"]))
        self._labels.append(np.asarray(conditions))

    def merge(self, other: "MovingDigits") -> None:
        """Take in the samples of another one."""
        self._clips += other._clips
        self._labels += other._labels

    def result(self) -> dict[str, float]:
        """The figures."""
        clips, labels = np.concatenate(self._clips), np.concatenate(self._labels)
        real, real_labels = read_clips(self._source, self._training_clips, len(clips))
        order = np.random.default_rng(0).random(real.shape[:2]).argsort(axis=1)  # [n, T]
        shuffled = np.take_along_axis(real, order[..., None, None, None], axis=1)
        frozen = np.repeat(real[:, :1], real.shape[1], axis=1)
        slowest = FROZEN_BELOW * np.median(motion(real))
        groups = {"": (clips, labels)}
        for name, others in {"real": real, "shuffled": shuffled, "frozen": frozen}.items():
            groups[f"_{name}"] = others, real_labels
        figures = {suffix: self._judge(*each, slowest) for suffix, each in groups.items()}
        return {f"{name}{end}": figures[end][name] for name in figures[""] for end in groups}

    def _judge(self, clips: np.ndarray, labels: np.ndarray, slowest: float) -> dict[str, float]:
        classifier, reference = train_judge(self._source, self._training_clips)
        features = classifier(clips.reshape(-1, *clips.shape[2:]))
        found = features["logits"].argmax(-1).reshape(clips.shape[:2])  # [n, T]
        seen = Moments(features["pool"])
        distance = (seen.mean, seen.covariance, reference.mean, reference.covariance)
        return {
            "digit_kept": float((found == labels[:, None]).all(1).mean()),
            "velocity_error": velocity_error(clips),
            "frozen": float((motion(clips) < slowest).mean()),
            "fd_frames": frechet_distance(*distance),
        }


def read_clips(source, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips `[n, T, H, W, C]` and their labels, from a place in a seeded order of the source on."""
    numbers = np.random.default_rng(0).permutation(len(source))[start : start + count]
    examples = [source[number] for number in numbers.tolist()]
    return tuple(np.stack([each[key] for each in examples]) for key in ("example", "condition"))


@functools.lru_cache(maxsize=1)  # for several evaluations while training
def train_judge(source, count: int) -> tuple[Classifier, Moments]:
    """A classifier of one frame of each of the first clips, and the moments of their features."""
    clips, labels = read_clips(source, 0, count)
    frame = np.random.default_rng(1).integers(clips.shape[1], size=len(clips))
    frames = clips[np.arange(len(clips)), frame]  # [n, H, W, C]
    classifier = Classifier.train(frames, labels)
    return classifier, Moments(classifier(frames)["pool"])
