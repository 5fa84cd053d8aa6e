"""Images as maps of VAE latents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.modalities.patches import PatchedMaps, patchify


@dataclasses.dataclass(frozen=True)
class ImageLatents(PatchedMaps):
    """Float latent maps `[size, size, channels]`; the network sees them times `scale`."""

    scale: float

    example_dtype = np.dtype(np.float32)

    def tokenize(self, examples: jax.Array) -> jax.Array:
        """Latents `[B, H, W, C]` -> scaled tokens."""
        return patchify(examples.astype(jnp.float32) * self.scale, self.patch)

    def export(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """{"latents": float32 `[B, H, W, C]`} in the autoencoder's own scale."""
        return {"latents": self.detokenize(tokens) / self.scale}
