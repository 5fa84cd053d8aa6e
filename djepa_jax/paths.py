"""Files and folders on a local disk or in Google Cloud Storage, through one path type.

An object in a bucket appears whole or not at all, but nothing can be renamed there; on a disk it is the other way round.
What has to differ for that reason is here, and nowhere else.
"""

import contextlib
import io
import json
import os
import pathlib
import uuid

import numpy as np
from etils import epath

BUCKET = "gs://"


class PathError(ValueError):
    """A folder that cannot be used as asked; the message names it and the remedy."""


def as_path(text: str | os.PathLike) -> epath.Path:
    """An absolute path, local or `gs://...`.

    Raises:
        PathError: another kind of address.
    """
    text = os.fspath(text)
    if text.startswith(BUCKET):
        _set_up_bucket_access()
        return epath.Path(text)
    if "://" in text:
        raise PathError(f'"{text}" is neither a local path nor {BUCKET}BUCKET/FOLDER; name one of those.')
    return epath.Path(pathlib.Path(os.path.expanduser(text)).absolute())


def _set_up_bucket_access() -> None:
    """Let paths go through gcsfs, TensorFlow or not, and never answer from a listing that was true some time ago."""
    os.environ.setdefault("EPATH_USE_TF", "0")
    with contextlib.suppress(ImportError):  # who writes there will be told
        import fsspec

        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def is_remote(path: os.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return os.fspath(path).startswith(BUCKET)


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Write a file so that a reader never sees half of it."""
    path = epath.Path(path)
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: os.PathLike, value: dict) -> None:
    """Write a JSON file so that a reader never sees half of it."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_npz(path: os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as an npz file so that a reader never sees half of it."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def check_local(path: str | os.PathLike, flag: str) -> None:
    """Raise PathError if a flag that needs a local folder names another."""
    if not os.fspath(path) or "://" in os.fspath(path):
        raise PathError(f'{flag} "{path}" is not a local path; name one.')


def check_writable(folder: str | os.PathLike, flag: str = "--workdir") -> None:
    """Make sure that the folder a flag names can be written, before anything is computed; creates it.

    Raises:
        PathError: it is a file, may not be created or written, or its storage cannot be reached.
    """
    if not os.fspath(folder):
        raise PathError(f"{flag} is empty; name a folder.")
    path = as_path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        probe.unlink()
    except ImportError as error:
        raise PathError(f'{flag} "{folder}" needs the package gcsfs ({error}): pip install gcsfs.') from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise PathError(f'{flag} "{folder}" cannot be written ({reason}); choose another folder.') from error
    except Exception as error:  # a storage service's own exceptions: no bucket, no permission, no network
        if not is_remote(path):
            raise
        raise PathError(
            f'{flag} "{folder}" cannot be written ({type(error).__name__}: {error}); check the bucket\'s name and your access.'
        ) from error
