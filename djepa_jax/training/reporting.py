"""What people see of a training: lines, metrics, sample grids, evaluations. Process 0 writes."""

import datetime
import functools
import json
import pathlib
import shlex
import socket
import sys
import tempfile
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from djepa_jax import __version__
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.flags import program
from djepa_jax.core.modalities.programs import tokenized
from djepa_jax.core.models.conditioning import Classes, Sum
from djepa_jax.core.models.text import Text
from djepa_jax.core.optimizer import describe_trained
from djepa_jax.core.train_step import TrainState
from djepa_jax.data.captions import any_rows, conditions_to_show
from djepa_jax.data.summary import describe_data
from djepa_jax.evaluation.evaluate import (
    FILE_NAME,
    describe,
    evaluate,
    identity,
    is_of,
    read_evaluation,
    trend,
)
from djepa_jax.evaluation.metrics.base import NotFiniteError
from djepa_jax.runtime import distributed
from djepa_jax.runtime.metric_writer import STARTS_NAME, MetricWriter, describe_parameters
from djepa_jax.runtime.progress import Progress, Stopwatch, say
from djepa_jax.runtime.storage import as_path, write_bytes
from djepa_jax.runtime.versions import commit, versions
from djepa_jax.sampling.generator import Generator, Stopped, count_of
from djepa_jax.sampling.grids import (
    MAX_GRID,
    output_paths,
    save_grid,
    save_samples,
    stored_settings,
)

SHOWN = ("loss", "token_loss", "jepa_loss")  # of the metrics, in the terminal
PARAMETERS_NAME = "parameters.txt"


