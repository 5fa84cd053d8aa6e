"""The training loop: mesh, data, state, one jitted step, and what happens between steps."""

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable

import jax
from etils import epath

from djepa_jax.checkpoints.autoencoder import check_sha256, with_autoencoder
from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.checkpoints.restore import go_back
from djepa_jax.config import experiment as configuration
from djepa_jax.config.experiment import ConfigError, Experiment
from djepa_jax.core import sharding
from djepa_jax.core.train_step import TrainState
from djepa_jax.data.device_cache import table_bytes
from djepa_jax.data.feed import device_batches
from djepa_jax.data.latent_cache import LatentCache, check_autoencoder
from djepa_jax.data.records import DataError
from djepa_jax.data.sources import Source, open_data
from djepa_jax.evaluation.metrics.small_images import check_judgeable
from djepa_jax.runtime import distributed, metric_writer
from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.profiling import ProfileWindow, debug_switches
from djepa_jax.runtime.staging import local_copy
from djepa_jax.runtime.storage import as_path, check_writable
from djepa_jax.runtime.units import format_seconds
from djepa_jax.training.compile_step import StepProgram, announce_and_compile, compile_to_fit
from djepa_jax.training.initial_state import Start
from djepa_jax.training.memory import device_limit
from djepa_jax.training.reporting import Reporter

# steps between running one and reading its metrics, so that the device never waits for the host
LAG = 2


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says why and from where to resume."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call of `train` ended."""

    step: int
    finished: bool
    grid: epath.Path | None
    evaluation: dict | None


def train(
    config,
    workdir: str,
    should_stop: Callable[[int], bool] = lambda step: False,
    restore_from: str = "",
) -> Result:
    """Train, or go on from the workdir's latest checkpoint.

    Args:
        config: an ml-collections config.
        workdir: folder of checkpoints, metrics and samples; local or gs://.
        should_stop: asked after every step (with the number of steps made); True saves and stops.
        restore_from: PATH@STEP, a step to go on from instead (`restore.go_back`).

    Raises:
        ConfigError, ValueError: a setting that cannot work; nothing was touched.
        CheckpointError: an unusable workdir or checkpoint; nothing was overwritten.
        TrainingError: too many non-finite gradients in a row.
    """
    experiment = configuration.build(config)
    mesh = sharding.make_mesh(config.mesh)
    divisor = sharding.batch_divisor(mesh)
    if config.batch_size % divisor:
        raise ConfigError(
            f"config.batch_size is {config.batch_size}; it must be a multiple of {divisor}, the "
            "devices that share a batch."
        )
    check_mesh(experiment, mesh)
    decoder_weights(config)  # before the data, whose copying may take long
    source = open_data(config, experiment.modality)
    if config.evaluation.kind != "none":
        check_judgeable(source)
    check_decoder(config, source)
    config = with_autoencoder(config, latents_made_by(config, source))
    distributed.on_main(lambda: check_writable(workdir))
    with distributed.held_by_main(lock_workdir(workdir)), debug_switches(config.debug):
        distributed.check_shared(as_path(workdir))
        same = f"{configuration.resolved(config)} {len(source)} {restore_from}"
        distributed.check_same(same, "the configuration, the data or --restore_from")
        run = _Run(config, experiment, source, mesh, as_path(workdir))
        if restore_from:
            abstract = run.start.abstract
            distributed.on_main(
                lambda: go_back(run.checkpoints, restore_from, abstract, config, run.report.say)
            )
        return run.train(should_stop)


def check_mesh(experiment: Experiment, mesh) -> None:
    """Raise ConfigError unless the axes of the mesh divide what they split; an array that they do
    not divide stays whole.
    """
    model = experiment.train.model
    for axis, entry, sizes in (
        ("fsdp", "second", {"width": model.width, "denoiser_width": model.denoiser_width}),
        ("tensor", "last", {"num_heads": model.num_heads, "denoiser_width": model.denoiser_width}),
    ):
        parts = mesh.shape[axis]
        for name, size in sizes.items():
            if size % parts:
                raise ConfigError(
                    f"config.mesh splits model.{name} {size} over {parts} devices ({axis}); its "
                    f"{entry} entry must divide {size}."
                )


