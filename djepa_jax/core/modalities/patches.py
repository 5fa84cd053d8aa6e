"""Maps as tokens: non-overlapping windows, row by row."""

import dataclasses

import jax
import numpy as np
from einops import rearrange


def patchify(maps: jax.Array, patch: int) -> jax.Array:
    """Cut maps `[B, H, W, C]` into tokens `[B, H/p W/p, C p p]`, inside a token (channel, row,
    column).
    """
    return rearrange(maps, "b (h p) (w q) c -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """Inverse of `patchify`: `[B, N, C p p]` -> `[B, height, width, C]`."""
    return rearrange(
        tokens,
        "b (h w) (c p q) -> b (h p) (w q) c",
        h=height // patch,
        w=width // patch,
        p=patch,
        q=patch,
    )


@dataclasses.dataclass(frozen=True)
class PatchedMaps:
    """Square maps `[size, size, channels]`, cut into windows of `patch` x `patch`; what pixels and
    latents share.
    """

    size: int
    channels: int
    patch: int

    def __post_init__(self):
        if self.patch < 1 or self.size % self.patch:
            raise ValueError(
                f"data.image_size {self.size} is not divisible by data.patch_size {self.patch}; "
                "choose a patch size that divides it."
            )

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
        """Height, width, channels."""
        return (self.size, self.size, self.channels)

    def check_example(self, example: np.ndarray) -> None:
        """Raise ValueError unless an example has exactly this shape and the modality's
        `example_dtype`.
        """
        if tuple(example.shape) != self.example_shape or example.dtype != self.example_dtype:
            raise ValueError(
                f"the data holds {example.dtype} examples of shape {tuple(example.shape)}, the "
                f"config expects {self.example_dtype} of shape {self.example_shape}; convert the "
                "data, or set image_size and channels to match."
            )

    def detokenize(self, tokens: jax.Array) -> jax.Array:
        """Tokens `[B, N, C]` -> maps `[B, H, W, C]` in the same value range."""
        return unpatchify(tokens, self.patch, self.size, self.size)
