"""A kernel of attention for GPUs, in which neither scores nor masks of dropout reach the memory.

Keys are taken block by block with a running maximum and sum (Dao et al. 2022, "FlashAttention");
the backward pass recomputes the weights from the logarithm of that sum, and draws the mask again.

Shape letters: B batch, Q queries, S keys, H heads, d width of a head.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec as P

from djepa_jax.core.models.dropout import keep_mask, keep_scale, key_words, weight_places
from djepa_jax.core.sharding import BATCH_AXES, batch_divisor

SAVED = "fused_attention"  # the name under which memory policies may keep the kernel's results
BLOCK = 64  # queries or keys at a time, a power of 2
HIDDEN = -1e30  # score of a key that must not be seen; finite, so that differences are


def fused_attention(q, k, v, seen, rate: float, keys) -> jax.Array:
    """`attend` by the kernel; `seen` `[B, S]` is False at keys that must not be seen, or None.

    On every device of a mesh it has that one's examples and heads.
    """
    batch, num_queries, heads, width = q.shape
    seen = jnp.ones(k.shape[:2], bool) if seen is None else seen
    words = key_words(keys) if rate else jnp.zeros((batch, 2), jnp.uint32)
    kernel = functools.partial(attention_kernel, Tiles(num_queries, k.shape[1], width, rate))
    inputs = (q, k, v, seen.astype(jnp.int32), words, jnp.arange(heads))
    mesh = jax.typeof(q).sharding.mesh
    if mesh.empty or mesh.size == 1 or batch % batch_divisor(mesh) or heads % mesh.shape["tensor"]:
        return kernel(*inputs)
    part = P(BATCH_AXES, None, "tensor")
    parts = (part, part, part, P(BATCH_AXES), P(BATCH_AXES), P("tensor"))
    return jax.shard_map(kernel, mesh=mesh, in_specs=parts, out_specs=part, check_vma=False)(
        *inputs
    )


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the kernel's work, and what its programs do with blocks of it.

    A program (block, head, example) refers to all rows of its example and head, rounded up to whole
    blocks and to a power of 2 channels; what lies outside of an array reads as zero and is never
    written.
    """

    queries: int
    keys: int
    width: int
    rate: float
    interpret: bool | None = None  # None: where there is no GPU

    def read(self, ref, block, count: int):
        """Of `count` rows those of a block, `[BLOCK, d]`, or `[BLOCK]` where a row is a number."""
        rows = ref.at[pl.ds(block * BLOCK, BLOCK)]
        return triton.load(rows, mask=self._inside(ref, block, count), other=0)

    def write(self, ref, block, count: int, value) -> None:
        """The reverse of `read`."""
        rows = ref.at[pl.ds(block * BLOCK, BLOCK)]
        triton.store(rows, value.astype(ref.dtype), mask=self._inside(ref, block, count))

    def _inside(self, ref, block, count: int):
        rows = block * BLOCK + jnp.arange(BLOCK) < count
        if len(ref.shape) == 1:
            return rows
        return rows[:, None] & (jnp.arange(ref.shape[1]) < self.width)

    def scores(self, q, k, seen_ref, key_block):
        """Of a block of queries and one of keys, scaled: `[BLOCK, BLOCK]`."""
        seen = self.read(seen_ref, key_block, self.keys) > 0
        return jnp.where(seen, _dot(q, k, 1, 1) * self.width**-0.5, HIDDEN)

    def keep(self, words_ref, head, query_block, key_block):
        """A block of the mask that `dropout` draws for weights `[B, H, Q, S]`."""
        query = query_block * BLOCK + jnp.arange(BLOCK)
        key = key_block * BLOCK + jnp.arange(BLOCK)
        places = weight_places(self.keys)
        index = (head * places + query)[:, None] * places + key
        return keep_mask((words_ref[0], words_ref[1]), index.astype(jnp.uint32), self.rate)

    def weight_gradients(self, inputs: "Inputs", q, dout, lse, delta, k, v, query_block, key_block):
        """Dropped weights and gradient of the scores of a block, `[BLOCK, BLOCK]`."""
        weights = jnp.exp(self.scores(q, k, inputs.seen, key_block) - lse[:, None])
        gradient, dropped = _dot(dout, v, 1, 1), weights
        if self.rate:
            keep = self.keep(inputs.words, inputs.head[...], query_block, key_block)
            gradient = jnp.where(keep, gradient * keep_scale(self.rate), 0)
            dropped = jnp.where(keep, weights * keep_scale(self.rate), 0)
        gradient = weights * (gradient - delta[:, None]) * self.width**-0.5
        return dropped.astype(q.dtype), gradient.astype(q.dtype)

    def run(self, kernel, num_rows: int, inputs: tuple, *results):
        """Run `kernel` for every block of `num_rows`, head and example; it writes `results`."""
        batch, _, heads, _ = inputs[0].shape
        warps = 4 if self.width <= 64 else 8  # or registers are not enough
        interpret = jax.default_backend() != "gpu" if self.interpret is None else self.interpret
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid=(pl.cdiv(num_rows, BLOCK), heads, batch),
            in_specs=[_spec(x, axes) for x, axes in zip(inputs, INPUT_AXES, strict=False)],
            out_specs=[_spec(x, RESULT_AXES[x.ndim]) for x in results],
            out_shape=results,
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )(*inputs)


