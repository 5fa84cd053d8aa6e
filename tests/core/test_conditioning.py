"""Conditions: what they mean for both networks, for dropping, and for guidance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from flax import nnx
from test_models import BATCH, NUM_VISIBLE, PLACES, TINY, features, inputs  # noqa: F401 (a fixture)

from djepa_jax.core.models.conditioning import (
    CONDITIONERS,
    Classes,
    Condition,
    Mixture,
    Nothing,
    Sum,
)
from djepa_jax.core.models.djepa import ContextEncoder, init_params, split_model
from djepa_jax.core.models.embedding import look_up
from djepa_jax.core.models.keys import Keys
from djepa_jax.core.models.text import Embeddings, Text
from djepa_jax.core.train_step import predict_features

P = TINY.num_prefix_tokens
TEXT = Text(P, length=6, width=32, num_heads=2)
VECTORS = Embeddings(P, length=3, width=32, num_heads=2, channels=5)
CONDITIONS = {
    "classes": (Classes(5), jnp.array([0, 4, 2, 1])),
    "nothing": (Nothing(), jnp.zeros(4, int)),
    "text": (TEXT, jnp.stack([jnp.asarray(TEXT.encode(t)) for t in ("a", "é b", "sixsix7", "b")])),
    "embeddings": (VECTORS, jax.random.normal(jax.random.key(0), (4, 3, 5))),
    "sum": (Sum(Classes(5), Classes(3)), (jnp.array([0, 4, 2, 1]), jnp.array([2, 0, 1, 1]))),
}


def filled(conditioner):
    """A tiny model with a conditioner; no parameter is zero."""
    config = dataclasses.replace(TINY, conditioner=conditioner)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.15 * rng.standard_normal(leaf.shape), jnp.float32),
        split_model(config)[1],
    )
    return nnx.merge(split_model(config)[0], params)


def embedded(model, raw) -> Condition:
    """What a model makes of raw conditions, by one program."""
    return jax.jit(lambda raw: model.embed_condition(raw))(raw)


@pytest.fixture(params=CONDITIONS)
def case(request):
    conditioner, raw = CONDITIONS[request.param]
    return conditioner, raw, filled(conditioner)


def test_a_condition_is_prefix_tokens(case):
    _, raw, model = case
    condition = embedded(model, raw)
    assert condition.prefix.shape == (BATCH, TINY.num_prefix_tokens, TINY.width)
    assert condition.mask is None


def test_null_says_the_same_for_every_example(case):
    conditioner, _, model = case
    prefix = embedded(model, conditioner.null(3)).prefix
    np.testing.assert_array_equal(prefix[0], prefix[2])


def test_dropping_replaces_whole_examples_by_null(case):
    conditioner, some, _ = case
    raw, null = conditioner.in_turn(1000), conditioner.null(1000)
    if isinstance(conditioner, Text | Embeddings):  # which cannot be listed
        raw = np.ones_like(np.resize(some, null.shape))
    dropped = conditioner.drop(jax.random.key(0), jax.tree.map(jnp.asarray, raw), 0.3)
    leaves = zip(*(jax.tree.leaves(x) for x in (raw, null, dropped)), strict=True)
    is_null = [np.asarray(d == n) & np.asarray(r != n) for r, n, d in leaves]
    if isinstance(conditioner, Nothing):
        assert not is_null[0].any()
        return
    assert abs(is_null[0].mean() - 0.3) < 0.05
    assert all((each == is_null[0]).all() for each in is_null), "both of a pair, or none"


def test_what_is_asked_for_matters(case, inputs):
    conditioner, raw, model = case
    tokens, order, _ = inputs

    @jax.jit
    def said_of(raw):
        condition = model.embed_condition(raw)
        return predict_features(model, tokens, order, condition, NUM_VISIBLE, PLACES, (None, None))

    said, unsaid = said_of(raw), said_of(conditioner.null(BATCH))
    differs = float(jnp.abs(said - unsaid).max()) > 1e-3
    assert differs != isinstance(conditioner, Nothing)


def test_classes_keep_their_parameters():
    """Checkpoints know the class table and the vector of no class by these names."""
    abstract = split_model(TINY)[1]["context_encoder"]
    assert abstract["class_embedding"]["table"].shape == (5, TINY.width)
    assert abstract["class_embedding"]["null"].shape == (1, TINY.width)
    assert abstract["prefix_table"].shape == (TINY.num_prefix_tokens, TINY.width)


def test_nothing_has_no_parameters_beside_the_prefix():
    abstract = split_model(dataclasses.replace(TINY, conditioner=Nothing()))[1]["context_encoder"]
    assert not {name for name in abstract if "embedding" in name}


def test_a_masked_prefix_token_is_never_seen(inputs):
    """Neither network's output has a gradient to a prefix token that the mask leaves out."""
    tokens, order, labels = inputs
    model = filled(Classes(5))
    mask = jnp.ones((BATCH, TINY.num_prefix_tokens), bool).at[:, 1].set(False)

    @jax.jit
    @jax.grad
    def gradient(prefix):
        condition = Condition(prefix, mask)
        args = (tokens, order, condition, NUM_VISIBLE, PLACES, (None, None))
        cond = predict_features(model, *args)  # [B, N, D]
        return (cond * jnp.cos(jnp.arange(cond.size).reshape(cond.shape))).sum()

    grads = gradient(model.embed_condition(labels).prefix)
    assert (grads[:, 1] == 0).all() and (jnp.abs(grads[:, 0]).max(-1) > 0).all()


