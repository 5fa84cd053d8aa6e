"""The training loop: mesh, data, state, one jitted step, and what happens between steps."""

import collections
import dataclasses
import json
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from djepa_jax import config as configuration
from djepa_jax import logs, sharding
from djepa_jax.checkpoint import Checkpoints, check_writable, lock_workdir, write_json
from djepa_jax.config import ConfigError, Experiment
from djepa_jax.data.latents import LatentCache, check_autoencoder
from djepa_jax.data.pipeline import example_stream, host_batches
from djepa_jax.data.records import DataError
from djepa_jax.data.sources import Source, open_data
from djepa_jax.digest import file_sha256
from djepa_jax.evaluation.runner import evaluate, identity, read_evaluation
from djepa_jax.evaluation.small_images import check_judgeable
from djepa_jax.generate import Generator, check_same_model, make_grid, output_paths, save_samples, stored_settings
from djepa_jax.resident import ResidentCache
from djepa_jax.train_step import TrainState, init_state, make_train_step

LAG = 2  # steps between running one and reading its metrics, so that the device never waits for the host
PREFETCH = 2  # batches that wait on the device


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and from where to resume."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call of `train` ended."""

    step: int
    finished: bool
    grid: pathlib.Path | None
    evaluation: dict | None


def train(config, workdir: str, should_stop: Callable[[int], bool] = lambda step: False) -> Result:
    """Train, or go on from the workdir's latest checkpoint.

    Args:
        config: an ml-collections config.
        workdir: folder of checkpoints, metrics and samples.
        should_stop: asked after every step (with the number of steps made); True saves and stops.

    Raises:
        ConfigError, ValueError: a setting that cannot work; nothing was touched.
        CheckpointError: an unusable workdir or checkpoint; nothing was overwritten.
        TrainingError: too many non-finite gradients in a row.
    """
    experiment = configuration.build(config)
    source = open_data(config, experiment.modality)
    if config.evaluation.kind != "none":
        check_judgeable(source)
    check_decoder(config, source)
    mesh = sharding.make_mesh(config.mesh)
    divisor = sharding.batch_divisor(mesh)
    if config.batch_size % divisor:
        raise ConfigError(
            f"config.batch_size is {config.batch_size}; it must be a multiple of {divisor}, the devices that share a batch."
        )
    check_writable(workdir)
    with lock_workdir(workdir):
        return _Run(config, experiment, source, mesh, pathlib.Path(workdir)).train(should_stop)


def check_decoder(config, source: Source) -> None:
    """Make sure, before training, that the autoencoder of the sample grids is the one of the latents.

    Raises:
        DataError: it is another one, or its file is missing.
    """
    path = config.autoencoder.path
    if config.data.modality != "image_latents" or not path:
        return
    if not pathlib.Path(os.path.expanduser(path)).is_file():
        raise DataError(f"config.autoencoder.path is {path}, where there is no file.")
    if isinstance(source, LatentCache):
        check_autoencoder(source.metadata, path, file_sha256(pathlib.Path(os.path.expanduser(path))))


