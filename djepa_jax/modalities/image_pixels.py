"""Images as tokens of raw pixels in [-1, 1]."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.modalities.patches import PatchedMaps, patchify


@dataclasses.dataclass(frozen=True)
class ImagePixels(PatchedMaps):
    """Square uint8 images `[size, size, channels]`, seen by the network in [-1, 1]."""

    example_dtype = np.dtype(np.uint8)

    def tokenize(self, examples: jax.Array) -> jax.Array:
        """uint8 images `[B, H, W, C]` -> tokens in [-1, 1]."""
        return patchify(examples.astype(jnp.float32) / 127.5 - 1, self.patch)

    def export(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """Clip, round to the nearest of 256 levels: {"images": uint8 `[B, H, W, C]`}."""
        return {"images": jnp.clip(jnp.round((self.detokenize(tokens) + 1) * 127.5), 0, 255).astype(jnp.uint8)}
