"""Maps as tokens: non-overlapping windows, row by row."""

import jax
import numpy as np
from einops import rearrange


def patchify(maps: jax.Array, patch: int) -> jax.Array:
    """Cut maps `[B, H, W, C]` into tokens `[B, H/p W/p, C p p]`, inside a token (channel, row, column)."""
    return rearrange(maps, "b (h p) (w q) c -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """Inverse of `patchify`: `[B, N, C p p]` -> `[B, height, width, C]`."""
    return rearrange(tokens, "b (h w) (c p q) -> b (h p) (w q) c", h=height // patch, w=width // patch, p=patch, q=patch)


def check_patches(size: int, patch: int) -> None:
    """Raise ValueError unless windows of `patch` tile a square of `size`."""
    if patch < 1 or size % patch:
        raise ValueError(
            f"data.image_size {size} is not divisible by data.patch_size {patch}; choose a patch size that divides it."
        )


def check_example(example, shape: tuple[int, ...], dtype) -> None:
    """Raise ValueError unless an example has exactly this shape and type."""
    if tuple(example.shape) != shape or example.dtype != dtype:
        raise ValueError(
            f"the data holds {example.dtype} examples of shape {tuple(example.shape)}, the config expects {np.dtype(dtype)} "
            f"of shape {shape}; convert the data, or set data.image_size and data.channels to match."
        )
