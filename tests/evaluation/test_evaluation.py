"""Quality figures against known answers."""

import numpy as np
import pytest

from djepa_jax.data.arrays import load_digits
from djepa_jax.evaluation.metrics.small_images import evaluate_images, frechet_distance


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_frechet_distance_of_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((200_000, 3))
    base = (base - base.mean(0)) @ np.linalg.inv(
        np.linalg.cholesky(np.cov(base.T)).T
    )  # unit covariance exactly
    other = base * np.array([1.0, 2.0, 3.0]) + np.array([3.0, 0.0, 4.0])
    expected = 25 + 0 + 1 + 4  # |mean|^2 + sum (s1 - s2)^2
    assert frechet_distance(base, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(base, base) == pytest.approx(0, abs=1e-9)


def test_yardsticks(digits):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1000, 8, 8, 1)).astype(np.uint8)
    labels = np.arange(1000) % 10
    record = evaluate_images(noise, labels, digits.images, digits.labels)
    assert record["frechet_distance"] == pytest.approx(10.0, abs=0.6) and record["accuracy"] < 0.2
    chosen = rng.permutation(len(digits))[:500]
    record = evaluate_images(
        digits.images[chosen], digits.labels[chosen], digits.images, digits.labels
    )
    assert record["frechet_distance"] < 0.1 and record["accuracy"] > 0.99


def test_wrong_labels_are_seen(digits):
    record = evaluate_images(digits.images, (digits.labels + 1) % 10, digits.images, digits.labels)
    # Pixels that are always empty leave eigenvalues of 1e-17 instead of 0, whose roots are 3e-9
    # each.
    assert record["accuracy"] < 0.01 and record["frechet_distance"] == pytest.approx(0, abs=1e-6)
