"""Quality of small pictures without a network: a classifier's verdict and a raw-pixel Frechet
distance.

The classifier is trained on the real images only and never used for tuning: it judges whether a
sample shows the class that it was asked for.
"""

import numpy as np

GAMMA, C = 0.064, 10  # of the classifier; gamma is for one pixel and is shared out among them
PIXEL_TOP = 16.0  # the classifier sees values from 0 to 16, the range of the digits data set
MAX_PIXELS = 1024  # times channels; a covariance of raw pixels means little beyond
MAX_TRAINING = 10_000  # real images that the classifier learns from


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of two point clouds `[n, D]`, `[m, D]` taken as Gaussians.

    |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), with the trace of the root from the eigenvalues
    of the symmetric A^(1/2) B A^(1/2), in float64.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root)
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.maximum(cross, 0)).sum())


def accuracy(
    images: np.ndarray, labels: np.ndarray, real_images: np.ndarray, real_labels: np.ndarray
) -> float:
    """Share of uint8 samples `[n, H, W, C]` that a support-vector classifier of the real data gives
    their label.

    It learns from `MAX_TRAINING` of the real images at most, always the same ones.
    """
    from sklearn.svm import SVC  # a second of import that only this needs

    chosen = np.random.default_rng(0).permutation(len(real_images))[:MAX_TRAINING]
    training = _flat(real_images[chosen]) * PIXEL_TOP
    classifier = SVC(gamma=GAMMA / training.shape[1], C=C).fit(training, real_labels[chosen])
    return float((classifier.predict(_flat(images) * PIXEL_TOP) == labels).mean())


class SmallImages:
    """`accuracy` and `frechet_distance` (of values 0..1) against all real images of a source.

    Args:
        images: real ones, uint8 `[n, H, W, C]`.
        labels: their classes `[n]`.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._real = images, labels
        self._samples: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    @classmethod
    def from_data(cls, source) -> "SmallImages":
        """Real images in memory, small ones, of at least two classes; ValueError for others."""
        if not hasattr(source, "images"):
            raise ValueError(
                'evaluation.kind "small_images" needs data.source "digits" or "npz"; set '
                'evaluation.kind to "none".'
            )
        if source.images.dtype != np.uint8 or source.images[0].size > MAX_PIXELS:
            raise ValueError(
                f'evaluation.kind "small_images" judges uint8 pictures of at most {MAX_PIXELS} '
                f"values, these are {source.images.dtype} with {source.images[0].size}; set "
                'evaluation.kind to "none".'
            )
        if len(np.unique(source.labels)) < 2:
            raise ValueError(
                'evaluation.kind "small_images" needs data of at least two classes; set '
                'evaluation.kind to "none".'
            )
        return cls(source.images, source.labels)

    def update(self, arrays: dict[str, np.ndarray], conditions: np.ndarray) -> None:
        """Keep samples `images` `[n, H, W, C]` and the labels `[n]` asked for."""
        self._samples.append(np.asarray(arrays["images"]))
        self._labels.append(np.asarray(conditions))

    def merge(self, other: "SmallImages") -> None:
        """Take in the samples of another one."""
        self._samples += other._samples
        self._labels += other._labels

    def result(self) -> dict[str, float]:
        """Both figures."""
        samples, labels = np.concatenate(self._samples), np.concatenate(self._labels)
        return {
            "accuracy": accuracy(samples, labels, *self._real),
            "frechet_distance": frechet_distance(_flat(samples), _flat(self._real[0])),
        }


def _flat(images: np.ndarray) -> np.ndarray:
    return np.asarray(images, np.float64).reshape(len(images), -1) / 255
