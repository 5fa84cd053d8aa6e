"""Images as tokens of raw pixels in [-1, 1]."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.core.modalities.patches import PatchedMaps, patchify


def to_range(pixels: jax.Array) -> jax.Array:
    """uint8 values -> float32 in [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1


def to_pixels(values: jax.Array) -> jax.Array:
    """Values around [-1, 1] -> uint8: clipped, and rounded to the nearest of 256 levels (ties to
    even).
    """
    return jnp.clip(jnp.round((values + 1) * 127.5), 0, 255).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class ImagePixels(PatchedMaps):
    """Square uint8 images `[size, size, channels]`, seen by the network in [-1, 1]."""

    example_dtype = np.dtype(np.uint8)

    def tokenize(self, examples: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """uint8 images `[B, H, W, C]` -> tokens in [-1, 1]."""
        del key  # nothing is drawn
        return patchify(to_range(examples), self.patch)

    def export(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """{"images": uint8 `[B, H, W, C]`}."""
        return {"images": to_pixels(self.detokenize(tokens))}