class Reporter:
    """The reports of one training run. All processes call the methods that sample.

    Args:
        experiment: the configuration.
        source: of the training data.
        mesh: of the devices.
        workdir: where to write.
        stop_requested: step -> whether the run was asked to stop; grids and evaluations are given
            up then.
        wandb: a project of Weights & Biases, for scalars and grids; "" for none.
    """

    def __init__(
        self,
        experiment: Experiment,
        source,
        mesh,
        workdir: epath.Path,
        stop_requested: Callable[[int], bool],
        wandb: str = "",
    ):
        self.experiment, self.source, self.workdir = experiment, source, workdir
        self.generator = Generator(experiment, mesh, progress=True)
        self._stop_requested = stop_requested
        self._progress: Progress | None = None
        self.watch = Stopwatch()
        self._logged, self._rate = 0, 0.0  # step, and steps per second up to it
        self.writer: MetricWriter | None = None
        self._wandb = wandb

    def open(self, step: int) -> None:
        """Begin to write metrics of the steps after `step`."""
        if distributed.is_main_process():
            self.writer = MetricWriter(self.workdir, step, self._wandb)
        self._logged = step

    def close(self) -> None:
        """Write what is left."""
        if self._progress is not None:
            self._progress.close()
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()

    @property
    def local_folder(self) -> pathlib.Path:
        """Where large files may be written that reach the workdir in the end."""
        folder = self.writer.folder if self.writer is not None else tempfile.gettempdir()
        return pathlib.Path(folder)

    def say(self, text: str) -> None:
        """Print a line."""
        if distributed.is_main_process():
            say(text)

    def announce(self, mesh, state: TrainState) -> None:
        """Say what is going to be trained on what."""
        experiment = self.experiment
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        if distributed.is_main_process():
            for line in describe_data(experiment, self.source):
                self.say(line)
        if int(state.step) == 0 and self.writer is not None:
            text = json.dumps(experiment.to_dict(), indent=2)
            self.writer.write_texts(0, {"config": text})
            table = describe_parameters(state.params)
            write_bytes(self.workdir / PARAMETERS_NAME, f"{table}\n".encode())
        if self.writer is not None:
            self._record_start(int(state.step), devices, shape)
        what = describe_trained(experiment.optimizer, state.params)
        self.say(
            f"training {what} on {devices}, mesh {shape}; {len(self.source):,} examples, batches "
            f"of {experiment.batch_size}"
        )
        if experiment.sample_every and experiment.lacks_decoder:
            self.say(
                "WARNING: sample grids will hold latents (.npz) and no pictures, for "
                "config.autoencoder.path is empty; name the autoencoder's weights there to see "
                "pictures"
            )

    def _record_start(self, step: int, devices: str, mesh: str) -> None:
        """Add a line on when, where and how this training begins or goes on."""
        path = self.workdir / STARTS_NAME
        about = {
            "step": step,
            "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join([*program(), *sys.argv[1:]]),
            "host": socket.gethostname(),
            "processes": jax.process_count(),
            "devices": devices,
            "mesh": mesh,
            "versions": {"djepa_jax": __version__} | versions(),
            "commit": commit(),
        }
        before = path.read_bytes() if path.exists() else b""
        write_bytes(path, before + json.dumps(about).encode() + b"\n")

    def start(self, step: int) -> None:
        """Begin to measure the time of the steps after `step`, and to show them."""
        self.watch.lap()
        total, quiet = self.experiment.num_steps, not distributed.is_main_process()
        self._progress = Progress("training", "step", total, step, quiet)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of a step that is over, when they are due."""
        experiment = self.experiment
        due = step % experiment.log_every == 0 or step == experiment.num_steps
        if due:
            seconds, share_waiting = self.watch.lap()
            self._rate, self._logged = (step - self._logged) / seconds, step
            images = {"images_per_second": self._rate * experiment.batch_size}
            values = values | images | {"data_wait_share": share_waiting}
            if self.writer is not None:
                self.writer.write_scalars(step, values)
        parts = [f"{name} {values[name]:.4f}" for name in SHOWN if name in values]
        if self._rate:
            parts.append(f"{self._rate * experiment.batch_size:.0f} images/s")
        if values.get("skipped_steps"):
            parts.append(f"{int(values['skipped_steps'])} steps skipped")
        self._progress.show(step, "  ".join(parts))

    def flush(self) -> None:
        """Make sure that what was logged is in the workdir."""
        if self.writer is not None:
            self.writer.flush()

    def final_grid(self, step: int, state: TrainState) -> epath.Path | None:
        """The last grid's path, of its arrays if there are no pictures; it is not made twice.

        None if there are to be no grids.
        """
        if not self.experiment.sample_every:
            return None
        png, npz = output_paths(self._grid_path(step))
        wanted = self._identity(step, state)
        if not distributed.run_on_main(lambda: int(is_of(stored_settings(npz) or {}, wanted))):
            self.sample_grid(step, state)
        return next((path for path in (png, npz) if path.exists()), None)

    def final_evaluation(self, step: int, state: TrainState) -> dict | None:
        """The evaluation of the last step; one of these weights and settings is not made again."""
        settings = self.experiment.evaluation
        if settings.kind == "none":
            return None
        record = read_evaluation(*self._to_judge(step, state))
        if not distributed.run_on_main(lambda: int(record is not None)):
            record = self.evaluate(step, state)
        return record

    def _identity(self, step: int, state: TrainState) -> dict:
        decoder = self.generator.autoencoder_sha256
        return identity(state.ema_params, self.experiment, step, decoder)

    def _to_judge(self, step: int, state: TrainState) -> tuple:
        arguments = (self.experiment, self.generator, state.ema_params, self.source)
        return (*arguments, step, self.workdir)

    def _grid_path(self, step: int) -> epath.Path:
        return self.workdir / "samples" / f"step_{step:08d}.png"

    def sample_grid(self, step: int, state: TrainState) -> None:
        """Sample the moving average and write a labelled grid, unless asked to stop meanwhile."""
        experiment = self.experiment
        conditions = conditions_to_show(experiment, self.source)
        stop = functools.partial(self._stop_requested, step)
        try:
            arrays = self.generator.images(
                state.ema_params, conditions, experiment.sample.seed, should_stop=stop
            )
        except Stopped:
            self.say(f"step {step}: no sample grid, for the run was asked to stop")
            return
        settings = self._identity(step, state)
        self._real_grid(step)
        if self.writer is None:
            return
        path = self._grid_path(step)
        grid = save_samples(path, experiment, arrays, conditions, settings)
        self.say(f"step {step}: wrote {path if grid is not None else output_paths(path)[1]}")
        if grid is not None:
            self.writer.write_images(step, {"samples": grid})

    def _real_grid(self, step: int) -> None:
        """Write real examples of the same classes beside the first grid, as their tokens hold them.

        Every process takes part, since they share the autoencoder of latents.
        """
        experiment, path = self.experiment, self._grid_path(step).with_name("real.png")
        if experiment.lacks_decoder or distributed.run_on_main(lambda: int(path.exists())):
            return
        wanted = conditions_to_show(experiment, self.source)
        wanted = jax.tree.map(lambda leaf: leaf[:MAX_GRID], wanted)
        examples = [self.source[index] for index in real_examples(self.source, wanted)]
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *examples)
        arrays = self.generator.export(tokenized(experiment.modality, batch["example"]))
        if self.writer is None:
            return
        grid = save_grid(path, experiment, arrays, batch["condition"], {})
        if grid is not None:
            self.writer.write_images(step, {"real": grid})
        if grid is not None and isinstance(experiment.network.conditioner, Text):
            lines = "".join(f"{title}\n" for title in experiment.titles(wanted))
            write_bytes(path.with_name("captions.txt"), lines.encode())  # grids cut long ones

    def evaluate(self, step: int, state: TrainState) -> dict | None:
        """Judge samples of the moving average; the record, in process 0, unless asked to stop."""
        judge = functools.partial(evaluate, *self._to_judge(step, state))
        record = self._judged(step, judge)
        if record:
            self._figures(step, record["metrics"])
        return record

    def trend(self, step: int, state: TrainState) -> None:
        """A few figures of a few samples of the moving average, unless asked to stop."""
        *arguments, _, workdir = self._to_judge(step, state)
        if figures := self._judged(step, functools.partial(trend, *arguments, workdir)):
            self._figures(step, figures)

    def _judged(self, step: int, judge: Callable) -> dict | None:
        self.say(f"step {step}: evaluating")
        try:
            return judge(should_stop=functools.partial(self._stop_requested, step)) or None
        except Stopped:
            self.say(f"step {step}: no evaluation, for the run was asked to stop")
        except NotFiniteError as error:
            self.say(f"WARNING: step {step}: no evaluation; {error}")
        return None

    def _figures(self, step: int, figures: dict[str, float]) -> None:
        named = {f"evaluation/{name}": value for name, value in figures.items()}
        if self.writer is not None:
            self.writer.write_scalars(step, named)
        self.say(f"step {step}: {describe(figures)}")


def real_examples(source, conditions) -> np.ndarray:
    """Indices of examples with some conditions, one for each; any where labels are not known."""
    count = count_of(conditions)
    indices = any_rows(source, count)
    labels, wanted = getattr(source, "all_labels", [source.labels]), jax.tree.leaves(conditions)
    if len(labels) != len(wanted) or any(x is None or len(x) != len(source) for x in labels):
        return indices
    labels, wanted = np.stack(labels, axis=1), np.stack(wanted, axis=1)  # [examples, 1], [n, 1]
    for label in np.unique(wanted, axis=0):
        having = np.flatnonzero((labels == label).all(axis=1))
        if len(having):
            places = np.flatnonzero((wanted == label).all(axis=1))
            indices[places] = np.resize(
                np.random.default_rng(label).permutation(having), len(places)
            )
    return indices


def summarise(result, experiment: Experiment, workdir: str) -> None:
    """Say how training ended, where the pictures are and what to try next."""
    if not result.finished:
        unfinished = result.step < experiment.num_steps
        rest = "goes on from there" if unfinished else "makes the missing samples or figures"
        print(f"stopped at step {result.step} of {experiment.num_steps}; the same command {rest}.")
        return
    print(
        f"\nTraining is complete ({result.step} steps); to start afresh, name another --workdir or "
        f"remove {workdir}."
    )
    if result.grid:
        print(f"Samples:  {result.grid}")
    if result.evaluation:
        figures = describe(result.evaluation["metrics"])
        print(f"Quality:  {figures} ({as_path(workdir) / FILE_NAME})")
    print(f"Try next (in {pathlib.Path.cwd()}):")
    for extra in next_steps(experiment):
        print(f"  {shlex.join([*program(), f'--workdir={workdir}'])} \\\n      {shlex.join(extra)}")


def next_steps(experiment: Experiment) -> list[tuple[str, ...]]:
    """What to do with a finished run, as flags beside its workdir."""
    conditioner, names, asked = experiment.network.conditioner, experiment.class_names[:4], {}
    if isinstance(conditioner, Text):
        asked = {"prompt": "sample.prompt=cat"}
    elif isinstance(conditioner, Classes | Sum) and names:
        asked = {"one_class": f"sample.labels={names[-1]}"}
    few = max(1, experiment.sample.num_ar_steps // 2)
    sample, ending = ("--mode=sample",), "png"
    if experiment.lacks_decoder:
        sample, ending = ("--mode=sample", "--latents_only"), "npz"
    elif hasattr(experiment.modality, "rate"):
        ending = "wav"
    changes = asked | {
        "fast": f"sample.num_ar_steps={few}",
        "guided": "sample.cfg_scale=4.0",
    }
    return [(*sample, f"--out={k}.{ending}", f"--config.{v}") for k, v in changes.items()]
