"""How processes that train together find each other, once, before JAX looks for devices."""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from djepa_jax.runtime.distributed import HostsError, is_main

KINDS = ("none", "tpu", "slurm", "explicit")
VARIABLE = (
    "DJEPA_DISTRIBUTED"  # what --distributed is when it is not given; the launch scripts set it
)
TIMEOUT, HEARTBEAT = 300, 60  # seconds
COUNTDOWN = 30  # seconds between lines while others are awaited, at most
SHUTDOWN = 3600  # seconds that a process that is done waits for the others to be
MAX_PORT = 65535
NAME_BYTES = 64  # of a host's name, in the table of processes
# What JAX reads of Slurm, in the order in which it is asked for here; the last is a name, the
# others are numbers.
SLURM = ("NTASKS", "PROCID", "JOB_ID", "LOCALID", "STEP_NODELIST")


@dataclasses.dataclass(frozen=True)
class Rendezvous:
    """Where processes meet.

    Attributes:
        kind: one of `KINDS`: alone; found through a TPU's metadata; through Slurm; told by the next
            three.
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
            raise HostsError(
                f'--distributed (or {VARIABLE}) is "{self.kind}"; it must be one of '
                f"{', '.join(KINDS)}."
            )
        told = {
            "--coordinator": self.coordinator,
            "--num_processes": self.num_processes,
            "--process_id": self.process_id >= 0,
        }
        if self.kind == "explicit" and not all(told.values()):
            missing = next(name for name, value in told.items() if not value)
            raise HostsError(f"--distributed=explicit needs {missing}.")
        if self.kind != "explicit" and any(told.values()):
            given = next(name for name, value in told.items() if value)
            raise HostsError(f"{given} is only for --distributed=explicit.")
        if self.kind == "explicit" and not _is_address(self.coordinator):
            raise HostsError(
                f'--coordinator is "{self.coordinator}"; it must be HOST:PORT, with a port from 1 '
                f"to {MAX_PORT}."
            )
        if self.kind == "explicit" and self.process_id >= self.num_processes:
            raise HostsError(
                f"--process_id is {self.process_id}; it must be below --num_processes, "
                f"{self.num_processes}."
            )
        if self.timeout < 1 or self.heartbeat < 1:
            raise HostsError(
                "--rendezvous_timeout and --heartbeat_timeout must be at least 1 (seconds)."
            )


@dataclasses.dataclass(frozen=True)
class _Place:
    """This process among the others: what `jax.distributed.initialize` is told, and where it is
    known from.
    """

    coordinator: str
    count: int
    index: int
    source: str = ""
    device: int | None = None  # of this host, if the process is to have one only


def start(place: Rendezvous, saves: bool = True) -> None:
    """Meet the other processes, if there are to be others; before JAX looks for devices.

    Says first who is awaited, where, and for how long: what JAX does when nobody comes is to end
    the process. Process 0 says, when all are there, which one is which.

    Args:
        place: where to meet.
        saves: whether SIGTERM is to be a request to save and stop (`hosts.StopSignals`); otherwise
            it ends the process.

    Raises:
        HostsError: the environment has not what `place.kind` needs, or the port of process 0 cannot
            be used.
    """
    if place.kind == "none":
        return
    with _countdown(place.timeout):
        mine = _find(place)
        if mine is None:
            return
        told = f"process {mine.index} of {mine.count}{mine.source}, coordinator {mine.coordinator}"
        print(f"{told}: waiting up to {place.timeout} s for the others", flush=True)
        if mine.index == 0:
            _check_port(mine.coordinator)
        limits = {
            "initialization_timeout": place.timeout + 60,
            "heartbeat_timeout_seconds": place.heartbeat,
        }
        jax.config.update("jax_enable_preemption_service", saves)
        jax.distributed.initialize(**_arguments(mine), **limits, shutdown_timeout_seconds=SHUTDOWN)
        table = (
            _everybody()
        )  # opens the way for collectives, too, while nobody has work that delays it
    if is_main():
        print(
            "".join(
                f"process {index} = {name}, pid {pid}\n" for index, (name, pid) in enumerate(table)
            ),
            end="",
        )
    me = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"{me} is connected; if one dies, the others end within {place.heartbeat} s", flush=True)


def _arguments(mine: _Place) -> dict:
    told = {"num_processes": mine.count, "process_id": mine.index, "local_device_ids": mine.device}
    return {
        "coordinator_address": mine.coordinator,
        **told,
        "cluster_detection_method": "deactivate",
    }


def _is_address(text: str) -> bool:
    """Whether this is HOST:PORT."""
    host, _, port = text.rpartition(":")
    return bool(host.strip()) and port.isascii() and port.isdigit() and 1 <= int(port) <= MAX_PORT


def _check_port(address: str) -> None:
    """Try to open a port as JAX is about to, which would end the process without a word.

    Raises:
        HostsError: it is in use, or not for this user.
    """
    port = int(address.rpartition(":")[2])
    try:
        family, options = (
            (socket.AF_INET6, {"dualstack_ipv6": True})
            if socket.has_dualstack_ipv6()
            else (socket.AF_INET, {})
        )
        socket.create_server(("", port), family=family, **options).close()
    except OSError as error:
        raise HostsError(
            f"port {port} of this machine, where process 0 is to meet the others ({address}), "
            "cannot be opened "
            f"({error.strerror or error}); end what uses it, or name another one with "
            "--coordinator to all processes."
        ) from error


def _find(place: Rendezvous) -> _Place | None:
    """This process's place; None if there are no others."""
    if place.kind == "explicit":
        return _Place(place.coordinator, place.num_processes, place.process_id)
    if place.kind == "slurm":
        return _in_slurm()
    return _on_tpu(place.timeout)


