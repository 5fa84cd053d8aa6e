"""Words as a condition: bytes, or the outputs of any text encoder, read by a small transformer.

Learned queries stand in front of what is read, and come out as the prefix tokens. What says
nothing has no places to read, so that the queries attend to themselves alone.

Shape letters: B batch, P prefix, L places of a text, W width of the reader, D width of the model.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from djepa_jax.core.bounds import Natural, Positive, check_bounds
from djepa_jax.core.models import vit
from djepa_jax.core.models.embedding import Condition, look_up
from djepa_jax.core.models.keys import Keys


@dataclasses.dataclass(frozen=True)
class Reader:
    """What both kinds share: the shape of the transformer, as `vit.Stack` asks for it."""

    num_prefix_tokens: Natural = 0  # 0: those of the model
    length: Positive = 80  # L; what is longer is cut
    width: Positive = 128  # W
    depth: Positive = 2
    num_heads: Positive = 4

    period: ClassVar[int] = 1  # texts cannot be listed
    mlp_ratio: ClassVar[float] = 4.0
    qk_norm: ClassVar[bool] = True
    dropout: ClassVar[float] = 0.0
    attention_dropout: ClassVar[float] = 0.0
    attention: ClassVar[str] = "plain"
    dtype: ClassVar[jnp.dtype] = jnp.dtype(jnp.float32)
    remat: ClassVar[str] = "none"
    scan_unroll: ClassVar[int] = 1

    def __post_init__(self):
        check_bounds(self)
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} must be a multiple of num_heads.")

    def drop(self, key: jax.Array, raw: jax.Array, probability: float) -> jax.Array:
        """Texts `[B, L, ...]`, some of them replaced by none."""
        dropped = jax.random.bernoulli(key, probability, raw.shape[:1])  # [B]
        return jnp.where(dropped.reshape(-1, *[1] * (raw.ndim - 1)), jnp.zeros_like(raw), raw)

    def in_turn(self, count: int) -> np.ndarray:
        """Texts cannot be listed: none at all."""
        return np.asarray(self.null(count))

    def embed(self, embedding: "TextEmbedding", raw: jax.Array) -> Condition:
        """Prefix tokens `[B, P, D]` of texts."""
        return Condition(embedding(raw))


@dataclasses.dataclass(frozen=True)
class Text(Reader):
    """Captions as UTF-8 bytes `[B, L]` uint8, filled up with zeros."""

    param_name: ClassVar[str] = "text_embedding"

    def size(self, text: str) -> int:
        """Places that a caption takes: its bytes."""
        return len(text.encode("utf-8"))

    def encode(self, text: str) -> np.ndarray:
        """A caption as `[L]` uint8, cut at the last whole character that fits."""
        data = text.encode("utf-8")[: self.length].decode("utf-8", "ignore").encode("utf-8")
        return np.frombuffer(data.ljust(self.length, b"\0"), np.uint8)

    def decode(self, raw: np.ndarray) -> str:
        """The caption of `[L]` bytes."""
        return bytes(np.asarray(raw, np.uint8)).rstrip(b"\0").decode("utf-8", "replace")

    def null(self, batch_size: int) -> jax.Array:
        """Empty captions `[B, L]`."""
        return jnp.zeros((batch_size, self.length), jnp.uint8)

    def make_embedding(self, width: int, *, rngs: Keys) -> "TextEmbedding":
        """A table of bytes, and the reader."""
        table = nnx.Param(vit.unit_init(rngs.params(), (256, self.width)))
        return TextEmbedding(self, width, table, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Embeddings(Reader):
    """Outputs of a text encoder, `[B, L, channels]`; places of zeros alone say nothing."""

    channels: Positive = 768

    param_name: ClassVar[str] = "text_embedding"

    def size(self, outputs: np.ndarray) -> int:
        """Places that outputs `[L', channels]` take."""
        return len(outputs)

    def encode(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs `[L', channels]` as `[L, channels]` float32, cut or filled up with zeros."""
        outputs = np.asarray(outputs[: self.length], np.float32)
        return np.pad(outputs, [(0, self.length - len(outputs)), (0, 0)])

    def null(self, batch_size: int) -> jax.Array:
        """Nothing to read `[B, L, channels]`."""
        return jnp.zeros((batch_size, self.length, self.channels), jnp.float32)

    def make_embedding(self, width: int, *, rngs: Keys) -> "TextEmbedding":
        """A linear map into the reader, and the reader."""
        source = vit.Linear(self.channels, self.width, rngs=rngs)
        return TextEmbedding(self, width, source, rngs=rngs)


class TextEmbedding(nnx.Module):
    """The reader: what stands in the places, learned queries before them, blocks, a linear map."""

    def __init__(self, config: Reader, width: int, source, *, rngs: Keys):
        self.source = source
        self.queries = nnx.Param(
            vit.unit_init(rngs.params(), (config.num_prefix_tokens, config.width))
        )
        self.positions = nnx.Param(vit.unit_init(rngs.params(), (config.length, config.width)))
        self.stack = vit.Stack(config, config.depth, rngs=rngs)
        self.out = vit.Linear(config.width, width, rngs=rngs, kernel_init=vit.normal_init)

    def __call__(self, raw: jax.Array) -> jax.Array:
        """Bytes `[B, L]`, or outputs of an encoder `[B, L, C]` -> `[B, P, D]`."""
        is_text = raw.ndim == 2
        said = raw != 0 if is_text else (raw != 0).any(-1)  # [B, L]
        read = look_up(self.source[...], raw) if is_text else self.source(raw)
        read = read + self.positions[...]  # [B, L, W]
        queries = jnp.broadcast_to(self.queries[...], (len(raw), *self.queries.shape))  # [B, P, W]
        mask = jnp.concatenate([jnp.ones(queries.shape[:2], bool), said], axis=1)  # [B, P + L]
        x = self.stack(jnp.concatenate([queries, read], axis=1), key_mask=mask)
        return self.out(x[:, : queries.shape[1]])
