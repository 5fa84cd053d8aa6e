"""What people see of a training: lines, metrics, sample grids, evaluations. Process 0 writes
them.
"""

import functools
import json
import pathlib
import tempfile
from collections.abc import Callable

import jax
from etils import epath

from djepa_jax.checkpoints.autoencoder import has_autoencoder, makes_latents
from djepa_jax.config import experiment as configuration
from djepa_jax.config.experiment import Experiment
from djepa_jax.core.train_step import TrainState
from djepa_jax.evaluation.evaluate import evaluate, identity, read_evaluation
from djepa_jax.runtime import distributed, metric_writer
from djepa_jax.runtime.progress import ProgressLine, Stopwatch
from djepa_jax.sampling.generator import (
    Generator,
    Stopped,
    make_grid,
    output_paths,
    save_samples,
    stored_settings,
)


class Reporter:
    """The reports of one training run.

    All processes call the methods that sample, since all of them take part in that.

    Attributes:
        stop_requested: step -> whether the run was asked to stop; grids and evaluations are given
            up then.
    """

    def __init__(self, config, experiment: Experiment, source, mesh, workdir: epath.Path):
        self.config, self.experiment, self.source, self.workdir = (
            config,
            experiment,
            source,
            workdir,
        )
        self.generator = Generator(config, experiment, mesh)
        self.progress = ProgressLine(config.num_steps, quiet=not distributed.is_main_process())
        self.watch = Stopwatch()
        self.last_logged, self.rate = 0, 0.0  # step, and steps per second up to it
        self.writer: metric_writer.MetricWriter | None = None
        self.stop_requested: Callable[[int], bool] = lambda step: False

    def open(self, step: int) -> None:
        """Begin to write metrics of the steps after `step`."""
        if distributed.is_main_process():
            self.writer = metric_writer.MetricWriter(self.workdir, step)
        self.last_logged = step

    def close(self) -> None:
        """Write what is left."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    @property
    def local_folder(self) -> pathlib.Path:
        """Where large files may be written that reach the workdir in the end."""
        return (
            self.writer.folder if self.writer is not None else pathlib.Path(tempfile.gettempdir())
        )

    def say(self, text: str) -> None:
        """Print a line."""
        self.progress.say(text)

    def announce(self, mesh, state: TrainState) -> None:
        """Say what is going to be trained on what."""
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        if int(state.step) == 0:
            self.say(metric_writer.describe_parameters(state.params))
            if self.writer is not None:
                self.writer.write_texts(
                    0, {"config": json.dumps(configuration.resolved(self.config), indent=2)}
                )
        self.say(
            f"training on {devices}, mesh {shape}; {len(self.source)} examples, batches of "
            f"{self.config.batch_size}"
        )
        if makes_latents(self.config) and not has_autoencoder(self.config):
            self.say(
                "WARNING: sample grids will hold latents (.npz) and no pictures, for "
                "config.autoencoder.path is empty; name "
                "the autoencoder's weights there to see pictures"
            )

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of a step that is over, when they are due."""
        due = step % self.config.log_every == 0 or step == self.config.num_steps
        if due:
            seconds, share_waiting = self.watch.lap()
            self.rate, self.last_logged = (step - self.last_logged) / seconds, step
            values = values | {
                "images_per_second": self.rate * self.config.batch_size,
                "data_wait_share": share_waiting,
            }
            if self.writer is not None:
                self.writer.write_scalars(step, values)
        if due or (self.progress.live and self.rate):
            left = (self.config.num_steps - step) / self.rate
            self.progress.show(step, values, self.rate * self.config.batch_size, left)

    def flush(self) -> None:
        """Make sure that what was logged is in the workdir."""
        if self.writer is not None:
            self.writer.flush()

    def final_grid(self, step: int, state: TrainState) -> epath.Path | None:
        """The last grid's path, of its arrays if it has no pictures; one of these very weights and
        settings is not made again.
        """
        png, npz = output_paths(self._grid_path(step))
        wanted = self._identity(step, state)
        if not distributed.run_on_main(lambda: int(stored_settings(npz) == wanted)):
            self.sample_grid(step, state)
        return next((path for path in (png, npz) if path.exists()), None)

    def final_evaluation(self, step: int, state: TrainState) -> dict | None:
        """The evaluation of the last step; one of these very weights and settings is not made
        again.
        """
        if self.config.evaluation.kind == "none":
            return None
        record = read_evaluation(self.config, state.ema_params, step, self.workdir)
        if not distributed.run_on_main(lambda: int(record is not None)):
            self.say(f"evaluating {self.config.evaluation.count} samples")
            record = self.evaluate(step, state)
        return record

    def _identity(self, step: int, state: TrainState) -> dict:
        return identity(state.ema_params, self.config, step, self.generator.autoencoder_sha256)

    def _grid_path(self, step: int) -> epath.Path:
        return self.workdir / "samples" / f"step_{step:08d}.png"

    def sample_grid(self, step: int, state: TrainState) -> None:
        """Sample the moving average and write a labelled grid, unless the run is asked to stop
        meanwhile.
        """
        labels, names = self.experiment.sample_labels, self.experiment.class_names
        try:
            stop = functools.partial(self.stop_requested, step)
            arrays = self.generator.images(
                state.ema_params, labels, self.config.sample.seed, should_stop=stop
            )
        except Stopped:
            self.say(f"step {step}: no sample grid, for the run was asked to stop")
            return
        settings = self._identity(step, state)
        if self.writer is None:
            return
        save_samples(self._grid_path(step), arrays, labels, names, settings)
        if "images" in arrays:
            self.writer.write_images(step, {"samples": make_grid(arrays["images"], labels, names)})

    def evaluate(self, step: int, state: TrainState) -> dict | None:
        """Judge samples of the moving average; the record, in process 0, unless the run is asked to
        stop meanwhile.
        """
        params, stop = state.ema_params, functools.partial(self.stop_requested, step)
        try:
            record = evaluate(
                self.config, self.generator, params, self.source, step, self.workdir, stop
            )
        except Stopped:
            self.say(f"step {step}: no evaluation, for the run was asked to stop")
            return None
        if self.writer is None:
            return None
        figures = {name: record[name] for name in ("accuracy", "frechet_distance")}
        self.writer.write_scalars(
            step, {f"evaluation/{name}": value for name, value in figures.items()}
        )
        self.say(
            f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        )
        return record
