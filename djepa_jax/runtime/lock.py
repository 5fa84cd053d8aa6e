"""One process at a time in a workdir.

On a disk the operating system holds the lock, which goes with the process. A bucket has no such
thing: there the lock is a file that its owner renews, and that counts as left behind when it was
not renewed for a while. An owner that comes back after that, from a suspended machine for example,
ends as soon as it sees that another has the lock.
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

import fsspec
from etils import epath

from djepa_jax.runtime.storage import BUCKET, PathError, as_path, is_remote

LOCK_NAME = ".lock"
RENEW_SECONDS = 20.0
STALE_SECONDS = 90.0
MISSING = "0"  # what a bucket takes for the version of an object that is not there


def lock_workdir(
    workdir: str | os.PathLike,
    name: str = LOCK_NAME,
    say: Callable[[str], None] = print,
    what: str = "",
) -> contextlib.AbstractContextManager[None]:
    """Hold a workdir for this process; a lock never outlives its process by more than
    `STALE_SECONDS`.

    Args:
        workdir: a folder that exists.
        name: of the lock's file in it.
        say: is told what is being waited for.
        what: is in use then, for messages; the workdir.

    Raises:
        PathError: another process holds it, named by host and process id.
    """
    path = as_path(workdir) / name
    what = what or f'--workdir "{workdir}"'
    return _lease(path, what, say) if is_remote(path) else _file_lock(path, what)


def _in_use(what: str, owner: str) -> PathError:
    return PathError(
        f"{what} is in use by {owner}; wait for it, stop it, or choose another folder."
    )


@contextlib.contextmanager
def _file_lock(path: epath.Path, what: str) -> Iterator[None]:
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _in_use(what, file.read().strip() or "another process") from None
        except OSError as error:
            raise PathError(
                f"{path} cannot be locked ({error.strerror}): its file system has no locks; "
                "choose another."
            ) from error
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def _lease(path: epath.Path, what: str, say) -> Iterator[None]:
    own = {"owner": f"process {os.getpid()} on {socket.gethostname()}", "token": uuid.uuid4().hex}
    lease = _Lease(path, own)
    lease.replace(_free_version(lease, what, say))
    if lease.lost_to is not None:
        raise _in_use(what, lease.lost_to)
    ended = threading.Event()
    renewer = threading.Thread(target=_keep_renewing, args=(lease, ended), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        ended.set()
        renewer.join()
        with contextlib.suppress(
            Exception
        ):  # storage that is away; the lock counts as left behind soon
            lease.remove()


def _free_version(lease: "_Lease", what: str, say) -> str:
    """Return, when nobody holds the lock, the version of it that may be replaced; an owner that
    renews it is alive.

    Clocks of two machines are never compared: what counts is whether the object changes while it is
    watched.
    """
    first, content = lease.read()
    if first == MISSING:
        return first
    owner = _owner(content)
    say(
        f"{lease.path} names {owner}; waiting up to {STALE_SECONDS:.0f} s to see whether it is "
        "alive"
    )
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(RENEW_SECONDS / 4, STALE_SECONDS / 4))
        version, _ = lease.read()
        if version == MISSING:
            return version
        if version != first:
            raise _in_use(what, owner)
    return first


def _keep_renewing(lease: "_Lease", ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        with contextlib.suppress(
            Exception
        ):  # storage that is away for a moment; the next renewal may succeed
            lease.replace(lease.version)
            if lease.lost_to is not None:
                _give_way(lease.path, lease.lost_to)


def _give_way(path: epath.Path, owner: str) -> None:
    """End this process at once: another one writes here now, or has written."""
    print(
        f"\nerror: {path} was not renewed in time and now names {owner}; this process ends.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _owner(content: bytes) -> str:
    return _parsed(content).get("owner", "another process")


def _parsed(content: bytes) -> dict:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):  # not written by this program
        return {}
    return found if isinstance(found, dict) else {}


class _Lease:
    """The lock's object in a bucket. The service itself refuses a change of another version than
    the one that was seen.

    So of several processes that find the lock free, or left behind, at any times, one gets it.

    Attributes:
        version: the generation, in Google's words, that this process wrote last.
        lost_to: who has the lock instead; None while this process may have it.
    """

    def __init__(self, path: epath.Path, own: dict):
        self.path, self.version, self.lost_to, self._own = path, MISSING, None, own
        self._storage = fsspec.filesystem("gcs")  # as `as_path` has set it up
        self._bucket, _, self._name = os.fspath(path).removeprefix(BUCKET).partition("/")

    def read(self) -> tuple[str, bytes]:
        """Version and content. Storage that does not answer is no free lock: its error is
        raised.
        """
        try:
            headers, content = self._storage.call("GET", self._storage.url(os.fspath(self.path)))
        except FileNotFoundError:
            return MISSING, b""
        return headers["X-Goog-Generation"], content

    def replace(self, version: str) -> None:
        """Make this process the owner, unless the object is no longer the given version: `lost_to`
        tells of whom it is.
        """
        data = json.dumps(self._own | {"renewed": uuid.uuid4().hex}).encode()
        url = f"{self._storage._location}/upload/storage/v1/b/{self._bucket}/o"
        query = {"uploadType": "media", "name": self._name, "ifGenerationMatch": version}
        try:
            self.version = self._storage.call("POST", url, data=data, json_out=True, **query)[
                "generation"
            ]
        except (
            FileExistsError
        ):  # also where the answer to a change of our own was lost, and it was sent again
            self.version, content = self.read()
            if _parsed(content).get("token") != self._own["token"]:
                self.lost_to = "nobody" if self.version == MISSING else _owner(content)

    def remove(self) -> None:
        """Give the lock back, if it is still that of this process."""
        if self.lost_to is None:
            self._storage.call(
                "DELETE", "b/{}/o/{}", self._bucket, self._name, ifGenerationMatch=self.version
            )
