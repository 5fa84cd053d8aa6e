"""The training loop: open data, restore or initialise, compile, loop, finish."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable

import jax
from etils import epath

from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.checkpoints.integrity import check_storable
from djepa_jax.checkpoints.restore import go_back, guide_params
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.stored import FILE_NAME, to_stored
from djepa_jax.core import sharding
from djepa_jax.core.train_step import TrainState
from djepa_jax.data.device_cache import table_bytes
from djepa_jax.data.loader import device_batches
from djepa_jax.data.sources import open_training_data
from djepa_jax.evaluation.judges import open_metric, settled
from djepa_jax.runtime import distributed
from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.metric_writer import check_wandb
from djepa_jax.runtime.profiling import ProfileWindow, debug_switches
from djepa_jax.runtime.progress import format_seconds
from djepa_jax.runtime.storage import as_path, check_ours, check_writable
from djepa_jax.training.compile_step import (
    StepProgram,
    compile_step,
    compile_to_fit,
    device_limit,
)
from djepa_jax.training.initial_state import (
    abstract_state,
    check_mesh,
    restore_or_initialise,
)
from djepa_jax.training.reporting import Reporter

LAG = 2  # steps between running one and reading its metrics: the device never waits for the host


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says why and from where to resume."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call of `train` ended, with the configuration as the data have completed it."""

    step: int
    finished: bool
    grid: epath.Path | None = None
    evaluation: dict | None = None
    experiment: Experiment | None = None


def train(
    experiment: Experiment,
    workdir: str,
    should_stop: Callable[[int], bool] = lambda step: False,
    restore_from: str = "",
    init_from: str = "",
    wandb: str = "",
) -> Result:
    """Train, or go on from the workdir's latest checkpoint.

    Args:
        experiment: the configuration.
        workdir: folder of checkpoints, metrics and samples; local or gs://.
        should_stop: asked after every step (with the number of steps made); True saves and stops.
        restore_from: PATH@STEP, a step to go on from instead (`restore.go_back`).
        init_from: a workdir, PATH@STEP or export, whose weights a new workdir begins with
            (`restore.warm_start`).
        wandb: a project of Weights & Biases, for scalars and grids.

    Raises:
        ConfigError, ValueError: a setting that cannot work; nothing was touched.
        CheckpointError: an unusable workdir or checkpoint; nothing was overwritten.
        TrainingError: too many non-finite gradients in a row.
    """
    mesh = sharding.make_mesh(experiment.mesh)
    check_mesh(experiment, mesh)
    source, experiment = open_training_data(experiment)
    experiment = settled(experiment, source)
    open_metric(experiment, source)  # refuses data that it cannot judge by
    if experiment.sampler.autoguided:
        guide_params(experiment, mesh)  # kept for the sampler
    check_storable(workdir)
    if wandb:
        distributed.run_on_main(check_wandb)
    distributed.run_on_main(lambda: check_writable(workdir))
    own, remedy = as_path(workdir) / FILE_NAME, "move it away, or name another --workdir"
    distributed.run_on_main(lambda: check_ours(own, "optimizer", remedy))
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.held_by_main(lock_workdir(workdir)))
        stack.enter_context(debug_switches(experiment.debug))
        signals = stack.enter_context(distributed.StopSignals())
        distributed.check_shared(as_path(workdir))
        same = f"{experiment.to_dict()} {len(source)} {restore_from} {init_from}"
        distributed.check_same(same, "the configuration, the data, --restore_from or --init_from")
        run = _Run(experiment, source, mesh, as_path(workdir), signals, should_stop, wandb)
        stack.enter_context(contextlib.closing(run))
        return dataclasses.replace(run.train(restore_from, init_from), experiment=experiment)


