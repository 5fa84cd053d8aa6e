"""What a modality is: the only place that knows what tokens stand for."""

from typing import Protocol

import jax
import numpy as np


class Modality(Protocol):
    """Turns data into tokens and back; implementations are frozen dataclasses."""

    @property
    def num_tokens(self) -> int:
        """Tokens per example (N)."""

    @property
    def token_dim(self) -> int:
        """Channels of a token (C)."""

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example as the data source gives it."""

    @property
    def example_dtype(self) -> np.dtype:
        """Type of its values."""

    def check_example(self, example: np.ndarray) -> None:
        """Raise ValueError, naming what was found and expected, if a source's example does not
        fit.
        """

    def tokenize(self, examples: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Examples `[B, ...]` as the source gives them -> tokens `[B, N, C]` float32; runs inside
        `jit`.

        `key` is for tokenizers that draw; without one they give their mean.
        """

    def detokenize(self, tokens: jax.Array) -> jax.Array:
        """Tokens `[B, N, C]` -> examples in float32, in the tokenizer's value range."""

    def export(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """Tokens `[B, N, C]` -> named arrays for a file; `images` (uint8 `[B, H, W, C]`) where it
        makes pictures.

        Runs inside `jit` and outside.
        """
