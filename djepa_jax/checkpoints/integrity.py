"""Folders with the checksums of all their files in a file of their own: writing, comparing,
copying, moving.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator

from etils import epath

from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.storage import is_remote, may_pass, write_bytes

MANIFEST_NAME = "manifest.json"
BLOCK_BYTES = 2**22
THREADS = 8  # files that are read at the same time


class ManifestError(UserError, RuntimeError):
    """A folder that is not as its manifest says; the message names the file."""


def file_sha256(path: os.PathLike) -> str:
    """Hexadecimal sha256 of a file, on a disk or in a bucket."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """Every file in a folder and in those below, in a fixed order, but for the folder's
    manifest.
    """
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from files_below(path)
        elif path.name != MANIFEST_NAME:
            yield path


def describe_files(folder: epath.Path) -> dict[str, dict]:
    """Bytes and sha256 of every file, by its name relative to the folder."""
    paths = list(files_below(folder))
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        entries = list(
            pool.map(lambda path: {"bytes": path.stat().length, "sha256": file_sha256(path)}, paths)
        )
    return {
        path.relative_to(folder).as_posix(): entry
        for path, entry in zip(paths, entries, strict=True)
    }


def write_manifest(folder: os.PathLike) -> None:
    """Write the manifest of everything that is in a folder now."""
    folder = epath.Path(folder)
    write_bytes(folder / MANIFEST_NAME, _text(describe_files(folder)))


def _text(files: dict[str, dict]) -> bytes:
    return (json.dumps({"files": files}, indent=2) + "\n").encode()


def read_manifest(folder: os.PathLike) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 by file name.

    Raises:
        ManifestError: there is no manifest, or it cannot be read.
    """
    path = epath.Path(folder) / MANIFEST_NAME
    try:
        with _reading(path):
            entries = json.loads(path.read_text())["files"]
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{path} cannot be read ({error})") from error


def check_manifest(folder: os.PathLike, names: Iterable[str] | None = None) -> None:
    """Compare the files of a folder with its manifest: some of them by name, or all and the
    manifest itself.

    Raises:
        ManifestError: a file is missing or differs, or there is no manifest.
        OSError: storage does not answer, which says nothing about the files.
    """
    folder = epath.Path(folder)
    entries = read_manifest(folder)
    if names is None:
        _check_text(folder / MANIFEST_NAME, entries)
    try:
        expected = {name: entries[name] for name in (entries if names is None else names)}
    except KeyError as error:
        raise ManifestError(
            f"{folder / MANIFEST_NAME} cannot be read: it does not list {error}"
        ) from error
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: _check_file(folder / name, *expected[name]), expected))


def _check_text(path: epath.Path, entries: dict[str, tuple[int, str]]) -> None:
    """Notice what changed in a manifest without changing what it says: white space, an entry that
    is there twice.
    """
    if path.read_bytes() != _text(
        {name: {"bytes": size, "sha256": digest} for name, (size, digest) in entries.items()}
    ):
        raise ManifestError(f"{path} is not as it was written")


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Tell a file that is not there, or broken, from storage that does not answer just now."""
    try:
        yield
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing") from None
    except OSError as error:
        if may_pass(error):
            raise OSError(
                f"{path} cannot be read just now ({error}); nothing was changed, run the same "
                "command again."
            ) from error
        raise ManifestError(f"{path} cannot be read ({error})") from error


def _check_file(path: epath.Path, size: int, digest: str) -> None:
    with _reading(path):
        same = path.stat().length == size and file_sha256(path) == digest
    if not same:
        raise ManifestError(f"{path} differs from its checksum in {MANIFEST_NAME}")


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Rename a folder; in a bucket, copy its objects and then delete them."""
    if not is_remote(source):
        source.rename(target)
        return
    copy_folder(source, target)
    source.rmtree()


def copy_folder(source: epath.Path, target: epath.Path) -> None:
    """Copy a folder file by file, its manifest last."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            path.copy(target / path.name)
