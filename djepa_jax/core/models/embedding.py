"""Class and time embeddings, and the prefix tokens that a condition becomes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from djepa_jax.core.models.keys import Keys
from djepa_jax.core.models.vit import Linear, normal_init, precision_of

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

    def __init__(self, num_classes: int, width: int, *, rngs: Keys):
        self.table = nnx.Param(normal_init(rngs.params(), (num_classes, width)))
        self.null = nnx.Param(normal_init(rngs.params(), (1, width)))

    def __call__(self, labels: jax.Array) -> jax.Array:
        """Look up `labels` `[B]`, each in 0..num_classes: `[B, D]`."""
        return look_up(jnp.concatenate([self.table[...], self.null[...]]), labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table: jax.Array, rows: jax.Array, dtype=None) -> jax.Array:
    """Rows `[...]` of a table `[R, D]`: `[..., D]`.

    Its gradient is a product, of factors of `dtype`, the table's if that is None. GPUs would add
    up the gradients of a row that is taken often in whatever order they come, and no two trainings
    would be the same to the bit.
    """
    return jnp.take(table, rows, axis=0)


def _look_up_forward(table, rows, dtype):
    return look_up(table, rows, dtype), (table, rows)


def _look_up_backward(dtype, inputs, gradient):
    table, rows = inputs
    dtype = dtype or table.dtype
    taken = jax.nn.one_hot(rows, len(table), dtype=dtype)  # [..., R]
    exact = {"precision": precision_of(dtype), "preferred_element_type": jnp.float32}
    summed = jnp.einsum("...r,...d->rd", taken, gradient.astype(dtype), **exact)  # [R, D]
    return summed.astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def time_frequencies(t: jax.Array) -> jax.Array:
    """Sinusoids of the times `t` `[...]`: 128 cosines, then 128 sines, `[..., 256]` float32.

    The angles are t exp(-ln(10000) k / 128), formed in float32 (t reaches 999).
    """
    exponents = jnp.arange(TIME_FREQUENCIES, dtype=jnp.float32) / TIME_FREQUENCIES
    angles = t.astype(jnp.float32)[..., None] * jnp.exp(-jnp.log(MAX_PERIOD) * exponents)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Sinusoids, linear, SiLU, linear; always float32, since times differ in their last bits."""

    def __init__(self, width: int, *, rngs: Keys):
        self.up = Linear(2 * TIME_FREQUENCIES, width, rngs=rngs, kernel_init=normal_init)
        self.down = Linear(width, width, rngs=rngs, kernel_init=normal_init)

    def __call__(self, t: jax.Array) -> jax.Array:
        """Map times `[...]` to `[..., w]`."""
        return self.down(jax.nn.silu(self.up(time_frequencies(t))))
