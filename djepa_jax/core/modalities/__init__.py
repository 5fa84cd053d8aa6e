"""Modalities by name."""

from djepa_jax.core.modalities.audio import AudioMel
from djepa_jax.core.modalities.base import MADE, Modality
from djepa_jax.core.modalities.image import ImageLatents, ImagePixels
from djepa_jax.core.modalities.joint import Joint
from djepa_jax.core.modalities.lapped import ImageLapped
from djepa_jax.core.modalities.video import VideoLapped, VideoLatents, VideoPixels

MODALITIES: dict[str, type[Modality]] = {
    "image_pixels": ImagePixels,
    "image_lapped": ImageLapped,
    "image_latents": ImageLatents,
    "video_pixels": VideoPixels,
    "video_lapped": VideoLapped,
    "video_latents": VideoLatents,
    "audio_mel": AudioMel,
    "joint": Joint,
}


def made_by(modality: Modality) -> str:
    """What people call examples of a modality."""
    if hasattr(modality, "parts"):
        return "pairs"
    return MADE.get(len(modality.example_shape), "images")


__all__ = ["MODALITIES", "Modality", "made_by"]
