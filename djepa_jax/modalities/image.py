"""Images and feature maps as tokens: non-overlapping windows, row by row."""

import jax
from einops import rearrange


def patchify(maps: jax.Array, patch: int) -> jax.Array:
    """Cut maps `[B, H, W, C]` into tokens `[B, H/p W/p, C p p]`, inside a token (channel, row, column)."""
    return rearrange(maps, "b (h p) (w q) c -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """Inverse of `patchify`: `[B, N, C p p]` -> `[B, height, width, C]`."""
    return rearrange(
        tokens, "b (h w) (c p q) -> b (h p) (w q) c", h=height // patch, w=width // patch, p=patch, q=patch
    )
