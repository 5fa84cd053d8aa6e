"""The number of accumulation steps that a batch is taken in, when it is left to the memory of the
devices, and what is said of that memory.
"""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from tiny import load_config, tiny_config

from djepa_jax.config.convert import ConfigError
from djepa_jax.core import sharding
from djepa_jax.core.optimizer import ema_decay, learning_rate, weight_decay
from djepa_jax.core.train_step import TrainState, make_train_step
from djepa_jax.sampling.generator import Generator, jitted_sampler
from djepa_jax.training import compile_step as module
from djepa_jax.training.benchmark_cases import random_batch
from djepa_jax.training.compile_step import (
    FILE_NAME,
    StepProgram,
    compile_step,
    compile_to_fit,
    describe_memory,
    planned_bytes,
)
from djepa_jax.training.initial_state import abstract_state

GIB = 2**30
LIMIT = 31 * GIB
COUNTS = (1, 2, 4, 8)
FULL, BROKEN = "RESOURCE_EXHAUSTED: 99.9G of 31.0G hbm", "INTERNAL: no such operation"


def real_program(experiment, devices: int = 1) -> StepProgram:
    mesh = sharding.make_mesh((devices, 1, 1), jax.devices()[:devices])
    return StepProgram(experiment.train, {"step": sharding.replicated(mesh)})


# Numbers that a run may be given at any time; no program depends on them.
NUMBERS = {
    "num_steps": 5000,
    "log_every": 7,
    "checkpoint_every": 9,
    "sample_every": 11,
    "seed": 8,
    "optimizer.learning_rate": 1e-5,
    "optimizer.min_learning_rate": 1e-6,
    "optimizer.learning_rate_schedule": "constant",
    "optimizer.warmup_steps": 77,
    "optimizer.weight_decay": 0.3,
    "optimizer.weight_decay_schedule": "linear",
    "optimizer.ema_decay": 0.5,
    "optimizer.ema_ramp": True,
    "loss.label_drop_prob": 0.4,
    "sample.count": 3,
    "sample.seed": 4,
    "sample.cfg_scale": 7.0,
    "sample.cfg_schedule": "constant",
    "sample.temperature": 0.5,
}


def test_programs_do_not_depend_on_numbers_that_are_changed_in_passing():
    """Their text, which is what the cache of compiled programs is searched by, stays the same."""
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])

    def texts(experiment) -> tuple[str, str]:
        state = abstract_state(experiment, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        batch = jax.device_put(random_batch(experiment), sharding.batch_sharding(mesh))
        step = StepProgram(experiment.train, shardings).lower(state, batch)
        generator = Generator(experiment, mesh)
        inputs = generator._inputs(np.arange(10, dtype=np.int32), 0, experiment.sample.seed)
        sampler = jitted_sampler(experiment.sampler, mesh).lower(state.params, inputs)
        return step.as_text(), sampler.as_text()

    experiment = tiny_config()
    assert texts(experiment.updated(NUMBERS)) == texts(experiment)


def test_a_step_is_told_the_numbers_of_its_update():
    config = tiny_config("--config.num_steps=10", "--config.optimizer.ema_ramp=True").train
    program = StepProgram(config, {})
    for step, skipped in ((0, 0), (7, 2)):
        counters = (np.int32(step), None, None, None, np.int32(skipped), np.int32(0))
        update = program.values(TrainState(*counters)).update
        for schedule in (learning_rate, weight_decay, ema_decay):
            expected = schedule(config.optimizer, np.int32(step - skipped))
            assert float(getattr(update, schedule.__name__)) == pytest.approx(float(expected))


def counts(program: StepProgram) -> list[int]:
    return [choice.config.grad_accumulation_steps for choice in program.choices()]


@pytest.mark.parametrize("name", ["digits", "moving_digits", "spoken_digits", "say_and_draw"])
def test_two_trainings_of_one_configuration_share_a_step(name):
    """So that a process that trains again need not trace it anew."""
    first, second = (make_train_step(load_config(name).train) for _ in range(2))
    assert first is second


def test_choices_are_whole_packs_that_all_devices_share():
    for name in ("djepa_b", "djepa_l", "djepa_h"):
        for devices in (1, 2, 4, 8):
            program = real_program(load_config(name), devices)
            masking, found = program.config.masking, counts(program)
            assert found == [1, 2, 4, 8, 16, 32, 64]
            for count in found:
                assert masking.batch_size // masking.pack_size % count == 0
                assert masking.batch_size // count % devices == 0
    uneven = tiny_config("--config.batch_size=96", "--config.loss.mask_group=1")
    assert counts(real_program(uneven)) == [1, 3], "three packs cannot be halved"
    assert counts(real_program(uneven.updated({"grad_accumulation_steps": 3}))) == [1, 3]
    with pytest.raises(ConfigError, match="grad_accumulation_steps is 2.* divide 3"):
        uneven.updated({"grad_accumulation_steps": 2})


def plan(**sizes: int) -> types.SimpleNamespace:
    """A compiled program with XLA's plan of its memory."""
    kinds = ("argument", "output", "temp", "generated_code", "alias")
    values = {f"{kind}_size_in_bytes": sizes.get(kind, 0) for kind in kinds}
    return types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**values), **sizes)


