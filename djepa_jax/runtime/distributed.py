"""Processes that train together: how they meet, what one of them does for all, when they stop."""

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from djepa_jax.runtime.errors import UserError

KINDS = ("none", "auto", "tpu", "slurm", "explicit")
VARIABLE = "DJEPA_DISTRIBUTED"  # gives --distributed where the flag is not; launch scripts set it
TIMEOUT, HEARTBEAT, SHUTDOWN = 300, 60, 3600  # seconds to wait for others, silent ones, late ones
SHARED_SECONDS = 5.0  # that a file may take to be seen by all processes
# What a signal leads to: while a checkpoint is read, while training, and after the last save.
STARTING = "stopping as soon as the checkpoint is read"
SAVING = "saving a checkpoint, then stopping"
SAVED = "leaving out samples and evaluation that are not made yet (everything is saved)"


class HostsError(UserError, ValueError):
    """Processes that cannot work together; the message says why."""


def connect(
    kind: str,
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    timeout: int = TIMEOUT,
    heartbeat: int = HEARTBEAT,
    saves: bool = True,
) -> None:
    """Meet the other processes, if there are to be others; before JAX looks for devices.

    Kind explicit takes the place from the next three, HOST:PORT and numbers; auto, tpu and slurm
    leave it to JAX to find it in the environment; HostsError if it cannot. Without `saves` SIGTERM
    ends the process.
    """
    place = _place(kind, coordinator, num_processes, process_id)
    if kind == "none":
        return
    who = f"--distributed={kind}"
    if place:
        who = f"process {process_id} of {num_processes}, coordinator {coordinator}"
    print(f"{who}: waiting up to {timeout} s for the others", flush=True)
    # JAX would end the process with a stack trace when nobody comes.
    timer = threading.Timer(timeout, _give_up, [timeout])
    timer.daemon = True
    timer.start()
    jax.config.update("jax_enable_preemption_service", saves)
    limits = {"initialization_timeout": timeout + 60, "heartbeat_timeout_seconds": heartbeat}
    try:
        jax.distributed.initialize(**place, **limits, shutdown_timeout_seconds=SHUTDOWN)
        # Opens the way for collectives, while nobody has work that delays it.
        multihost_utils.sync_global_devices("connected")
    except Exception as error:  # JAX's, the network's, and what parsing an environment gives
        said = " ".join(str(error).split()) or type(error).__name__
        raise HostsError(
            f"{who}: JAX cannot connect this process to others ({said}); start one process "
            "on each TPU host, or with srun, or say where to meet: --distributed=explicit."
        ) from error
    finally:
        timer.cancel()
    me = f"process {jax.process_index()} of {jax.process_count()}"
    me += f" ({socket.gethostname()}, pid {os.getpid()})"
    print(f"{me} is connected; if one dies, the others end within {heartbeat} s", flush=True)


def _place(kind: str, coordinator: str, num_processes: int, process_id: int) -> dict:
    """What JAX is told of the place to meet; nothing, where it is to find it itself."""
    if kind not in KINDS:
        raise HostsError(
            f'--distributed (or {VARIABLE}) is "{kind}"; it must be one of {", ".join(KINDS)}.'
        )
    if kind != "explicit":
        if coordinator or num_processes or process_id >= 0:
            flags = "--coordinator, --num_processes and --process_id"
            raise HostsError(f"{flags} are only for --distributed=explicit; leave them out.")
        return {}
    port = re.fullmatch(r"\S+:([0-9]{1,5})", coordinator)
    if port is None or not 1 <= int(port[1]) <= 65535:
        raise HostsError(
            f'--coordinator is "{coordinator}"; it must be HOST:PORT, with a port from 1 to 65535.'
        )
    try:
        if process_id == 0:  # JAX would end with SIGSEGV where it is in use
            socket.create_server(("", int(port[1]))).close()
    except OSError as error:
        raise HostsError(
            f"port {port[1]} of this machine, where process 0 is to meet the others "
            f"({coordinator}), cannot be opened ({error.strerror or error}); end what uses it, or "
            "name another one with --coordinator to all processes."
        ) from error
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }


def _give_up(seconds: int) -> None:
    text = f"error: not all processes came within {seconds} s; start all of them again."
    print(text, file=sys.stderr, flush=True)
    os._exit(2)


def is_single_process() -> bool:
    """Whether there are no other processes; asks no device."""
    return not jax.distributed.is_initialized()


def is_main_process() -> bool:
    """Whether this process is the one that writes logs and pictures."""
    return jax.process_index() == 0


