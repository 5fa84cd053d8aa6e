"""Metrics to a file, to TensorBoard and to the terminal."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from clu import parameter_overview
from etils import epath
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from djepa_jax.runtime.storage import as_path, is_remote, write_bytes
from djepa_jax.runtime.units import format_seconds

METRICS_NAME = "metrics.jsonl"
MIRROR_SECONDS = 120.0  # between copies of the metrics to a bucket
EVENT_SECONDS = 30.0  # for which events may wait in memory


class MetricWriter:
    """Scalars and images of a run: `metrics.jsonl` (one line a step) and TensorBoard event files.

    Lines of steps after `step`, which a run made that did not save them, are dropped: they will be
    made again. For a workdir in a bucket, where nothing can be appended, the files are kept in a
    local folder and copied now and then.

    Attributes:
        folder: where the files are written; the workdir itself if it is local.
    """

    def __init__(self, workdir: os.PathLike, step: int = 0):
        self._mirror = Mirror(as_path(workdir)) if is_remote(workdir) else None
        self.folder = self._mirror.folder if self._mirror else pathlib.Path(workdir)
        path = self.folder / METRICS_NAME
        if self._mirror:
            self._mirror.fetch(METRICS_NAME)
        with self._naming_the_place():
            _drop_lines_after(path, step)
            self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed in `close`)
            self._events = EventFile(self.folder)

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Write one line; a value that is not finite becomes null, as JSON has no word for it."""
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        with self._naming_the_place():
            self._file.write(json.dumps(line) + "\n")
            for name, value in scalars.items():
                self._events.add(step, summary.scalar(name, value))
        if self._mirror:
            self._mirror.copy_if_due()

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Write uint8 pictures `[H, W, 3]`."""
        with self._naming_the_place():
            for name, image in images.items():
                self._events.add(step, summary.image(name, image, dataformats="HWC"))

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        """Write texts, shown in TensorBoard."""
        with self._naming_the_place():
            for name, text in texts.items():
                self._events.add(step, summary.text(name, text))

    def flush(self) -> None:
        """Bring everything that was written into the workdir."""
        with self._naming_the_place():
            self._events.flush()
        if self._mirror:
            self._mirror.copy()

    def close(self) -> None:
        """Flush and close both."""
        with contextlib.ExitStack() as stack:  # each is closed, whatever another says
            if self._mirror:
                stack.callback(self._mirror.close)
            stack.enter_context(self._naming_the_place())
            stack.callback(self._file.close)
            stack.callback(self._events.close)

    @contextlib.contextmanager
    def _naming_the_place(self) -> Iterator[None]:
        """Make an error of the file system, such as a full disk, say where it was, and what to
        do.
        """
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"{self.folder} cannot be written ({reason}). Make room there, and run the same "
                "command again."
            ) from error


class EventFile:
    """A file of TensorBoard events, written by whoever calls.

    tensorboardX's own `SummaryWriter` leaves it to a thread. On a full disk the thread ends without
    a word, and the caller waits for ever once the queue between the two is full.
    """

    def __init__(self, folder: pathlib.Path):
        self._file = RecordWriter(
            str(folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}")
        )
        self._due = time.monotonic()  # so that the first event is on the disk at once
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, step: int, what: summary.Summary) -> None:
        """Write a summary of a step.

        Raises:
            OSError: this, or what waited in memory before, cannot be written.
        """
        self._write(Event(wall_time=time.time(), step=step, summary=what))
        if time.monotonic() >= self._due:
            self.flush()

    def _write(self, event: Event) -> None:
        self._file.write(event.SerializeToString())

    def flush(self) -> None:
        """Bring everything that was added to the disk."""
        self._due = time.monotonic() + EVENT_SECONDS
        self._file.flush()

    def close(self) -> None:
        """Flush, and close even if that fails."""
        self._file.close()


class Mirror:
    """A local folder whose files are copied to a bucket when they have grown.

    Storage that cannot be reached stops no training: the copy is tried again later.
    """

    def __init__(self, target: epath.Path):
        self._target, self._complete = target, True
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="djepa_jax-"))
        self._sizes: dict[str, int] = {}  # as copied last
        self._due = time.monotonic() + MIRROR_SECONDS

    def fetch(self, name: str) -> None:
        """Begin with what the bucket has of a file."""
        if (self._target / name).exists():
            (self.folder / name).write_bytes((self._target / name).read_bytes())

    def copy_if_due(self) -> None:
        """Copy, if the last time is long enough ago."""
        if time.monotonic() >= self._due:
            self.copy()

    def copy(self) -> None:
        """Copy every file that has another size than when it was copied last."""
        self._due, self._complete = time.monotonic() + MIRROR_SECONDS, True
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name, size = path.relative_to(self.folder).as_posix(), path.stat().st_size
            if self._sizes.get(name) == size:
                continue
            try:
                (self._target / name).write_bytes(path.read_bytes())
                self._sizes[name] = size
            except Exception as error:  # storage services have exceptions of their own
                self._complete, reason = False, " ".join(str(error).split())
                print(
                    f"WARNING: {self._target / name} was not written ({reason}); it is tried "
                    "again later",
                    flush=True,
                )

    def close(self) -> None:
        """Copy for the last time, and remove the local folder unless it holds what could not be
        copied.
        """
        self.copy()
        if self._complete:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            print(
                f"WARNING: what could not be written to {self._target} is kept in {self.folder}",
                flush=True,
            )


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
    if path.exists():
        kept = [
            line for line in path.read_text(errors="replace").splitlines() if _step_of(line) <= step
        ]
        write_bytes(path, "".join(f"{line}\n" for line in kept).encode())


def _step_of(line: str) -> float:
    try:
        step = json.loads(line)["step"]
        return step if type(step) is int else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf  # a line cut short by a crash


class ProgressLine:
    """One line that stays at the bottom of a terminal, or a plain line now and then where there is
    none.
    """

    def __init__(self, num_steps: int, stream=None, quiet: bool = False):
        self.num_steps, self.quiet = num_steps, quiet
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty() and not quiet

    def show(self, step: int, metrics: dict[str, float], rate: float, seconds_left: float) -> None:
        """Report a step: losses, images per second, time left."""
        if self.quiet:
            return
        losses = "  ".join(
            f"{k} {metrics[k]:.4f}" for k in ("loss", "token_loss", "jepa_loss") if k in metrics
        )
        line = (
            f"step {step}/{self.num_steps}  {losses}  {rate:.0f} images/s  "
            f"{format_seconds(seconds_left)} left"
        )
        if metrics.get("skipped_steps"):
            line += f"  {int(metrics['skipped_steps'])} steps skipped"
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r" + line[:width].ljust(width))
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self.quiet:
            return
        if self.live:
            self.stream.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
        self.stream.write(text + "\n")
        self.stream.flush()


class Stopwatch:
    """Time since the last lap, and how much of it was spent waiting for data."""

    def __init__(self):
        self.start = time.perf_counter()
        self.waited = 0.0

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap and the share of them spent waiting; starts the next one."""
        now = time.perf_counter()
        seconds, waited = now - self.start, self.waited
        self.start, self.waited = now, 0.0
        return seconds, waited / max(seconds, 1e-9)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this context as spent waiting."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time in this context (of sampling or saving) out of the present lap."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start


def describe_parameters(params: dict) -> str:
    """clu's table of parameters: name, shape, count."""
    return parameter_overview.get_parameter_overview(params, include_stats=False)
