"""Modalities by name."""

from djepa_jax.core.modalities.base import Modality
from djepa_jax.core.modalities.image import ImageLatents, ImagePixels
from djepa_jax.core.modalities.lapped import ImageLapped

MODALITIES: dict[str, type[Modality]] = {
    "image_pixels": ImagePixels,
    "image_lapped": ImageLapped,
    "image_latents": ImageLatents,
}

__all__ = ["MODALITIES", "Modality"]
