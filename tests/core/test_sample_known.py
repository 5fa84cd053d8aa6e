"""Guidance by tokens that are given, of models that are told nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled_params
from flax import nnx
from tiny import tiny_config

from djepa_jax.core.models.djepa import split_model
from djepa_jax.core.sampler import Known, SampleInputs, make_sampler

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


@pytest.mark.parametrize("changes", [{"guided": False}, {"num_known": 0}, {"condition": "classes"}])
def test_where_something_else_is_told_both_halves_see_what_is_given(changes):
    config = config_of(changes.pop("condition", "nothing"), **{"guided": True} | changes)
    assert not config.guides_by_known
    if config.num_known and config.guided:  # of both halves the condition is the null one
        one, other = (drawn(config, 0.0, value) for value in (0.5, -2.0))
        assert np.abs(one - other)[:, KNOWN:].max() > 1e-2
