"""Copies on a local disk of what is read from a bucket: a latent cache, an npz file, the weights of
an autoencoder.

Training reads examples in random order, through libraries that open files by name, so every host
keeps all of a cache. A copy is made once; a start that finds it whole asks the bucket only whether
it is still the same. A file gets its name when its checksum has been compared, so that whatever
interrupts a copy costs the files that were under way.

A copy serves all runs on its host. When the bucket has another cache at an address, the next start
replaces the copy, also under a run that still reads it: another cache is best given another
address.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

from djepa_jax.runtime.downloads import (
    BLOCK_BYTES,
    METADATA_NAME,
    THREADS,
    Item,
    Plan,
    copy_items,
    hasher,
    make_plan,
    say,
)
from djepa_jax.runtime.storage import (
    PathError,
    as_path,
    check_local,
    is_remote,
    write_bytes,
    write_json,
)

LOCK_NAME, RECORD_NAME = ".lock", ".copied.json"
VERIFIED_BYTES = (
    2**32
)  # of larger copies only files that changed since they were compared are read through again
STAGED = ("latents", "npz")  # the data sources that read copies
UNREAD = ("folder", "tar", "tfds")  # those whose many small files are encoded first


def local_copy(path: str | os.PathLike, folder: str = "", flag: str = "data.path") -> pathlib.Path:
    """Where a file, or a latent cache, is on a local disk; one in a bucket is copied first, unless
    it was before.

    A process makes a copy once: what it has got does not change under its run.

    Args:
        path: local, which is given back as it is, or gs://...
        folder: where copies are kept; by default in the user's cache folder.
        flag: the setting that gave the path, for errors.

    Raises:
        PathError: there is no such object, it cannot be read, it is damaged, or the disk cannot
            take it.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return pathlib.Path(os.path.expanduser(text))
    as_path(text)  # sets up the access
    return _copied(text.rstrip("/"), staging_folder(folder), flag)


def reachable(path: str) -> os.PathLike:
    """A latent cache where it is, so that its metadata can be compared before it is copied.

    Raises:
        PathError: it lies in a bucket, and is not whole or cannot be read.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    folder = as_path(path.rstrip("/"))
    plan = make_plan(os.fspath(folder), "data.path")
    if plan.metadata is None:
        raise PathError(
            f'data.path is "{path}", which is a file; name the folder of a latent cache.'
        )
    return folder


def local_source(name: str, path: str, folder: str = "", group: str = "data") -> str:
    """The path for data source `name`: that of a copy, if it lies in a bucket. `group` is where the
    config has its settings.

    Raises:
        PathError: as `local_copy`; or the source reads no buckets.
    """
    if not is_remote(path) or name not in (*STAGED, *UNREAD):
        return path
    if name in UNREAD:
        raise PathError(
            f'{group}.path "{path}" lies in a bucket, which {group}.source "{name}" does not '
            "read; copy it to a local disk, "
            "encode it there with --mode=prepare, and copy the latent cache to the bucket: gcloud "
            "storage cp -r CACHE "
            "gs://BUCKET/CACHE."
        )
    return str(local_copy(path, folder, f"{group}.path"))


def staging_folder(folder: str = "") -> pathlib.Path:
    """Where copies are kept: as `data.staging` says, or in the user's cache folder.

    Raises:
        PathError: the setting is no local path, or there is none and the user has no cache folder.
    """
    if folder:
        check_local(folder, "--config.data.staging")
        return pathlib.Path(os.path.expanduser(folder)).absolute()
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(root):  # there are users without a home
        raise PathError(
            "this user has no cache folder for copies of a bucket; name one with "
            "--config.data.staging."
        )
    return pathlib.Path(root) / "djepa_jax" / "staged"


@functools.cache
def _copied(url: str, root: pathlib.Path, flag: str) -> pathlib.Path:
    plan = make_plan(url, flag)
    folder = root / f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    with _writing(plan, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(folder / LOCK_NAME, url):
            _complete(plan, folder)
    return folder if plan.metadata is not None else folder / plan.items[0].name


# ---------------------------------------------------------------- what is on the disk


@contextlib.contextmanager
def _writing(plan: Plan, folder: pathlib.Path) -> Iterator[None]:
    """Say in one line why the disk does not take a copy."""
    try:
        yield
    except PathError:
        raise
    except OSError as error:
        raise PathError(
            f"{plan.flag}: {plan.url} cannot be copied to {folder} ({error.strerror or error}); "
            "make that possible or name "
            "another folder with --config.data.staging, and run the same command again: what is "
            "copied already is kept."
        ) from error


@contextlib.contextmanager
def _only_one(path: pathlib.Path, url: str) -> Iterator[None]:
    """Hold the lock of a copy; the operating system gives it back if the process is killed."""
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process on this host, which copies {url}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _complete(plan: Plan, folder: pathlib.Path) -> None:
    """Copy what is missing, damaged or of an earlier state, and remove what does not belong to the
    copy.
    """
    known = _read_record(folder)
    verify = sum(item.bytes for item in plan.items) <= VERIFIED_BYTES
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        whole = list(
            pool.map(lambda item: is_whole(folder / item.name, item, known, verify), plan.items)
        )
    missing = [item for item, good in zip(plan.items, whole, strict=True) if not good]
    _remove_others(
        folder,
        {item.name for item, good in zip(plan.items, whole, strict=True) if good} | {METADATA_NAME},
    )
    metadata = folder / METADATA_NAME
    if plan.metadata is not None and (
        missing or not metadata.is_file() or metadata.read_bytes() != plan.metadata
    ):
        metadata.unlink(missing_ok=True)  # it says that the copy is complete
    if missing:
        _check_space(plan, missing, folder)
        copy_items(plan, missing, folder)
    if plan.metadata is not None and not metadata.is_file():
        write_bytes(metadata, plan.metadata)
    record = {item.name: _fingerprint(folder / item.name, item) for item in plan.items}
    if record != known:
        write_json(folder / RECORD_NAME, record)


def is_whole(path: pathlib.Path, item: Item, known: dict, verify: bool) -> bool:
    """Whether a file is that of the bucket.

    Args:
        path: of the file.
        item: what it should be.
        known: files that were compared before, by name, as they were then.
        verify: read the file even if it looks as it did then.
    """
    if not path.is_file() or path.stat().st_size != item.bytes:
        return False
    if not verify and known.get(item.name) == _fingerprint(path, item):
        return True
    digest = hasher(item.kind)
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.digest().hex() == item.digest


def _fingerprint(path: pathlib.Path, item: Item) -> list:
    return [path.stat().st_mtime_ns, item.bytes, item.kind, item.digest]


def _read_record(folder: pathlib.Path) -> dict:
    """Files that were compared with their checksums; none where that is not known."""
    try:
        known = json.loads((folder / RECORD_NAME).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _remove_others(folder: pathlib.Path, kept: set[str]) -> None:
    """Remove files of an earlier state and of an interrupted copy; whoever has one open goes on
    reading it.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in kept | {
            LOCK_NAME,
            RECORD_NAME,
        }:
            path.unlink()


def _check_space(plan: Plan, missing: list[Item], folder: pathlib.Path) -> None:
    needed, free = sum(item.bytes for item in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise PathError(
            f"{plan.flag}: copying {plan.url} needs {needed:,} bytes, and the disk of {folder} "
            f"has {free:,} free; make room, or "
            "name a folder on another disk with --config.data.staging."
        )
