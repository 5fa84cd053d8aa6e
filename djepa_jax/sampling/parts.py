"""Samples on their way into an npz file: written batch by batch, and gone on with after the process
was killed.

Beside the npz file stands the folder `NAME.npz.unfinished` (for a file in a bucket: a folder in the
user's cache) with an .npy file per array and `progress.json`, which says what the samples are of
and how many are there. Rows are on the disk before they are counted. When all are there the arrays
are copied into the npz file, and the folder goes. Nothing here holds more than a batch in memory.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator

import fsspec
import numpy as np
from etils import epath

from djepa_jax.runtime.lock import LOCK_NAME, lock_workdir
from djepa_jax.runtime.storage import is_remote, write_json

PROGRESS_NAME, ARCHIVE_NAME, ARRAY_ENDING = "progress.json", "archive.tmp", ".npy"


class Parts:
    """The unfinished arrays of one npz file.

    Args:
        target: the npz file, local or in a bucket.
        identity: what the samples depend on; parts of another identity are not gone on with.
        count: samples that there will be.
    """

    def __init__(self, target: epath.Path, identity: dict, count: int):
        self.target, self.folder = target, unfinished_folder(target)
        self._of = json.loads(
            json.dumps({"identity": identity, "count": count})
        )  # as it is when it is read again
        self._count, self._done, self._bytes = count, 0, {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it.

        Raises:
            PathError: another process samples into the same file.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock_workdir(self.folder, what=f'--out "{self.target}"'):
            yield

    def begin(self) -> int:
        """How many samples are there already; those of other settings or weights are removed, and
        that is said.
        """
        found = self._read_progress()
        if found is None and any(self.folder.glob(f"*{ARRAY_ENDING}")):
            print(f"{self.folder} cannot be gone on with; starting anew", flush=True)
        if found is not None and any(found[key] != value for key, value in self._of.items()):
            print(
                f"{self.folder} holds samples of other settings or weights; starting anew",
                flush=True,
            )
            found = None
        if found is None:
            self._clear()
            return 0
        self._done, self._bytes = found["done"], found["bytes"]
        print(
            f"{self._done:,} of {self._count:,} samples are in {self.folder}; going on from there",
            flush=True,
        )
        return self._done

    def _read_progress(self) -> dict | None:
        """What the folder says it holds; None if it holds nothing, or less than it says."""
        try:
            found = json.loads((self.folder / PROGRESS_NAME).read_text("utf-8"))
            sizes = {
                name: (self.folder / f"{name}{ARRAY_ENDING}").stat().st_size
                for name in found["bytes"]
            }
            whole = all(sizes[name] >= size for name, size in found["bytes"].items())
            return (
                found
                if whole
                and found["bytes"]
                and 0 < found["done"] <= found["count"]
                and found["identity"]
                else None
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Write the next samples, `[n, ...]` each.

        Raises:
            OSError: the disk is full, or cannot be written; what was added before is kept.
        """
        for name, rows in arrays.items():
            try:
                self._bytes[name] = self._write(name, rows)
            except OSError as error:
                raise OSError(
                    f"{self.folder / name}{ARRAY_ENDING} cannot be written "
                    f"({error.strerror or error}); mend that and run the "
                    f"same command again: {self._done:,} of {self._count:,} samples are kept."
                ) from error
        self._done += len(rows)
        write_json(
            self.folder / PROGRESS_NAME, self._of | {"done": self._done, "bytes": self._bytes}
        )

    def _write(self, name: str, rows: np.ndarray) -> int:
        """Write rows behind those that count; returns how many bytes of the file count now."""
        header, row_bytes = (
            npy_header(rows, self._count),
            rows.dtype.itemsize * math.prod(rows.shape[1:]),
        )
        with (self.folder / f"{name}{ARRAY_ENDING}").open("r+b" if self._done else "wb") as file:
            file.write(header)
            file.seek(len(header) + self._done * row_bytes)
            file.write(np.ascontiguousarray(rows).data)
            file.flush()
            os.fsync(file.fileno())
        return len(header) + (self._done + len(rows)) * row_bytes

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays, mapped from the disk, when all samples are there."""
        return {
            name: np.load(self.folder / f"{name}{ARRAY_ENDING}", mmap_mode="r", allow_pickle=False)
            for name in self._bytes
        }

    def _clear(self) -> None:
        (self.folder / PROGRESS_NAME).unlink(missing_ok=True)  # first what makes the rest count
        for pattern in (f"*{ARRAY_ENDING}", f"{PROGRESS_NAME}.*.tmp", ARCHIVE_NAME):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder, for everything in it is in the npz file."""
        self._clear()
        (self.folder / LOCK_NAME).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody has put something there
            self.folder.rmdir()


def unfinished_folder(target: epath.Path) -> pathlib.Path:
    """Where the parts of an npz file are; the same place every time."""
    if not is_remote(target):
        return pathlib.Path(target).with_name(f"{target.name}.unfinished")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = pathlib.Path(
        cache if os.path.isabs(cache) else tempfile.gettempdir()
    )  # there are users without a home
    return (
        root / "djepa_jax" / "samples" / hashlib.sha256(os.fspath(target).encode()).hexdigest()[:16]
    )


def npy_header(rows: np.ndarray, count: int) -> bytes:
    """The beginning of an .npy file of `count` such rows."""
    buffer, descr = io.BytesIO(), np.lib.format.dtype_to_descr(rows.dtype)
    shape = (count, *rows.shape[1:])
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def write_large_npz(path: epath.Path, arrays: dict[str, np.ndarray], folder: pathlib.Path) -> None:
    """As `paths.write_npz`, but arrays that are mapped from a disk are not read into memory.

    It is put together in `folder`, which is on the same disk as a local file; it appears when it is
    whole.

    Raises:
        OSError: it cannot be written; what was there before is kept.
    """
    local = folder / ARCHIVE_NAME  # one name, which the next attempt writes over
    try:
        with open(local, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        if is_remote(path):
            fsspec.filesystem("gcs").put_file(os.fspath(local), os.fspath(path))
        else:
            local.replace(path)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}); mend that and run the command "
            "again: all samples are kept."
        ) from error
    finally:
        local.unlink(missing_ok=True)
