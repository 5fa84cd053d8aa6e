"""What orders, reveal counts and guidance scales mean."""

import math

import jax
import numpy as np
import pytest

from djepa_jax.core.schedules import ORDERS, guidance_scales, reveal_counts


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_names_every_place_once(name):
    order = np.asarray(ORDERS[name](jax.random.key(0), (3, 5)))
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(15))


def test_reveal_counts_sum_and_are_positive():
    for tokens in (1, 2, 3, 16, 49, 64, 256, 1024):
        for steps in {1, 2, 3, tokens // 4, tokens // 2, tokens - 1, tokens}:
            if 1 <= steps <= tokens:
                counts = reveal_counts(tokens, steps)
                assert len(counts) == steps and sum(counts) == tokens and min(counts) >= 1


def test_reveal_counts_follow_the_cosine():
    hidden = 256 - np.cumsum(reveal_counts(256, 8))
    expected = [math.floor(256 * math.cos(math.pi / 2 * (s + 1) / 8)) for s in range(7)]
    np.testing.assert_array_equal(hidden, [*expected, 0])


@pytest.mark.parametrize("steps", [0, -1, 17])
def test_reveal_counts_refuse_too_few_and_too_many_steps(steps):
    with pytest.raises(ValueError, match=f"num_ar_steps is {steps}"):
        reveal_counts(16, steps)


def test_guidance_scales():
    np.testing.assert_array_equal(
        guidance_scales(16, 4, 2.5, "constant"), np.full(4, 2.5, np.float32)
    )
    np.testing.assert_array_equal(guidance_scales(16, 4, 1.0, "linear"), np.ones(4, np.float32))
    linear = guidance_scales(16, 4, 3.0, "linear")
    assert linear.dtype == np.float32 and (np.diff(linear) > 0).all()
    np.testing.assert_allclose(
        linear[-1], 1 + 2 * 15 / 16
    )  # one token counts as hidden in the last step
    with pytest.raises(ValueError, match="num_ar_steps"):
        guidance_scales(16, 17, 3.0, "linear")


def test_known_tokens_count_as_revealed_for_guidance():
    linear = guidance_scales(16, 4, 3.0, "linear", num_known=8)
    hidden = 8 - np.cumsum(reveal_counts(8, 4))
    hidden[-1] = 1
    np.testing.assert_allclose(linear, 1 + 2 * (16 - hidden) / 16, rtol=1e-6)