class _Run:
    """One process's part of a training run."""

    def __init__(self, experiment: Experiment, source, mesh, workdir, signals, should_stop, wandb):
        self.experiment, self.source, self.mesh = experiment, source, mesh
        self.signals, self._should_stop = signals, should_stop
        self.checkpoints = Checkpoints(workdir, experiment.keep_checkpoints, experiment.keep_every)
        self.report = Reporter(experiment, source, mesh, workdir, signals.requested, wandb)
        self.saved = 0  # the newest step that is in the workdir, or on its way there
        self.blocked = 0.0  # seconds that saving it has kept training waiting
        self.unread = collections.deque()  # steps and their metrics, still on the device

    def close(self) -> None:
        """Checkpoints are complete after this, whatever closing the report may say."""
        with contextlib.closing(self.checkpoints):
            self.report.close()

    def train(self, restore_from: str, init_from: str) -> Result:
        """Restore, train, save and sample; a signal ends this as soon as nothing is lost by it."""
        experiment, report = self.experiment, self.report
        abstract = abstract_state(experiment, self.mesh)
        self.signals.announce(distributed.STARTING)
        if restore_from:
            distributed.run_on_main(
                lambda: go_back(self.checkpoints, restore_from, abstract, experiment, report.say)
            )
        state, examples = restore_or_initialise(
            experiment, abstract, self.checkpoints, report.say, init_from, self.source.class_names
        )
        step = self.saved = int(state.step)
        if self.signals.requested(step):
            return Result(step, False)
        self.signals.announce(distributed.SAVING)
        report.open(step)
        stopped = False
        if step < experiment.num_steps:
            report.announce(self.mesh, state)
            state, examples, stopped = self._loop(state, examples)
            step = int(state.step)
        if self.saved != step:
            self.report.say(f"saving step {step}")
            self._save(step, state, examples)
        self._say_saved(self.checkpoints.wait())
        # Asked again: that save may have taken long.
        if self.signals.requested(step) or stopped or step < experiment.num_steps:
            return Result(step, False)
        self.signals.announce(distributed.SAVED)
        evaluation = None
        with self.signals.during("the batch of samples"):
            grid = report.final_grid(step, state)
            if not self.signals.requested(step):
                evaluation = report.final_evaluation(step, state)
        return Result(step, not self.signals.requested(step), grid, evaluation)

    def _loop(self, state: TrainState, examples: int) -> tuple[TrainState, int, bool]:
        """Train to the last step or until asked to stop: state, examples seen, whether asked."""
        experiment, step, watch = self.experiment, int(state.step), self.report.watch
        batches = device_batches(experiment, self.source, self.mesh, examples)
        batch = next(batches)
        with self.signals.during("the compilation"):
            train_step = self._compile(state, batch)
        debug = experiment.debug
        profile = ProfileWindow(self.report.local_folder, debug.profile_start, debug.profile_steps)
        self.report.start(step)  # compiling is not training
        stopped = self._asked_to_stop(step)
        with contextlib.closing(profile), self.signals.during("the running step"):
            while step < experiment.num_steps and not stopped:
                profile.before_step()
                state, metrics = train_step(state, batch)
                profile.after_step(metrics)
                step, examples = step + 1, examples + experiment.batch_size
                self.unread.append((step, metrics))
                self._read_metrics(LAG)
                self._between_steps(step, state, examples)
                with watch.waiting():
                    batch = next(batches)
                stopped = self._asked_to_stop(step)
        self._read_metrics()
        if step == experiment.num_steps and int(state.skipped_steps) == step:
            raise self._gone_bad(int(state.bad_streak), step)
        return state, examples, stopped

    def _asked_to_stop(self, step: int) -> bool:
        return self.signals.requested(step) or self._should_stop(step)

    def _compile(self, state: TrainState, batch: dict) -> Callable:
        """The training step, compiled for these arguments; the old state's memory is reused."""
        start, say = time.perf_counter(), self.report.say
        say("compiling the training step")
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        program = StepProgram(self.experiment.train, shardings)
        limit = device_limit()
        if limit is not None and self.experiment.data.device_resident:
            limit -= table_bytes(self.source, self.mesh)
        if self.experiment.grad_accumulation_steps:
            compiled = compile_step(program, state, batch, limit, say)
        else:
            workdir = self.checkpoints.workdir
            compiled = compile_to_fit(program, state, batch, limit, workdir, say)
        program.values(state)  # compiled here, too
        # One that is much later than the others at its first step counts as lost.
        distributed.wait_for_all("compiled")
        say(f"compiled in {format_seconds(time.perf_counter() - start)}")
        # Looking for NaNs needs the old state, and runs the step operation by operation.
        step = program.jitted(donate=False) if self.experiment.debug.nans else compiled
        return lambda state, batch: step(state, batch, program.values(state))

    def _read_metrics(self, lag: int = 0) -> None:
        """Read the metrics of all but the last `lag` steps, log them, stop a run gone bad."""
        while len(self.unread) > lag:
            step, metrics = self.unread.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if values["bad_streak"] >= self.experiment.max_bad_steps:
                raise self._gone_bad(int(values["bad_streak"]), step)
            self.report.metrics(step, values)

    def _gone_bad(self, streak: int, step: int) -> TrainingError:
        self.checkpoints.wait()
        last = self.checkpoints.latest_step()
        saved = "none yet" if last is None else f"step {last} in {self.checkpoints.directory}"
        return TrainingError(
            f"loss or gradient was not finite in {streak} steps in a row, the last of them step "
            f"{step}. The last good checkpoint is {saved}; lower optimizer.learning_rate and run "
            "the same command again."
        )

    def _between_steps(self, step: int, state: TrainState, examples: int) -> None:
        """Checkpoints, sample grids and evaluations that are due; not counted as training time."""
        experiment = self.experiment
        self._say_saved(self.checkpoints.poll())  # finds a save that failed, too
        if step == experiment.num_steps:
            return
        periods = (experiment.checkpoint_every, experiment.sample_every, experiment.evaluate_every)
        save, grid, evaluation = (period and step % period == 0 for period in periods)
        if not (save or grid or evaluation):
            return
        self._read_metrics()  # what the device still does for them is training
        with self.report.watch.paused(), self.signals.during("the save or the batch of samples"):
            if save:
                self._save(step, state, examples)
            if grid:
                self.report.sample_grid(step, state)
            if evaluation:
                self.report.trend(step, state)

    def _save(self, step: int, state: TrainState, examples: int) -> None:
        """Start a save; metrics up to its step, which were read, are in the workdir first."""
        start = time.perf_counter()
        self._say_saved(self.checkpoints.wait())
        self.report.flush()
        self.checkpoints.save(state, to_stored(self.experiment), examples)
        self.saved, self.blocked = step, time.perf_counter() - start

    def _say_saved(self, step: int | None) -> None:
        if step is not None:
            self.report.say(
                f"saved step {step} in {self.checkpoints.directory} (training waited "
                f"{self.blocked:.2f} s)"
            )
