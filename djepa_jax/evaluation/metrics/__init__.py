"""Metrics by name, as `config.evaluation.kind` gives it."""

from djepa_jax.evaluation.metrics.base import Metric
from djepa_jax.evaluation.metrics.moving_digits import MovingDigits
from djepa_jax.evaluation.metrics.small_images import SmallImages

METRICS: dict[str, type[Metric]] = {
    "small_images": SmallImages,
    "moving_digits": MovingDigits,
}

__all__ = ["METRICS", "Metric"]
