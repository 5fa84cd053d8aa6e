"""The memory plan: exact for the state, XLA's own for the step, and a closed form held to a factor
of 2.
"""

import math
import types

import jax
import pytest
from djepa_jax.training.memory import MemoryPlan, describe, memory_plan
from tiny import load_config, tiny_config

from djepa_jax.core import sharding
from djepa_jax.core.train_step import init_state, make_train_step
from djepa_jax.training import memory

GIB = 2**30
FACTOR = 2  # between the closed form and XLA's plan
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MIDDLE = (  # 33 MB of parameters, 64 tokens, 4 + 4 layers
    "--config.batch_size=32",
    "--config.data.patch_size=1",
    "--config.model.width=256",
    "--config.model.num_heads=4",
    "--config.model.encoder_depth=4",
    "--config.model.predictor_depth=4",
    "--config.model.denoiser_width=256",
    "--config.model.denoiser_depth=3",
    "--config.model.remat=dots",
)


def spec_and_state(config, mesh_shape=(1, 1, 1)):
    spec = config.train
    abstract = jax.eval_shape(lambda: init_state(spec))
    mesh = sharding.make_mesh(mesh_shape, jax.devices()[: math.prod(mesh_shape)])
    return spec, abstract, sharding.state_shardings(abstract, mesh)


def compile_step(spec, abstract):
    shape = (spec.masking.batch_size, 8, 8, 1)
    batch = {
        "example": jax.ShapeDtypeStruct(shape, "uint8"),
        "condition": jax.ShapeDtypeStruct(shape[:1], "int32"),
    }
    return (
        jax.jit(make_train_step(spec), donate_argnums=0)
        .lower(abstract, batch)
        .compile(compiler_options=QUICK)
    )


@pytest.fixture(scope="module")
def tiny():
    spec, abstract, shardings = spec_and_state(tiny_config())
    return spec, abstract, shardings, compile_step(spec, abstract)


def test_state_is_counted_exactly(tiny):
    _, abstract, shardings, compiled = tiny
    plan = memory_plan(abstract, shardings, compiled)
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    assert plan.parameters == plan.moving_average == size
    assert 2 * size <= plan.optimiser <= 2 * size + 16  # two moments and counters
    stats = compiled.memory_analysis()
    batch = 16 * (8 * 8 + 4)
    assert (
        plan.state + 12 + batch == stats.argument_size_in_bytes
    )  # three counters of the state besides


def test_step_is_what_xla_plans(tiny):
    _, abstract, shardings, compiled = tiny
    plan, stats = memory_plan(abstract, shardings, compiled), compiled.memory_analysis()
    assert not plan.estimated
    assert stats.temp_size_in_bytes < plan.step < 1.02 * stats.temp_size_in_bytes
    assert (
        plan.limit is None and "GiB" not in describe(plan) and " of " not in describe(plan)
    )  # the CPU tells no limit


def test_closed_form_on_the_tiny_model(tiny):
    spec, abstract, shardings, compiled = tiny
    estimated, planned = (
        memory_plan(abstract, shardings, spec=spec),
        memory_plan(abstract, shardings, compiled),
    )
    assert estimated.estimated and estimated.state == planned.state
    assert 1 / FACTOR < estimated.step / planned.step < FACTOR


@pytest.mark.slow
def test_closed_form_on_a_middle_size():
    spec, abstract, shardings = spec_and_state(tiny_config(*MIDDLE))
    planned = memory_plan(abstract, shardings, compile_step(spec, abstract))
    assert 1 / FACTOR < memory_plan(abstract, shardings, spec=spec).step / planned.step < FACTOR


def test_shares_of_devices():
    config = load_config("djepa_h")
    spec, abstract, whole = spec_and_state(config)
    alone = memory_plan(abstract, whole, spec=spec)
    assert alone.parameters == 4 * 1_427_386_144
    split = memory_plan(abstract, spec_and_state(config, (1, 8, 1))[2], spec=spec)
    assert 1 <= 8 * split.state / alone.state < 1.05
    copies = memory_plan(abstract, spec_and_state(config, (8, 1, 1))[2], spec=spec)
    assert copies.state == alone.state
    assert memory.estimate_activations(spec, 8) == pytest.approx(
        memory.estimate_activations(spec, 1) / 8
    )


@pytest.mark.parametrize(
    "key, smaller",
    [("grad_accumulation_steps", "8"), ("model.remat", "full"), ("batch_size", "256")],
)
def test_keys_of_the_remedy_make_the_estimate_smaller(key, smaller):
    spec, fewer = (
        load_config("djepa_b", *extra).train for extra in ((), (f"--config.{key}={smaller}",))
    )
    assert memory.estimate_activations(fewer, 1) < 0.7 * memory.estimate_activations(
        spec, 1
    )  # the denoiser is not recomputed


def test_a_backend_that_tells_nothing(tiny):
    spec, abstract, shardings, _ = tiny
    silent = types.SimpleNamespace(memory_analysis=lambda: None)
    plan = memory_plan(abstract, shardings, silent)
    assert plan.step is None and plan.total == plan.state and "step" not in describe(plan)
    plan = memory_plan(abstract, shardings, silent, spec, limit=GIB)
    assert plan.estimated and "step, roughly" in describe(plan)


def test_what_is_said():
    text = describe(MemoryPlan(GIB, GIB, 2 * GIB, 6 * GIB, 79 * GIB, False))
    assert text == (
        "memory per device: parameters 1.0 GiB, moving average 1.0 GiB, optimiser 2.0 GiB, "
        "step (batch, activations, gradients) 6.0 GiB; together 10.0 GiB of 79.0 GiB"
    )


def test_what_is_said_when_it_does_not_fit():
    text = describe(MemoryPlan(GIB, GIB, 2 * GIB, 6 * GIB, 8 * GIB, False))
    assert all(
        key in text
        for key in (
            "may not fit",
            "grad_accumulation_steps",
            "model.remat",
            "mesh=(1,-1,1)",
            "batch_size",
        )
    )
    text = describe(MemoryPlan(GIB, GIB, 2 * GIB, 6 * GIB, 3 * GIB, False))
    assert (
        "state alone" in text and "mesh=(1,-1,1)" in text and "grad_accumulation_steps" not in text
    )
