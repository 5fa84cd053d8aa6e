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


def check_judgeable(source) -> None:
    """Raise ValueError unless a source can train the classifier: small pictures in memory, of at
    least two classes.
    """
    if not hasattr(source, "images"):
        raise ValueError(
            'evaluation.kind "small_images" needs data.source "digits" or "npz"; set '
            'evaluation.kind to "none".'
        )
    if source.images[0].size > MAX_PIXELS:
        raise ValueError(
            f'evaluation.kind "small_images" judges pictures of at most {MAX_PIXELS} values, '
            "these have "
            f'{source.images[0].size}; set evaluation.kind to "none".'
        )
    if len(np.unique(source.labels)) < 2:
        raise ValueError(
            'evaluation.kind "small_images" needs data of at least two classes; set '
            'evaluation.kind to "none".'
        )


def evaluate_images(images, labels, real_images, real_labels) -> dict[str, float]:
    """Both figures for uint8 samples against all real images: `accuracy` and `frechet_distance`
    (values 0..1).
    """
    return {
        "accuracy": accuracy(images, labels, real_images, real_labels),
        "frechet_distance": frechet_distance(_flat(images), _flat(real_images)),
    }


def _flat(images: np.ndarray) -> np.ndarray:
    return np.asarray(images, np.float64).reshape(len(images), -1) / 255
