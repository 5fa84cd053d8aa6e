"""Images as tokens of raw pixels in [-1, 1]."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.modalities.patches import check_example, check_patches, patchify, unpatchify


@dataclasses.dataclass(frozen=True)
class ImagePixels:
    """Square uint8 images `[size, size, channels]`, cut into windows of `patch` x `patch` pixels."""

    size: int
    channels: int
    patch: int

    def __post_init__(self):
        check_patches(self.size, self.patch)

    @property
    def num_tokens(self) -> int:
        """Windows per image."""
        return (self.size // self.patch) ** 2

    @property
    def token_dim(self) -> int:
        """Values per window."""
        return self.channels * self.patch**2

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Height, width, channels."""
        return (self.size, self.size, self.channels)

    @property
    def example_dtype(self) -> np.dtype:
        """uint8."""
        return np.dtype(np.uint8)

    def check_example(self, example: np.ndarray) -> None:
        """Raise ValueError unless the example is a uint8 image of this shape."""
        check_example(example, self.example_shape, self.example_dtype)

    def tokenize(self, examples: jax.Array) -> jax.Array:
        """uint8 images `[B, H, W, C]` -> tokens in [-1, 1]."""
        return patchify(examples.astype(jnp.float32) / 127.5 - 1, self.patch)

    def detokenize(self, tokens: jax.Array) -> jax.Array:
        """Tokens -> float images in the same range, `[B, H, W, C]`."""
        return unpatchify(tokens, self.patch, self.size, self.size)

    def export(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Clip, round to the nearest of 256 levels: {"images": uint8 `[B, H, W, C]`}."""
        images = np.asarray(self.detokenize(tokens), np.float32)
        return {"images": np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)}
