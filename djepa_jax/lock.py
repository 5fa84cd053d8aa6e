"""One process at a time in a workdir.

On a disk the operating system holds the lock, which goes with the process. A bucket has no such thing: there the lock is
a file that its owner renews, and that counts as left behind when it was not renewed for a while. An owner that comes back
after that, from a suspended machine for example, ends as soon as it sees that another has the lock.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
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
        except OSError as error:
            raise PathError(
                f"{path} cannot be locked ({error.strerror}): its file system has no locks; choose another."
            ) from error
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
    other = _owner_but(own, path)
    if other is not None:
        raise _in_use(workdir, other)
    ended = threading.Event()
    renewer = threading.Thread(target=_keep_renewing, args=(path, own, ended), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        ended.set()
        renewer.join()
        with contextlib.suppress(Exception):  # storage that is away; the lock counts as left behind soon
            if _owner_but(own, path) is None:
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
            other = _owner_but(own, path)
            if other is not None:
                _give_way(path, other)
            _renew(path, own)


def _owner_but(own: dict, path: epath.Path) -> str | None:
    """Who else has the lock; None if nobody has."""
    found = _read(path)
    return None if found is None or found.get("token") == own["token"] else found.get("owner", "another process")


def _give_way(path: epath.Path, owner: str) -> None:
    """End this process at once: another one writes here now."""
    print(f"\nerror: {path} was not renewed in time and now names {owner}; this process ends.", file=sys.stderr, flush=True)
    os._exit(2)


def _renew(path: epath.Path, own: dict) -> None:
    write_json(path, own | {"renewed": uuid.uuid4().hex})


def _read(path: epath.Path) -> dict | None:
    """What the lock says; None if there is none. Storage that does not answer is no free lock: its error is raised."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:  # not written by this program
        return {}
    return found if isinstance(found, dict) else {}