class Inputs(NamedTuple):
    """Of the kernels, as arrays, or as what one program sees of them."""

    q: Any  # [B, Q, H, d]
    k: Any  # [B, S, H, d]
    v: Any  # [B, S, H, d]
    seen: Any  # [B, S], 0 at a key that must not be seen
    num_keys: Any  # [B], keys up to the last that may be seen
    words: Any  # [B, 2], of the example's key
    head: Any  # [H], its number, in a mesh among all


def _dot(x, y, x_axis: int, y_axis: int):
    """Product of two blocks over one axis of each, in float32."""
    axes = (((x_axis,), (y_axis,)), ((), ()))
    exact = jax.lax.Precision.HIGHEST  # or float32 factors are rounded; bfloat16 ones are exact
    return jax.lax.dot_general(x, y, axes, exact, preferred_element_type=jnp.float32)


def _forward_kernel(tiles: Tiles, *refs):
    inputs, (out_ref, lse_ref) = Inputs(*refs[:7]), refs[7:]
    block = pl.program_id(0)
    q = tiles.read(inputs.q, block, tiles.queries)

    def add_keys(key_block, carry):
        """Output, maximum and sum after one more block of keys."""
        out, top, total = carry
        k = tiles.read(inputs.k, key_block, tiles.keys)
        v = tiles.read(inputs.v, key_block, tiles.keys)
        scores = tiles.scores(q, k, inputs.seen, key_block)
        new_top = jnp.maximum(top, scores.max(1))
        weights, shrink = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
        total = total * shrink + weights.sum(1)
        if tiles.rate:
            keep = tiles.keep(inputs.words, inputs.head[...], block, key_block)
            weights = jnp.where(keep, weights, 0)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v, 1, 0)
        return out, new_top, total

    start = jnp.zeros(q.shape, jnp.float32), jnp.full(BLOCK, HIDDEN), jnp.zeros(BLOCK)
    out, top, total = jax.lax.fori_loop(0, _blocks(inputs.num_keys[...]), add_keys, start)
    total = jnp.maximum(total, 1)  # as it is, unless no key at all may be seen
    tiles.write(out_ref, block, tiles.queries, out * (keep_scale(tiles.rate) / total)[:, None])
    tiles.write(lse_ref, block, tiles.queries, top + jnp.log(total))


