"""Feature networks by name, and how each is opened."""

from collections.abc import Callable

from djepa_jax.evaluation.features.base import Features
from djepa_jax.evaluation.features.classifier import Classifier
from djepa_jax.evaluation.features.dinov2 import DINOv2
from djepa_jax.evaluation.features.efficientnet import EfficientNetLite0
from djepa_jax.evaluation.features.inception import Inception

# By the path of their weights
FROM_FILE: dict[str, Callable[[str], Features]] = {
    "inception": Inception.from_file,
    "dinov2": DINOv2.from_file,
}
INSTALLED: dict[str, Callable[[], Features]] = {"efficientnet_lite0": EfficientNetLite0.open}
# From pictures, their labels and a folder to keep what was learnt
TRAINED: dict[str, Callable[..., Features]] = {"classifier": Classifier.for_data}
FEATURES = (*TRAINED, *INSTALLED, *FROM_FILE)  # their names

__all__ = ["FEATURES", "FROM_FILE", "INSTALLED", "TRAINED", "Features"]
