"""The autoregressive sampler: what a sample may and may not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled_params
from flax import nnx
from tiny import tiny_config

from djepa_jax.core import sharding
from djepa_jax.core.models.djepa import split_model
from djepa_jax.core.sampler import (
    Draws,
    Known,
    SampleInputs,
    make_draws,
    make_sampler,
    run_steps,
)
from djepa_jax.core.schedules import reveal_counts
from djepa_jax.core.segments import plan_segments
from djepa_jax.sampling.generator import Generator

LABELS = np.arange(10) % 10


def filled(variant: str):
    """A tiny model with every parameter filled, so that no output is constant."""
    experiment = tiny_config("--config.sample.cfg_scale=2.0", variant=variant)
    return experiment, filled_params(experiment.network)


@pytest.fixture(scope="module")
def setup():
    """With one loss: the loop is that of all, whose samplers tests of the losses know."""
    return filled("flow")


@pytest.fixture(scope="module", params=["flow", "diffusion"])
def either(request):
    """With noise at the start alone, and at every step."""
    return filled(request.param)


def generate(setup, batch_size, devices=1, seed=0, labels=LABELS, **sample):
    experiment, params = setup
    changes = {f"sample.{key}": value for key, value in sample.items()}
    experiment = experiment.updated({"sample.batch_size": batch_size} | changes)
    mesh = sharding.make_mesh((-1, 1, 1), jax.devices()[:devices])
    return Generator(experiment, mesh).tokens(params, labels, seed)


def test_a_sample_depends_on_neither_batch_size_nor_devices_nor_segments(either):
    reference = generate(either, batch_size=10)
    for change in ({"batch_size": 4}, {"devices": 8, "batch_size": 16, "num_segments": 3}):
        found = generate(either, **{"batch_size": 10} | change)
        np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-4, err_msg=str(change))


def test_seed_and_label_and_index_matter(setup):
    reference = generate(setup, 10)
    assert np.abs(generate(setup, 10, seed=1) - reference).max() > 0.01
    same_label = generate(setup, 10, labels=np.zeros(10, int))
    assert np.abs(same_label[0] - same_label[1]).max() > 0.01
    assert np.abs(same_label[5] - reference[5]).max() > 1e-3, "sample 5 was asked for another class"
    np.testing.assert_allclose(same_label[0], reference[0], rtol=1e-4, atol=1e-4)


def test_guidance_of_one_equals_no_guidance(setup):
    experiment, params = setup
    free = jax.jit(make_sampler(dataclasses.replace(experiment.sampler, guided=False)))
    paired = jax.jit(make_sampler(experiment.sampler))
    inputs = SampleInputs(jnp.arange(4), jnp.arange(4), 0, jnp.ones(3), 1.0)
    np.testing.assert_allclose(free(params, inputs), paired(params, inputs), rtol=1e-4, atol=1e-4)


class Counting:
    """A token loss whose sample is its noise, so that the noise's place can be read off it."""

    noises_per_token, denoiser_calls, out_per_channel = 1, 1, 1

    def sample(self, denoiser, cond, noise, cfg_scale, temperature):
        return noise[..., 0, :]


def with_steps(num_ar_steps: int, num_segments: int):
    changes = {"sample.num_ar_steps": num_ar_steps, "sample.num_segments": num_segments}
    return tiny_config().updated(changes).sampler


def test_every_token_is_revealed_exactly_once():
    """With a token loss that answers "my place", each place shows up once, in its place."""
    for num_ar_steps, num_segments in ((1, 1), (2, 4), (5, 1), (5, 4), (16, 4)):
        config = with_steps(num_ar_steps, num_segments)
        config = dataclasses.replace(config, token_loss=Counting(), guided=False)
        graph, abstract = split_model(config.model)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
        dim = config.model.token_dim

        def noise_of(places, dim=dim):
            return jnp.broadcast_to((places + 1.0)[None, :, None, None], (9, len(places), 1, dim))

        @jax.jit
        def tokens_of(params, order, config=config, graph=graph, noise_of=noise_of):
            steps = jnp.ones(config.num_ar_steps)
            draws, labels = Draws(order, noise_of), jnp.zeros(9, int)
            return run_steps(config, nnx.merge(graph, params), draws, labels, steps, 1.0)

        order = make_draws(config, 0, jnp.arange(9)).order
        in_order = np.take_along_axis(
            np.asarray(tokens_of(params, order)[..., 0]), np.asarray(order), axis=1
        )
        np.testing.assert_array_equal(in_order, np.broadcast_to(np.arange(1, 17), (9, 16)))


