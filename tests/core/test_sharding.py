"""Meshes, placement, and that the published sizes build and trace (shapes only).

That they shard without remainder is in `test_mesh_programs.py`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import count_compilations
from tiny import load_config, tiny_config

from djepa_jax.core import sharding
from djepa_jax.core.train_step import init_state, make_train_step, state_shapes

SIZES = {"b": 212_410_656, "l": 687_946_272, "h": 1_427_386_144}


def test_mesh_fills_in_what_is_left():
    assert dict(sharding.make_mesh((-1, 2, 1)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(sharding.make_mesh((1, 1, 1), jax.devices()[:1]).shape) == {
        "data": 1,
        "fsdp": 1,
        "tensor": 1,
    }


def test_mesh_that_does_not_fit_is_refused():
    for shape in [(3, 1, 1), (-1, -1, 1), (0, 1, 1), (2, 2), (16, 1, 1), (4, 1, 1)]:
        with pytest.raises(ValueError, match="mesh"):
            sharding.make_mesh(shape)


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_trace_a_step(name):
    experiment = load_config(f"djepa_{name}")
    abstract = state_shapes(experiment.train)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params)) == SIZES[name]
    batch = {
        "example": jax.ShapeDtypeStruct((2048, 16, 16, 16), jnp.float32),
        "condition": jax.ShapeDtypeStruct((2048,), jnp.int32),
    }
    state, metrics = jax.eval_shape(make_train_step(experiment.train), abstract, batch)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, abstract)
    assert all(jax.tree.leaves(same)) and metrics["loss"].shape == ()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


def test_state_is_created_sharded():
    experiment = tiny_config()
    mesh = sharding.make_mesh((1, 8, 1))
    shapes = state_shapes(experiment.train)
    shardings = sharding.state_shardings(shapes, mesh)
    state = init_state(experiment.train, shardings)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    kernel = state.params["predictor"]["stack"]["blocks"]["mlp"]["up"]["kernel"]  # [L, 16, 64]
    assert kernel.addressable_shards[0].data.shape == (1, 2, 64)
    moment = jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
    mu = next(leaf.mu for leaf in moment if hasattr(leaf, "mu"))
    assert mu["predictor"]["stack"]["blocks"]["mlp"]["up"]["kernel"].sharding == kernel.sharding


def test_initial_values_do_not_depend_on_the_mesh():
    experiment = tiny_config()
    mesh = sharding.make_mesh((2, 2, 2))
    shardings = sharding.state_shardings(state_shapes(experiment.train), mesh)
    whole, sharded = init_state(experiment.train), init_state(experiment.train, shardings)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(sharded.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_seed_compiles_nothing_and_gives_other_values():
    config = tiny_config().train
    first = init_state(config).params
    with count_compilations() as compiled:
        second = init_state(dataclasses.replace(config, seed=config.seed + 1)).params
    assert not compiled
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    assert any((a != b).any() for a, b in pairs)
