"""Metrics of a run: `metrics.jsonl`, one line a step, TensorBoard event files, and W&B if asked."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator

import numpy as np
from absl import logging
from clu import parameter_overview
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.storage import as_path, is_remote, reason, write_bytes, write_json

METRICS_NAME = "metrics.jsonl"
STARTS_NAME = "starts.jsonl"  # when, where and how each training began
WANDB_NAME = "wandb_runs.json"  # the run of each project


class MetricWriter:
    """Scalars, images and texts of a run.

    What a run wrote of steps after `step`, which it did not save, is dropped: those steps are made
    again. For a workdir in a bucket, where nothing can be appended, the files are kept in a local
    folder and copied by `flush`; a bucket that cannot be reached stops no training.

    Scalars and images go to the `project` at Weights & Biases, too, if one is named.

    Attributes:
        folder: where the files are written; the workdir itself if it is local.
    """

    def __init__(self, workdir: os.PathLike, step: int = 0, project: str = ""):
        self.folder, self._bucket = pathlib.Path(workdir), None
        self._copied: dict[str, int] = {}  # size of each file, as it is in the bucket
        if is_remote(workdir):
            self._bucket = as_path(workdir)
            self.folder = pathlib.Path(tempfile.mkdtemp(prefix="djepa_jax-"))
            if (self._bucket / METRICS_NAME).exists():
                data = (self._bucket / METRICS_NAME).read_bytes()
                (self.folder / METRICS_NAME).write_bytes(data)
        with self._naming_the_place():
            _drop_lines_after(self.folder / METRICS_NAME, step)
            self._file = open(self.folder / METRICS_NAME, "a", buffering=1)  # noqa: SIM115
            # tensorboardX's SummaryWriter leaves writing to a thread: on a full disk the thread
            # ends without a word, and training waits for ever once the queue to it is full.
            # Its names tell seconds apart; TensorBoard reads files in the order of their names.
            self._events = EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=step + 1, session_log=start))  # drops what is made again
        self._wandb = _open_wandb(project, workdir, self.folder) if project else None

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Write one line; a value that is not finite becomes null, as JSON has no word for it."""
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        with self._naming_the_place():
            self._file.write(json.dumps(line) + "\n")
        self._add(step, *(summary.scalar(name, value) for name, value in scalars.items()))
        self._send(step, scalars)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Write uint8 pictures `[H, W, 3]`."""
        self._add(step, *(summary.image(k, v, dataformats="HWC") for k, v in images.items()))
        self._send(step, images)

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        """Write texts, shown in TensorBoard."""
        self._add(step, *(summary.text(name, text) for name, text in texts.items()))

    def _add(self, step: int, *summaries: summary.Summary) -> None:
        with self._naming_the_place():
            for item in summaries:
                self._write(Event(step=step, summary=item))
            self._events.flush()

    def _send(self, step: int, values: dict) -> None:
        """To W&B, which stops no training, and has all before its last step (made again here)."""
        if self._wandb is None or step < self._wandb.step:
            return
        try:
            import wandb

            images = {k: wandb.Image(v) for k, v in values.items() if isinstance(v, np.ndarray)}
            self._wandb.log(values | images, step=step)
        except Exception as error:
            logging.warning("Weights & Biases did not take step %d: %s", step, reason(error))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def flush(self) -> bool:
        """Bring everything that was written into the workdir; whether that was possible."""
        if self._bucket is None:
            return True
        complete = True
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name, size = path.relative_to(self.folder).as_posix(), path.stat().st_size
            if self._copied.get(name) == size:
                continue
            try:
                (self._bucket / name).write_bytes(path.read_bytes())
                self._copied[name] = size
            except Exception as error:  # storage services have exceptions of their own
                complete, target = False, self._bucket / name
                logging.warning("%s was not written (%s); tried again later", target, reason(error))
        return complete

    def close(self) -> None:
        """Flush, and close all files, whatever one of them says."""
        with self._naming_the_place(), contextlib.ExitStack() as stack:
            stack.callback(self._file.close)
            stack.callback(self._events.close)
            if self._wandb is not None:
                stack.callback(self._wandb.finish)
        if self._bucket is None:
            return
        if self.flush():
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            logging.warning("what %s did not take is kept in %s", self._bucket, self.folder)

    @contextlib.contextmanager
    def _naming_the_place(self) -> Iterator[None]:
        """Make an error of the file system, such as a full disk, say where it was."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.folder} cannot be written ({reason(error)}). Make room there, and run the "
                "same command again."
            ) from error


def read_lines(path: os.PathLike) -> tuple[list[dict], int]:
    """The objects in a file of JSON lines, and how many lines are none, as one cut by a crash."""
    path, found, broken = as_path(path), [], 0
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.exists() else ():
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            broken += 1
    return found, broken


def check_wandb() -> None:
    """Raise UserError unless Weights & Biases can be used: the package is there, and a login."""
    with _asking_wandb() as wandb:
        wandb.login()


def _open_wandb(project: str, workdir: os.PathLike, folder: pathlib.Path):
    """A run there, the same one whenever its workdir goes on."""
    note = as_path(workdir) / WANDB_NAME
    runs = json.loads(note.read_text("utf-8")) if note.exists() else {}
    name = runs.setdefault(project, uuid.uuid4().hex[:8])
    write_json(note, runs)
    with _asking_wandb() as wandb:
        settings = wandb.Settings(console="off")  # what is printed is not its business
        return wandb.init(project=project, id=name, resume="allow", dir=folder, settings=settings)


@contextlib.contextmanager
def _asking_wandb() -> Iterator:
    """The package; what it says becomes one line."""
    try:
        import wandb

        yield wandb
    except (ImportError, AttributeError) as error:  # or a folder `wandb`, which its runs leave
        raise UserError(
            '--wandb needs the package wandb: pip install "djepa_jax[wandb]".'
        ) from error
    except Exception as error:  # of many kinds: no login, no network, a name that it does not take
        raise UserError(
            f"Weights & Biases: {reason(error).rstrip('.')}; log in with wandb login, set "
            "WANDB_MODE=offline, or leave out --wandb."
        ) from error


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
    lines, _ = read_lines(path)
    kept = [line for line in lines if type(line.get("step")) is int and line["step"] <= step]
    if path.exists():
        write_bytes(path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())


def describe_parameters(params: dict) -> str:
    """clu's table of parameters: name, shape, count."""
    return parameter_overview.get_parameter_overview(params, include_stats=False)
