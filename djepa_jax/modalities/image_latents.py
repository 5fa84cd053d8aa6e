"""Images as maps of VAE latents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.modalities.patches import check_example, check_patches, patchify, unpatchify


@dataclasses.dataclass(frozen=True)
class ImageLatents:
    """Float latent maps `[size, size, channels]`; the network sees them times `scale`."""

    size: int
    channels: int
    patch: int
    scale: float

    def __post_init__(self):
        check_patches(self.size, self.patch)

    @property
    def num_tokens(self) -> int:
        """Windows per map."""
        return (self.size // self.patch) ** 2

    @property
    def token_dim(self) -> int:
        """Values per window."""
        return self.channels * self.patch**2

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Height, width, channels of the map."""
        return (self.size, self.size, self.channels)

    @property
    def example_dtype(self) -> np.dtype:
        """float32."""
        return np.dtype(np.float32)

    def check_example(self, example: np.ndarray) -> None:
        """Raise ValueError unless the example is a float map of this shape."""
        check_example(example, self.example_shape, self.example_dtype)

    def tokenize(self, examples: jax.Array) -> jax.Array:
        """Latents `[B, H, W, C]` -> scaled tokens."""
        return patchify(examples.astype(jnp.float32) * self.scale, self.patch)

    def detokenize(self, tokens: jax.Array) -> jax.Array:
        """Scaled tokens -> scaled maps `[B, H, W, C]`."""
        return unpatchify(tokens, self.patch, self.size, self.size)

    def export(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """{"latents": float32 `[B, H, W, C]`} in the autoencoder's own scale."""
        return {"latents": np.asarray(self.detokenize(tokens), np.float32) / self.scale}