@dataclasses.dataclass(frozen=True)
class Program:
    """In place of a `StepProgram`: compiles at once, to what `peaks` says per number of steps,
    bytes or an error.
    """

    peaks: dict[int, int | str]
    tried: list[int]
    steps: int = 1

    @property
    def config(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(grad_accumulation_steps=self.steps)

    def choices(self) -> list["Program"]:
        return [dataclasses.replace(self, steps=count) for count in COUNTS]

    def lower(self, state, batch) -> "Program":
        return self

    def compile(self):
        self.tried.append(self.steps)
        peak = self.peaks[self.steps]
        if isinstance(peak, str):
            raise jax.errors.JaxRuntimeError(peak)
        return plan(temp=peak, steps=self.steps)


def fit(
    workdir, peaks: dict, limit: int | None = LIMIT, batch_size: int = 16, compiler=compile_to_fit
) -> tuple[int, list[int], str]:
    """The steps of the program that was taken, those that were tried, and what was said."""
    tried, said = [], []
    batch = {"example": np.zeros(batch_size)}
    compiled = compiler(Program(peaks, tried), None, batch, limit, workdir, said.append)
    return compiled.steps, tried, "\n".join(said)


def test_steps_are_doubled_until_the_plan_fits(tmp_path):
    large = dict.fromkeys(COUNTS, 99 * GIB)
    table = [
        (LIMIT, {1: 30 * GIB}, 1),
        (LIMIT, {1: 32 * GIB, 2: 30 * GIB}, 2),
        (LIMIT, {1: FULL, 2: FULL, 4: 9 * GIB}, 4),
        (LIMIT, {1: 32 * GIB, 2: FULL, 4: 3 * GIB}, 4),
        (LIMIT, large, 8),  # nothing is left to try, and it may fit nevertheless
        (None, large, 1),  # a device that does not tell what it has
    ]
    for number, (limit, peaks, expected) in enumerate(table):
        (tmp_path / str(number)).mkdir()
        steps, tried, said = fit(tmp_path / str(number), peaks, limit)
        assert steps == expected and tried == list(COUNTS[: COUNTS.index(expected) + 1])
        assert (f"in {expected} accumulation steps" in said) == (expected > 1)
        assert said.count("memory per device") == sum(type(peaks[n]) is int for n in tried)
    (tmp_path / "cpu").mkdir()
    steps, _, said = fit(tmp_path / "cpu", {1: 2**60}, None)
    assert steps == 1 and "may not fit" in said, "more than this machine has"
    assert "may not fit" not in fit(tmp_path / "cpu", {1: 1}, None)[2]


def test_errors_that_more_steps_do_not_mend_come_through(tmp_path):
    for peaks, tries in (({1: BROKEN}, 1), (dict.fromkeys(COUNTS, FULL), len(COUNTS))):
        tried = []
        with pytest.raises(jax.errors.JaxRuntimeError):
            compile_to_fit(
                Program(peaks, tried), None, {"example": [0]}, LIMIT, tmp_path, lambda text: None
            )
        assert len(tried) == tries and not (tmp_path / FILE_NAME).exists()
    with pytest.raises(jax.errors.JaxRuntimeError):  # a number that was chosen
        compile_step(Program({1: FULL}, []), None, None, LIMIT, lambda text: None)


def test_the_answer_is_kept_for_the_next_start_in_the_same_situation(tmp_path, monkeypatch):
    peaks = {1: FULL, 2: 32 * GIB, 4: 9 * GIB, 8: 5 * GIB}
    assert fit(tmp_path, peaks)[:2] == (4, [1, 2, 4])
    kept = (tmp_path / FILE_NAME).read_text()
    assert fit(tmp_path, peaks)[:2] == (4, [4]), "nothing is compiled that was found not to fit"
    assert (tmp_path / FILE_NAME).read_text() == kept
    assert fit(tmp_path, peaks, limit=8 * GIB)[:2] == (8, [4, 8]), "it no longer fits"
    assert fit(tmp_path, peaks, batch_size=32)[1][0] == 1, "of another batch"
    (tmp_path / FILE_NAME).write_text(kept)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 512)
        assert fit(tmp_path, peaks)[1][0] == 1, "of other devices"
    for spoilt in ("", "[4]", "{}", '{"steps": 4}', kept.replace("4", '"4"')):
        (tmp_path / FILE_NAME).write_text(spoilt)
        assert fit(tmp_path, peaks)[:2] == (4, [1, 2, 4]), spoilt
    more_than_there_are = json.loads(kept) | {"steps": 64}
    (tmp_path / FILE_NAME).write_text(json.dumps(more_than_there_are))
    assert fit(tmp_path, peaks)[:2] == (8, [8])


