"""Dropout's bits: exact functions of key and place, with the statistics of independent draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djepa_jax.core.models.dropout import (
    dropout,
    hash_bits,
    keep_mask,
    keep_scale,
    key_words,
    row_major_index,
    scramble,
    split_keys,
)


def masks(key, rate=0.25, shape=(4, 64, 64), batch=16, layers=3) -> np.ndarray:
    """What is dropped in some layers: 1 or 0, `[L, B, H, Q, S]`."""

    @jax.jit
    def dropped(key):
        keys, ones = split_keys(jax.random.split(key, batch), layers), jnp.ones((batch, *shape))
        return jnp.stack([dropout(ones, rate, layer) == 0 for layer in keys])

    return np.asarray(dropped(key)) * 1.0


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_masks_are_independent(impl):
    """Rate, and correlation along every axis, of neighbours and of those far apart."""
    dropped = masks(jax.random.key(5, impl=impl))
    rate, size = 0.25, dropped.size
    assert abs(dropped.mean() - rate) < 4 * (rate * (1 - rate) / size) ** 0.5
    centred = (dropped - rate) / (rate * (1 - rate)) ** 0.5
    for axis in range(dropped.ndim):
        for step in (1, 2, dropped.shape[axis] // 2):
            product = centred * np.roll(centred, step, axis)
            assert abs(product.mean()) < 5 / size**0.5, (axis, step)
    per_row = dropped.mean((0, 1, 4))  # no place is favoured
    assert abs(per_row.std() / (rate * (1 - rate) / (3 * 16 * 64)) ** 0.5 - 1) < 0.2


def test_bits_are_balanced():
    """Each of the 32 bits, and each pair of neighbours, for keys that differ in one bit."""
    index = row_major_index((1 << 15,))
    words = [(0, 0), (1, 0), (0, 1), (0, 1 << 31)]
    words = scramble(jnp.asarray(words, jnp.uint32))
    bits = np.stack([np.asarray(hash_bits(pair, index)) for pair in words])
    each = bits[..., None] >> np.arange(32) & 1  # [4, n, 32]
    bound = 4.5 / (2 * index.size**0.5)
    assert np.abs(each.mean(1) - 0.5).max() < bound
    assert np.abs((each[..., 1:] ^ each[..., :-1]).mean(1) - 0.5).max() < bound
    assert np.abs((each[1:] ^ each[:1]).mean(1) - 0.5).max() < bound
    assert len(np.unique(bits[0])) == index.size, "a bijection"


def test_an_example_drops_the_same_wherever_it_stands():
    x = jnp.ones((6, 5, 7))
    keys = jax.random.split(jax.random.key(1), 6)
    drop = jax.jit(dropout, static_argnums=1)
    whole = np.asarray(drop(x, 0.4, keys))
    order = jnp.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_array_equal(drop(x, 0.4, keys[order]), whole[order])
    np.testing.assert_array_equal(drop(x[:2], 0.4, keys[3:5]), whole[3:5])

    @jax.jit
    def kept(keys):
        words = key_words(keys)[:, :, None, None].swapaxes(0, 1)
        return keep_mask(words, row_major_index((5, 7)), 0.4)

    np.testing.assert_array_equal(kept(keys), whole != 0)


def test_scale_and_gradient():
    """Kept values grow by one over their exact probability, in bfloat16 too; the gradient is cut
    by the same mask.
    """
    keys = jax.random.split(jax.random.key(1), 3)
    x = jnp.full((3, 50), 3, jnp.bfloat16)

    @jax.jit
    def both(x):
        kept, pull = jax.vjp(lambda x: dropout(x, 0.1, keys), x)
        return kept, pull(x)[0]

    kept, gradient = both(x)
    assert kept.dtype == jnp.bfloat16
    assert set(np.unique(kept)) == {0, np.float32(jnp.bfloat16(3 * keep_scale(0.1)))}
    np.testing.assert_array_equal(gradient, kept)
    assert keep_scale(0.1) == pytest.approx(1 / 0.9, rel=1e-9) and keep_scale(0.5) == 2
    assert np.isfinite(keep_scale(1 - 1e-12))
