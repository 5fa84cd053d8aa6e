"""Feature networks by name, and how each is opened."""

from collections.abc import Callable

from djepa_jax.evaluation.features.base import Features
from djepa_jax.evaluation.features.dinov2 import DINOv2
from djepa_jax.evaluation.features.efficientnet import EfficientNetLite0
from djepa_jax.evaluation.features.inception import Inception

FEATURES: dict[str, Callable[..., Features]] = {
    "inception": Inception.from_file,
    "efficientnet_lite0": EfficientNetLite0.open,
    "dinov2": DINOv2.from_file,
}

__all__ = ["FEATURES", "Features"]
