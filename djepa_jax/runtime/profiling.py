"""For looking into a run: NaNs, compilations, a trace of some steps (`config.debug`), kernels."""

import collections
import contextlib
import gzip
import json
import os
import pathlib

import jax


@contextlib.contextmanager
def debug_switches(settings):
    """Set what JAX is told by `config.debug`, as long as the context lasts."""
    with jax.debug_nans(settings.nans), jax.log_compiles(settings.log_compiles):
        yield


class ProfileWindow:
    """A trace of `count` steps after the first `first`, for XProf or TensorBoard's profile plugin.

    It lies below `plugins/profile` in a local folder.
    """

    def __init__(self, folder: str | os.PathLike, first: int, count: int):
        self._folder, self._first, self._last = os.fspath(folder), first, first + count
        self._passed, self._running = 0, False

    def before_step(self) -> None:
        """Start the trace if the next step is the first to be traced."""
        if self._passed == self._first < self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after_step(self, state) -> None:
        """End the trace after the last step that is traced, when the devices have done it."""
        self._passed += 1
        if self._running and self._passed == self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write the trace, however short, of a run that ends early."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def largest_kernels(folder: str | os.PathLike, count: int = 10) -> dict:
    """Kernels of the trace below a folder: milliseconds and calls of all, and by name the largest.

    They are the events of a GPU's streams; elsewhere XLA's operations, inner ones beside outer.
    """
    with gzip.open(next(pathlib.Path(folder).rglob("*.trace.json.gz"))) as file:
        events = json.load(file)["traceEvents"]
    threads = [event for event in events if event.get("name") == "thread_name"]
    streams = {(e["pid"], e["tid"]) for e in threads if e["args"]["name"].startswith("Stream")}
    timed = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in timed if (event["pid"], event["tid"]) in streams]
    kernels = kernels or [event for event in timed if "hlo_op" in event.get("args", {})]
    spent, calls = collections.Counter(), collections.Counter(event["name"] for event in kernels)
    for event in kernels:
        spent[event["name"]] += event["dur"] / 1e3
    largest = [(name, ms, calls[name]) for name, ms in spent.most_common(count)]
    return {"milliseconds": spent.total(), "calls": calls.total(), "largest": largest}
