"""Switches for looking into a run: NaNs, compilations, a trace of some steps (`config.debug`)."""

import contextlib
import os

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