def test_all_processes_take_as_many_steps_as_the_one_that_needs_most(tmp_path, monkeypatch):
    """The program fits here; another process says that it does not."""
    others = iter([1, 1, 0])
    said: list[int] = []

    def largest(misfit: int) -> int:
        said.append(misfit)
        return max(misfit, next(others))

    monkeypatch.setattr(module.distributed, "max_over_processes", largest)
    assert fit(tmp_path, dict.fromkeys(COUNTS, GIB))[0] == 4 and said == [0, 0, 0]


def test_memory_is_what_xla_plans_with_a_remedy_where_it_exceeds_the_device():
    compiled = plan(
        argument=6 * GIB, output=5 * GIB, temp=3 * GIB, generated_code=GIB, alias=5 * GIB
    )
    assert planned_bytes(compiled) == 10 * GIB, "what is donated is counted once"
    remedies = ("grad_accumulation_steps", "model.remat", "mesh=(1,-1,1)", "batch_size")
    for limit, fits in ((None, True), (10 * GIB, True), (10 * GIB - 1, False)):
        text = describe_memory(compiled, limit)
        assert "10.0 GiB planned" in text and ("of 10.0 GiB" in text) == (limit is not None)
        assert all((f"config.{remedy}" in text) != fits for remedy in remedies)
    silent = types.SimpleNamespace(memory_analysis=lambda: None)
    assert planned_bytes(silent) is None and "no plan" in describe_memory(silent, GIB)


def test_the_plan_of_a_real_program_counts_its_arguments():
    x = jax.ShapeDtypeStruct((1000,), "float32")
    doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)
    assert 4000 <= planned_bytes(doubled.lower(x).compile()) < 8000, "the result takes its place"