def decoder_weights(config) -> pathlib.Path | None:
    """The local file of the autoencoder that makes pictures of samples; None if there are to be
    none.

    Raises:
        DataError, PathError: the file is missing, or it lies in a bucket and cannot be copied.
    """
    path = config.autoencoder.path
    if config.data.modality != "image_latents" or not path:
        return None
    file = local_copy(path, config.data.staging, "config.autoencoder.path")
    if not file.is_file():
        raise DataError(f"config.autoencoder.path is {path}, where there is no file.")
    return file


def check_decoder(config, source: Source) -> None:
    """Make sure, before training, that the autoencoder of the sample grids is the one of the
    latents.

    Raises:
        DataError, ConfigError: it is another one, or its file is missing.
    """
    weights = decoder_weights(config)
    if weights is not None:
        check_sha256(config.autoencoder, weights)
    cache = getattr(source, "source", source)  # inside of `Unlabelled`
    if weights is not None and isinstance(cache, LatentCache):
        check_autoencoder(cache.metadata, config.autoencoder.path, file_sha256(weights))


def latents_made_by(config, source: Source) -> str:
    """The sha256 of the autoencoder that made a source's latents; what the config says, where the
    source does not know.

    Raises:
        DataError: the config says another one.
    """
    cache, told = getattr(source, "source", source), config.autoencoder.sha256
    if not isinstance(cache, LatentCache):
        return told
    found = cache.metadata.autoencoder["sha256"]
    if told and told != found:
        raise DataError(
            f"config.autoencoder.sha256 is {told}, the latent cache was made with {found}; leave "
            "it empty."
        )
    return found


