"""Metrics to a file, to TensorBoard and to the terminal."""

import json
import math
import pathlib
import shutil
import sys
import time

import numpy as np
from clu import parameter_overview
from tensorboardX import SummaryWriter


class MetricWriter:
    """Scalars and images of a run: `metrics.jsonl` (one line a step) and TensorBoard event files.

    Lines of steps after `step`, which a run made that did not save them, are dropped: they will be made again.
    """

    def __init__(self, workdir: pathlib.Path, step: int = 0):
        _drop_lines_after(workdir / "metrics.jsonl", step)
        self._file = open(workdir / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (closed in `close`)
        self._events = SummaryWriter(str(workdir), flush_secs=30)

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Write one line; a value that is not finite becomes null, as JSON has no word for it."""
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        self._file.write(json.dumps(line) + "\n")
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Write uint8 pictures `[H, W, 3]`."""
        for name, image in images.items():
            self._events.add_image(name, image, step, dataformats="HWC")

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        """Write texts, shown in TensorBoard."""
        for name, text in texts.items():
            self._events.add_text(name, text, step)

    def close(self) -> None:
        """Flush and close both."""
        self._events.close()
        self._file.close()


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a crash


class ProgressLine:
    """One line that stays at the bottom of a terminal, or a plain line now and then where there is none."""

    def __init__(self, num_steps: int, stream=None):
        self.num_steps = num_steps
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()

    def show(self, step: int, metrics: dict[str, float], rate: float, seconds_left: float) -> None:
        """Report a step: losses, images per second, time left."""
        losses = "  ".join(f"{k} {metrics[k]:.4f}" for k in ("loss", "token_loss", "jepa_loss") if k in metrics)
        line = f"step {step}/{self.num_steps}  {losses}  {rate:.0f} images/s  {format_seconds(seconds_left)} left"
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

    def pause(self, seconds: float) -> None:
        """Leave `seconds` (of sampling or saving) out of the present lap."""
        self.start += seconds


def format_seconds(seconds: float) -> str:
    """A duration as people write it: 42 s, 3 min 05 s, 2 h 07 min."""
    seconds = round(max(seconds, 0))
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def describe_parameters(params: dict) -> str:
    """clu's table of parameters: name, shape, count."""
    return parameter_overview.get_parameter_overview(params, include_stats=False)
