"""Figures of features and logits that look at no neighbours: Inception Score, KID, MIND."""

import numpy as np

FIDELITY_SEED = 2020  # of torch-fidelity's shuffles and subsets
ADM_CHUNK, FIDELITY_SPLITS = 5_000, 10
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1_000
MIND_DIRECTIONS, MIND_BLOCK = 1_000, 100


def inception_scores_adm(logits: np.ndarray) -> np.ndarray:
    """Inception Scores (Salimans et al., 2016) of chunks of 5,000 samples in their order, as ADM's
    evaluator takes them; the figure is their mean.
    """
    return _inception_scores(np.split(logits, range(ADM_CHUNK, len(logits), ADM_CHUNK)))


def inception_scores_fidelity(logits: np.ndarray) -> np.ndarray:
    """Inception Scores of 10 parts of shuffled samples, as torch-fidelity takes them."""
    count = len(logits)
    logits = logits[np.random.RandomState(FIDELITY_SEED).permutation(count)]
    bounds = [part * count // FIDELITY_SPLITS for part in range(1, FIDELITY_SPLITS)]
    return _inception_scores(np.split(logits, bounds))


def inception_moved(logits: np.ndarray) -> np.ndarray:
    """How far each sample moves the score of `inception_scores_adm`, to first order `[n]`.

    The marginal p(y) has a vanishing derivative: its changes sum to 0.
    """
    chunks = np.split(logits, range(ADM_CHUNK, len(logits), ADM_CHUNK))
    parts = [_divergences(chunk) for chunk in chunks]
    return np.concatenate([np.exp(part.mean()) * (part - part.mean()) for part in parts])


def _inception_scores(parts: list[np.ndarray]) -> np.ndarray:
    """exp(mean KL(p(y|x) || p(y))) of each part of logits `[n, K]`."""
    return np.asarray([np.exp(_divergences(part).mean()) for part in parts])


def _divergences(logits: np.ndarray) -> np.ndarray:
    """KL(p(y|x) || p(y)) of each row of logits `[n, K]`."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))  # [n, K]
    p = np.exp(log_p)
    return (p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1)


def kernel_distances(samples: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Squared maximum mean discrepancies, unbiased, of 100 pairs of subsets of 1,000 rows, drawn as
    torch-fidelity draws them. Their mean is KID (Binkowski et al., 2018).
    """
    rng = np.random.RandomState(FIDELITY_SEED)
    distances = []
    for _ in range(KID_SUBSETS):
        x, y = (
            rows[rng.choice(len(rows), KID_SUBSET_SIZE, replace=False)].astype(np.float64)
            for rows in (samples, real)
        )
        distances.append(_mean_off_diagonal(x) + _mean_off_diagonal(y) - 2 * _kernel(x, y).mean())
    return np.asarray(distances)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The polynomial kernel of degree 3 with gamma 1/D and coef0 1, `[n, m]`."""
    kernel = x @ y.T / x.shape[1] + 1
    return kernel * kernel * kernel  # ten times as fast as a power


def _mean_off_diagonal(x: np.ndarray) -> float:
    kernel = _kernel(x, x)
    return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))


def mind(samples: np.ndarray, real: np.ndarray, seed: int = 0) -> float:
    """MIND (Berthet et al., 2026): 3 D times the squared Wasserstein distance along a direction,
    averaged over 1,000 random ones.

    It compares sets of one size: of the larger one, as many rows are drawn as the smaller one has.
    """
    rng = np.random.default_rng(seed)
    count, size = min(len(samples), len(real)), samples.shape[1]
    x, y = (
        rows if len(rows) == count else rows[rng.permutation(len(rows))[:count]]
        for rows in (samples, real)
    )
    total = 0.0
    for _ in range(MIND_DIRECTIONS // MIND_BLOCK):
        directions = rng.standard_normal((size, MIND_BLOCK))
        directions /= np.linalg.norm(directions, axis=0)
        # In order along each direction, the rows at one place are the pairs of optimal transport.
        total += np.square(np.sort(x @ directions, 0) - np.sort(y @ directions, 0)).mean()
    return float(3 * size * total * MIND_BLOCK / MIND_DIRECTIONS)
