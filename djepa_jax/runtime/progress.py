"""What people see of the progress of a run, and the time that it takes."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

EVERY = 30.0  # seconds between lines that stay


def say(text: str) -> None:
    """Print a line, above a bar if there is one; nobody need read it."""
    with tqdm.external_write_mode(file=sys.stdout), contextlib.suppress(OSError):
        print(text, flush=True)


class Progress:
    """Work that can be counted, such as "sampling" of so many of a unit: a bar on a terminal, and
    everywhere a line that stays of its first part, of its last, and of one every `every` seconds.
    """

    def __init__(self, what: str, unit: str, total: int, done: int = 0, quiet: bool = False):
        self.unit, self.total, self.quiet, self.every = unit, total, quiet, EVERY
        self._first = self._done = done
        self._start, self._said = time.monotonic(), 0.0
        if done < total and not quiet:
            say(f"{what} {total - done:,} {unit}s")
        off = quiet or None  # None: unless it is a terminal
        look = {"leave": False, "dynamic_ncols": True, "disable": off, "file": sys.stdout}
        self._bar = tqdm(desc=what, unit=unit, total=total, initial=done, **look)

    def show(self, done: int, text: str = "") -> None:
        """So many are done; the text tells more of the last one, parts of it after two spaces."""
        self._bar.set_postfix_str(text.partition("  ")[0], refresh=False)  # leaves room for the bar
        self._bar.update(done - self._done)
        now, self._done = time.monotonic(), done
        due = not self._said or done >= self.total or now >= self._said + self.every
        if due and not self.quiet:
            self._said = now
            spent, rest = now - self._start, self.total - done
            left = f"{format_seconds(spent / max(done - self._first, 1) * rest)} left"
            time_text = left if rest > 0 else f"in {format_seconds(spent)}"
            say("  ".join(filter(None, (f"{self.unit} {done}/{self.total}", text, time_text))))
        if done >= self.total:
            self.close()

    def over(self, items: Iterable) -> Iterator:
        """The items, each of them done once the next one is asked for."""
        for item in items:
            yield item
            self.show(self._done + 1)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


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
