"""Feature networks by name, and how each is opened."""

from collections.abc import Callable

from djepa_jax.evaluation.features.base import Features
from djepa_jax.evaluation.features.inception import Inception

FEATURES: dict[str, Callable[..., Features]] = {
    "inception": Inception.from_file,
}

__all__ = ["FEATURES", "Features"]
