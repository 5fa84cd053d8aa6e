"""Guidance by tokens that are given, of models that are told nothing else."""

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
from djepa_jax.core.sampler import Known, SampleInputs, make_sampler
from djepa_jax.sampling.generator import Generator, grow

KNOWN, VISIBLE = 5, 9  # of 16 tokens


def config_of(condition: str, **changes):
    experiment = tiny_config(f"--config.model.condition={condition}")
    experiment = experiment.updated({"sample.num_ar_steps": 3, "sample.num_segments": 1})
    return dataclasses.replace(experiment.sampler, **{"num_known": KNOWN} | changes)


def test_tokens_that_are_not_seen_might_as_well_stand_behind():
    """Features at the same places are those of an order in which these tokens come last, hidden."""
    config = config_of("nothing")
    graph, _ = split_model(config.model)
    model = nnx.merge(graph, filled_params(config.model))
    order = jax.vmap(lambda key: jax.random.permutation(key, 16))(
        jax.random.split(jax.random.key(0), 2)
    )
    tokens = jax.random.normal(jax.random.key(1), (2, 16, config.model.token_dim))
    condition = model.embed_condition(jnp.zeros(2, jnp.int32))

    @jax.jit
    def features(order, tokens, visible, query_ids, unseen):
        count, unseen = jnp.full(2, visible), None if unseen is None else jnp.full(2, unseen)
        seen = tokens[:, :12], order[:, :12]
        encoded = model.context_encoder(*seen, condition, num_visible=count, num_unseen=unseen)
        return model.predictor(encoded, order, count, num_unseen=unseen, query_ids=query_ids)

    places = jnp.arange(VISIBLE, 12)
    found = features(order, tokens, VISIBLE, places, KNOWN)
    behind = (jnp.roll(each, -KNOWN, axis=1) for each in (order, tokens))
    np.testing.assert_allclose(
        found, features(*behind, VISIBLE - KNOWN, places - KNOWN, None), rtol=1e-4, atol=1e-5
    )
    assert np.abs(found - features(order, tokens, VISIBLE, places, None)).max() > 1e-2


def drawn(config, scale: float, known_value: float) -> np.ndarray:
    """Tokens `[2, 16, C]` beside given ones that are all of one value."""
    known = Known(
        jnp.full((2, 16, config.model.token_dim), known_value),
        jnp.tile(jnp.arange(16) < KNOWN, (2, 1)),
    )
    null = config.model.conditioner.null(2)
    inputs = SampleInputs(null, jnp.arange(2), 0, jnp.full(3, scale), jnp.float32(1), known)
    return np.asarray(jax.jit(make_sampler(config))(filled_params(config.model), inputs))


def test_the_unconditional_half_does_not_depend_on_what_is_given():
    """At a scale of 0 it alone counts; at 1 there is no guidance; given tokens stay."""
    guided = config_of("nothing", guided=True)
    assert guided.guides_by_known
    one, other = (drawn(guided, 0.0, value) for value in (0.5, -2.0))
    np.testing.assert_array_equal(one[:, KNOWN:], other[:, KNOWN:])
    np.testing.assert_array_equal(one[:, :KNOWN], 0.5)
    plain = drawn(config_of("nothing", guided=False), 1.0, 0.5)
    np.testing.assert_allclose(drawn(guided, 1.0, 0.5), plain, rtol=1e-4, atol=1e-4)
    assert np.abs(one - plain).max() > 1e-2


def test_steps_of_their_own_give_what_the_loop_gives():
    """In several segments, of which the first has no guidance."""
    config = config_of("nothing", guided=True, num_segments=3, cfg_interval=(0.4, 1.0))
    known = Known(
        jnp.ones((2, 16, config.model.token_dim)), jnp.tile(jnp.arange(16) < KNOWN, (2, 1))
    )
    scales = jnp.asarray(config.guidance(3.0, "constant"))
    inputs = SampleInputs(jnp.zeros(2, jnp.int32), jnp.arange(2), 0, scales, 1.0, known)
    params = filled_params(config.model)
    *_, grown = grow(config, params, inputs)
    tokens = jax.jit(make_sampler(config))(params, inputs)
    np.testing.assert_allclose(grown, tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("condition", ["nothing", "classes"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_generator_guides_where_there_is_something_to_guide_by(condition, scale):
    experiment = tiny_config(f"--config.model.condition={condition}")
    experiment = experiment.updated({"sample.cfg_scale": scale, "sample.num_ar_steps": 3})
    told, guides = condition == "classes", scale != 1
    alone = Generator(experiment, sharding.make_mesh((-1, 1, 1), jax.devices()[:1]))
    assert alone.config.guided == (guides and told)
    for num_known in (0, KNOWN):
        mask = np.tile(np.arange(16) < num_known, (2, 1))
        config = alone.beside(Known(np.zeros((2, 16, 4)), mask)).config
        assert config.guided == (guides and (told or num_known > 0))
        assert config.guides_by_known == (guides and not told and num_known > 0)


@pytest.mark.parametrize("changes", [{"guided": False}, {"num_known": 0}, {"condition": "classes"}])
def test_where_something_else_is_told_both_halves_see_what_is_given(changes):
    config = config_of(changes.pop("condition", "nothing"), **{"guided": True} | changes)
    assert not config.guides_by_known
    if config.num_known and config.guided:  # of both halves the condition is the null one
        one, other = (drawn(config, 0.0, value) for value in (0.5, -2.0))
        assert np.abs(one - other)[:, KNOWN:].max() > 1e-2