class _Run:
    """One process's part of a training run."""

    def __init__(self, config, experiment: Experiment, source: Source, mesh, workdir: pathlib.Path):
        self.config, self.experiment, self.source, self.mesh, self.workdir = config, experiment, source, mesh, workdir
        self.checkpoints = Checkpoints(workdir, config.keep_checkpoints)
        self.generator = Generator(config, experiment, mesh)
        self.progress = logs.ProgressLine(config.num_steps)
        self.watch = logs.Stopwatch()
        self.last_logged, self.rate = 0, 0.0  # step, and steps per second up to it
        self.abstract = jax.eval_shape(lambda: init_state(experiment.train))
        self.shardings = sharding.state_shardings(self.abstract, mesh)

    def train(self, should_stop) -> Result:
        """Prepare, loop, finish; checkpoints are complete when this returns or raises."""
        try:
            state, examples = self._start()
            writer = logs.MetricWriter(self.workdir, int(state.step))
            try:
                with SignalCatcher() as signals:
                    return self._train(state, examples, writer, lambda step: signals.caught or should_stop(step))
            finally:
                writer.close()
        finally:
            self.checkpoints.close()

    def _train(self, state: TrainState, examples: int, writer: logs.MetricWriter, should_stop) -> Result:
        start = int(state.step)
        if start < self.config.num_steps:
            self._announce(writer, state)
            state, examples = self._loop(state, examples, writer, should_stop)
        step = int(state.step)
        if self.checkpoints.latest_step() != step and step > 0:
            self.checkpoints.save(state, configuration.resolved(self.config), examples)
            self.checkpoints.wait()
            self.progress.say(f"saved step {step} in {self.checkpoints.directory}")
        if step < self.config.num_steps or (step > start and should_stop(step)):
            return Result(step, False, None, None)
        return Result(step, True, self._final_grid(step, state, writer), self._final_evaluation(step, state, writer))

    def _start(self) -> tuple[TrainState, int]:
        """A fresh state, or the latest checkpoint's with the examples it has seen."""
        step = self.checkpoints.step_to_resume()
        if step is None:
            write_json(self.workdir / configuration.FILE_NAME, configuration.resolved(self.config))
            make = jax.jit(lambda: init_state(self.experiment.train), out_shardings=self.shardings)
            return make(), 0
        meta = self.checkpoints.read_meta(step)
        check_same_model(meta.config, self.config)
        for line in configuration.differences(configuration.upgraded(meta.config), configuration.resolved(self.config)):
            self.progress.say(f"changed since the checkpoint: {line}")
        if step > self.config.num_steps:
            self.progress.say(f"the checkpoint already has {step} steps, more than num_steps {self.config.num_steps}")
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.abstract, self.shardings)
        state = self._complete(self.checkpoints.restore(abstract, meta))
        if step < self.config.num_steps:
            write_json(self.workdir / configuration.FILE_NAME, configuration.resolved(self.config))
            self.progress.say(f"going on from step {step} of {self.config.num_steps} ({self.checkpoints.directory})")
        return state, meta.examples

    def _complete(self, parts: dict) -> TrainState:
        """The state that a step holds; what an import left out starts afresh, the parameters from their average."""
        if parts.keys() == {field.name for field in dataclasses.fields(TrainState)}:
            return TrainState(**parts)
        self.progress.say(f"the checkpoint was imported with {', '.join(parts)}; the rest of the training state starts afresh")

        def fill(parts):
            fresh = dataclasses.replace(init_state(self.experiment.train), **parts)
            return dataclasses.replace(fresh, params=parts.get("params", jax.tree.map(jnp.copy, parts["ema_params"])))

        return jax.jit(fill, out_shardings=self.shardings)(parts)

    def _announce(self, writer: logs.MetricWriter, state: TrainState) -> None:
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        shape = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        if int(state.step) == 0:
            self.progress.say(logs.describe_parameters(state.params))
            writer.write_texts(0, {"config": json.dumps(configuration.resolved(self.config), indent=2)})
        self.progress.say(
            f"training on {devices}, mesh {shape}; {len(self.source)} examples, batches of {self.config.batch_size}"
        )

    def _loop(self, state: TrainState, examples: int, writer, should_stop) -> tuple[TrainState, int]:
        config, step = self.config, int(state.step)
        batches = self._batches(examples)
        batch = next(batches)
        train_step = self._compile(state, batch)
        pending = collections.deque()
        self.last_logged, self.watch = step, logs.Stopwatch()
        while step < config.num_steps and not should_stop(step):
            state, metrics = train_step(state, batch)
            step, examples = step + 1, examples + config.batch_size
            pending.append((step, metrics))
            if len(pending) > LAG:
                self._report(*pending.popleft(), writer)
            self._between_steps(step, state, examples, writer)
            waiting = time.perf_counter()
            batch = next(batches)
            self.watch.waited += time.perf_counter() - waiting
        while pending:
            self._report(*pending.popleft(), writer)
        if step == config.num_steps and int(state.skipped_steps) == step:
            raise self._gone_bad(int(state.bad_streak), step)
        return state, examples

    def _compile(self, state: TrainState, batch: dict) -> Callable:
        """The training step, compiled for these arguments; the old state's memory is reused for the new one."""
        self.progress.say("compiling the training step")
        start = time.perf_counter()
        step = jax.jit(make_train_step(self.experiment.train), donate_argnums=0, out_shardings=(self.shardings, None))
        compiled = step.lower(state, batch).compile()
        self.progress.say(f"compiled in {logs.format_seconds(time.perf_counter() - start)}")
        return compiled

    def _batches(self, consumed: int) -> Iterator[dict]:
        """Batches on the device, a few ahead of the step that uses them."""
        resident = ResidentCache(self.source, self.mesh) if self.config.data.device_resident else None
        source = resident.rows if resident else self.source
        stream = example_stream(source, self.config.seed, self.config.data.random_flip)
        host, hosts = jax.process_index(), jax.process_count()
        place, queue = sharding.batch_sharding(self.mesh), collections.deque()
        for batch in host_batches(stream, self.config.batch_size, consumed, host, hosts):
            batch = {name: jax.make_array_from_process_local_data(place, value) for name, value in batch.items()}
            queue.append(resident.fetch(batch) if resident else batch)
            if len(queue) > PREFETCH:
                yield queue.popleft()

    def _report(self, step: int, metrics: dict, writer: logs.MetricWriter) -> None:
        """Read the metrics of a step that is over, log them, and stop a run that has gone bad."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values["bad_streak"] >= self.config.max_bad_steps:
            raise self._gone_bad(int(values["bad_streak"]), step)
        due = step % self.config.log_every == 0 or step == self.config.num_steps
        if due:
            seconds, share_waiting = self.watch.lap()
            self.rate, self.last_logged = (step - self.last_logged) / seconds, step
            values |= {"images_per_second": self.rate * self.config.batch_size, "data_wait_share": share_waiting}
            writer.write_scalars(step, values)
        if due or (self.progress.live and self.rate):
            left = (self.config.num_steps - step) / self.rate
            self.progress.show(step, values, self.rate * self.config.batch_size, left)

    def _gone_bad(self, streak: int, step: int) -> TrainingError:
        self.checkpoints.wait()
        last = self.checkpoints.latest_step()
        saved = "none yet" if last is None else f"step {last} in {self.checkpoints.directory}"
        return TrainingError(
            f"loss or gradient was not finite in {streak} steps in a row, the last of them step {step}. The last good "
            f"checkpoint is {saved}; lower optimizer.learning_rate and run the same command again."
        )

    def _between_steps(self, step: int, state: TrainState, examples: int, writer) -> None:
        """Checkpoints, sample grids and evaluations that are due; the time they take is not training time."""
        start = time.perf_counter()
        config, last = self.config, step == self.config.num_steps
        if step % config.checkpoint_every == 0 and not last:
            self.checkpoints.save(state, configuration.resolved(config), examples)
        if config.sample_every and step % config.sample_every == 0 and not last:
            self._sample_grid(step, state, writer)
        if config.evaluate_every and step % config.evaluate_every == 0 and not last:
            self._evaluate(step, state, writer)
        self.watch.pause(time.perf_counter() - start)

    def _final_grid(self, step: int, state: TrainState, writer) -> pathlib.Path | None:
        """The last grid's path; a grid of these very weights and settings is not made again."""
        png, npz = output_paths(self._grid_path(step))
        if stored_settings(npz) != identity(state.ema_params, self.config, step):
            self._sample_grid(step, state, writer)
        return png if png.exists() else None

    def _final_evaluation(self, step: int, state: TrainState, writer) -> dict | None:
        """The evaluation of the last step; one of these very weights and settings is not made again."""
        if self.config.evaluation.kind == "none":
            return None
        record = read_evaluation(self.config, state.ema_params, step, self.workdir)
        if record is None:
            self.progress.say(f"evaluating {self.config.evaluation.count} samples")
            record = self._evaluate(step, state, writer)
        return record

    def _grid_path(self, step: int) -> pathlib.Path:
        return self.workdir / "samples" / f"step_{step:08d}.png"

    def _sample_grid(self, step: int, state: TrainState, writer) -> None:
        labels = self.experiment.sample_labels
        arrays = self.generator.images(state.ema_params, labels, self.config.sample.seed)
        names = self.experiment.class_names
        save_samples(self._grid_path(step), arrays, labels, names, identity(state.ema_params, self.config, step))
        if "images" in arrays:
            writer.write_images(step, {"samples": make_grid(arrays["images"], labels, names)})

    def _evaluate(self, step: int, state: TrainState, writer) -> dict:
        record = evaluate(self.config, self.generator, state.ema_params, self.source, step, self.workdir, progress=True)
        figures = {name: record[name] for name in ("accuracy", "frechet_distance")}
        writer.write_scalars(step, {f"evaluation/{name}": value for name, value in figures.items()})
        self.progress.say(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        return record


class SignalCatcher:
    """Turns the first SIGINT or SIGTERM into a request to save and stop; a second SIGINT ends the process at once."""

    def __init__(self):
        self.caught = False
        self._previous: dict = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._catch)
            except ValueError:  # not the main thread: signals are somebody else's business
                break
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number, frame):
        del frame
        self.caught = True
        print(
            f"\n{signal.Signals(number).name}: saving a checkpoint, then stopping; press Ctrl-C again to stop at once.",
            flush=True,
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)