def run_on_main(function: Callable[[], int | None]) -> int | None:
    """Call a function in process 0 alone; every process returns its result, a number or None.

    Where it fails, process 0 raises its exception, the others raise HostsError.
    """
    if jax.process_count() == 1:
        return function()
    result, error = None, None
    if is_main_process():
        try:
            result = function()
        except Exception as caught:
            error = caught
    told = np.array([error is not None, result is None, result or 0], np.int32)
    failed, is_none, value = multihost_utils.broadcast_one_to_all(told).tolist()
    if error:
        raise error
    if failed:
        raise HostsError("process 0 cannot go on; what it printed says why.")
    return None if is_none else value


@contextlib.contextmanager
def held_by_main(context: contextlib.AbstractContextManager):
    """Enter a context in process 0 alone; every process fails if that fails."""
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(context)

        run_on_main(enter)
        yield


def check_shared(folder: epath.Path) -> None:
    """Raise HostsError, in all processes, unless all of them see the same folder."""
    if jax.process_count() == 1:
        return
    number = run_on_main(lambda: int.from_bytes(os.urandom(3)))
    mark = folder / f".shared-{number}"  # a new name, which no file system remembers as missing
    run_on_main(mark.touch)
    deadline = time.monotonic() + SHARED_SECONDS
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    all_see = multihost_utils.process_allgather(np.array(seen)).all()
    run_on_main(lambda: mark.unlink(missing_ok=True))
    if not all_see:
        raise HostsError(
            f'"{folder}" is not the same folder for all processes; name one that they share, such '
            "as gs://BUCKET/RUN."
        )


def check_same(text: str, what: str) -> None:
    """Raise HostsError, in all processes, unless all have the same text; `what` names it."""
    if jax.process_count() == 1:
        return
    numbers = multihost_utils.process_allgather(np.array(zlib.crc32(text.encode()), np.uint32))
    others = np.flatnonzero(numbers != numbers[0]).tolist()
    if others:
        raise HostsError(
            f"{what} of process {others[0]} is not that of process 0; start all of them with the "
            "same command."
        )


def max_over_processes(number: int) -> int:
    """The largest of all processes' numbers, for all of them."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.array(number, np.int32)).max())


def wait_for_all(name: str) -> None:
    """Wait for the other processes; `name` says where, and must be the same for all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class StopSignals:
    """A context in which the first SIGINT, SIGTERM or SIGHUP is a request to save and stop
    (`requested`), and a second SIGINT ends the process at once. A SIGHUP that was ignored before,
    as under `nohup`, stays ignored.

    A signal to any of several processes stops all of them after the same question, which is why
    they have to ask the same questions in the same order.
    """

    def __init__(self):
        self._answer, self._busy = SAVING, ""
        self._caught, self._agreed, self._questions = False, False, 0
        self._together = jax.process_count() > 1
        self._previous: dict = {}

    def __enter__(self):
        # With several processes SIGTERM is JAX's: it tells the others.
        numbers = [signal.SIGINT] if self._together else [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        with contextlib.suppress(ValueError):  # not the main thread: somebody else's business
            for number in numbers:
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def announce(self, answer: str) -> None:
        """Say what a signal leads to from now on."""
        self._answer = answer

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Name what has to end before a signal is answered."""
        before, self._busy = self._busy, what
        try:
            yield
        finally:
            self._busy = before

    def requested(self, step: int) -> bool:
        """Whether to stop now, with `step` steps made; once it was so, it stays so."""
        if not self._together:
            return self._caught
        # Not the step: JAX stops at the question after the last one, and a step may be the last.
        self._questions += 1
        if not self._agreed and multihost_utils.reached_preemption_sync_point(self._questions):
            self._agreed = True
            if is_main_process():
                print(f"a process was asked to stop, at step {step}: {self._answer}", flush=True)
        return self._agreed

    def _catch(self, number, frame):
        """Nothing here may raise: it would be raised wherever the training is."""
        del frame
        self._caught = True
        # Python's own handler would wait for what it is in: a save, or another process.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
        name = signal.Signals(number).name
        wait = f"waiting for {self._busy}, then " if self._busy else ""
        again = " again" if number == signal.SIGINT else ""
        text = f"\n{name}: {wait}{self._answer}; press Ctrl-C{again} to stop at once.\n"
        with contextlib.suppress(OSError):  # nobody may be listening any more
            os.write(1, text.encode())  # not by print, which may be what the signal interrupted
