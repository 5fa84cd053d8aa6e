"""Processes of their own with one CPU device each, which start at once: they are copies of one that has imported everything."""

import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax
import pytest
from small_autoencoder import registered

from djepa_jax import prepare
from djepa_jax.checkpoint import Checkpoints
from djepa_jax.main import main
from djepa_jax.settings import Settings

FILE_LIMIT = 50_000  # bytes; metrics stay below, arrays do not
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["processes", "djepa_jax.train"])


def start(function, *arguments) -> multiprocessing.Process:
    """Run a function of this module in a new process."""
    process = CONTEXT.Process(target=function, args=arguments, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the process that is copied
        process.start()
    return process


def keep_compiled(folder: str) -> None:
    """Share compiled programs with other processes through a folder."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def run_command(compiled: str, *arguments: str) -> int:
    """The command line in a process of its own; its exit status."""
    process = start(_command, compiled, arguments)
    process.join()
    return process.exitcode


def _command(compiled: str, arguments: tuple[str, ...]) -> None:
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=1"  # compiles sooner
    keep_compiled(compiled)
    sys.exit(main(["djepa_jax", *arguments]))


class Training:
    """The command line in a process of its own, in trouble as `_trouble` describes it."""

    def __init__(self, compiled: str, *arguments: str, **troubles):
        self._pipe, theirs = CONTEXT.Pipe(duplex=False)
        self.process = start(_train, compiled, arguments, troubles, theirs)
        theirs.close()
        self._output = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while block := os.read(self._pipe.fileno(), 2**16):
            self._output.extend(block)

    def finish(self) -> tuple[int, str]:
        """Wait for its end: exit status, and what it said."""
        self.process.join()
        self._reader.join()
        return self.process.exitcode, self._output.decode()

    def kill(self) -> tuple[int, str]:
        """End it at once, as `finish`."""
        self.process.kill()
        return self.finish()


def _train(compiled: str, arguments: tuple[str, ...], troubles: dict, pipe) -> None:
    os.dup2(pipe.fileno(), 1)
    os.dup2(pipe.fileno(), 2)
    _trouble(**troubles)
    _command(compiled, arguments)


def _trouble(pace: float = 0.0, full_from: int | None = None) -> None:
    """Make every step last at least `pace` seconds, or the disk full when the step `full_from` is saved.

    With a full disk the next step waits for the save to fail.
    """
    save, poll = Checkpoints.save, Checkpoints.poll

    def limited_save(self, state, *arguments):
        if full_from is not None and int(state.step) >= full_from:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))
        return save(self, state, *arguments)

    def slow_poll(self):
        time.sleep(pace)
        if full_from is not None and self._save is not None:
            self._save.join()
        return poll(self)

    Checkpoints.save, Checkpoints.poll = limited_save, slow_poll


class Preparation:
    """A process that makes a latent cache with the small autoencoder.

    Args:
        config: what `run_prepare` takes.
        folder: of the cache.
        compiled: folder of compiled programs.
        limit: bytes that a file may have once the first message was sent, as if the disk were full then.
        share: index, number, and barrier of processes that share the work.
    """

    def __init__(self, config, folder: pathlib.Path, compiled: str, limit: int | None = None, share: tuple | None = None):
        self._pipe, theirs = CONTEXT.Pipe(duplex=False)
        self.process = start(_prepare, config.to_dict(), str(folder), compiled, limit, share, theirs)
        theirs.close()

    @property
    def messages(self) -> Iterator[str]:
        """What it says, then "done" or "failed: " and the error."""
        while True:
            try:
                yield self._pipe.recv()
            except EOFError:
                return self.process.join()

    def finish(self) -> list[str]:
        """All messages."""
        return list(self.messages)

    def kill(self) -> int:
        """Send SIGKILL; the exit status."""
        self.process.kill()
        self.process.join()
        return self.process.exitcode


def _prepare(config: dict, folder: str, compiled: str, limit: int | None, share: tuple | None, pipe) -> None:
    keep_compiled(compiled)
    if share is not None:
        index, count, barrier = share
        jax.process_index, jax.process_count = lambda: index, lambda: count
        prepare.multihost_utils.sync_global_devices = lambda name: barrier.wait(300)

    def say(text: str) -> None:
        pipe.send(text)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    try:
        with registered():
            prepare.run_prepare(Settings(config), folder, say=say)
        pipe.send("done")
    except (OSError, ValueError) as error:
        pipe.send(f"failed: {error}")
