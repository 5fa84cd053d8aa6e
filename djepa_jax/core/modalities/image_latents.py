"""Images as maps of VAE latents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.core.modalities.patches import PatchedMaps, patchify
from djepa_jax.core.models.autoencoder_kl import sample_posterior


@dataclasses.dataclass(frozen=True)
class ImageLatents(PatchedMaps):
    """Float latent maps `[size, size, channels]`, or the moments of their posterior, `[size, size,
    2 channels]`.

    The network sees (latents - shift) * scale.
    """

    scale: float
    shift: float = 0.0

    example_dtype = np.dtype(np.float32)

    def check_example(self, example: np.ndarray) -> None:
        """Raise ValueError unless an example is a map of float32 latents, or of float32 or bfloat16
        moments.
        """
        moments = tuple(example.shape) == (self.size, self.size, 2 * self.channels)
        if not (moments and example.dtype in (np.float32, jnp.bfloat16)):
            super().check_example(example)

    def tokenize(self, examples: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Latents `[B, H, W, C]`, or moments `[B, H, W, 2C]` of which `key` draws a sample ->
        scaled tokens.
        """
        latents = examples.astype(jnp.float32)
        if examples.shape[-1] == 2 * self.channels:
            shape = (*examples.shape[:-1], self.channels)
            noise = jnp.zeros(shape) if key is None else jax.random.normal(key, shape)
            latents = sample_posterior(latents, noise)
        return patchify((latents - self.shift) * self.scale, self.patch)

    def export(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """{"latents": float32 `[B, H, W, C]`} in the autoencoder's own scale."""
        return {"latents": self.detokenize(tokens) / self.scale + self.shift}