def _query_gradient_kernel(tiles: Tiles, *refs):
    inputs, (dout_ref, lse_ref, delta_ref, dq_ref) = Inputs(*refs[:7]), refs[7:]
    block = pl.program_id(0)
    of_queries = [
        tiles.read(x, block, tiles.queries) for x in (inputs.q, dout_ref, lse_ref, delta_ref)
    ]

    def add_keys(key_block, dq):
        """The gradient of the queries after one more block of keys."""
        k = tiles.read(inputs.k, key_block, tiles.keys)
        v = tiles.read(inputs.v, key_block, tiles.keys)
        _, gradient = tiles.weight_gradients(inputs, *of_queries, k, v, block, key_block)
        return dq + _dot(gradient, k, 1, 0)

    start = jnp.zeros(of_queries[0].shape, jnp.float32)
    dq = jax.lax.fori_loop(0, _blocks(inputs.num_keys[...]), add_keys, start)
    tiles.write(dq_ref, block, tiles.queries, dq)


def _key_gradient_kernel(tiles: Tiles, *refs):
    inputs, (dout_ref, lse_ref, delta_ref, dk_ref, dv_ref) = Inputs(*refs[:7]), refs[7:]
    block = pl.program_id(0)
    k, v = (tiles.read(x, block, tiles.keys) for x in (inputs.k, inputs.v))

    def add_queries(query_block, carry):
        """The gradients of keys and values after one more block of queries."""
        dk, dv = carry
        refs = inputs.q, dout_ref, lse_ref, delta_ref
        q, dout, *sums = [tiles.read(x, query_block, tiles.queries) for x in refs]
        both = tiles.weight_gradients(inputs, q, dout, *sums, k, v, query_block, block)
        return dk + _dot(both[1], q, 0, 0), dv + _dot(both[0], dout, 0, 0)

    # None at all where no key of the block may be seen; a product, since Triton's lowering makes
    # booleans of a choice between constants
    is_seen = (block * BLOCK < inputs.num_keys[...]).astype(jnp.int32)
    num_blocks = is_seen * pl.cdiv(tiles.queries, BLOCK)
    zero = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, num_blocks, add_queries, (zero, zero))
    tiles.write(dk_ref, block, tiles.keys, dk)
    tiles.write(dv_ref, block, tiles.keys, dv)


def _blocks(count):
    return jax.lax.div(count + BLOCK - 1, BLOCK)


# Where the axes of the kernels' arrays are: b and h are one example and head, n all rows.
INPUT_AXES = "bnhd", "bnhd", "bnhd", "bn", "b", "b2", "h", "bnhd", "bnh", "bnh"
RESULT_AXES = {4: "bnhd", 3: "bnh"}


def _spec(x, axes: str) -> pl.BlockSpec:
    """What a program (block, head, example) sees of an array."""
    sizes = {
        "n": lambda n: pl.cdiv(n, BLOCK) * BLOCK,
        "d": lambda d: max(16, pl.next_power_of_2(d)),
    }
    shape = [
        None if a in "bh" else sizes.get(a, int)(n) for a, n in zip(axes, x.shape, strict=True)
    ]

    def place(_, head, example):
        return tuple({"b": example, "h": head}.get(axis, 0) for axis in axes)

    return pl.BlockSpec(shape, place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention_kernel(tiles: Tiles, q, k, v, seen, words, heads) -> jax.Array:
    """The kernel on one device; arrays are as `Inputs` says."""
    return _fused_forward(tiles, q, k, v, seen, words, heads)[0]


def _fused_forward(tiles, q, k, v, seen, words, heads):
    num_keys = (seen * jnp.arange(1, tiles.keys + 1)).max(1)  # [B]
    inputs = Inputs(q, k, v, seen, num_keys, words, heads)
    lse = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    results = tiles.run(_forward_kernel, tiles.queries, inputs, out, lse)
    out, lse = (checkpoint_name(x, SAVED) for x in results)
    return out, (inputs, out, lse)


def _fused_backward(tiles, kept, dout):
    inputs, out, lse = kept
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)  # [B, Q, H]
    q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[:3])
    inputs = (*inputs, dout, lse, delta)
    (dq,) = tiles.run(_query_gradient_kernel, tiles.queries, inputs, q)
    dk, dv = tiles.run(_key_gradient_kernel, tiles.keys, inputs, k, v)
    return dq, dk, dv, None, None, None


attention_kernel.defvjp(_fused_forward, _fused_backward)
