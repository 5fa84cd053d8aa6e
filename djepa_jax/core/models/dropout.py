"""Dropout whose mask is a function of an example's key and of the element's place in the example.

Bits are a hash of (key, place) instead of a draw from JAX's generators: 14 integer operations in
place of 120. A mask is drawn again in the backward pass rather than kept, in the registers of
whatever loop needs it, and a kernel of attention draws the same one block by block. One hash makes
one element: two of 16 bits would halve the operations, but loops would have to share results.
"""

import functools

import jax
import jax.numpy as jnp


def dropout(
    x: jax.Array, rate: float, keys: jax.Array | None, sizes: tuple[int, ...] | None = None
) -> jax.Array:
    """Zero a share `rate` of `x` `[B, ...]` and scale the rest up; does nothing without keys `[B]`.

    The mask of an example is a function of its own key, the same in any part of a batch. It is a
    part of the mask of an example of `sizes`, its own by default.
    """
    if keys is None or rate == 0.0:
        return x
    words = key_words(keys).reshape(len(x), *(1,) * (x.ndim - 1), 2)
    return _dropout(rate, sizes or x.shape[1:], x, words, jnp.uint32(0))


def dropout_rows(x: jax.Array, rate: float, words: jax.Array, places: jax.Array) -> jax.Array:
    """`dropout` of rows `[..., D]`: each is at one of the `places` `[...]` of its example.

    Args:
        x: rows, of any examples in any order.
        rate: share that becomes zero.
        words: `key_words` of the example of each row, `[..., 2]`.
        places: uint32, numbers of the rows in their examples.
    """
    start = places[..., None] * jnp.uint32(x.shape[-1])  # [..., 1]
    return _dropout(rate, x.shape[-1:], x, words[..., None, :], start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dropout(rate: float, sizes: tuple[int, ...], x: jax.Array, words: jax.Array, start):
    """`sizes` are of the last axes; the numbers of their elements begin at `start`."""
    index = start + row_major_index(x.shape[-len(sizes) :], sizes)
    keep = keep_mask((words[..., 0], words[..., 1]), index, rate)
    # A factor and no choice between x and 0, since scans keep that many zeros in memory and read
    # them in every layer
    factor = keep.astype(jnp.float32) * keep_scale(rate)
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _dropout_forward(rate, sizes, x, words, start):
    return _dropout(rate, sizes, x, words, start), (words, start)


def _dropout_backward(rate, sizes, inputs, gradient):
    return _dropout(rate, sizes, gradient, *inputs), None, None  # linear: its own transpose


_dropout.defvjp(_dropout_forward, _dropout_backward)


def split_keys(keys: jax.Array | None, count: int) -> jax.Array | tuple:
    """Keys of examples `[B]` -> `[count, B]`; no keys stay none."""
    if keys is None:
        return (None,) * count
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def key_words(keys: jax.Array) -> jax.Array:
    """64 bits of each key, of whatever generator: `[B]` -> uint32 `[B, 2]`."""
    return scramble(jax.random.key_data(keys)[..., :2])


def scramble(words: jax.Array) -> jax.Array:
    """Uint32 that are alike, as keys of some generators, become ones that are not."""
    return hash_bits((jnp.uint32(0), jnp.uint32(0)), words)


def row_major_index(shape: tuple[int, ...], sizes: tuple[int, ...] | None = None) -> jax.Array:
    """For every element of a `shape` its flat index in an array of `sizes`, uint32."""
    index = jnp.uint32(0)
    for axis, size in enumerate(sizes or shape):  # no reshaped iota: meshes could not split it
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def weight_places(num_keys: int) -> int:
    """Queries and keys in the numbering of attention weights: the same however much is padded."""
    return max(4096, num_keys)


def keep_mask(words, index: jax.Array, rate: float) -> jax.Array:
    """True at a share 1 - `rate` of uint32 `index`; `words` are the two of a key."""
    return hash_bits(words, index) >= jnp.uint32(_threshold(rate))


def keep_scale(rate: float) -> float:
    """One over the exact probability of True in `keep_mask`."""
    return 1 / (1 - _threshold(rate) / 2**32)


def _threshold(rate: float) -> int:
    return min(round(rate * 2**32), 2**32 - 1)


def hash_bits(words, index: jax.Array) -> jax.Array:
    """32 random bits for every uint32 `index`: a bijection of it for any two `words` of a key.

    The finaliser "triple32", in which every bit of the input flips each of the output half the
    time; the second word comes in between, so that two keys have no mask in common.
    """
    bits = index ^ words[0]
    bits = (bits ^ (bits >> 17)) * jnp.uint32(0xED5AD4BB) ^ words[1]
    bits = (bits ^ (bits >> 11)) * jnp.uint32(0xAC4C1B51)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x31848BAB)
    return bits ^ (bits >> 14)
