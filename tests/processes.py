"""Processes of their own with one CPU device each, which start at once: they are copies of one that
has imported everything.
"""

import concurrent.futures
import contextlib
import dataclasses
import gc
import multiprocessing
import os
import pathlib
import random
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import fsspec
import jax
import pytest
from holding import FailingSource, hold_at
from jax._src import cache_key
from small_autoencoder import registered
from waiting import LIMIT, wait_until

from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.config.experiment import Experiment
from djepa_jax.core.models.autoencoder_kl import AUTOENCODERS, AutoencoderConfig
from djepa_jax.core.train_step import TrainState
from djepa_jax.data.prepare_latents import run_prepare
from djepa_jax.main import main
from djepa_jax.runtime import lock
from djepa_jax.training import compile_step, loop
from djepa_jax.training.reporting import Reporter

FILE_LIMIT = 50_000  # bytes; metrics stay below, arrays do not
LEASE = 0.5, 6.0  # seconds to renew, until it is stale
gc.set_threshold(100_000)  # as in conftest.py, for the processes that are copied from this one
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["processes", "djepa_jax.training.loop", "sklearn.datasets"])


def start(function, *arguments) -> multiprocessing.Process:
    """Run a function of this module in a new process."""
    process = CONTEXT.Process(target=function, args=arguments, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the process that is copied
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(name)  # JAX warns of them; an `ObjectStore` that this process uses has one
        process.start()
    return process


RESERVED = []  # sockets that keep ports for this process


def free_port() -> int:
    """A port for processes that start later, which nobody else takes meanwhile.

    It is below those that the operating system hands out, and its neighbour, which stays bound,
    keeps it from others who come here.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000, 2)
        with contextlib.suppress(OSError):
            keeper = socket.create_server(("127.0.0.1", port + 1))
            RESERVED.append(keeper)
            socket.create_server(("", port)).close()
            return port


def keep_compiled(folder: str) -> None:
    """Share compiled programs with other processes through a folder."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def run_command(compiled: str, *arguments: str, kl16: AutoencoderConfig | None = None) -> int:
    """The command line in a process of its own, perhaps with another shape of the autoencoder
    `kl16`; its exit status.
    """
    process = start(_command, compiled, arguments, kl16)
    process.join()
    return process.exitcode


def _command(
    compiled: str, arguments: tuple[str, ...], kl16: AutoencoderConfig | None = None
) -> None:
    keep_compiled(compiled)
    AUTOENCODERS["kl16"] = kl16 or AUTOENCODERS["kl16"]
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

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self._output.decode(errors="replace")

    def wait_for(self, text: str) -> None:
        """Return when it has said a text."""
        wait_until(lambda: text in self.output or not self._reader.is_alive(), lambda: self.output)
        assert text in self.output, self.output

    def finish(self) -> tuple[int, str]:
        """Wait for its end: exit status, and what it said."""
        self.process.join()
        self._reader.join()
        return self.process.exitcode, self.output

    def kill(self) -> tuple[int, str]:
        """End it at once, as `finish`."""
        self.process.kill()
        return self.finish()


def _train(compiled: str, arguments: tuple[str, ...], troubles: dict, pipe) -> None:
    os.dup2(pipe.fileno(), 1)
    os.dup2(pipe.fileno(), 2)
    _trouble(**troubles)
    _command(compiled, arguments)


def _trouble(
    pace: float = 0.0,
    full_from: int | None = None,
    simple: bool = True,
    pictures: bool = False,
    storage: dict[str, str] | None = None,
    hold: str | int | None = None,
    gate: str | None = None,
    fail_after: int | None = None,
) -> None:
    """Make every step last at least `pace` seconds, or the disk full when the step `full_from` is
    saved.

    With a full disk the next step waits for the save to fail. No pictures are made at the end,
    unless there are to be `pictures`. A `simple` step takes no time to compile. `storage` is the
    environment of an `ObjectStore`. `hold` and `gate` as `hold_at` describes them. All readings of
    examples after `fail_after` of them fail.
    """
    if storage is not None:
        reach(storage)
    if fail_after is not None:
        open_data = loop.open_training_data

        def open_failing(experiment):
            source, experiment = open_data(experiment)
            return FailingSource(source, fail_after), experiment

        loop.open_training_data = open_failing
    save, poll = Checkpoints.save, Checkpoints.poll

    def limited_save(self, state, *arguments):
        if full_from is not None and int(state.step) >= full_from:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))
        return save(self, state, *arguments)

    def slow_poll(self):
        time.sleep(pace)
        if full_from is not None and self._saving is not None:
            concurrent.futures.wait([self._saving[1]])
        return poll(self)

    Checkpoints.save, Checkpoints.poll = limited_save, slow_poll
    if not pictures:
        Reporter.final_grid = lambda self, step, state: None
    if simple:
        compile_step.make_train_step = lambda config: simple_step
    if hold is not None:
        hold_at(hold, gate)


