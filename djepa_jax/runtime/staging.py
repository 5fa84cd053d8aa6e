"""Copies on a local disk of what lies in a bucket, for libraries that open files by name.

A file gets its name when its checksum has been compared, so that whatever interrupts a copy costs
the files that were under way. A folder holds one state of what lies at an address; what is uploaded
there later gets a folder of its own.
"""

import base64
import concurrent.futures
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
from collections.abc import Sequence

import fsspec

from djepa_jax.runtime.distributed import is_main_process
from djepa_jax.runtime.progress import format_bytes
from djepa_jax.runtime.storage import PathError, as_path, check_local, is_remote, reason, user_cache

THREADS, BLOCK_BYTES = 8, 2**24
VERIFIED_BYTES = 2**32  # larger copies are not read through again at every start
File = tuple[str, int, str]  # name below an address, bytes, checksum as KIND:HEXADECIMAL


def local_copy(
    url: str | os.PathLike,
    folder: str = "",
    flag: str = "data.path",
    files: Sequence[File] | None = None,
) -> pathlib.Path:
    """Where a file, or a folder of the given files, is on a local disk; copied from a bucket.

    Copies are kept in `folder`, by default in the user's cache folder. PathError names the `flag`.
    """
    text = os.fspath(url)
    if not is_remote(text):
        return pathlib.Path(text)
    as_path(text)  # sets up the access
    root = user_cache("staged")
    if folder:
        check_local(folder, "--config.data.staging")
        root = pathlib.Path(folder).absolute()
    if root is None:
        raise PathError("this user has no cache folder; name one with --config.data.staging.")
    try:
        return _copied(text.rstrip("/"), root, None if files is None else tuple(files))
    except PathError:
        raise
    except Exception as error:  # storage services have exceptions of their own
        raise PathError(
            f"{flag}: {text} cannot be copied to {root} ({reason(error)}); check the address, your "
            "access (roles/storage.objectViewer) and the disk, or name another with "
            "--config.data.staging; the same command goes on with what is missing."
        ) from error


@functools.cache  # so that what a process has got does not change under its run
def _copied(url: str, root: pathlib.Path, files: tuple[File, ...] | None) -> pathlib.Path:
    if files is None:
        parent, _, name = url.rpartition("/")
        info = fsspec.filesystem("gs").info(url)
        checksum = "crc32c:" + base64.b64decode(info["crc32c"]).hex()
        return _copied(parent, root, ((name, info["size"], checksum),)) / name
    state = hashlib.sha256(repr((url, files)).encode()).hexdigest()
    folder = root / f"{url.rpartition('/')[2]}-{state[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a host copies, the others wait
        _complete(url, files, folder)
    return folder


def _complete(source: str, files: Sequence[File], folder: pathlib.Path) -> None:
    """Copy the files that a folder has not got, or not whole."""
    missing = [size for name, size, _ in files if not (folder / name).is_file()]
    free = shutil.disk_usage(folder).free
    if sum(missing) > free:
        raise PathError(
            f"copying {source} needs {sum(missing):,} bytes, and the disk of {folder} has {free:,} "
            "free; make room, or name another folder with --config.data.staging."
        )
    if missing and is_main_process():
        size = format_bytes(sum(missing))
        print(f"copying {len(missing)} files, {size}, of {source} to {folder}", flush=True)
    verify = sum(size for _, size, _ in files) <= VERIFIED_BYTES
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(functools.partial(_copy, source, folder, verify), files))


def _copy(source: str, folder: pathlib.Path, verify: bool, file: File) -> None:
    name, size, checksum = file
    path, unfinished = folder / name, folder / f"{name}.unfinished"
    whole = path.is_file() and path.stat().st_size == size
    if whole and (not verify or _checksum(path, checksum) == checksum):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fsspec.filesystem("gs").get_file(f"{source}/{name}", str(unfinished))
    if _checksum(unfinished, checksum) != checksum:
        raise PathError(
            f"{source}/{name} differs from its checksum, {checksum}; copy it to the bucket again, "
            "or, if that was just done, run the same command again."
        )
    unfinished.replace(path)


def _checksum(path: pathlib.Path, like: str) -> str:
    """The checksum of a file, of the kind of another checksum."""
    kind = like.partition(":")[0]
    if kind == "crc32c":
        import google_crc32c  # comes with gcsfs

        digest = google_crc32c.Checksum()
    else:
        digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return f"{kind}:{digest.digest().hex()}"