def test_positions_of_axes_are_summed(inputs):
    """A factorised table is the full table of the sums of its rows."""
    config = dataclasses.replace(TINY, factorised_positions=True)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    full_params = jax.tree.map(lambda leaf: leaf, params)
    for network in ("context_encoder", "predictor"):
        rows, columns = jnp.split(params[network]["positions"], 2)  # [3, D] each
        assert 0.5 < jnp.std(rows) < 2, "as large as the tokens that they are added to"
        summed = (rows[:, None] + columns[None]).reshape(9, -1)
        full_params[network] = params[network] | {"positions": summed}
    outputs = (
        jax.jit(functools.partial(features, split_model(c)[0]))(p, inputs)
        for c, p in ((config, params), (TINY, full_params))
    )
    assert_close(*outputs, 1e-5)


def test_the_table_makes_conditioners_from_settings():
    assert CONDITIONERS["classes"](7) == Classes(7) and CONDITIONERS["nothing"](7) == Nothing()


@pytest.mark.parametrize("kind", [Classes(5), Sum(Classes(5), Classes(3))])
def test_a_mixture_is_the_weighted_mean_of_the_prefixes(kind):
    """With the parameters of a model that was trained on one condition at a time."""
    model, mixture = filled(kind), Mixture(kind, 2)
    params = nnx.to_pure_dict(nnx.state(model))
    config = dataclasses.replace(TINY, conditioner=mixture)
    mixed = nnx.merge(split_model(config)[0], params)
    one, other = jnp.array([0, 4, 2, 1]), jnp.array([2, 0, 1, 1])
    if isinstance(kind, Sum):
        one, other = (one, jnp.array([2, 1, 0, 0])), (other, jnp.array([0, 0, 1, 2]))
    weights = jnp.array([[1, 0], [0, 1], [0.25, 0.75], [0.5, 0.5]])
    raw = jax.tree.map(lambda a, b: jnp.stack([a, b], 1), one, other), weights
    prefixes = [embedded(model, each).prefix for each in (one, other)]
    expected = sum(w[:, None, None] * p for w, p in zip(weights.T, prefixes, strict=True))
    assert_close(embedded(mixed, raw).prefix, expected, 1e-6)
    null = embedded(model, kind.null(3)).prefix
    assert_close(embedded(mixed, mixture.null(3)).prefix, null, 1e-6)
    always = mixture.drop(jax.random.key(0), raw, 1.0)
    assert_close(embedded(mixed, always).prefix[:3], null, 1e-6)


