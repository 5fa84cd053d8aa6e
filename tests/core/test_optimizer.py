"""The update apart from any recorded numbers."""

import jax
import numpy as np
import pytest
from tiny import tiny_config

from djepa_jax.core import optimizer
from djepa_jax.core.train_step import state_shapes


@pytest.fixture(scope="module")
def state():
    """A fresh state of which every number is another."""
    filled = state_shapes(tiny_config().train)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), filled)


def test_vectors_are_joined_and_come_back(state):
    """In parameters and in moments, whatever else is in their tree."""
    tree = (state.params, state.opt_state)
    packed = optimizer.pack(tree)
    assert 2 * len(jax.tree.leaves(packed)) < len(jax.tree.leaves(tree))
    assert sum(x.size for x in jax.tree.leaves(packed)) == sum(
        x.size for x in jax.tree.leaves(tree)
    )
    back = optimizer.unpack(packed, state.params)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_nothing_that_decays_is_joined(state):
    """Weight decay is told by the path, which joined vectors have no more."""
    packed = optimizer.pack(state.params)
    decayed = sum(jax.tree.leaves(optimizer.decay_mask(state.params)))
    assert decayed == sum(jax.tree.leaves(optimizer.decay_mask(packed))) > 0
    assert not optimizer.decay_mask(packed)["vectors"]
