"""What orders, ratios and packing mean, apart from any recorded numbers."""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djepa_jax.core import masking
from djepa_jax.core.masking import MaskingConfig

NORMAL = statistics.NormalDist()
PLANS = {
    "example": MaskingConfig(256, 32, group_size=1),
    "group of 32": MaskingConfig(256, 64, group_size=32),
    "batch": MaskingConfig(256, 16, group_size=16),
}
GROUPED = dict.fromkeys((b, g) for b in (8, 32, 96, 128) for g in (1, 4, 32, b) if b % g == 0)


@functools.cache
def draw_many(*plans: MaskingConfig, seeds: int = 4096) -> list[np.ndarray]:
    """Masked tokens of every example under many seeds, `[seeds, B]` for each plan; one
    compilation.
    """
    draw = jax.jit(jax.vmap(lambda key: [masking.draw_num_visible(key, plan) for plan in plans]))
    drawn = draw(jax.random.split(jax.random.key(7), seeds))
    return [
        plan.num_tokens - np.asarray(visible) for plan, visible in zip(plans, drawn, strict=True)
    ]


def truncated_cdf(x, low=0.7, high=1.0, mean=1.0, std=0.25):
    """Distribution function of the cut normal, from its definition."""
    at_low, at_high = (NORMAL.cdf((edge - mean) / std) for edge in (low, high))
    return (NORMAL.cdf((x - mean) / std) - at_low) / (at_high - at_low)


def test_orders_are_uniform_permutations():
    batch, tokens = 4096, 8
    order = np.asarray(masking.draw_orders(jax.random.key(0), batch, tokens))
    np.testing.assert_array_equal(
        np.sort(order, axis=-1), np.broadcast_to(np.arange(tokens), order.shape)
    )
    counts = np.stack([(order == token).sum(0) for token in range(tokens)])  # [token, place]
    chi_square = np.square(counts - batch / tokens).sum() / (batch / tokens)
    freedom = (tokens - 1) ** 2
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)
    # Neighbours: every token follows every other equally often.
    pairs = np.bincount(
        (order[:, :-1] * tokens + order[:, 1:]).ravel(), minlength=tokens**2
    ).reshape(tokens, tokens)
    assert np.diagonal(pairs).sum() == 0
    expected = batch * (tokens - 1) / (tokens * (tokens - 1))
    assert np.abs(pairs[~np.eye(tokens, dtype=bool)] - expected).max() < 5 * math.sqrt(expected)


def test_order_and_raster_are_inverse():
    order = masking.draw_orders(jax.random.key(1), 3, 7)
    tokens = jax.random.normal(jax.random.key(2), (3, 7, 2))
    ordered = masking.to_order(tokens, order)
    np.testing.assert_array_equal(ordered[1, 4], tokens[1, order[1, 4]])
    np.testing.assert_array_equal(masking.to_raster(ordered, order), tokens)
    np.testing.assert_array_equal(masking.to_order(masking.to_raster(tokens, order), order), tokens)


@pytest.mark.parametrize("name", PLANS)
def test_ratios_follow_the_cut_normal(name):
    """Any one example has exactly that distribution, however the batch is stratified."""
    plan = PLANS[name]
    [masked] = draw_many(plan)
    seeds = len(masked)
    assert (
        masked.min() >= math.ceil(0.7 * plan.num_tokens - 1e-6) and masked.max() <= plan.num_tokens
    )
    counts = np.arange(plan.num_tokens + 1)
    expected = np.array([np.clip(truncated_cdf(m / plan.num_tokens), 0, 1) for m in counts])
    for example in (0, plan.batch_size - 1):
        seen = (masked[:, example, None] <= counts).mean(0)
        assert np.abs(seen - expected).max() < 1.95 / math.sqrt(
            seeds
        )  # Kolmogorov and Smirnov, p = 0.001
    # Mean: mu + sigma (phi(a) - phi(b)) / (Phi(b) - Phi(a)), and half a token more for rounding up.
    a, b = (0.7 - 1) / 0.25, 0.0
    mean = 1 + 0.25 * (NORMAL.pdf(a) - NORMAL.pdf(b)) / (NORMAL.cdf(b) - NORMAL.cdf(a))
    deviation = masked.mean(1).std() / math.sqrt(seeds)
    assert abs(masked.mean() - (plan.num_tokens * mean + 0.5)) < 4 * deviation + 0.02


