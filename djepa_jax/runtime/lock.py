"""One process at a time in a workdir.

On a disk the operating system holds the lock, which goes with the process. In a bucket the lock is
an object that its owner writes anew now and then; one that did not change for a while was left
behind. Clocks of two machines are never compared.
"""

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

import fsspec
from absl import logging

from djepa_jax.runtime.storage import PathError, as_path, is_remote

LOCK_NAME = ".lock"
RENEW_SECONDS, STALE_SECONDS = 20.0, 90.0


def lock_workdir(
    workdir: str | os.PathLike, name: str = LOCK_NAME, what: str = ""
) -> contextlib.AbstractContextManager[None]:
    """Hold a folder, named by `what`; PathError names the host and id of another that does."""
    path, what = as_path(workdir) / name, what or f'--workdir "{workdir}"'
    owner = f"process {os.getpid()} on {socket.gethostname()}\n"
    if is_remote(path):
        return _object_lock(os.fspath(path), what, owner)
    return _file_lock(path, what, owner)


def is_locked(workdir: str | os.PathLike) -> bool:
    """Whether somebody holds a folder at this moment."""
    path = as_path(workdir) / LOCK_NAME
    if is_remote(path) or not path.exists():
        return path.exists()  # in a bucket whoever ends removes it
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _in_use(what: str, owner: str) -> PathError:
    owner = owner.strip() or "another process"
    return PathError(
        f"{what} is in use by {owner}; wait for it, stop it, or choose another folder."
    )


@contextlib.contextmanager
def _file_lock(path: os.PathLike, what: str, owner: str) -> Iterator[None]:
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _in_use(what, file.read()) from None
        except OSError as error:
            text = f"{path} cannot be locked ({error.strerror}); choose another file system."
            raise PathError(text) from error
        file.truncate(0)
        file.write(owner)
        file.flush()
        yield


@contextlib.contextmanager
def _object_lock(address: str, what: str, owner: str) -> Iterator[None]:
    # Aware of versions, so that what is removed is the object that was looked at, and no newer one.
    storage = fsspec.filesystem("gs", version_aware=True)
    mine, ended = f"{owner}{uuid.uuid4().hex}\n".encode(), threading.Event()
    _acquire(storage, address, mine, what)

    def keep_renewing() -> None:
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(Exception):  # storage that is away for a moment
                if storage.cat_file(address) != mine:
                    logging.error("%s names another process; stop one of the two", address)
                    return
                storage.pipe_file(address, mine)

    renewer = threading.Thread(target=keep_renewing, daemon=True)
    renewer.start()
    try:
        yield
    finally:
        ended.set()
        renewer.join()
        with contextlib.suppress(Exception):  # if storage is away the lock is free before long
            if storage.cat_file(address) == mine:
                storage.rm_file(address)


def _acquire(storage, address: str, mine: bytes, what: str) -> None:
    """Create the object; remove one that does not change, give up if it does."""
    first, deadline = None, time.monotonic() + STALE_SECONDS
    while True:
        with contextlib.suppress(FileExistsError):
            storage.pipe_file(address, mine, mode="create")
            return
        with contextlib.suppress(FileNotFoundError):  # it was given back meanwhile
            # In this order: what is read is never older than the generation.
            generation, found = storage.info(address)["generation"], storage.cat_file(address)
            if found == mine:  # it was created, but the answer was lost
                return
            owner = found.decode(errors="replace").partition("\n")[0]
            if first is None:
                first = generation
                text = f"waiting up to {STALE_SECONDS:.0f} s to see whether it is alive"
                print(f"{address} names {owner}; {text}", flush=True)
            if generation != first:
                raise _in_use(what, owner)
            if time.monotonic() >= deadline:
                storage.rm_file(f"{address}#{generation}")
                continue
        time.sleep(min(RENEW_SECONDS, STALE_SECONDS) / 4)
