"""Class and time embeddings, and the prefix tokens that a condition becomes."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from djepa_jax.core.models.vit import Linear, normal_init

TIME_FREQUENCIES = 128
MAX_PERIOD = 10_000.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """Prefix tokens; a mask of None says that all of them are real."""

    prefix: jax.Array  # [B, P, D]
    mask: jax.Array | None = None  # [B, P], False where a prefix token must not be seen


class ClassEmbedding(nnx.Module):
    """A table of class vectors, and one vector that stands for "no label" (id `num_classes`)."""

    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(normal_init(rngs.params(), (num_classes, width)))
        self.null = nnx.Param(normal_init(rngs.params(), (1, width)))

    def __call__(self, labels: jax.Array) -> jax.Array:
        """Look up `labels` `[B]`, each in 0..num_classes: `[B, D]`."""
        return jnp.take(jnp.concatenate([self.table[...], self.null[...]]), labels, axis=0)


def time_frequencies(t: jax.Array) -> jax.Array:
    """Sinusoids of the times `t` `[...]`: 128 cosines, then 128 sines, `[..., 256]` float32.

    The angles are t exp(-ln(10000) k / 128), formed in float32 (t reaches 999).
    """
    exponents = jnp.arange(TIME_FREQUENCIES, dtype=jnp.float32) / TIME_FREQUENCIES
    angles = t.astype(jnp.float32)[..., None] * jnp.exp(-jnp.log(MAX_PERIOD) * exponents)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Sinusoids, linear, SiLU, linear; always float32, since times differ in their last bits."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.up = Linear(2 * TIME_FREQUENCIES, width, rngs=rngs, kernel_init=normal_init)
        self.down = Linear(width, width, rngs=rngs, kernel_init=normal_init)

    def __call__(self, t: jax.Array) -> jax.Array:
        """Map times `[...]` to `[..., w]`."""
        return self.down(jax.nn.silu(self.up(time_frequencies(t))))
