"""Quality of small pictures without a network: a classifier's verdict and a raw-pixel Frechet
distance.

The classifier is trained on the real images only and never used for tuning: it judges whether a
sample shows the class that it was asked for.
"""

import functools

import jax
import numpy as np

from djepa_jax.evaluation.metrics import intervals
from djepa_jax.evaluation.metrics.moments import Moments
from djepa_jax.evaluation.metrics.pictures import MAX_REAL, read_pictures

GAMMA, C = 0.064, 10  # of the classifier; gamma is for one pixel and is shared out among them
PIXEL_TOP = 16.0  # the classifier sees values from 0 to 16, the range of the digits data set
MAX_PIXELS = 1024  # times channels; a covariance of raw pixels means little beyond


@functools.lru_cache(maxsize=1)  # a search judges the samples of every cell
def judge_of(source, has_classes: bool) -> tuple:
    """Moments of a source's pictures, and a support-vector classifier of them, None where there are
    no classes to tell apart.

    It learns from `MAX_REAL` of them at most, always the same ones.
    """
    images, labels = read_pictures(source)
    moments = Moments(_flat(images))
    if not has_classes or len(np.unique(labels)) == 1:
        return moments, None
    from sklearn.svm import SVC  # a second of import that only this needs

    chosen = np.random.default_rng(0).permutation(len(images))[:MAX_REAL]
    training = _flat(images[chosen]) * PIXEL_TOP
    classifier = SVC(gamma=GAMMA / training.shape[1], C=C).fit(training, labels[chosen])
    return moments, classifier


class SmallImages:
    """Accuracy, where there are classes, and `frechet_distance` (of values 0..1) against the real
    images of a source: all of an array, `MAX_REAL` of files.
    """

    def __init__(self, source):
        self._source = source
        self._samples: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self.moved: dict[str, np.ndarray] = {}

    @classmethod
    def from_data(cls, source) -> "SmallImages":
        """Against any small pictures, of which one is read now; ValueError for other examples."""
        example = source[0]["example"]
        if example.dtype != np.uint8 or example.size > MAX_PIXELS:
            raise ValueError(
                f'evaluation.kind "small_images" judges uint8 pictures of at most {MAX_PIXELS} '
                f"values, these are {example.dtype} with {example.size}; use classifier or "
                "efficientnet_lite0 for larger pictures, for others "
                "--config.evaluation.kind=none, and look at samples (--mode=sample)."
            )
        return cls(source)

    def update(self, arrays: dict[str, np.ndarray], conditions: np.ndarray) -> None:
        """Keep samples `images` `[n, H, W, C]` and the labels `[n]` asked for."""
        self._samples.append(np.asarray(arrays["images"]))
        self._labels.append(np.asarray(jax.tree.leaves(conditions)[0]))

    def merge(self, other: "SmallImages") -> None:
        """Take in the samples of another one."""
        self._samples += other._samples
        self._labels += other._labels

    def state(self) -> dict[str, np.ndarray]:
        """The samples and their labels."""
        samples, labels = np.concatenate(self._samples), np.concatenate(self._labels)
        return {"count": np.asarray(len(samples)), "samples": samples, "labels": labels}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what `state` gave, in process 0; others have none."""
        self._samples = [state["samples"]] if state else []
        self._labels = [state["labels"]] if state else []

    def result(self) -> dict[str, float]:
        """The figures."""
        samples, labels = _flat(np.concatenate(self._samples)), np.concatenate(self._labels)
        real, classifier = judge_of(self._source, has_classes=len(np.unique(labels)) > 1)
        figures, self.moved = {}, {}
        if classifier is not None:
            self.moved["accuracy"] = classifier.predict(samples * PIXEL_TOP) == labels
            figures["accuracy"] = float(self.moved["accuracy"].mean())
        distance, self.moved["frechet_distance"] = intervals.frechet(
            samples, Moments(samples), real
        )
        return figures | {"frechet_distance": distance}


def _flat(images: np.ndarray) -> np.ndarray:
    return np.asarray(images, np.float64).reshape(len(images), -1) / 255
