"""95 % intervals of figures, from the samples that they were taken of."""

import numpy as np

from djepa_jax.evaluation.metrics.moments import Moments, Statistics, frechet_distance_and_map

RESAMPLES = 1_000
NORMAL_QUANTILE = 1.96


def bootstrap(rows: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap (Efron, 1979) of the mean of `rows`, one value per row.

    Of precision and its like, the neighbourhoods are held as they are.
    """
    rng = np.random.default_rng(seed)
    means = [rng.choice(rows, len(rows)).mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def subsampling(values: np.ndarray, size: int, count: int) -> tuple[float, float]:
    """Interval of the mean of a figure's `values` on subsets of `size` of `count` rows.

    The spread of subsets tells that of the whole (Politis and Romano, 1994): a subset without
    replacement varies by (1 - size / count) / size where all rows vary by 1 / count.
    """
    variance = values.var(ddof=1) * (size / (count - size) + 1 / len(values))
    return _normal(float(values.mean()), variance)


def frechet(rows: np.ndarray, samples: Moments, real: Statistics) -> tuple[float, np.ndarray]:
    """A Frechet distance, and how far each of `rows`, any choice of the samples, moves it `[n]`.

    The spread of that gives an interval, without the bias that all estimates have, which resampling
    would add once more. The distance is smooth in mean and covariance, so to first order (Rippl,
    Munk and Sturm, 2016) a row x moves it by 2 (m - m_real) (x - m) + (x - m)^T (1 - T) (x - m),
    with the optimal map T of the samples' Gaussian to the real one's.
    """
    distance, half = frechet_distance_and_map(
        real.mean, real.covariance, samples.mean, samples.covariance
    )
    rows = rows - samples.mean  # [n, D]
    moved = np.square(rows).sum(axis=1) - np.square(rows @ half).sum(axis=1)
    return distance, moved + 2 * rows @ (samples.mean - real.mean)


def first_order(centre: float, moved: np.ndarray, count: int) -> tuple[float, float]:
    """Interval of a figure of `count` samples, of which each moves it so far: `[n]` of some.

    Of the difference of two figures of paired samples, `moved` is the difference of the two.
    """
    return _normal(centre, moved.var() / count)


def _normal(centre: float, variance: float) -> tuple[float, float]:
    width = NORMAL_QUANTILE * float(np.sqrt(variance))
    return centre - width, centre + width
