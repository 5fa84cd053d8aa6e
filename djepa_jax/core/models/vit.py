"""Transformer blocks with stacked parameters, shared by all three ViTs of D-JEPA.

Parameters are float32. Matrix products run in the compute dtype; LayerNorm, QK-norm and softmax
always run in float32. A module holds no random state: dropout is on exactly when a call is given
keys, one per example.

Shape letters: B batch, S sequence, Q queries, D width, H heads, L layers.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from djepa_jax.core.models.attention import attend, precision_of
from djepa_jax.core.models.dropout import dropout_rows, key_words, split_keys
from djepa_jax.core.models.fused_attention import SAVED
from djepa_jax.core.models.keys import Keys
from djepa_jax.core.models.ragged import Ragged, whole
from djepa_jax.core.sharding import batch_divisor, keep_batch_split

if TYPE_CHECKING:  # it names the conditioner, which is built from these layers
    from djepa_jax.core.models.djepa import ModelConfig

NORM_EPSILON = 1e-6
policies = jax.checkpoint_policies
REMAT_POLICIES = {
    "none": None,
    "dots": policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED)
    ),
    "full": policies.nothing_saveable,
}

zeros_init = nnx.initializers.zeros
normal_init = nnx.initializers.normal(0.02)
unit_init = nnx.initializers.normal(1.0)


def xavier_init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Xavier-uniform values for a kernel `[in, *out]`; all output axes make the fan-out."""
    flat = (shape[0], math.prod(shape[1:]))
    return nnx.initializers.xavier_uniform()(key, flat, dtype).reshape(shape)


def torch_linear_init(key, shape, dtype=jnp.float32, *, fan_in: int) -> jax.Array:
    """PyTorch's default for kernel and bias alike: uniform within +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Linear(nnx.Module):
    """y = x W + b over the last axis, in the compute dtype; `out` is one size or several."""

    def __init__(
        self, fan_in, out, *, rngs, dtype=jnp.float32, kernel_init=xavier_init, bias_init=zeros_init
    ):
        out = (out,) if isinstance(out, int) else out
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (fan_in, *out)))
        self.bias = nnx.Param(bias_init(rngs.params(), out))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[..., in]` to `[..., *out]`."""
        # Rows on one axis: XLA's CPU backend takes a slow path for the gradient of a kernel when
        # they span several; on accelerators the reshape is free.
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)  # [R, in]
        kernel = self.kernel[...].astype(self.dtype)
        out = product(rows, kernel) + self.bias[...].astype(self.dtype)  # [R, *out]
        return out.reshape(*x.shape[:-1], *kernel.shape[1:])

    def apart(self, x: jax.Array) -> list[jax.Array]:
        """Map `[..., in]` to the `n` parts of an `out` of `(n, w)`: each `[..., w]`."""
        # A product for each, since the gradients of parts of one would be copied together
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)  # [R, in]
        kernel, bias = (y.astype(self.dtype) for y in (self.kernel[...], self.bias[...]))
        parts = [product(rows, kernel[:, i]) + bias[i] for i in range(len(bias))]
        return [part.reshape(*x.shape[:-1], -1) for part in parts]


def product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """Rows `[R, in]` times a kernel `[in, *out]`: `[R, *out]`, in the type of both."""
    is_tall = kernel.ndim == 2 and kernel.shape[0] > kernel.shape[1]
    return _tall_product(rows, kernel) if is_tall else _contract(rows, kernel, 1, 0)


def _contract(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), precision_of(x.dtype))


@jax.custom_vjp
def _tall_product(rows, kernel):
    return _contract(rows, kernel, 1, 0)


def _tall_product_backward(inputs, gradient):
    rows, kernel = inputs
    # CPUs take twice as long for the gradient of a tall kernel as for that of its transpose
    transposed = jax.lax.optimization_barrier(_contract(gradient, rows, 0, 0))  # [out, in]
    return _contract(gradient, kernel, 1, 1), transposed.T


_tall_product.defvjp(lambda *inputs: (_tall_product(*inputs), inputs), _tall_product_backward)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis in float32; the result has the compute dtype."""

    def __init__(self, width: int, *, dtype=jnp.float32, affine: bool = True):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((width,))) if affine else None
        self.bias = nnx.Param(jnp.zeros((width,))) if affine else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `[..., D]`."""
        x = standardise(x)
        if self.scale is not None:
            x = x * self.scale[...] + self.bias[...]
        return x.astype(self.dtype)


