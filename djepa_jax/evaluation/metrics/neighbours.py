"""Figures from distances between samples and real examples: are samples plausible (precision,
density), is all of the data covered (recall, coverage), and are examples repeated (memorising)?

Distances are Euclidean, from products in float64; blocks of them keep the memory bounded.
"""

import numpy as np

PRECISION_K, DENSITY_K = 3, 5  # neighbours, as the papers take them
BLOCK_MIB = 128  # of distances; a few arrays of that size are alive at once


def nearest(queries: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """Distances `[n, k + 1]` of queries to the nearest rows, ascending.

    Of queries that are among the rows, column 0 is the query itself and column k its neighbour k.
    """
    from sklearn.neighbors import NearestNeighbors  # a second of import that only this needs

    return NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(rows).kneighbors(queries)[0]


def manifold_rows(samples: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    """What precision, recall (Kynkaanniemi et al., 2019; k = 3), density and coverage (Naeem et
    al., 2020; k = 5) are the mean of: one value per sample, or per real example.

    ADM's evaluator and torch-fidelity 0.4 take the same; ADM in half precision, and all samples
    against 10,000 real examples.
    """
    from sklearn.metrics import pairwise_distances_chunked

    radii = nearest(real, real, DENSITY_K)  # [m, k + 1]
    sample_radius = nearest(samples, samples, PRECISION_K)[:, PRECISION_K]  # [n]
    inside, density = [], []
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    start = 0
    for block in pairwise_distances_chunked(samples, real, working_memory=BLOCK_MIB):  # [b, m]
        inside.append((block <= radii[:, PRECISION_K]).any(axis=1))
        recalled |= (block <= sample_radius[start : start + len(block), None]).any(axis=0)
        within = block < radii[:, DENSITY_K]  # the authors' balls are open
        density.append(within.sum(axis=1) / DENSITY_K)
        covered |= within.any(axis=0)
        start += len(block)
    return {
        "precision": np.concatenate(inside),
        "recall": recalled,
        "density": np.concatenate(density),
        "coverage": covered,
    }


def memorising(samples: np.ndarray, real: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """How near samples are to the real examples, by the yardstick of `held_out` ones from among
    them, each of which is measured against all the others.

    `nearest_real_ratio` is the ratio of the median distances: 1 for new examples of the same
    distribution, 0 for copies. `nearest_real_copies` is the share of samples nearer to a real
    example than 99 % of the held-out ones are: 0.01 for new examples, 1 for copies. Data of which
    most are there twice have no ratio.
    """
    distance = nearest(samples, real, 0)[:, 0]
    yardstick = nearest(held_out, real, 1)[:, 1]
    figures = {"nearest_real_copies": float((distance <= np.quantile(yardstick, 0.01)).mean())}
    if usual := float(np.median(yardstick)):
        figures["nearest_real_ratio"] = float(np.median(distance)) / usual
    return figures