@pytest.mark.parametrize("name", PLANS)
def test_groups_share_and_strata_spread(name):
    """All examples of a group have one ratio, and each stratum of a chunk holds exactly one
    group.
    """
    plan = PLANS[name]
    groups = draw_many(plan)[0].reshape(4096, -1, plan.group_size)
    assert (groups == groups[..., :1]).all()
    strata = plan.pack_size // plan.group_size
    ranked = np.sort(groups[..., 0].reshape(4096, -1, strata), axis=-1)
    for i in range(strata):
        upper = plan.masked_at((i + 1) / strata, slack=1e-3)
        lower = plan.masked_at(i / strata, slack=-1e-3)
        assert (ranked[..., i] >= lower).all() and (ranked[..., i] <= upper).all()
    if strata > 1:  # which example is in which stratum is drawn anew
        assert len({tuple(row) for row in np.argsort(groups[:, :, 0], axis=-1).tolist()}) > 1


def both_sizes(batch: int, group: int) -> list[MaskingConfig]:
    return [MaskingConfig(tokens, batch, group_size=group) for tokens in (16, 256)]


@pytest.mark.parametrize("batch, group", GROUPED)
def test_packed_rows_hold_every_draw(batch, group):
    plans = both_sizes(batch, group)
    for plan, masked in zip(plans, draw_many(*plans, seeds=1024), strict=True):
        assert batch % plan.pack_size == 0 and plan.pack_size % group == 0
        per_chunk = masked.reshape(-1, plan.pack_size).sum(-1)
        assert per_chunk.max() <= plan.packed_rows <= plan.pack_size * plan.num_tokens
        assert (plan.num_tokens - masked).max() <= plan.max_visible
        strata = plan.pack_size // group
        waste = plan.packed_rows - per_chunk.mean()
        assert waste <= group * (
            0.3 * plan.num_tokens + 2 * strata
        )  # one stratum's worth of rows, and rounding


@pytest.mark.parametrize("batch, group", GROUPED)
def test_sorted_packs_fit_the_lengths(batch, group):
    """Every draw, and they leave out half of the padding where ratios are many."""
    plans = both_sizes(batch, group)
    plan, masked = plans[1], draw_many(*plans, seeds=1024)[1]
    shown = np.asarray(256 - masked).reshape(1024, -1, plan.pack_size)
    shown = -np.sort(-shown, axis=-1)
    limits = np.concatenate([np.full(count, most) for count, most in plan.lengths])
    assert len(limits) == plan.pack_size and (shown <= limits).all()
    if batch // group >= 32:
        assert plan.max_visible - limits.mean() > (plan.max_visible - shown.mean()) / 2