@jax.custom_vjp
def standardise(x: jax.Array) -> jax.Array:
    """`[..., D]` with mean 0 and variance 1 along the last axis, in float32."""
    return _standardise(x, *_moments(x))


def _moments(x):
    """Mean and one over the standard deviation `[..., 1]`."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + NORM_EPSILON)


def _standardise(x, mean, scale):
    return (x.astype(jnp.float32) - mean) * scale


def _standardise_forward(x):
    moments = jax.lax.optimization_barrier(_moments(x))
    return _standardise(x, *moments), (x, *moments)


def _standardise_backward(inputs, gradient):
    x, mean, scale = inputs
    normal = _standardise(x, mean, scale)
    along = (gradient * normal).mean(-1, keepdims=True)
    gradient = (gradient - gradient.mean(-1, keepdims=True) - normal * along) * scale
    return (gradient.astype(x.dtype),)


standardise.defvjp(_standardise_forward, _standardise_backward)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis in float32, scale without bias."""

    def __init__(self, width: int, *, dtype=jnp.float32):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((width,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `[..., D]`."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + NORM_EPSILON)
        return (x * self.scale[...]).astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with optional QK-norm and dropout on weights and output."""

    def __init__(self, config: "ModelConfig", *, rngs: Keys):
        width, dtype = config.width, config.dtype
        self.num_heads, self.implementation = config.num_heads, config.attention
        self.weight_dropout, self.out_dropout = config.attention_dropout, config.dropout
        norm = functools.partial(RMSNorm, width // config.num_heads, dtype=dtype)
        self.qkv = Linear(width, (3, width), rngs=rngs, dtype=dtype)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None
        self.out = Linear(width, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, key_mask, keys, queries, ragged: Ragged) -> jax.Array:
        """Attend within each of the examples whose rows are `x` `[G, R, D]`; as for `Stack`."""
        weight_keys, out_keys = split_keys(keys, 2)
        masks = ragged.of_examples(key_mask)
        parts = zip(*map(ragged.split, self.qkv.apart(x)), strict=True)  # (q, k, v) of each part
        parts = zip(parts, masks, ragged.of_examples(weight_keys), strict=True)
        mixed = ragged.join([self._attend(*part, queries) for part in parts])  # [G, R, D]
        return drop_rows(self.out(mixed), self.out_dropout, out_keys, ragged)

    def _attend(self, qkv: tuple, key_mask, weight_keys, queries) -> jax.Array:
        """Attention of examples of one length, three `[B, S, D]`: `[B, S, D]` or `[B, Q, D]`."""
        heads = {"pattern": "b s (h d) -> b s h d", "h": self.num_heads}
        q, k, v = (rearrange(x, **heads) for x in qkv)  # [B, S, H, D/H] each
        if queries is not None:
            q = jnp.take(q, queries, axis=1)  # [B, Q, H, D/H]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if key_mask is not None and key_mask.ndim == 2:
            key_mask = key_mask[:, : k.shape[1]]
        drop = {"rate": self.weight_dropout, "keys": weight_keys}
        mixed = attend(q, k, v, mask=key_mask, implementation=self.implementation, **drop)
        return rearrange(mixed, "b q h d -> b q (h d)")


def drop_rows(x: jax.Array, rate: float, keys: jax.Array | None, ragged: Ragged) -> jax.Array:
    """Dropout on rows `[G, R, D]` of examples with `keys` `[B]`."""
    if keys is None or rate == 0.0:
        return x
    words = jnp.repeat(key_words(keys)[:, None], ragged.length, axis=1)  # [B, S, 2]
    places = jnp.broadcast_to(jnp.arange(ragged.length, dtype=jnp.uint32), words.shape[:2])
    return dropout_rows(x, rate, ragged.flatten(words), ragged.flatten(places))


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x Phi(x) (Hendrycks and Gimpel 2016), with erf.

    JAX's own form has erfc, which takes CPUs longer, and so does its gradient. It is computed in
    float32: far below zero, one plus erf has few digits, and in bfloat16 hardly any.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x, gradient):
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) * (1 / math.sqrt(2 * math.pi))
    return ((gradient * (_normal_cdf(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class Mlp(nnx.Module):
    """Linear, exact (erf) GELU, linear, with dropout after both."""

    def __init__(self, config: "ModelConfig", *, rngs: Keys):
        hidden = int(config.width * config.mlp_ratio)
        self.dropout_rate = config.dropout
        self.up = Linear(config.width, hidden, rngs=rngs, dtype=config.dtype)
        self.down = Linear(hidden, config.width, rngs=rngs, dtype=config.dtype)

    def __call__(self, x: jax.Array, keys: jax.Array | None, ragged: Ragged) -> jax.Array:
        """Map rows `[G, R, D]` to as many; the `keys` `[B]` of their examples drop."""
        up_keys, down_keys = split_keys(keys, 2)
        x = drop_rows(gelu(self.up(x)), self.dropout_rate, up_keys, ragged)
        return drop_rows(self.down(x), self.dropout_rate, down_keys, ragged)


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(LN(x)), then x + mlp(LN(x))."""

    def __init__(self, config: "ModelConfig", *, rngs: Keys):
        self.attention_norm = LayerNorm(config.width, dtype=config.dtype)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, dtype=config.dtype)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x, ragged: Ragged, key_mask=None, keys=None, queries=None):
        """Map rows `[G, R, D]` to as many, or to `[B, Q, D]` where only `queries` are wanted."""
        attention_keys, mlp_keys = split_keys(keys, 2)
        mixed = self.attention(self.attention_norm(x), key_mask, attention_keys, queries, ragged)
        x = (x if queries is None else jnp.take(x, queries, axis=1)) + mixed
        return x + self.mlp(self.mlp_norm(x), mlp_keys, ragged)


