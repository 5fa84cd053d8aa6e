"""One process at a time in a workdir.

On a disk the operating system holds the lock, which goes with the process. A bucket has no such thing: there the lock is
a file that its owner renews, and that counts as left behind when it was not renewed for a while.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from etils import epath

from djepa_jax.paths import PathError, as_path, is_remote, write_json

LOCK_NAME = ".lock"
RENEW_SECONDS = 20.0
STALE_SECONDS = 90.0
SETTLE_SECONDS = 2.0  # for two that wrote at the same time: whoever is read afterwards has it


def lock_workdir(
    workdir: str | os.PathLike, name: str = LOCK_NAME, say: Callable[[str], None] = print
) -> contextlib.AbstractContextManager[None]:
    """Hold a workdir for this process; a lock never outlives its process by more than `STALE_SECONDS`.

    Args:
        workdir: a folder that exists.
        name: of the lock's file in it.
        say: is told what is being waited for.

    Raises:
        PathError: another process holds it, named by host and process id.
    """
    path = as_path(workdir) / name
    return _lease(path, workdir, say) if is_remote(path) else _file_lock(path, workdir)


def _in_use(workdir, owner: str) -> PathError:
    return PathError(f'--workdir "{workdir}" is in use by {owner}; wait for it, stop it, or choose another folder.')


@contextlib.contextmanager
def _file_lock(path: epath.Path, workdir) -> Iterator[None]:
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _in_use(workdir, file.read().strip() or "another process") from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def _lease(path: epath.Path, workdir, say) -> Iterator[None]:
    own = {"owner": f"process {os.getpid()} on {socket.gethostname()}", "token": uuid.uuid4().hex}
    _wait_until_free(path, workdir, say)
    _renew(path, own)
    time.sleep(SETTLE_SECONDS)
    found = _read(path)
    if found and found.get("token") != own["token"]:
        raise _in_use(workdir, found.get("owner", "another process"))
    ended = threading.Event()
    renewer = threading.Thread(target=_keep_renewing, args=(path, own, ended), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        ended.set()
        renewer.join()
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _wait_until_free(path: epath.Path, workdir, say) -> None:
    """Return when nobody holds the lock; an owner that renews it meanwhile is alive.

    Clocks of two machines are never compared: what counts is whether the file changes while it is watched.
    """
    first = _read(path)
    if first is None:
        return
    owner = first.get("owner", "another process")
    say(f"{path} names {owner}; waiting up to {STALE_SECONDS:.0f} s to see whether it is alive")
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(RENEW_SECONDS / 4, STALE_SECONDS / 4))
        found = _read(path)
        if found is None:
            return
        if found != first:
            raise _in_use(workdir, owner)


def _keep_renewing(path: epath.Path, own: dict, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        with contextlib.suppress(Exception):  # storage that is away for a moment; the next renewal may succeed
            _renew(path, own)


def _renew(path: epath.Path, own: dict) -> None:
    write_json(path, own | {"renewed": uuid.uuid4().hex})


def _read(path: epath.Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
