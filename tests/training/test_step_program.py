"""The number of parts that a batch is taken in, when it is left to the memory of the devices."""

import dataclasses
import functools
import types

import jax
import pytest
from djepa_jax.training.memory import memory_plan
from tiny import load_config

from djepa_jax.core import sharding
from djepa_jax.core.train_step import init_state
from djepa_jax.training.compile_step import (
    ROOM,
    StepProgram,
    announce_and_compile,
    compile_to_fit,
    fits,
)

GIB = 2**30


@functools.cache
def program(name="djepa_b", devices=1, limit=None) -> StepProgram:
    spec = load_config(name).train
    abstract = jax.eval_shape(lambda: init_state(spec))
    mesh = sharding.make_mesh((devices, 1, 1), jax.devices()[:devices])
    return StepProgram(spec, abstract, sharding.state_shardings(abstract, mesh), limit)


def parts(program: StepProgram) -> list[int]:
    return [each.spec.grad_accumulation_steps for each in program.in_parts()]


def test_one_part_where_the_device_does_not_tell_its_memory():
    assert parts(program())[0] == 1
    assert program().plan().limit is None and fits(program().plan())


@pytest.mark.parametrize("name", ["djepa_b", "djepa_l", "djepa_h"])
@pytest.mark.parametrize("devices, limit", [(8, 139 * GIB), (8, 31 * GIB), (1, 79 * GIB)])
def test_the_fewest_parts_whose_estimate_fits(name, devices, limit):
    counts = parts(program(name, devices, limit))
    plans = {n: memory_plan_in(program(name, devices, limit), n) for n in (1, 2, 4, 8, 16, 32, 64)}
    fewest = next((n for n, plan in plans.items() if plan.total <= ROOM * limit), 64)
    assert counts[0] == fewest and counts[-1] == 64


def memory_plan_in(program: StepProgram, count: int):
    spec = dataclasses.replace(program.spec, grad_accumulation_steps=count)
    return memory_plan(program.abstract, program.shardings, spec=spec, limit=program.limit)


def test_one_part_that_fits_is_taken_though_two_would_not():
    """From two parts on there is a second copy of the gradients."""
    step = program("djepa_h", 8)
    spec = load_config("djepa_h", "--config.batch_size=256", "--config.model.remat=full").train
    totals = [memory_plan_in(dataclasses.replace(step, spec=spec), count).total for count in (1, 2)]
    assert totals[0] < totals[1]
    assert parts(dataclasses.replace(step, spec=spec, limit=int(1.001 * totals[0] / ROOM)))[0] == 1


def test_recipes_fit_what_their_headers_name():
    """A size that takes more parts than one on eight devices of 139 GiB, and none that does not fit
    at all.
    """
    first = {
        name: next(program(name, 8, 139 * GIB).in_parts())
        for name in ("djepa_b", "djepa_l", "djepa_h")
    }
    assert all(fits(step.plan(), ROOM) for step in first.values())
    assert (
        first["djepa_b"].spec.grad_accumulation_steps
        == 1
        < first["djepa_h"].spec.grad_accumulation_steps
    )


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_parts_are_shared_by_all_devices(devices):
    plan = program().spec.masking
    for count in parts(program(devices=devices)):
        assert (
            plan.batch_size // plan.pack_size % count == 0
            and plan.batch_size // count % devices == 0
        )


class Stub(StepProgram):
    """Compiles at once, to what `peaks` says per number of parts: bytes, or an error."""

    def compile(self, state, batch):
        peak = peaks[self.spec.grad_accumulation_steps]
        if isinstance(peak, str):
            raise jax.errors.JaxRuntimeError(peak)
        names = ("argument", "output", "temp", "generated_code", "alias")
        sizes = {f"{name}_size_in_bytes": 0 for name in names} | {"temp_size_in_bytes": peak}
        return types.SimpleNamespace(
            parts=self.spec.grad_accumulation_steps,
            memory_analysis=lambda: types.SimpleNamespace(**sizes),
        )


peaks: dict[int, int | str] = {}
FULL, BROKEN = "RESOURCE_EXHAUSTED: 99.9G of 31.0G hbm", "INTERNAL: no such operation"


@pytest.mark.parametrize(
    "said_by_xla, expected",
    [
        ({1: 30 * GIB}, 1),
        ({1: 32 * GIB, 2: 30 * GIB}, 2),
        ({1: FULL, 2: FULL, 4: 9 * GIB}, 4),
        ({1: 32 * GIB, 2: FULL, 4: 3 * GIB}, 4),
    ],
)
def test_more_parts_where_xla_says_that_it_does_not_fit(monkeypatch, said_by_xla, expected):
    said = compile_stub(monkeypatch, said_by_xla, compile_to_fit)
    assert said["compiled"].parts == expected
    assert (f"in {expected} parts" in said["text"]) == (expected > 1)
    assert said["text"].count("compiling the training step") == len(said_by_xla)


def test_the_last_try_is_made_whatever_is_said(monkeypatch):
    """Nothing is left to try: it is told that it may not fit, and XLA's own error comes through."""
    said = compile_stub(
        monkeypatch, {n: 99 * GIB for n in (1, 2, 4, 8, 16, 32, 64)}, compile_to_fit
    )
    assert said["compiled"].parts == 64 and "may not fit: set config.model.remat" in said["text"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compile_stub(monkeypatch, {n: FULL for n in (1, 2, 4, 8, 16, 32, 64)}, compile_to_fit)


@pytest.mark.parametrize(
    "compiler, problem", [(compile_to_fit, BROKEN), (announce_and_compile, FULL)]
)
def test_other_errors_and_chosen_parts_are_not_tried_again(monkeypatch, compiler, problem):
    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_stub(monkeypatch, {1: problem}, compiler)


def compile_stub(monkeypatch, said_by_xla: dict, compiler) -> dict:
    monkeypatch.setattr("test_step_program.peaks", said_by_xla)
    monkeypatch.setattr("test_step_program.Stub.plan", estimate_nothing)
    base, lines = program(), []
    stub = Stub(base.spec, base.abstract, base.shardings, 31 * GIB)
    compiled = compiler(stub, None, None, lines.append)
    return {"compiled": compiled, "text": "\n".join(lines)}


def estimate_nothing(self, compiled=None):
    """The plan, where the estimate before compiling always fits."""
    plan = StepProgram.plan(self, compiled)
    return plan if compiled is not None else dataclasses.replace(plan, step=0)