class Stack(nnx.Module):
    """Blocks whose parameters have a leading layer axis, run by one `lax.scan`, then LayerNorm."""

    def __init__(self, config: "ModelConfig", depth: int, *, rngs: Keys):
        self.depth, self.dtype = depth, config.dtype
        self.remat, self.unroll = config.remat, config.scan_unroll
        make_block = nnx.vmap(lambda key: Block(config, rngs=Keys(key)))
        self.blocks = make_block(jax.random.split(rngs.params(), depth))
        self.norm = LayerNorm(config.width, dtype=config.dtype)

    def __call__(self, x, *, key_mask=None, keys=None, queries=None, ragged: Ragged | None = None):
        """Run all layers on `[B, S, D]`: `[B, S, D]`, or `[B, Q, D]` at the places `queries` `[Q]`.

        Places beyond the first `key_mask` `[B]`, or where it is False `[B, S]`, never influence
        another; `keys` `[B]` turn dropout on. With `queries` the last layer skips all other places,
        which nothing reads. With `ragged` the places beyond the lengths that it tells are left out,
        and zero in the result.
        """
        graph, params = nnx.split(self.blocks)
        length, ragged = x.shape[1], usable(ragged, x) or whole(x.shape[1])
        x = ragged.flatten(x.astype(self.dtype))  # [G, R, D]
        if queries is None:
            layer_keys = None if keys is None else split_keys(keys, self.depth)  # [L, B]

            def body(x, layer):
                block_params, keys = layer
                x = nnx.merge(graph, block_params)(keep_batch_split(x), ragged, key_mask, keys)
                return keep_batch_split(x), None

            body = remat_layer(body, self.remat)
            x, _ = jax.lax.scan(body, x, (params, layer_keys), unroll=self.unroll)
            return ragged.restore(self.norm(x), length)

        def block_at(index):  # by index, so that no slice of the stack is copied
            layer = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
            return nnx.merge(graph, jax.tree.map(layer, params))

        def indexed_body(x, index):
            return block_at(index)(x, ragged, key_mask), None

        x, _ = jax.lax.scan(indexed_body, x, jnp.arange(self.depth - 1))
        return self.norm(block_at(self.depth - 1)(x, ragged, key_mask, None, queries))


def usable(ragged: Ragged | None, x: jax.Array) -> Ragged | None:
    """`ragged` where the groups of `x` `[B, ...]` divide over the devices that share the batch."""
    devices = batch_divisor(jax.typeof(x).sharding.mesh)
    return None if ragged is None or len(x) // ragged.size % devices else ragged


def remat_layer(body: Callable, policy: str) -> Callable:
    """A scan's body that keeps for its backward pass what `REMAT_POLICIES[policy]` says."""
    if policy == "none":
        return body
    return jax.checkpoint(body, policy=REMAT_POLICIES[policy], prevent_cse=False)
