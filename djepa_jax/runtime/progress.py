"""What people see of the progress of a run, and the time that it takes."""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator

SHOWN = ("loss", "token_loss", "jepa_loss")


class ProgressLine:
    """One line that stays at the bottom of a terminal; plain lines where there is no terminal."""

    def __init__(self, num_steps: int, stream=None, quiet: bool = False):
        self.num_steps, self.quiet = num_steps, quiet
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty() and not quiet

    def show(self, step: int, metrics: dict[str, float], rate: float, seconds_left: float) -> None:
        """Report a step: losses, images per second, time left."""
        losses = "  ".join(f"{name} {metrics[name]:.4f}" for name in SHOWN if name in metrics)
        left = format_seconds(seconds_left)
        line = f"step {step}/{self.num_steps}  {losses}  {rate:.0f} images/s  {left} left"
        if metrics.get("skipped_steps"):
            line += f"  {int(metrics['skipped_steps'])} steps skipped"
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self._write("\r" + line[:width].ljust(width))
        else:
            self._write(line + "\n")

    def say(self, text: str) -> None:
        """Print a line of its own."""
        width = shutil.get_terminal_size().columns - 1
        self._write(f"\r{'':{width}}\r{text}\n" if self.live else f"{text}\n")

    def _write(self, text: str) -> None:
        if not self.quiet:
            self.stream.write(text)
            self.stream.flush()


class Stopwatch:
    """Time since the last lap, and how much of it was spent waiting for data."""

    def __init__(self):
        self.start, self.waited = time.perf_counter(), 0.0

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


def format_seconds(seconds: float) -> str:
    """A duration as people write it: 42 s, 3 min 05 s, 2 h 07 min."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def format_bytes(size: float) -> str:
    """A size with three digits or so: 512 B, 3.2 MiB, 79 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
