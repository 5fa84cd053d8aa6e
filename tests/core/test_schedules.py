"""What orders, reveal counts and guidance scales mean."""

import math

import jax
import numpy as np
import pytest

from djepa_jax.core.schedules import (
    ORDERS,
    REVEALS,
    falling_steps,
    guidance_scales,
    halton_places,
    reveal_counts,
)


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
        guidance_scales(reveal_counts(16, 4), 2.5, "constant"), np.full(4, 2.5, np.float32)
    )
    np.testing.assert_array_equal(
        guidance_scales(reveal_counts(16, 4), 1.0, "linear"), np.ones(4, np.float32)
    )
    linear = guidance_scales(reveal_counts(16, 4), 3.0, "linear")
    assert linear.dtype == np.float32 and (np.diff(linear) > 0).all()
    np.testing.assert_allclose(
        linear[-1], 1 + 2 * 15 / 16
    )  # one token counts as hidden in the last step


def test_known_tokens_count_as_revealed_for_guidance():
    linear = guidance_scales(reveal_counts(8, 4), 3.0, "linear", num_known=8)
    hidden = 8 - np.cumsum(reveal_counts(8, 4))
    hidden[-1] = 1
    np.testing.assert_allclose(linear, 1 + 2 * (16 - hidden) / 16, rtol=1e-6)


@pytest.mark.parametrize("grid", [(16, 16), (7, 5), (1, 1), (9,), (4, 6, 5)])
@pytest.mark.parametrize("name", ORDERS)
def test_orders_are_permutations(name, grid):
    draw = jax.jit(jax.vmap(lambda key: ORDERS[name](key, grid)))
    orders = np.asarray(draw(jax.random.split(jax.random.key(0), 3)))
    assert orders.dtype == np.int32
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(math.prod(grid)), (3, 1)))
    if math.prod(grid) > 30 and name != "raster":
        assert (orders[0] != orders[1]).any(), "samples differ"


def test_each_order_is_what_it_says():
    key, grid = jax.random.key(1), (8, 8)
    orders = jax.jit(lambda key: {name: ORDERS[name](key, grid) for name in ORDERS})(key)
    orders = jax.device_get(orders)
    rows, columns = np.divmod(orders["checkerboard"], 8)
    np.testing.assert_array_equal((rows + columns) % 2, np.repeat([0, 1], 32))
    np.testing.assert_array_equal(orders["frame_causal"] // 8, np.repeat(np.arange(8), 8))
    np.testing.assert_array_equal(orders["raster"], np.arange(64))
    frames = orders["ends"] // 8
    np.testing.assert_array_equal(np.minimum(frames, 7 - frames), np.repeat(np.arange(4), 16))

    def nearest(order):  # mean distance of the first quarter's places to their nearest, wrapping
        places = np.stack(np.divmod(order[:16], 8), 1)
        apart = np.abs(places[:, None] - places[None])
        apart = np.minimum(apart, 8 - apart)
        distance = np.sqrt(np.square(apart).sum(-1)) + 99 * np.eye(16)
        return distance.min(1).mean()

    assert nearest(orders["blue_noise"]) > nearest(orders["halton"]) > nearest(orders["random"])


def test_the_halton_sequence_is_the_published_one():
    """Bases 2 and 3: 1/2 1/3, 1/4 2/3, 3/4 1/9, ... (Halton 1960), here after the origin."""
    first = halton_places((100, 100))[:5]
    np.testing.assert_array_equal(first, [[0, 0], [50, 33], [25, 66], [75, 11], [12, 44]])


def test_outside_its_interval_there_is_no_guidance():
    counts = reveal_counts(16, 8)
    whole = guidance_scales(counts, 3.0, "linear")
    part = guidance_scales(counts, 3.0, "linear", interval=(0.25, 0.75))
    np.testing.assert_array_equal(
        part, np.where((np.arange(8) >= 2) & (np.arange(8) < 6), whole, 1)
    )
    assert (guidance_scales(counts, 3.0, "constant", interval=(0.5, 0.5)) == 1).all()


@pytest.mark.parametrize("name", REVEALS)
def test_every_rule_reveals_all_tokens_in_as_many_steps_as_asked_for(name):
    for tokens in (1, 2, 5, 16, 49):
        for steps in range(1, tokens + 1):
            counts = reveal_counts(tokens, steps, name)
            assert len(counts) == steps and sum(counts) == tokens and min(counts) >= 1


def test_halves_reveal_the_second_half_in_a_quarter_of_the_steps():
    counts = reveal_counts(64, 16, "halves")
    assert sum(counts[:12]) == 32 == sum(counts[12:])


def test_denoising_steps_fall_on_a_line():
    assert falling_steps(5, 50, 10) == [50, 40, 30, 20, 10]
    assert falling_steps(3, 50, 0) == [50, 50, 50] and falling_steps(1, 50, 5) == [50]