# ---------------------------------------------------------------- Slurm and TPUs, through what JAX
# knows of them


def _in_slurm() -> _Place | None:
    """The place that Slurm's variables tell.

    Raises:
        HostsError: one is missing, or is no number.
    """
    values = {}
    for name in SLURM:
        value = values[name] = os.environ.get(f"SLURM_{name}", "")
        if not value or (name != SLURM[-1] and not value.isdigit()):
            said = f'is "{value}"' if value else "is not set"
            raise HostsError(
                f"--distributed=slurm, but SLURM_{name} {said}: start the processes with srun."
            )
        if name == "PROCID" and values["NTASKS"] == "1":
            return None
    cluster = _jax_cluster("SlurmCluster", "slurm")
    coordinator = cluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))
    source = f" in Slurm job {values['JOB_ID']} on {values['STEP_NODELIST']}"
    told = (
        "JAX_LOCAL_DEVICE_IDS" in os.environ
    )  # as `launch/train_slurm.sh` does; otherwise one device, as JAX has it
    return _Place(
        coordinator,
        int(values["NTASKS"]),
        int(values["PROCID"]),
        source,
        None if told else int(values["LOCALID"]),
    )


def _on_tpu(timeout: int) -> _Place | None:
    """The place that a TPU's environment or metadata tell.

    Raises:
        HostsError: this is no TPU, or its metadata cannot be read.
    """
    kinds = [_jax_cluster(name, "tpu") for name in ("GkeTpuCluster", "GceTpuCluster")]
    try:
        cluster = next((kind for kind in kinds if kind.is_env_present()), None)
        if cluster is None:
            raise HostsError(
                f"--distributed=tpu (or {VARIABLE}), but JAX finds no TPU on this machine; leave "
                "it out, or say where to meet "
                "with --distributed=explicit."
            )
        count, index = cluster.get_process_count(), cluster.get_process_id()
        if count == 1:
            return None
        print(
            f"process {index} of {count} of a TPU: looking up the address of process 0", flush=True
        )
        coordinator = cluster.get_coordinator_address(
            timeout, os.environ.get("JAX_COORDINATOR_PORT")
        )
    except HostsError:
        raise
    except Exception as error:  # the network's, and whatever parsing what is not there gives
        reason = f"{type(error).__name__}: {error}"
        raise HostsError(
            f"--distributed=tpu (or {VARIABLE}), but the metadata of this TPU cannot be read "
            f"({reason}); try again, or say where "
            "to meet with --distributed=explicit."
        ) from error
    return _Place(coordinator, count, index, " of a TPU (its metadata)")


def _jax_cluster(name: str, kind: str):
    """A class of JAX that can read an environment; it is not of JAX's public interface.

    Raises:
        HostsError: this version has none of that name.
    """
    try:
        from jax._src import clusters

        return getattr(clusters, name)
    except (ImportError, AttributeError) as error:
        raise HostsError(
            f"--distributed={kind} (or {VARIABLE}) cannot be used with jax {jax.__version__}, "
            f"which has no {name}; "
            "use --distributed=explicit."
        ) from error


# ---------------------------------------------------------------- waiting, and who came


@contextlib.contextmanager
def _countdown(seconds: int):
    """Say now and then how long is left; end the process when nothing is."""
    arrived = threading.Event()

    def count():
        deadline = time.monotonic() + seconds
        while not arrived.wait(min(COUNTDOWN, seconds / 4, max(deadline - time.monotonic(), 0.0))):
            left = deadline - time.monotonic()
            if left <= 0:
                print(
                    f"error: not all processes came within {seconds} s; start all of them again.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)
            print(f"still waiting for the others, {left:.0f} s left", flush=True)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        arrived.set()
        thread.join()


def _everybody() -> list[tuple[str, int]]:
    """Host and process number of every process, in order."""
    name = socket.gethostname().encode()[:NAME_BYTES]
    mine = np.zeros(NAME_BYTES + 8, np.uint8)
    mine[: len(name)] = np.frombuffer(name, np.uint8)
    mine[NAME_BYTES:] = np.frombuffer(np.int64(os.getpid()).tobytes(), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, NAME_BYTES + 8)
    return [
        (
            row[:NAME_BYTES].tobytes().rstrip(b"\0").decode(errors="replace"),
            int(row[NAME_BYTES:].copy().view(np.int64)[0]),
        )
        for row in rows
    ]
