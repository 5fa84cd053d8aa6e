"""The compiled training step, in as few parts as fit a device's memory (`config.microbatches =
0`).
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax

from djepa_jax.core import sharding
from djepa_jax.core.train_step import TrainSpec, make_train_step
from djepa_jax.runtime import distributed
from djepa_jax.runtime.errors import OUT_OF_MEMORY
from djepa_jax.training.memory import MemoryPlan, describe, memory_plan

ROOM = 0.9  # share of a device's memory that the closed form may fill; it is an estimate


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A training step, and where its state lives."""

    spec: TrainSpec
    abstract: object  # shapes of a `TrainState`
    shardings: object  # of the same structure
    limit: int | None = None  # bytes of a device, in place of what it says itself

    def plan(self, compiled=None) -> MemoryPlan:
        """What the step needs on each device: XLA's word on the compiled one, else an estimate."""
        return memory_plan(self.abstract, self.shardings, compiled, self.spec, self.limit)

    def jitted(self, donate: bool) -> Callable:
        """The step under `jax.jit`; with `donate` the old state's memory is used for the new
        one.
        """
        return jax.jit(
            make_train_step(self.spec),
            donate_argnums=0 if donate else (),
            out_shardings=(self.shardings, None),
        )

    def compile(self, state, batch):
        """The step as one program for arguments like these."""
        return self.jitted(donate=True).lower(state, batch).compile()

    def in_parts(self) -> Iterator["StepProgram"]:
        """The step in the fewest parts with which the estimate fits, then in more and more.

        A part has whole chunks and as many examples for every device. The last one comes even if it
        does not fit.
        """
        plan, devices = (
            self.spec.plan,
            sharding.batch_divisor(jax.tree.leaves(self.shardings)[0].mesh),
        )
        chunks = plan.batch_size // plan.chunk_size
        counts = [
            n
            for n in range(1, chunks + 1)
            if chunks % n == 0 and plan.batch_size // n % devices == 0
        ] or [1]
        programs = [
            dataclasses.replace(self, spec=dataclasses.replace(self.spec, microbatches=n))
            for n in counts
        ]
        first = next(
            (i for i, program in enumerate(programs) if fits(program.plan(), ROOM)),
            len(programs) - 1,
        )
        return iter(programs[distributed.largest(first) :])


def fits(plan: MemoryPlan, share: float = 1.0) -> bool:
    """Whether a plan fills at most a `share` of its device; True where the device does not tell its
    size.
    """
    return plan.limit is None or plan.total <= share * plan.limit


def compile_to_fit(program: StepProgram, state, batch, say: Callable[[str], None]):
    """The step compiled in as few parts as fit, by the estimate first and then by XLA's plan; says
    what it does.

    Every process calls this, and all of them end with the same number of parts.

    Raises:
        jax.errors.JaxRuntimeError: XLA cannot compile it, not even in the largest number of parts.
    """
    programs = list(program.in_parts())
    for program, last in zip(programs, [False] * (len(programs) - 1) + [True], strict=True):
        if program.spec.microbatches > 1:
            say(
                f"the batch is taken in {program.spec.microbatches} parts, one after the other, "
                "to fit the memory (same result)"
            )
        compiled = announce_and_compile(
            program, state, batch, say, may_fail=not last, choosing=True
        )
        misfit = compiled is None or not fits(program.plan(compiled))
        if last or not distributed.largest(int(misfit)):
            return compiled


def announce_and_compile(
    program: StepProgram,
    state,
    batch,
    say: Callable[[str], None],
    may_fail: bool = False,
    choosing: bool = False,
):
    """The compiled step, with the memory plan before and after; None if it `may_fail` for want of
    memory, and does.

    With `choosing` the number of parts is not the user's, and is not what a remedy should be about.
    """
    say(describe(program.plan(), choosing))  # should compiling run out of memory
    say("compiling the training step")
    try:
        compiled = program.compile(state, batch)
    except jax.errors.JaxRuntimeError as error:
        if not may_fail or OUT_OF_MEMORY not in str(error):
            raise
        return None
    say(describe(program.plan(compiled), choosing))
    return compiled
