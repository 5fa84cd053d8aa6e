"""What a copy of something in a bucket consists of, and getting it onto a local disk; `staging.py`
decides what is needed.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import fsspec

from djepa_jax.runtime import distributed
from djepa_jax.runtime.storage import PathError, bucket_reason
from djepa_jax.runtime.units import format_bytes, format_seconds

METADATA_NAME, SHARDS_NAME = "metadata.json", "shards"  # of a latent cache
UNFINISHED = ".unfinished"  # ends the name of a file that is not whole
BLOCK_BYTES = 2**25  # of one request
THREADS = 8  # files that are copied or compared at the same time
PROGRESS_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Item:
    """A file to copy: its name in the copy, its address, its size, and its checksum (kind and
    hexadecimal value).
    """

    name: str
    url: str
    bytes: int
    kind: str
    digest: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a copy consists of.

    Attributes:
        url: what is copied.
        flag: the setting that names it.
        items: its files.
        metadata: of a cache, written last; None of a single file.
    """

    url: str
    flag: str
    items: tuple[Item, ...]
    metadata: bytes | None = None


def make_plan(url: str, flag: str) -> Plan:
    """Ask the bucket what there is to copy.

    Raises:
        PathError: nothing, it may not be read, or the cache in the bucket is not whole.
    """
    with reading(url, flag):
        info = storage().info(url)
    if info["type"] == "file":
        return Plan(url, flag, (_single(url, info),))
    with reading(f"{url}/{METADATA_NAME}", flag):
        metadata = storage().cat_file(f"{url}/{METADATA_NAME}")
    with reading(f"{url}/{SHARDS_NAME}", flag):
        found = {
            entry["name"].rpartition("/")[2]: entry["size"]
            for entry in storage().ls(f"{url}/{SHARDS_NAME}", detail=True)
        }
    items = _shards(url, metadata)
    for item in items:
        size = found.get(pathlib.PurePosixPath(item.name).name)
        if size != item.bytes:
            state = (
                "is missing" if size is None else f"has {size:,} bytes instead of {item.bytes:,}"
            )
            raise PathError(
                f"{flag}: shard {item.url} {state}; copy the cache to the bucket again."
            )
    return Plan(url, flag, items, metadata)


def _single(url: str, info: dict) -> Item:
    """A file by itself; objects that were uploaded in parts have a CRC only."""
    kind, digest = ("md5", info["md5Hash"]) if info.get("md5Hash") else ("crc32c", info["crc32c"])
    return Item(url.rpartition("/")[2], url, info["size"], kind, base64.b64decode(digest).hex())


def _shards(url: str, metadata: bytes) -> tuple[Item, ...]:
    """The shards that a cache's metadata lists.

    Raises:
        PathError: it is not the metadata of a latent cache.
    """
    from djepa_jax.data.latent_cache import Shard  # needs packages that sampling does without

    try:
        shards = [Shard(**shard) for shard in json.loads(metadata)["shards"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PathError(
            f"{url}/{METADATA_NAME} cannot be read ({error}); copy the cache to the bucket again."
        ) from error
    names = [
        f"{SHARDS_NAME}/{shard.file}" for shard in shards
    ]  # checked: no name leads out of the folder
    return tuple(
        Item(n, f"{url}/{n}", s.bytes, "sha256", s.sha256)
        for n, s in zip(names, shards, strict=True)
    )


def storage() -> fsspec.AbstractFileSystem:
    """What reads buckets; `paths.as_path` has set up the access."""
    return fsspec.filesystem("gs")


@contextlib.contextmanager
def reading(url: str, flag: str) -> Iterator[None]:
    """Say in one line what is wrong with an object that cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise PathError(
            f"{flag} names {url}, and there is no such object; check the name, or copy it there: "
            "gcloud storage cp -r."
        ) from error
    except Exception as error:  # storage services have exceptions of their own
        raise PathError(
            f"{flag}: {url} cannot be read ({bucket_reason(error)}); check the bucket's name and "
            "your access "
            "(roles/storage.objectViewer), and run the same command again: what is copied already "
            "is kept."
        ) from error


def hasher(kind: str):
    """A new checksum of a kind, with `update` and `digest`."""
    if kind == "crc32c":
        import google_crc32c  # comes with gcsfs

        return google_crc32c.Checksum()
    return hashlib.new(kind, usedforsecurity=False)


def copy_items(plan: Plan, missing: list[Item], folder: pathlib.Path) -> None:
    """Copy files, several at a time; the first failure ends it at once."""
    stop, total = threading.Event(), sum(item.bytes for item in missing)
    say(
        f"copying {plan.url} to {folder}: {len(missing)} of {len(plan.items)} files, "
        f"{format_bytes(total)}"
    )
    progress = Progress(total, say)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        futures = [
            pool.submit(copy_one, item, folder / item.name, plan.flag, stop, progress.add)
            for item in missing
        ]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def copy_one(
    item: Item, path: pathlib.Path, flag: str, stop: threading.Event, add: Callable[[int], None]
) -> None:
    """Copy a file under a temporary name and give it its own when it is what it should be.

    Raises:
        PathError: it is not, or cannot be read.
        OSError: the disk does not take it.
    """
    path.parent.mkdir(exist_ok=True)
    temporary, digest = path.with_name(path.name + UNFINISHED), hasher(item.kind)
    with temporary.open("wb") as file:
        for start in range(0, item.bytes, BLOCK_BYTES):
            if stop.is_set():
                return
            with reading(item.url, flag):
                block = storage().cat_file(
                    item.url, start=start, end=min(start + BLOCK_BYTES, item.bytes)
                )
            digest.update(block)
            file.write(block)
            add(len(block))
        file.flush()
        os.fsync(file.fileno())
    if digest.digest().hex() != item.digest:
        raise PathError(
            f"{flag}: {item.url} differs from its checksum, {item.kind} {item.digest}; copy it to "
            "the bucket again, or, if that "
            "was just done, run the same command again."
        )
    temporary.replace(path)


class Progress:
    """Tells now and then how much is copied, how fast, and how long the rest takes."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self.total, self.done, self._say = total, 0, say
        self._start = self._told = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Note bytes that have arrived; called by several threads."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now - self._told < PROGRESS_SECONDS:
                return
            self._told = now
            rate = self.done / max(now - self._start, 1e-9)
            left = format_seconds((self.total - self.done) / rate)
            self._say(
                f"copied {format_bytes(self.done)} of {format_bytes(self.total)}, "
                f"{format_bytes(rate)}/s, {left} left"
            )


def say(text: str) -> None:
    """Print a line, in one process for all: the others do the same on their hosts."""
    if distributed.is_main():
        print(text, flush=True)