@pytest.mark.parametrize("num_known", [0, 7, 15])
def test_known_tokens_stay_and_all_others_are_drawn(num_known):
    """Each sample knows other places, and a token loss answers the place in the order."""
    config = dataclasses.replace(with_steps(1, 4), token_loss=Counting(), guided=False)
    config = dataclasses.replace(config, num_known=num_known)
    keys = jax.random.split(jax.random.key(0), 5)
    mask = jax.vmap(lambda key: jax.random.permutation(key, 16) < num_known)(keys)  # [5, 16]
    given = jax.random.normal(keys[0], (5, 16, config.model.token_dim))
    known = Known(jnp.where(mask[..., None], given, jnp.nan), mask)
    draws = make_draws(config, 0, jnp.arange(5), known)
    assert (np.sort(draws.order, axis=1) == np.arange(16)).all()
    plain = np.asarray(make_draws(config, 0, jnp.arange(5)).order)
    hidden = ~np.take_along_axis(np.asarray(mask), plain, axis=1)
    for mine, others, keep in zip(draws.order, plain, hidden, strict=True):
        np.testing.assert_array_equal(mine[num_known:], others[keep])  # in the order of the rule

    def noise_of(places):
        shape = (5, len(places), 1, config.model.token_dim)
        return jnp.broadcast_to((places + 100.0)[None, :, None, None], shape)

    graph, abstract = split_model(config.model)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    run = jax.jit(lambda params, known: run_steps(
        config, nnx.merge(graph, params), Draws(draws.order, noise_of), jnp.zeros(5, int),
        jnp.ones(1), 1.0, known,
    ))  # fmt: skip
    tokens = np.asarray(run(params, known))
    mask = np.asarray(mask)
    np.testing.assert_array_equal(tokens[mask], np.asarray(given)[mask])
    drawn = np.sort(tokens[..., 0][~mask].reshape(5, -1), axis=1)
    np.testing.assert_array_equal(drawn, np.tile(np.arange(num_known, 16) + 100, (5, 1)))


def test_every_region_has_a_condition_of_its_own(setup):
    """In a single step tokens do not see each other: the two halves are those of two whole samples.
    Over several steps they do; with one condition everywhere regions change nothing.
    """
    experiment, params = setup
    left = np.arange(16) % 4 < 2
    regions = tuple(np.where(left, 0, 1).tolist())
    ids, seed = jnp.arange(3), jnp.int32(5)

    def tokens(steps, labels, regions=()):
        config = experiment.updated({"sample.num_ar_steps": steps}).sampler
        config = dataclasses.replace(config, regions=regions)
        scales, labels = jnp.full(steps, 2.0), jnp.asarray(labels)
        inputs = SampleInputs(labels, ids, seed, scales, jnp.float32(1))
        return np.asarray(jax.jit(make_sampler(config))(params, inputs))

    both = tokens(1, [[3, 7]] * 3, regions)
    three, seven = tokens(1, [3] * 3), tokens(1, [7] * 3)
    assert np.abs(three - seven).max() > 1e-3
    expected = np.where(left[:, None], three, seven)
    np.testing.assert_allclose(both, expected, rtol=1e-4, atol=1e-4)
    same = tokens(3, [[3, 3]] * 3, regions)
    np.testing.assert_allclose(same, tokens(3, [3] * 3), rtol=1e-4, atol=1e-4)


def test_segments_cover_every_step_with_room_enough():
    for num_ar_steps, num_segments in ((1, 8), (3, 2), (16, 8), (16, 100)):
        segments = plan_segments(with_steps(num_ar_steps, num_segments))
        counts = reveal_counts(16, num_ar_steps)
        assert len(segments) <= num_segments
        assert [s.start for s in segments] == [0] + [s.stop for s in segments[:-1]]
        assert segments[-1].stop == num_ar_steps
        for segment in segments:
            for step in range(segment.start, segment.stop):
                assert counts[step] <= segment.new and sum(counts[:step]) <= segment.visible


def test_orders_are_permutations_and_differ():
    order = make_draws(tiny_config().sampler, 0, jnp.arange(50)).order
    assert (np.sort(order, axis=1) == np.arange(16)).all()
    assert len({tuple(row) for row in np.asarray(order)}) == 50


def test_steps_without_guidance_leave_the_null_half_out(setup):
    """An interval cuts segments, changes no draw, and gives what scales of 1 give."""
    experiment, params = setup
    config = experiment.updated({"sample.num_ar_steps": 4, "sample.num_segments": 4}).sampler
    part = dataclasses.replace(config, cfg_interval=(0.5, 1.0))
    assert [s.halves == 2 for s in plan_segments(part) for _ in range(s.start, s.stop)] == [
        False, False, True, True,
    ]  # fmt: skip
    scales = part.guidance(2.0, "constant")
    np.testing.assert_array_equal(scales, [1, 1, 2, 2])
    inputs = SampleInputs(jnp.arange(4), jnp.arange(4), 0, scales, 1.0)
    expected = jax.jit(make_sampler(config))(params, inputs)
    found = jax.jit(make_sampler(part))(params, inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_denoising_steps_fall_from_segment_to_segment(either):
    experiment, params = either
    changes = {"num_ar_steps": 3, "num_segments": 3, "num_denoise_steps": 6}
    changes |= {"final_denoise_steps": 2, "sampler": type(experiment.token_loss).samplers[0]}
    config = experiment.updated({f"sample.{key}": value for key, value in changes.items()}).sampler
    assert [config.loss_at(step).num_denoise_steps for step in range(3)] == [6, 4, 2]
    calls = [config.loss_at(s.start).denoiser_calls for s in plan_segments(config)]
    assert [s.denoiser_calls for s in plan_segments(config)] == calls
    inputs = SampleInputs(jnp.arange(4), jnp.arange(4), 0, jnp.ones(3), 1.0)
    tokens = jax.jit(make_sampler(config))(params, inputs)
    same = dataclasses.replace(config, final_denoise_steps=0)
    before = jax.jit(make_sampler(same))(params, inputs)
    first = make_draws(config, 0, jnp.arange(4)).order[:, : config.counts[0]]
    pick = lambda x: np.take_along_axis(np.asarray(x), np.asarray(first)[..., None], 1)  # noqa: E731
    np.testing.assert_allclose(pick(tokens), pick(before), rtol=1e-4, atol=1e-4)
    assert np.isfinite(tokens).all() and np.abs(tokens - before).max() > 1e-3
