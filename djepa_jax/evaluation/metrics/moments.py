"""Mean and covariance of features, files of them, and the Frechet distance of two Gaussians."""

import dataclasses
import json

import numpy as np

from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.runtime.storage import as_path, write_npz

# Names of mean and covariance in files, as ADM's have them; others write "ref_" before them.
KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
BLOCK = 8192  # rows that are in float64 at a time


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A mean `[D]` and a covariance `[D, D]`, and of how many rows they are, if a file tells."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None


class Moments:
    """Count, mean and scatter (sum of outer products around the mean) of rows, in float64.

    Parts are joined by the formula of Chan, Golub and LeVeque (1979), which subtracts no large
    sums, so that any split into parts gives the same to rounding.
    """

    def __init__(self, rows: np.ndarray | None = None):
        self.count, self.mean, self.scatter = 0, np.zeros(0), np.zeros((0, 0))
        if rows is not None:
            self.update(rows)

    def update(self, rows: np.ndarray) -> None:
        """Take in rows `[n, D]`."""
        for start in range(0, len(rows), BLOCK):
            block = np.asarray(rows[start : start + BLOCK], np.float64)
            mean = block.mean(0)  # [D]
            block = block - mean
            self._add(len(block), mean, block.T @ block)

    def merge(self, other: "Moments") -> None:
        """Take in what another one has."""
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def state(self) -> dict[str, np.ndarray]:
        """What it holds, as arrays by name."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Hold what `state` gave."""
        self.count, self.mean, self.scatter = int(state["count"]), state["mean"], state["scatter"]

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not self.count:
            self.count, self.mean, self.scatter = count, mean.copy(), scatter.copy()
            return
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(shift * (self.count * count / total), shift)
        self.mean += shift * (count / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance `[D, D]`, as `numpy.cov` gives it; it needs two rows."""
        if self.count < 2:
            raise MetricError(f"a covariance needs at least 2 samples, there are {self.count}.")
        return self.scatter / (self.count - 1)


def write_statistics(
    path, statistics: dict[str, Moments | Statistics], about: dict | None = None
) -> None:
    """Write statistics of "pool" (and "spatial") under the names that ADM's evaluator reads.

    `about` says what they are of; it lies beside them as JSON.
    """
    count = statistics["pool"].count
    arrays = {} if count is None else {"count": np.asarray(count)}
    arrays |= {"about": np.asarray(json.dumps(about))} if about else {}
    for tap, each in statistics.items():
        arrays |= dict(zip(KEYS[tap], (each.mean, each.covariance), strict=True))
    write_npz(as_path(path), arrays)


def read_statistics(path) -> dict[str, Statistics]:
    """Statistics of "pool", and of "spatial" where a file has them.

    Raises:
        MetricError: the file cannot be read, lacks statistics, or they are damaged.
    """
    found = {}
    try:
        with as_path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = {name.removeprefix("ref_"): name for name in arrays}
            count = int(arrays["count"]) if "count" in arrays else None
            for tap, keys in KEYS.items():
                if names.keys() >= set(keys):
                    values = (arrays[names[key]].astype(np.float64) for key in keys)
                    found[tap] = Statistics(*values, count)
    except Exception as error:  # damaged files make numpy fail in ways that nobody has listed
        raise MetricError(
            f"{path} is no npz file of statistics ({error}); name one that --mode=reference made."
        ) from error
    if "pool" not in found:
        raise MetricError(f'{path} has no "mu" and "sigma"; name a file of statistics.')
    for tap, each in found.items():
        fitting = each.mean.ndim == 1 and each.covariance.shape == 2 * each.mean.shape
        fitting = fitting and each.mean.size and (each.count is None or each.count > 1)
        if not fitting or not np.isfinite(each.mean.sum() + each.covariance.sum()):
            raise MetricError(
                f"{path}: statistics of {tap} are a mean {each.mean.shape} and a covariance "
                f"{each.covariance.shape} of {each.count or 'some'} rows; it needs [D], [D, D], "
                "all finite, of 2 rows or more: make the file again."
            )
    return found


def read_about(path) -> dict:
    """What `write_statistics` was told of a file; empty for those of others."""
    with as_path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        text = str(arrays["about"]) if "about" in arrays else "{}"
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise MetricError(f'{path}: "about" is damaged ({error}); make the file again.') from error


def frechet_distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """Frechet distance of two Gaussians, squared (Dowson and Landau, 1982), as FID takes it.

    |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), in float64.
    """
    return frechet_distance_and_map(mean_a, cov_a, mean_b, cov_b)[0]


def frechet_distance_and_map(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> tuple[float, np.ndarray]:
    """The distance, and M `[D, R]` of the optimal map M M^T from b's Gaussian to a's.

    With A = F F^T, the symmetric F^T B F has the eigenvalues of A B, and the map is
    F (F^T B F)^(-1/2) F^T.
    """
    values, vectors = np.linalg.eigh(cov_a)
    factor = vectors * np.sqrt(np.maximum(values, 0))  # values below 0 are rounding
    values, vectors = np.linalg.eigh(factor.T @ cov_b @ factor)
    roots = np.sqrt(np.maximum(values, 0))
    mean = np.square(mean_a - mean_b).sum()
    distance = mean + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum()
    kept = roots > roots[-1] * 1e-6  # with fewer rows than dimensions, the others are rounding
    return float(distance), factor @ (vectors[:, kept] / np.sqrt(roots[kept]))
