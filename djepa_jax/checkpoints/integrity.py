"""Folders with a manifest, the sha256 of all their other files: write, check, copy, move."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator

from etils import epath

from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.storage import as_path, is_remote, may_pass, write_bytes

MANIFEST_NAME = "manifest.json"
REMEDY = "put a good copy back, or move it away"
THREADS = 8  # files that are read at the same time


class CheckpointError(UserError, RuntimeError):
    """A checkpoint or export that is missing, damaged or of another kind."""


class DamagedError(CheckpointError):
    """A step or export that is not what was written."""


def check_storable(folder: os.PathLike) -> None:
    """Raise CheckpointError for a path that TensorStore, which stores arrays, cannot use."""
    odd = re.search(r"\\|[\ud800-\udfff]|(?<=/)gs:(?=/(?!/))", os.fspath(as_path(folder)))
    if odd:
        raise CheckpointError(
            f'"{folder}" has {odd[0]!a} in it, which the storage of arrays does not take; give '
            "that folder another name."
        )


@contextlib.contextmanager
def reading(path: epath.Path) -> Iterator[None]:
    """Tell what is missing or broken from storage that does not answer just now."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error) or 'no details').splitlines()[0]}"
        if may_pass(error):
            raise CheckpointError(
                f"{path} cannot be read just now ({reason}); nothing was changed, run the same "
                "command again."
            ) from error
        raise DamagedError(f"{path} cannot be read ({reason}); {REMEDY}.") from error


def file_sha256(path: os.PathLike) -> str:
    """Hexadecimal sha256 of a file, on a disk or in a bucket."""
    with epath.Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: os.PathLike) -> None:
    """Write the manifest of everything that is in a folder now."""
    folder = epath.Path(folder)
    names = [path.relative_to(folder).as_posix() for path in _files_below(folder)]
    files = _describe(folder, [name for name in names if name != MANIFEST_NAME])
    write_bytes(folder / MANIFEST_NAME, _text(files))


def check_manifest(folder: os.PathLike, below: str = "", but: str | None = None) -> None:
    """Compare the files that a manifest lists with it: those whose names begin so, but for one.

    Raises:
        DamagedError: one of them, or the manifest, is missing or is not as it was written.
        CheckpointError: storage does not answer, which says nothing about the files.
    """
    path = epath.Path(folder) / MANIFEST_NAME
    with reading(path):
        text = path.read_bytes()
        files = {
            name: {"bytes": entry["bytes"], "sha256": entry["sha256"]}
            for name, entry in json.loads(text)["files"].items()
        }
    if text != _text(files):  # white space counts, too, and an entry that is there twice
        raise DamagedError(f"{path} is not as it was written; {REMEDY}.")
    chosen = [name for name in files if name.startswith(below) and name != but]
    for name, found in _describe(path.parent, chosen).items():
        if found != files[name]:
            raise DamagedError(f"{path.parent / name} differs from its checksum; {REMEDY}.")


def _describe(folder: epath.Path, names: list[str]) -> dict[str, dict]:
    def entry(name: str) -> dict:
        path = folder / name
        with reading(path):
            return {"bytes": path.stat().length, "sha256": file_sha256(path)}

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))


def _text(files: dict[str, dict]) -> bytes:
    return (json.dumps({"files": files}, indent=2) + "\n").encode()


def _files_below(folder: epath.Path) -> list[epath.Path]:
    paths = sorted(folder.iterdir())
    return [file for path in paths for file in (_files_below(path) if path.is_dir() else [path])]


def copy_folder(source: epath.Path, target: epath.Path) -> None:
    """Copy the files of a folder, its manifest last."""
    for path in sorted(_files_below(source), key=lambda path: path.name == MANIFEST_NAME):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.copy(place)


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Rename a folder; in a bucket, copy its objects and then delete them."""
    if is_remote(source):
        copy_folder(source, target)
        source.rmtree()
    else:
        source.rename(target)
