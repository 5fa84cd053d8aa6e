"""Rows of examples of several lengths: nothing is lost, and networks answer as on padded ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from filled import filled_params
from flax import nnx
from tiny import tiny_config

from djepa_jax.core.models.djepa import split_model
from djepa_jax.core.models.ragged import Ragged
from djepa_jax.core.train_step import predict_features

RAGGED = Ragged(((1, 5), (2, 3)))  # groups of three examples
NUM_VISIBLE = jnp.array([4, 2, 1, 3, 2, 0])
LENGTHS = ((1, 4), (2, 2))  # hold these numbers in groups of three


def test_rows_hold_what_is_inside_the_lengths():
    x = jnp.arange(6 * 5 * 2.0).reshape(6, 5, 2)
    rows = RAGGED.flatten(x)
    assert rows.shape == (2, 11, 2)
    parts = RAGGED.split(rows)
    assert [part.shape for part in parts] == [(2, 5, 2), (4, 3, 2)]
    np.testing.assert_array_equal(parts[1][2], x[4, :3])  # second group, its second example
    np.testing.assert_array_equal(RAGGED.join(parts), rows)
    inside = np.zeros((6, 5, 1), bool)
    inside[[0, 3]] = inside[:, :3] = True
    np.testing.assert_array_equal(RAGGED.restore(rows, 5), np.where(inside, x, 0))
    chosen = RAGGED.of_examples(jnp.arange(6))
    np.testing.assert_array_equal(chosen[0], [0, 3])
    np.testing.assert_array_equal(chosen[1], [1, 2, 4, 5])


def test_features_and_gradients_are_those_of_padded_examples():
    """With the same masks of dropout for an example, wherever its rows are."""
    changes = {"encoder_depth": 2, "dropout": 0.3, "attention_dropout": 0.3}
    config = dataclasses.replace(tiny_config().train.model, **changes)
    params = filled_params(config)
    order = jax.vmap(jax.random.permutation, (0, None))(jax.random.split(jax.random.key(1), 6), 16)
    tokens = jax.random.normal(jax.random.key(2), (6, 16, config.token_dim))
    keys = jax.random.split(jax.random.key(3), (2, 6))

    def loss(params, lengths):
        model = nnx.merge(split_model(config)[0], params)
        condition = model.embed_condition(jnp.arange(6) % 6)
        cond = predict_features(model, tokens, order, condition, NUM_VISIBLE, 4, keys, lengths)
        return jnp.sin(cond).sum(), cond

    evaluate = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, padded), expected = evaluate(params, ())
    (_, ragged), gradient = evaluate(params, LENGTHS)
    np.testing.assert_allclose(ragged, padded, atol=1e-5)
    gradient, expected = (map(np.asarray, jax.tree.leaves(tree)) for tree in (gradient, expected))
    for one, other in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(other).max()))
