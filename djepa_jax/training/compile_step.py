"""The compiled training step, in as few accumulation steps as fit a device's memory.

With `grad_accumulation_steps = 0` the number is doubled until XLA's plan of the compiled step fits,
and the answer is kept in the workdir for the next start on such devices.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable

import jax
from etils import epath

from djepa_jax.core import sharding
from djepa_jax.core.train_step import TrainState, TrainStepConfig, make_train_step, step_values
from djepa_jax.runtime import distributed
from djepa_jax.runtime.compilation_cache import without_alarms
from djepa_jax.runtime.errors import OUT_OF_MEMORY
from djepa_jax.runtime.progress import format_bytes
from djepa_jax.runtime.storage import write_json

FILE_NAME = "grad_accumulation.json"


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A training step, and where its state lives."""

    config: TrainStepConfig
    shardings: TrainState

    def jitted(self, donate: bool) -> Callable:
        """The step under `jax.jit`; with `donate` the old state's memory is used for the new."""
        donated = 0 if donate else ()
        step = make_train_step(self.config)
        return jax.jit(step, donate_argnums=donated, out_shardings=(self.shardings, None))

    @functools.cached_property
    def values(self) -> Callable:
        """What the step that follows a state is told: a small program of its own."""
        return jax.jit(functools.partial(step_values, self.config))

    def lower(self, state: TrainState, batch: dict) -> jax.stages.Lowered:
        """The step for arguments like these, not compiled yet."""
        values = jax.eval_shape(self.values, state)
        return self.jitted(donate=True).lower(state, batch, values)

    def choices(self) -> list["StepProgram"]:
        """The step in 1, 2, 4, ... accumulation steps, as far as packs and devices allow."""
        masking = self.config.masking
        devices = sharding.batch_divisor(jax.tree.leaves(self.shardings)[0].mesh)
        packs = masking.batch_size // masking.pack_size
        counts = [1]
        for count in range(2, packs + 1):
            fits = packs % count == 0 and masking.batch_size // count % devices == 0
            if fits and count >= 2 * counts[-1]:
                counts.append(count)
        return [self.with_steps(count) for count in counts]

    def with_steps(self, count: int) -> "StepProgram":
        """The same step in another number of accumulation steps."""
        config = dataclasses.replace(self.config, grad_accumulation_steps=count)
        return dataclasses.replace(self, config=config)


def device_limit() -> int | None:
    """Bytes that this process may use on a device; None where it does not tell, as the CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def cpu_share() -> int | None:
    """Of CPU devices, which have no limit, each one's share of the machine's memory."""
    if jax.default_backend() != "cpu":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def planned_bytes(compiled) -> int | None:
    """Bytes per device that XLA plans for a program, arguments included; None if unknown."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    kinds = ("argument", "output", "temp", "generated_code")
    sizes = (getattr(plan, f"{kind}_size_in_bytes") for kind in kinds)
    return sum(sizes) - plan.alias_size_in_bytes


def describe_memory(compiled, limit: int | None) -> str:
    """XLA's plan of a program on a line, with a remedy where it exceeds the device."""
    planned = planned_bytes(compiled)
    if planned is None:
        return "memory per device: XLA gives no plan"
    text = f"memory per device: {format_bytes(planned)} planned by XLA"
    if limit is None:
        return text
    text += f" of {format_bytes(limit)}"
    if planned > limit:
        text += (
            "; this may not fit: raise config.grad_accumulation_steps or set config.model.remat to "
            "dots or full (same result), split the state with config.mesh=(1,-1,1), or lower "
            "config.batch_size"
        )
    return text


def compile_step(program: StepProgram, state, batch, limit: int | None, say: Callable[[str], None]):
    """The step as one program for arguments like these, with its memory plan said."""
    with without_alarms():
        compiled = program.lower(state, batch).compile()
    say(describe_memory(compiled, limit or cpu_share()))
    return compiled


def compile_to_fit(
    program: StepProgram,
    state,
    batch,
    limit: int | None,
    workdir: epath.Path,
    say: Callable[[str], None],
):
    """The step compiled in as few accumulation steps as fit; every process ends with as many.

    Args:
        program: with any number of accumulation steps.
        state: of the training, on the devices.
        batch: on the devices.
        limit: bytes that a device has for it; None if that is not known, so that everything fits.
        workdir: where the answer is kept.
        say: told what is tried.

    Raises:
        jax.errors.JaxRuntimeError: XLA cannot compile it, not even in the most steps.
    """
    known = distributed.run_on_main(lambda: _read_answer(workdir, batch)) or 1
    choices = program.choices()
    choices = [c for c in choices if c.config.grad_accumulation_steps >= known] or choices[-1:]
    for choice in choices:
        count, last = choice.config.grad_accumulation_steps, choice is choices[-1]
        if count > 1:
            say(f"the batch is taken in {count} accumulation steps to fit the memory (same result)")
        compiled = None
        try:
            compiled = compile_step(choice, state, batch, limit, say)
        except jax.errors.JaxRuntimeError as error:
            if last or OUT_OF_MEMORY not in str(error):
                raise
        planned = planned_bytes(compiled) if compiled else None
        misfit = compiled is None or (limit is not None and (planned or 0) > limit)
        if last or not distributed.max_over_processes(int(misfit)):
            if distributed.is_main_process():
                write_json(workdir / FILE_NAME, _situation(batch) | {"steps": count})
            return compiled


def _situation(batch) -> dict:
    """What an answer depends on."""
    device = jax.devices()[0]
    size = len(jax.tree.leaves(batch)[0])
    return {"device": device.device_kind, "devices": jax.device_count(), "batch_size": size}


def _read_answer(workdir: epath.Path, batch) -> int | None:
    try:
        found = json.loads((workdir / FILE_NAME).read_text())
        count = found.pop("steps")
        return count if found == _situation(batch) and type(count) is int else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
