"""What a modality is: the only place that knows what tokens stand for."""

import os
from typing import Protocol

import jax
import numpy as np

from djepa_jax.core.schedules import Grid

MADE = {1: "sound", 3: "images", 4: "clips"}  # what people call examples, by their axes


class Modality(Protocol):
    """Turns data into tokens and back; implementations are frozen dataclasses in `MODALITIES`, of
    fields that can be hashed: equal ones share their programs.
    """

    needs_decoder: bool  # whether pictures of what it exports take an autoencoder
    factorised_positions: bool  # position vectors per axis of `grid`, summed, not one per token
    example_dtype: np.dtype  # of the values of an example
    grid: Grid  # positions along each axis of an example, N in all, the last fastest
    token_dim: int  # channels of a token (C)
    example_shape: tuple[int, ...]  # of one example as the data source gives it

    @classmethod
    def from_settings(cls, data) -> "Modality":
        """The modality that `config.data` describes; its `options` are for modalities' own keys."""

    def check_example(self, example: np.ndarray) -> None:
        """Raise ValueError, naming what was found and expected, if an example does not fit."""

    def tokenize(self, examples: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Examples `[B, ...]` as the source gives them -> tokens `[B, N, C]` float32, inside `jit`.

        `key` is for tokenizers that draw; without one they give their mean.
        """

    def detokenize(self, tokens: jax.Array) -> jax.Array:
        """Tokens `[B, N, C]` -> examples in float32, in the tokenizer's value range."""

    def export(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """Tokens `[B, N, C]` -> named arrays for a file, leading axis B, inside `jit`.

        `latents` go through the decoder, if there is one, which adds `images` or, of frames,
        `clips`; `sound` is played.
        """

    def tokens_at(self, places: np.ndarray) -> np.ndarray:
        """Which tokens, bool `[B, N]`, show any of some places of examples.

        For editing; it may be absent.
        """

    def put_back(
        self, examples: np.ndarray, arrays: dict[str, np.ndarray], mask: np.ndarray
    ) -> np.ndarray:
        """Examples whose places of a mask `[B, ...]` are those of exported arrays.

        For editing; it may be absent.
        """

    def preview(self, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
        """uint8 pictures `[n, H, W, 1 or 3]` of exported arrays, for grids; None if none."""

    def save(self, arrays: dict[str, np.ndarray], index: int, stem: os.PathLike) -> None:
        """Write one exported example as a file that people open; `stem` lacks the ending."""
