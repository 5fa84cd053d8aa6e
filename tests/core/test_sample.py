"""The autoregressive sampler: what a sample may and may not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from djepa_jax.sampling.sample_to_npz.generator import Generator
from tiny import tiny_config

from djepa_jax.core import sharding
from djepa_jax.core.models.djepa import init_params
from djepa_jax.core.sampler import (
    Draws,
    SampleInputs,
    make_draws,
    make_sampler,
    plan_segments,
    run_steps,
)
from djepa_jax.core.schedules import reveal_counts

LABELS = np.arange(10) % 10


@pytest.fixture(scope="module", params=["flow", "diffusion"])
def setup(request):
    """A tiny model with every parameter filled, so that no output is constant."""
    experiment = tiny_config("--config.sample.cfg_scale=2.0", variant=request.param)
    params = jax.jit(lambda: init_params(experiment.train.model, jax.random.key(1)))()
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    filled = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return experiment, jax.tree.unflatten(tree, filled)


def generate(setup, batch_size, devices=1, seed=0, labels=LABELS, **sample):
    experiment, params = setup
    changes = {f"sample.{key}": value for key, value in sample.items()}
    experiment = experiment.updated({"sample.batch_size": batch_size} | changes)
    mesh = sharding.make_mesh((-1, 1, 1), jax.devices()[:devices])
    return Generator(experiment, mesh).tokens(params, labels, seed)


@pytest.fixture(scope="module")
def reference(setup):
    return generate(setup, batch_size=10)


def test_a_sample_does_not_depend_on_the_batch_size(setup, reference):
    np.testing.assert_allclose(generate(setup, batch_size=4), reference, rtol=1e-4, atol=1e-4)


def test_a_sample_does_not_depend_on_the_number_of_devices(setup, reference):
    np.testing.assert_allclose(
        generate(setup, batch_size=16, devices=8), reference, rtol=1e-4, atol=1e-4
    )


def test_a_sample_does_not_depend_on_the_segments(setup, reference):
    np.testing.assert_allclose(
        generate(setup, batch_size=10, num_segments=3), reference, rtol=1e-4, atol=1e-4
    )


def test_seed_and_label_and_index_matter(setup, reference):
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


@pytest.mark.parametrize("num_ar_steps", [1, 2, 5, 16])
@pytest.mark.parametrize("num_segments", [1, 4])
def test_every_token_is_revealed_exactly_once(num_ar_steps, num_segments):
    """With a sampler that answers "my place + 1000 * how often written", each place shows up once
    in its place.
    """
    experiment = tiny_config(
        f"--config.sample.num_ar_steps={num_ar_steps}",
        f"--config.sample.num_segments={num_segments}",
    )

    class Counting:
        """A token loss whose sample is its noise, so that the noise's place can be read off the
        result.
        """

        noises_per_token, denoiser_calls, out_per_channel = 1, 1, 1

        def sample(self, denoiser, cond, noise, cfg_scale, temperature):
            return noise[..., 0, :]

    spec = dataclasses.replace(experiment.sampler, token_loss=Counting(), guided=False)
    from flax import nnx

    from djepa_jax.core.models.djepa import split_model

    graph, abstract = split_model(spec.model)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    model = nnx.merge(graph, params)
    for seed in range(3):
        order = make_draws(spec, seed, jnp.arange(3)).order

        def noise_of(places):
            return jnp.broadcast_to(
                (places + 1.0)[None, :, None, None], (3, len(places), 1, spec.model.token_dim)
            )

        tokens = run_steps(
            spec, model, Draws(order, noise_of), jnp.zeros(3, int), jnp.ones(num_ar_steps), 1.0
        )
        in_order = np.take_along_axis(np.asarray(tokens[..., 0]), np.asarray(order), axis=1)
        np.testing.assert_array_equal(in_order, np.broadcast_to(np.arange(1, 17), (3, 16)))


@pytest.mark.parametrize(("num_ar_steps", "num_segments"), [(1, 8), (3, 2), (16, 8), (16, 100)])
def test_segments_cover_every_step_with_room_enough(num_ar_steps, num_segments):
    experiment = tiny_config(
        f"--config.sample.num_ar_steps={num_ar_steps}",
        f"--config.sample.num_segments={num_segments}",
    )
    segments = plan_segments(experiment.sampler)
    counts = reveal_counts(16, num_ar_steps)
    assert len(segments) <= num_segments
    assert [s.start for s in segments] == [0] + [s.stop for s in segments[:-1]] and segments[
        -1
    ].stop == num_ar_steps
    for segment in segments:
        for step in range(segment.start, segment.stop):
            assert counts[step] <= segment.new and sum(counts[:step]) <= segment.visible


def test_orders_are_permutations_and_differ(setup):
    order = make_draws(setup[0].sampler, 0, jnp.arange(50)).order
    assert (np.sort(order, axis=1) == np.arange(16)).all()
    assert len({tuple(row) for row in np.asarray(order)}) == 50