def test_captions_are_bytes_cut_at_a_whole_character():
    assert TEXT.decode(TEXT.encode("é b")) == "é b"
    assert TEXT.decode(TEXT.encode("12345é")) == "12345" and TEXT.encode("").max() == 0
    assert TEXT.encode("123456789").shape == (6,) and TEXT.encode("ab").dtype == np.uint8


def test_order_and_length_of_a_text_matter_and_padding_does_not():
    model = filled(TEXT)
    told = [embedded(model, TEXT.encode(t)[None]).prefix for t in ("ab", "ba", "aab")]
    assert min(np.abs(a - b).max() for a, b in zip(told, told[1:], strict=False)) > 1e-3
    longer_text = dataclasses.replace(TEXT, length=9)
    mine, longer = (
        nnx.to_pure_dict(nnx.state(m))["context_encoder"]["text_embedding"]
        for m in (model, filled(longer_text))
    )
    params = nnx.to_pure_dict(nnx.state(model))
    positions = longer["positions"].at[:6].set(mine["positions"])
    params["context_encoder"]["text_embedding"]["positions"] = positions
    config = dataclasses.replace(TINY, conditioner=longer_text)
    padded = nnx.merge(split_model(config)[0], params)
    raw = jnp.asarray(longer_text.encode("ab"))[None]
    assert_close(embedded(padded, raw).prefix, told[0], 1e-5)


def test_prefix_tokens_of_text_must_be_those_of_the_model():
    with pytest.raises(ValueError, match="num_prefix_tokens"):
        dataclasses.replace(TINY, conditioner=dataclasses.replace(TEXT, num_prefix_tokens=P + 1))


def test_pairs_in_turn_are_all_combinations():
    conditioner = CONDITIONERS["class_pair"](4, second_classes=2)
    assert conditioner == Sum(Classes(4), Classes(2)) and conditioner.period == 8
    first, second = conditioner.in_turn(10)
    assert first.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert second.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    nested = Sum(conditioner, Nothing())
    triples = np.stack(jax.tree.leaves(nested.in_turn(8)), axis=1)
    assert len(np.unique(triples, axis=0)) == 8


def test_asked_for_labels_take_the_second_ones_in_turn():
    first, second = Sum(Classes(9), Classes(3)).pair(np.array([5, 7, 5, 7, 5, 7]), 2)
    assert first.tolist() == [5, 7, 5, 7, 5, 7] and second.tolist() == [0, 0, 1, 1, 2, 2]


def test_gradients_stay_moderate_where_neither_a_condition_nor_a_token_is_seen():
    config = dataclasses.replace(TINY, conditioner=Nothing(), encoder_depth=4)
    encoder = nnx.jit(lambda: ContextEncoder(config, rngs=Keys(0)))()
    tokens, order = jnp.ones((1, 2, config.token_dim)), jnp.arange(2)[None]

    def output(encoder):
        condition = encoder.embed_condition(jnp.zeros(1, jnp.int32))
        features = encoder(tokens, order, condition, num_visible=jnp.zeros(1, jnp.int32))
        return features[:, : config.num_prefix_tokens, 0].sum()

    gradients = jax.tree.leaves(nnx.jit(nnx.grad(output))(encoder))
    assert max(np.abs(each).max() for each in gradients) < 1e6


def test_gradients_of_a_table_are_sums_over_what_was_taken():
    """As those of indexing, of rows of any shape; a row that nothing took gets exactly nothing."""
    table, rows = jnp.arange(12.0).reshape(4, 3), jnp.array([[1, 3, 1], [0, 1, 1]])
    np.testing.assert_array_equal(look_up(table, rows), table[rows])
    weights = jax.random.normal(jax.random.key(0), (2, 3, 3))
    ours = jax.grad(lambda table: (look_up(table, rows) * weights).sum())(table)
    expected = jax.grad(lambda table: (table[rows] * weights).sum())(table)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert not np.any(ours[2])
    rounded = jax.grad(lambda table: (look_up(table, rows, "bfloat16") * weights).sum())(table)
    np.testing.assert_allclose(rounded, expected, rtol=0.02, atol=0.02)