class _Run:
    """One process's part of a training run."""

    def __init__(self, config, experiment: Experiment, source: Source, mesh, workdir: epath.Path):
        self.config, self.experiment, self.source, self.mesh = config, experiment, source, mesh
        self.checkpoints = Checkpoints(workdir, config.keep_checkpoints)
        self.report = Reporter(config, experiment, source, mesh, workdir)
        self.start = Start(config, experiment, mesh, self.checkpoints, self.report.say)
        self.saved = 0  # the newest step that is in the workdir, or on its way there
        self.blocked = 0.0  # seconds that saving it has kept training waiting
        self.unread = collections.deque()  # steps and their metrics, still on the device

    def train(self, should_stop) -> Result:
        """Prepare, loop, finish; checkpoints are complete when this returns or raises."""
        try:
            with distributed.StopSignals() as signals:
                self.report.stop_requested = signals.requested
                return self._train(signals, should_stop)
        finally:
            with contextlib.closing(self.checkpoints):  # whatever closing the report may say
                self.report.close()

    def _train(self, signals: distributed.StopSignals, should_stop) -> Result:
        """Restore, train, save and sample; a signal ends this as soon as nothing is lost by it."""
        signals.answer = distributed.STARTING
        state, examples = self.start.state()
        step = self.saved = int(state.step)
        if signals.requested(step):
            return Result(step, False, None, None)
        signals.answer, stopped = distributed.SAVING, False
        self.report.open(step)
        if step < self.config.num_steps:
            self.report.announce(self.mesh, state)
            state, examples, stopped = self._loop(
                state, examples, lambda at: signals.requested(at) or should_stop(at)
            )
            step = int(state.step)
        if self.saved != step:
            self._save(step, state, examples)
        self._say_saved(self.checkpoints.wait())
        if (
            signals.requested(step) or stopped or step < self.config.num_steps
        ):  # asked again: that save may have taken long
            return Result(step, False, None, None)
        return self._results(step, state, signals)

    def _results(self, step: int, state: TrainState, signals: distributed.StopSignals) -> Result:
        """Grid and evaluation of the last step; a signal ends them soon, for everything is
        saved.
        """
        signals.answer, evaluation = distributed.SAVED, None
        grid = self.report.final_grid(step, state)
        if not signals.requested(step):
            evaluation = self.report.final_evaluation(step, state)
        return Result(step, not signals.requested(step), grid, evaluation)

    def _loop(self, state: TrainState, examples: int, should_stop) -> tuple[TrainState, int, bool]:
        """Train to the last step, or until asked to stop: the state, the examples it has seen, and
        whether it was asked.
        """
        config, step, report = self.config, int(state.step), self.report
        batches = device_batches(config, self.source, self.mesh, examples)
        batch = next(batches)
        train_step = self._compile(state, batch)
        profile = ProfileWindow(
            report.local_folder, config.debug.profile_start, config.debug.profile_steps
        )
        report.watch = metric_writer.Stopwatch()
        stopped = should_stop(step)
        with contextlib.closing(profile):
            while step < config.num_steps and not stopped:
                profile.before_step()
                state, metrics = train_step(state, batch)
                profile.after_step(metrics)
                step, examples = step + 1, examples + config.batch_size
                self.unread.append((step, metrics))
                self._read_metrics(LAG)
                self._between_steps(step, state, examples)
                with report.watch.waiting():
                    batch = next(batches)
                stopped = should_stop(step)
        self._read_metrics()
        if step == config.num_steps and int(state.skipped_steps) == step:
            raise self._gone_bad(int(state.bad_streak), step)
        return state, examples, stopped

    def _compile(self, state: TrainState, batch: dict) -> Callable:
        """The training step, compiled for these arguments; the old state's memory is reused for the
        new one.
        """
        start, say = time.perf_counter(), self.report.say
        program = StepProgram(
            self.experiment.train, self.start.abstract, self.start.shardings, self._room()
        )
        compiler = announce_and_compile if self.config.microbatches else compile_to_fit
        compiled = compiler(program, state, batch, say)
        distributed.wait_for_all(
            "compiled"
        )  # one that is much later than the others at its first step counts as lost
        say(f"compiled in {format_seconds(time.perf_counter() - start)}")
        # Looking for NaNs needs the old state, and runs the step operation by operation.
        return program.jitted(donate=False) if self.config.debug.nans else compiled

    def _room(self) -> int | None:
        """Bytes of a device that are there for training, beside the data that stay on it."""
        limit = device_limit()
        if limit is None or not self.config.data.device_resident:
            return limit
        return limit - table_bytes(self.source, self.mesh)

    def _read_metrics(self, lag: int = 0) -> None:
        """Read the metrics of all but the last `lag` steps, log them, and stop a run that has gone
        bad.
        """
        while len(self.unread) > lag:
            step, metrics = self.unread.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if values["bad_streak"] >= self.config.max_bad_steps:
                raise self._gone_bad(int(values["bad_streak"]), step)
            self.report.metrics(step, values)

    def _gone_bad(self, streak: int, step: int) -> TrainingError:
        self.checkpoints.wait()
        last = self.checkpoints.latest_step()
        saved = "none yet" if last is None else f"step {last} in {self.checkpoints.directory}"
        return TrainingError(
            f"loss or gradient was not finite in {streak} steps in a row, the last of them step "
            f"{step}. The last good "
            f"checkpoint is {saved}; lower optimizer.learning_rate and run the same command again."
        )

    def _between_steps(self, step: int, state: TrainState, examples: int) -> None:
        """Checkpoints, sample grids and evaluations that are due; the time they take is not
        training time.
        """
        config, last = self.config, step == self.config.num_steps
        self._say_saved(self.checkpoints.poll())  # finds a save that failed, too
        with self.report.watch.paused():
            if step % config.checkpoint_every == 0 and not last:
                self._save(step, state, examples)
            if config.sample_every and step % config.sample_every == 0 and not last:
                self.report.sample_grid(step, state)
            if config.evaluate_every and step % config.evaluate_every == 0 and not last:
                self.report.evaluate(step, state)

    def _save(self, step: int, state: TrainState, examples: int) -> None:
        """Start a save; metrics up to its step are in the workdir first."""
        start = time.perf_counter()
        self._say_saved(self.checkpoints.wait())
        self._read_metrics()
        self.report.flush()
        self.checkpoints.save(state, configuration.resolved(self.config), examples)
        self.saved, self.blocked = step, time.perf_counter() - start

    def _say_saved(self, step: int | None) -> None:
        if step is not None:
            self.report.say(
                f"saved step {step} in {self.checkpoints.directory} (training waited "
                f"{self.blocked:.2f} s)"
            )
