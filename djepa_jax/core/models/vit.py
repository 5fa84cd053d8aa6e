"""Transformer blocks with stacked parameters, shared by all three ViTs of D-JEPA.

Parameters are float32. Matrix products run in the compute `dtype`; LayerNorm, QK-norm and softmax
always run in float32. A module holds no random state: dropout is on exactly when a call is given
keys, one per example.

Shape letters: B batch, S sequence, Q queries, D width, H heads, L layers.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from djepa_jax.core.sharding import keep_batch_split

NORM_EPSILON = 1e-6
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

Initializer = Callable[..., jax.Array]
zeros_init = nnx.initializers.zeros
normal_init = nnx.initializers.normal(0.02)


def xavier_init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Xavier-uniform values for a kernel `[in, *out]`; the fan-out is the product of all output
    axes.
    """
    flat = nnx.initializers.xavier_uniform()(key, (shape[0], math.prod(shape[1:])), dtype)
    return flat.reshape(shape)


def torch_linear_init(
    key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32, fan_in: int | None = None
) -> jax.Array:
    """PyTorch's default for a linear layer: uniform within +-1/sqrt(fan_in), for kernel and bias
    alike.
    """
    bound = (fan_in or shape[0]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of `x` `[B, ...]` and scale the rest up; does nothing without keys `[B]`.

    An example's mask is a function of its own key, so that parts of a batch have the masks that
    they have in the whole.
    """
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(
        keys
    )  # [B, ...]
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def split_keys(keys: jax.Array | None, count: int) -> jax.Array | tuple:
    """Keys of examples `[B]` -> `[count, B]`; no keys stay none."""
    if keys is None:
        return (None,) * count
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def precision_of(dtype) -> jax.lax.Precision | None:
    """Float32 as it is: left alone, TPUs round the factors of its products to bfloat16, and recent
    GPUs to TF32.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


class Linear(nnx.Module):
    """y = x W + b over the last axis, in the compute dtype; `out` may have several axes."""

    def __init__(
        self,
        in_features: int,
        out: int | tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        kernel_init: Initializer = xavier_init,
        bias_init: Initializer = zeros_init,
    ):
        out = (out,) if isinstance(out, int) else out
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, *out)))
        self.bias = nnx.Param(bias_init(rngs.params(), out))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[..., in]` to `[..., *out]`.

        Rows are flattened to one axis first: XLA's CPU backend takes a slow path for the gradient
        of a kernel when the rows span several axes; on accelerators the reshape is free.
        """
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)  # [R, in]
        kernel = self.kernel[...].astype(self.dtype)
        out = jax.lax.dot_general(
            rows, kernel, (((1,), (0,)), ((), ())), precision_of(self.dtype)
        )  # [R, *out]
        out = out + self.bias[...].astype(self.dtype)
        return out.reshape(*x.shape[:-1], *kernel.shape[1:])


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis in float32; the result has the compute dtype."""

    def __init__(self, width: int, *, dtype=jnp.float32, affine: bool = True):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((width,))) if affine else None
        self.bias = nnx.Param(jnp.zeros((width,))) if affine else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `[..., D]`."""
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        x = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + NORM_EPSILON)
        if self.scale is not None:
            x = x * self.scale[...] + self.bias[...]
        return x.astype(self.dtype)


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

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool,
        weight_dropout: float,
        out_dropout: float,
        dtype,
        rngs,
    ):
        self.num_heads = num_heads
        self.weight_dropout, self.out_dropout = weight_dropout, out_dropout
        self.qkv = Linear(width, (3, width), rngs=rngs, dtype=dtype)
        self.q_norm = RMSNorm(width // num_heads, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(width // num_heads, dtype=dtype) if qk_norm else None
        self.out = Linear(width, width, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        key_mask: jax.Array | None,
        keys: jax.Array | None,
        queries: jax.Array | None,
    ) -> jax.Array:
        """Attend within `x` `[B, S, D]`; `key_mask` `[B, S]` is False where a place must not be
        seen, `keys` `[B]` drop.

        With `queries` `[Q]` (indices into S) only those places are computed: result `[B, Q, D]`.
        """
        heads = "b s three (h d) -> three b h s d"
        q, k, v = rearrange(self.qkv(x), heads, three=3, h=self.num_heads)  # [B, H, S, D/H] each
        if queries is not None:
            q = jnp.take(q, queries, axis=2)  # [B, H, Q, D/H]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        weight_keys, out_keys = split_keys(keys, 2)
        weights = attention_weights(q, k, key_mask)  # [B, H, Q, S]
        weights = dropout(weights, self.weight_dropout, weight_keys)
        mixed = jnp.einsum(
            "bhqs,bhsd->bqhd", weights.astype(v.dtype), v, precision=precision_of(v.dtype)
        )
        return dropout(
            self.out(rearrange(mixed, "b q h d -> b q (h d)")), self.out_dropout, out_keys
        )


def attention_weights(q: jax.Array, k: jax.Array, key_mask: jax.Array | None) -> jax.Array:
    """Softmax of scaled dot products in float32: `[B, H, Q, d]`, `[B, H, S, d]` -> `[B, H, Q,
    S]`.
    """
    precision = precision_of(q.dtype)
    scores = jnp.einsum(
        "bhqd,bhsd->bhqs", q, k, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores * q.shape[-1] ** -0.5
    if key_mask is not None:
        scores = jnp.where(key_mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


class Mlp(nnx.Module):
    """Linear, exact (erf) GELU, linear, with dropout after both."""

    def __init__(self, width: int, hidden: int, *, dropout_rate: float, dtype, rngs):
        self.dropout_rate = dropout_rate
        self.up = Linear(width, hidden, rngs=rngs, dtype=dtype)
        self.down = Linear(hidden, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Map `[B, S, D]` to `[B, S, D]`; `keys` `[B]` drop."""
        up_keys, down_keys = split_keys(keys, 2)
        x = dropout(jax.nn.gelu(self.up(x), approximate=False), self.dropout_rate, up_keys)
        return dropout(self.down(x), self.dropout_rate, down_keys)


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(LN(x)), then x + mlp(LN(x))."""

    def __init__(
        self, width, num_heads, mlp_ratio, *, qk_norm, attention_dropout, dropout_rate, dtype, rngs
    ):
        self.attention_norm = LayerNorm(width, dtype=dtype)
        self.attention = Attention(
            width,
            num_heads,
            qk_norm=qk_norm,
            weight_dropout=attention_dropout,
            out_dropout=dropout_rate,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = LayerNorm(width, dtype=dtype)
        self.mlp = Mlp(
            width, int(width * mlp_ratio), dropout_rate=dropout_rate, dtype=dtype, rngs=rngs
        )

    def __call__(self, x, key_mask=None, keys=None, queries=None):
        """Map `[B, S, D]` to `[B, S, D]`, or to `[B, Q, D]` where only the places `queries` are
        wanted.
        """
        attention_keys, mlp_keys = split_keys(keys, 2)
        mixed = self.attention(self.attention_norm(x), key_mask, attention_keys, queries)
        x = (x if queries is None else jnp.take(x, queries, axis=1)) + mixed
        return x + self.mlp(self.mlp_norm(x), mlp_keys)


class Stack(nnx.Module):
    """`depth` blocks whose parameters carry a leading layer axis, run by one `lax.scan`, then a
    LayerNorm.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        *,
        mlp_ratio,
        qk_norm,
        attention_dropout,
        dropout_rate,
        remat,
        unroll,
        dtype,
        rngs,
    ):
        self.depth, self.dtype, self.remat, self.unroll = depth, dtype, remat, unroll

        def make_block(key):
            """One layer, with parameters of its own."""
            return Block(
                width,
                num_heads,
                mlp_ratio,
                qk_norm=qk_norm,
                attention_dropout=attention_dropout,
                dropout_rate=dropout_rate,
                dtype=dtype,
                rngs=nnx.Rngs(key),
            )

        self.blocks = nnx.vmap(make_block)(jax.random.split(rngs.params(), depth))
        self.norm = LayerNorm(width, dtype=dtype)

    def __call__(self, x, *, key_mask=None, keys=None, queries=None):
        """Run all layers on `[B, S, D]`.

        Args:
            x: tokens `[B, S, D]`.
            key_mask: `[B, S]`, False at padded places; they never influence a real one.
            keys: `[B]`, turn dropout on.
            queries: `[Q]`; the last layer computes these places only (exact, since nothing else is
                read).

        Returns:
            `[B, S, D]`, or `[B, Q, D]` with `queries`.
        """
        graph, params = nnx.split(self.blocks)
        x = x.astype(self.dtype)
        if queries is None:
            layer_keys = None if keys is None else split_keys(keys, self.depth)  # [L, B]
            return self.norm(self._scan(graph, params, x, layer_keys, key_mask))
        x = self._scan_indexed(graph, params, x, key_mask)
        last = nnx.merge(graph, _layer(params, self.depth - 1))
        return self.norm(last(x, key_mask, None, queries))

    def _scan(self, graph, params, x, layer_keys, key_mask):
        def body(x, layer):
            block_params, keys = layer
            return keep_batch_split(
                nnx.merge(graph, block_params)(keep_batch_split(x), key_mask, keys)
            ), None

        return jax.lax.scan(
            remat_layer(body, self.remat), x, (params, layer_keys), unroll=self.unroll
        )[0]

    def _scan_indexed(self, graph, params, x, key_mask):
        """All layers but the last, reading parameters by index so that no slice of the stack is
        copied.
        """

        def body(x, index):
            return nnx.merge(graph, _layer(params, index))(x, key_mask), None

        return jax.lax.scan(body, x, jnp.arange(self.depth - 1))[0]


def _layer(params, index):
    return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), params)


def remat_layer(body: Callable, policy: str) -> Callable:
    """A scan's body that keeps for its backward pass what `REMAT_POLICIES[policy]` says, and
    computes the rest again.
    """
    if policy == "none":
        return body
    return jax.checkpoint(body, policy=REMAT_POLICIES[policy], prevent_cse=False)