def test_sorting_keeps_examples_together():
    plan = MaskingConfig(16, 8, group_size=1)
    draw = jax.jit(masking.draw_num_visible, static_argnums=1)
    num_visible = draw(jax.random.key(5), plan)
    examples = {
        "shown": num_visible,
        "id": jnp.arange(8),
        "key": jax.random.split(jax.random.key(0), 8),
    }
    found = jax.jit(functools.partial(masking.sort_packs, config=plan))(examples, num_visible)
    shown, ids = np.asarray(found["shown"]), np.asarray(found["id"])
    packs = shown.reshape(-1, plan.pack_size)
    assert (np.diff(packs, axis=-1) <= 0).all()
    np.testing.assert_array_equal(shown, np.asarray(num_visible)[ids])
    assert (found["key"] == examples["key"][ids]).all()
    assert (ids.reshape(packs.shape) // plan.pack_size == np.arange(len(packs))[:, None]).all()


@pytest.mark.parametrize("ratio_min", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("end", [0.0, 1 - 2**-24])
def test_packed_rows_hold_the_most_extreme_draw(monkeypatch, ratio_min, end):
    """Every uniform number at the end of its range, which no number of seeds would show."""
    monkeypatch.setattr(
        masking.jax.random, "uniform", lambda key, shape: jnp.full(shape, end, jnp.float32)
    )
    for batch, tokens, group in ((32, 256, 1), (8, 16, 4), (96, 250, 1)):
        plan = MaskingConfig(tokens, batch, ratio_min=ratio_min, group_size=group)
        draw = jax.jit(functools.partial(masking.draw_num_visible, config=plan))
        num_visible = np.asarray(draw(jax.random.key(0)))
        assert num_visible.min() >= 0 and num_visible.max() <= plan.max_visible
        assert (tokens - num_visible).reshape(-1, plan.pack_size).sum(-1).max() <= plan.packed_rows
        limits = np.concatenate([np.full(count, most) for count, most in plan.lengths])
        assert (-np.sort(-num_visible.reshape(-1, plan.pack_size)) <= limits).all()


def test_masked_weights_closed_form():
    plan = MaskingConfig(num_tokens=10, batch_size=4, ratio_min=0.5, group_size=2)
    weights = masking.masked_weights(jnp.array([1, 1, 4, 4]), plan)
    expected = np.zeros((4, 10), np.float32)
    expected[:2, 1:] = 1 / (2 * 18)  # two groups; 18 masked tokens in the first, 12 in the second
    expected[2:, 4:] = 1 / (2 * 12)
    np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch, tokens, group", [(8, 16, 1), (8, 16, 4), (8, 16, 8), (96, 16, 1)])
def test_packing_picks_every_masked_row_once(batch, tokens, group):
    plan = MaskingConfig(tokens, batch, group_size=group)
    rows = jnp.arange(batch * tokens).reshape(batch, tokens)

    @jax.jit
    def run(key):
        num_visible = masking.draw_num_visible(key, plan)
        pack, weights = (
            masking.pack_masked(num_visible, plan),
            masking.masked_weights(num_visible, plan),
        )
        features = jnp.stack([rows, -rows], axis=-1)
        return num_visible, pack(rows), pack(weights), pack(features), weights

    for seed in range(5):
        num_visible, picked, weights, features, all_weights = map(
            np.asarray, run(jax.random.key(seed))
        )
        assert picked.shape == (batch // plan.pack_size, plan.packed_rows) == weights.shape
        masked = np.asarray(rows)[np.arange(tokens) >= num_visible[:, None]]
        assert len(np.unique(picked)) == picked.size
        np.testing.assert_array_equal(np.sort(picked[weights > 0]), masked)
        pack_of_row = picked // (tokens * plan.pack_size)
        np.testing.assert_array_equal(
            pack_of_row, np.broadcast_to(np.arange(len(picked))[:, None], picked.shape)
        )
        np.testing.assert_array_equal(weights, all_weights.ravel()[picked])
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
        np.testing.assert_array_equal(features, np.stack([picked, -picked], axis=-1))


@pytest.mark.parametrize(
    "ratio, group, name",
    [(0.0, 1, "ratio_min"), (1.1, 1, "ratio_min"), (0.7, 3, "mask_group")],
)
def test_impossible_plans_are_refused(ratio, group, name):
    with pytest.raises(ValueError, match=name):
        MaskingConfig(16, 8, ratio_min=ratio, group_size=group)


def test_orders_of_several_rules_come_in_their_shares():
    modes = (("frame_causal", 0.25), ("raster", 0.75))
    orders = np.asarray(masking.draw_mixed_orders(jax.random.key(0), 4000, (4, 3), modes))
    assert orders.shape == (4000, 12)
    np.testing.assert_array_equal(orders // 3, np.repeat(np.tile(np.arange(4), (4000, 1)), 3, 1))
    raster = (orders == np.arange(12)).all(1)
    assert abs(raster.mean() - 0.75) < 0.03
    assert len({tuple(order) for order in orders[~raster]}) > 400, "each example draws its own"
