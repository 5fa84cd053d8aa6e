"""Processes that train together: how they find each other, what one of them does for all, and when they stop."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

KINDS = ("none", "tpu", "slurm", "explicit")
VARIABLE = "DJEPA_DISTRIBUTED"  # what --distributed is when it is not given; the launch scripts set it
TIMEOUT, HEARTBEAT = 300, 60  # seconds
COUNTDOWN = 30  # seconds between lines while others are awaited, at most
SHUTDOWN = 3600  # seconds that a process that is done waits for the others to be
SHARED_SECONDS = 5.0  # that a file may take to be seen by all processes


class HostsError(ValueError):
    """Processes that cannot work together; the message says why."""


@dataclasses.dataclass(frozen=True)
class Rendezvous:
    """Where processes meet.

    Attributes:
        kind: one of `KINDS`: alone; found through a TPU's metadata; through Slurm; told by the next three.
        coordinator: HOST:PORT of process 0.
        num_processes: how many there are.
        process_id: which one this is.
        timeout: seconds to wait for the others.
        heartbeat: seconds after which a silent process counts as dead.
    """

    kind: str = "none"
    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    timeout: int = TIMEOUT
    heartbeat: int = HEARTBEAT

    def __post_init__(self):
        if self.kind not in KINDS:
            raise HostsError(f'--distributed (or {VARIABLE}) is "{self.kind}"; it must be one of {", ".join(KINDS)}.')
        told = {"--coordinator": self.coordinator, "--num_processes": self.num_processes, "--process_id": self.process_id >= 0}
        if self.kind == "explicit" and not all(told.values()):
            missing = next(name for name, value in told.items() if not value)
            raise HostsError(f"--distributed=explicit needs {missing}.")
        if self.kind != "explicit" and any(told.values()):
            given = next(name for name, value in told.items() if value)
            raise HostsError(f"{given} is only for --distributed=explicit.")
        if self.kind == "explicit" and not self.coordinator.rpartition(":")[2].isdigit():
            raise HostsError(f'--coordinator is "{self.coordinator}"; it must be HOST:PORT.')
        if self.kind == "explicit" and self.process_id >= self.num_processes:
            raise HostsError(f"--process_id is {self.process_id}; it must be below --num_processes, {self.num_processes}.")
        if self.timeout < 1 or self.heartbeat < 1:
            raise HostsError("--rendezvous_timeout and --heartbeat_timeout must be at least 1 (seconds).")


def start(place: Rendezvous, saves: bool = True, environment: Mapping[str, str] = os.environ) -> None:
    """Meet the other processes, if there are to be others; before JAX looks for devices.

    Says first who is awaited, where, and for how long: what JAX does when nobody comes is to end the process.

    Args:
        place: where to meet.
        saves: whether SIGTERM is to be a request to save and stop (`StopSignals`); otherwise it ends the process.
        environment: variables, of which Slurm sets some.

    Raises:
        HostsError: the environment has not what `place.kind` needs.
    """
    who = _who(place, environment)
    if who is None:
        return
    print(f"{who}: waiting up to {place.timeout} s for the others", flush=True)
    limits = {"initialization_timeout": place.timeout + 60, "heartbeat_timeout_seconds": place.heartbeat}
    jax.config.update("jax_enable_preemption_service", saves)
    with _countdown(place.timeout):
        try:
            jax.distributed.initialize(**_arguments(place), **limits, shutdown_timeout_seconds=SHUTDOWN)
        except ValueError as error:
            raise HostsError(f"--distributed={place.kind} (or {VARIABLE}) finds no other processes here: {error}") from error
        multihost_utils.sync_global_devices("start")  # opens the way for collectives while nobody has work that delays it
    print(f"{_me()} is connected; if one dies, the others end within {place.heartbeat} s", flush=True)


def _me() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def _who(place: Rendezvous, environment: Mapping[str, str]) -> str | None:
    """This process, and where it meets others; None if there are no others."""
    if place.kind == "tpu":
        return "worker of a TPU slice (found through its metadata)"
    if place.kind == "explicit":
        return f"process {place.process_id} of {place.num_processes}, coordinator {place.coordinator}"
    if place.kind == "none":
        return None
    number, index, job = (_needed(environment, f"SLURM_{name}") for name in ("NTASKS", "PROCID", "JOB_ID"))
    nodes = environment.get("SLURM_JOB_NODELIST", "its nodes")
    return None if number == "1" else f"process {index} of {number} in Slurm job {job} on {nodes}"


def _needed(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name, "").isdigit():
        raise HostsError(f"--distributed=slurm, but {name} is not set: start the processes with srun.")
    return environment[name]


def _arguments(place: Rendezvous) -> dict:
    if place.kind != "explicit":
        return {"cluster_detection_method": "slurm"} if place.kind == "slurm" else {}
    told = {"num_processes": place.num_processes, "process_id": place.process_id}
    return {"coordinator_address": place.coordinator, **told, "cluster_detection_method": "deactivate"}


@contextlib.contextmanager
def _countdown(seconds: int):
    """Say now and then how long is left; end the process when nothing is."""
    arrived = threading.Event()

    def count():
        deadline = time.monotonic() + seconds
        while not arrived.wait(min(COUNTDOWN, seconds / 4, max(deadline - time.monotonic(), 0.0))):
            left = deadline - time.monotonic()
            if left <= 0:
                print(f"error: not all processes came within {seconds} s; start all of them again.", file=sys.stderr, flush=True)
                os._exit(2)
            print(f"still waiting for the others, {left:.0f} s left", flush=True)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        arrived.set()
        thread.join()


def alone() -> bool:
    """Whether there are no other processes; asks no device, so that it can be asked before JAX has found any."""
    return not jax.distributed.is_initialized()


def is_main() -> bool:
    """Whether this process is the one that writes logs and pictures."""
    return jax.process_index() == 0


def on_main(function: Callable[[], int | None]) -> int | None:
    """Call a function in process 0 alone and tell every process its result, a number or None.

    Raises:
        HostsError: it failed in process 0, where its own exception is raised.
    """
    if jax.process_count() == 1:
        return function()
    result, error = None, None
    if is_main():
        try:
            result = function()
        except Exception as caught:
            error = caught
    mark = 2 if error else int(result is None)
    mark, value = multihost_utils.broadcast_one_to_all(np.array([mark, result or 0], np.int32)).tolist()
    if error:
        raise error
    if mark == 2:
        raise HostsError("process 0 cannot go on; what it printed says why.")
    return None if mark == 1 else value


@contextlib.contextmanager
def held_by_main(context: contextlib.AbstractContextManager):
    """Enter a context in process 0 alone; every process fails if that fails."""
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(context) and None)
        yield


def check_shared(folder: epath.Path) -> None:
    """Make sure that all processes see the same folder.

    Raises:
        HostsError: in all processes: one of them does not see what process 0 wrote there.
    """
    if jax.process_count() == 1:
        return
    number = on_main(lambda: int.from_bytes(os.urandom(3)))
    mark = folder / f".shared-{number}"  # a new name, which no file system remembers as missing
    on_main(lambda: mark.write_text("") and None)
    deadline = time.monotonic() + SHARED_SECONDS
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    all_see = multihost_utils.process_allgather(np.array(seen)).all()
    on_main(lambda: mark.unlink(missing_ok=True))
    if not all_see:
        raise HostsError(
            f'"{folder}" is not the same folder for all processes; name one that they share, such as gs://BUCKET/RUN.'
        )


def check_same(text: str, what: str) -> None:
    """Make sure that all processes have the same text.

    Raises:
        HostsError: in all processes: one of them has another than process 0; the message names `what`.
    """
    if jax.process_count() == 1:
        return
    numbers = multihost_utils.process_allgather(np.array(zlib.crc32(text.encode()), np.uint32))
    others = np.flatnonzero(numbers != numbers[0]).tolist()
    if others:
        raise HostsError(f"{what} of process {others[0]} is not that of process 0; start all of them with the same command.")


def wait_for_all(name: str) -> None:
    """Wait for the other processes; `name` says where, and must be the same for all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request to save and stop; a second SIGINT ends the process at once.

    With several processes, a signal to any of them stops all of them after the same step.
    """

    def __init__(self):
        self.caught = False
        self._together = jax.process_count() > 1
        self._previous: dict = {}

    def __enter__(self):
        numbers = (signal.SIGINT,) if self._together else (signal.SIGINT, signal.SIGTERM)  # SIGTERM is JAX's there
        for number in numbers:
            try:
                self._previous[number] = signal.signal(number, self._catch)
            except ValueError:  # not the main thread: signals are somebody else's business
                break
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._together and self._previous:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX would take it, and nobody asks any more

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; with several processes all must ask after every step."""
        if not self._together:
            return self.caught
        reached = multihost_utils.reached_preemption_sync_point(step)
        if reached and is_main():
            print(f"a process was asked to stop: saving step {step}, then stopping all of them", flush=True)
        return reached

    def _catch(self, number, frame):
        del frame
        self.caught = True
        name = signal.Signals(number).name
        # Not by print, which may be what the signal has interrupted.
        os.write(1, f"\n{name}: saving a checkpoint, then stopping; press Ctrl-C again to stop at once.\n".encode())
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once: not after what Python waits for, a save or another process
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
