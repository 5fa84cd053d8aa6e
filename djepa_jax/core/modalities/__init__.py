"""Modalities by name."""

from djepa_jax.core.modalities.image_latents import ImageLatents
from djepa_jax.core.modalities.image_pixels import ImagePixels

MODALITIES = {"image_pixels": ImagePixels, "image_latents": ImageLatents}

__all__ = ["MODALITIES"]