def reach(storage: dict[str, str]) -> None:
    """Let this process use an `ObjectStore`, given its environment, and find out soon whether a
    lock's owner is alive.
    """
    os.environ.update(storage)
    tempfile.tempdir = None  # it may be among them
    fsspec.config.set_conf_env(fsspec.config.conf)
    lock.RENEW_SECONDS, lock.STALE_SECONDS = LEASE


def simple_step(state: TrainState, batch: dict, values) -> tuple[TrainState, dict]:
    """In place of the training step: all arrays depend on all batches and their order, and on the
    arrays before.
    """
    signal = jax.numpy.mean(batch["example"] / 255.0) + jax.numpy.mean(batch["condition"])

    def moved(tree, share):
        return jax.tree.map(lambda x: x * share + signal.astype(x.dtype) if x.ndim else x + 1, tree)

    params, opt_state = moved(state.params, 0.9), moved(state.opt_state, 0.5)
    ema_params = jax.tree.map(lambda x, y: 0.9 * x + 0.1 * y, state.ema_params, params)
    state = dataclasses.replace(
        state, step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
    )
    return state, {"loss": signal, "bad_streak": state.bad_streak}


class Member:
    """One of several processes that run the command line together, with two devices each, or four
    if it is alone.

    Args:
        compiled: folder of compiled programs.
        log: file that gets what it prints.
        arguments: of the command line.
        place: port and index of the process; None for one that is alone.
        heartbeat: seconds without a sign of life after which another process counts as lost.
        troubles: as `_trouble` describes them; the training step is the real one, and pictures are
            made.
    """

    def __init__(
        self,
        compiled: str,
        log: pathlib.Path,
        arguments: tuple,
        place: tuple | None = None,
        heartbeat: int = LIMIT,
        **troubles,
    ):
        self._log = log
        if place is not None:
            where = (
                f"--coordinator=127.0.0.1:{place[0]}",
                "--num_processes=2",
                f"--process_id={place[1]}",
            )
            arguments = (*arguments, "--distributed=explicit", *where)
            arguments = (*arguments, f"--heartbeat_timeout={heartbeat}")
        troubles = {"simple": False, "pictures": True} | troubles
        self.process = start(
            _member, compiled, str(log), arguments, 4 if place is None else 2, troubles
        )

    @property
    def log(self) -> str:
        """What it has printed so far, without what the library below JAX prints."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return "".join(
            f"{line}\n"
            for line in lines
            if "[Gloo]" not in line and not line.startswith("3 is connected")
        )

    def wait_for(self, text: str) -> None:
        """Return when it has printed a text."""
        wait_until(lambda: text in self.log or not self.process.is_alive(), lambda: self.log)
        assert text in self.log, self.log

    def status(self) -> int | None:
        """Its exit status, once it has ended."""
        self.process.join(LIMIT)
        return self.process.exitcode


def _member(
    compiled: str, log: str, arguments: tuple[str, ...], devices: int, troubles: dict
) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    jax.config.update("jax_num_cpu_devices", devices)
    keep_compiled(
        f"{compiled}/{devices}"
    )  # programs for two times two devices are others than for four
    _compile_once()
    _trouble(**troubles)
    status = main(["djepa_jax", *arguments])
    jax.distributed.shutdown()  # as JAX does when Python ends
    sys.stdout.flush()
    os._exit(status)


def _compile_once() -> None:
    """Let process 1 take the programs that process 0 compiles; JAX would have it compile them anew,
    though they are the same.
    """
    cache_key._hash_accelerator_config = lambda *_: None
    jax.config.update("jax_share_binary_between_hosts", True)


class Preparation:
    """A process that makes a latent cache with the small autoencoder.

    Args:
        experiment: what `run_prepare` takes.
        folder: of the cache.
        compiled: folder of compiled programs.
        limit: bytes that a file may have once the first message was sent, as if the disk were full
            then.
        shard: "i/n", if this is one of several processes that share the work.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: pathlib.Path,
        compiled: str,
        limit: int | None = None,
        shard: str = "",
    ):
        self._pipe, theirs = CONTEXT.Pipe(duplex=False)
        self.process = start(
            _prepare, experiment.to_dict(), str(folder), compiled, limit, shard, theirs
        )
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


def _prepare(values: dict, folder: str, compiled: str, limit: int | None, shard: str, pipe) -> None:
    keep_compiled(compiled)

    def say(text: str) -> None:
        if " looked at, " in text or text.startswith(("the middle square", "classes: ")):
            return  # of the data, before anything is made
        pipe.send(text)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    try:
        with registered():
            run_prepare(Experiment.from_dict(values), folder, shard=shard, say=say)
        pipe.send("done")
    except (OSError, ValueError) as error:
        pipe.send(f"failed: {error}")
