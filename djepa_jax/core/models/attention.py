"""Softmax attention with dropout on its weights, in three implementations that agree.

`plain` is XLA everywhere; `cudnn` is NVIDIA's kernel, without dropout; `fused` is the kernel of
`fused_attention.py`, for GPUs.

Shape letters: B batch, Q queries, S keys, H heads, d width of a head.
"""

import jax
import jax.numpy as jnp

from djepa_jax.core.models.dropout import dropout, weight_places
from djepa_jax.core.models.fused_attention import fused_attention

IMPLEMENTATIONS = ("auto", "plain", "cudnn", "fused")
# What "auto" is where one was measured to be the best, for (platform, whether weights are dropped);
# plain elsewhere, and where the best one cannot be had.
BEST = {
    ("cpu", False): "plain",
    ("cpu", True): "plain",
    ("gpu", False): "cudnn",
    ("gpu", True): "fused",
}


def attend(q, k, v, *, mask=None, rate=0.0, keys=None, implementation="auto") -> jax.Array:
    """Attention of queries `[B, Q, H, d]` to keys and values `[B, S, H, d]`: `[B, Q, H, d]`.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: how many keys, from the first, may be seen `[B]`, or which `[B, S]`, at least one;
            None for all.
        rate: share of the weights that is dropped where there are `keys`.
        keys: random keys `[B]`, one per example.
        implementation: one of `IMPLEMENTATIONS`; `fused` is interpreted, slowly, without a GPU.
    """
    rate = 0.0 if keys is None else rate
    if implementation == "auto":
        implementation = BEST.get((jax.default_backend(), rate > 0), "plain")
        if obstacle(implementation, jax.default_backend(), q.dtype, q.shape[-1], rate):
            implementation = "plain"
    if why := obstacle(implementation, "gpu", q.dtype, q.shape[-1], rate):
        raise ValueError(f"attention {implementation!r}: {why}.")
    if implementation == "plain":
        return _plain(q, k, v, mask, rate, keys)
    if implementation == "cudnn":
        return _cudnn(q, k, v, mask)
    seen = None if mask is None else _seen(mask, k.shape[1])
    return fused_attention(q, k, v, seen, rate, keys)


def obstacle(implementation: str, platform: str, dtype, head_width: int, rate: float) -> str:
    """Why an implementation cannot do it, with a remedy; empty if it can."""
    if implementation in ("cudnn", "fused") and platform != "gpu":
        return 'it needs a GPU: set it to "auto"'
    if implementation != "cudnn":
        return ""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return "it needs compute_dtype bfloat16"
    if head_width % 8 or head_width > 128:
        return f"it needs heads of 8, 16, ... 128 channels, not {head_width}"
    return "it has no dropout: set attention_dropout to 0" if rate else ""


def precision_of(dtype) -> jax.lax.Precision | None:
    """Float32 as it is: left alone, TPUs round factors to bfloat16, recent GPUs to TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def _seen(mask: jax.Array, num_keys: int) -> jax.Array:
    """A mask of either kind as `[B, S]`."""
    return mask if mask.ndim == 2 else jnp.arange(num_keys) < mask[:, None]


def _plain(q, k, v, mask, rate, keys):
    scores = _scores(q, k) * q.shape[-1] ** -0.5  # [B, H, Q, S]
    if mask is not None:
        seen = _seen(mask, k.shape[1])[:, None, None]
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    sizes = (scores.shape[1], weight_places(k.shape[1]), weight_places(k.shape[1]))
    weights = dropout(jax.nn.softmax(scores), rate, keys, sizes).astype(v.dtype)
    return jnp.einsum("bhqs,bshd->bqhd", weights, v, precision=precision_of(v.dtype))


@jax.custom_vjp
def _scores(q, k):
    """Dot products of all queries and keys in float32, `[B, H, Q, S]`."""
    return _product("bqhd,bshd->bhqs", q, k)


def _product(pattern: str, x, y):
    exact = {"precision": precision_of(x.dtype), "preferred_element_type": jnp.float32}
    return jnp.einsum(pattern, x, y, **exact)


def _scores_forward(q, k):
    return _scores(q, k), (q, k)


def _scores_backward(inputs, gradient):
    q, k = inputs
    gradient = gradient.astype(q.dtype)  # else both products would be float32, and slow
    dq = _product("bhqs,bshd->bqhd", gradient, k)
    dk = _product("bhqs,bqhd->bshd", gradient, q)
    return dq.astype(q.dtype), dk.astype(k.dtype)


_scores.defvjp(_scores_forward, _scores_backward)


def _cudnn(q, k, v, mask):
    if mask is None or mask.ndim == 1:
        lengths = None if mask is None else mask.astype(jnp.int32)
        how = {"implementation": "cudnn", "key_value_seq_lengths": lengths}
        return jax.nn.dot_product_attention(q, k, v, **how)
    num_queries = q.shape[1]
    q, k, v, mask = map(_even, (q, k, v, mask))  # else a mask has no gradients there
    mask = jnp.broadcast_to(mask[:, None, None], (len(q), 1, q.shape[1], k.shape[1]))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return out[:, :num_queries]


def _even(x: jax.Array) -> jax.Array:
    """`x` `[B, S, ...]` with another row of zeros if S is odd."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), *((0, 0),) * (x.ndim - 2)))
