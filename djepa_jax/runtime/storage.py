"""Files and folders on a local disk or in Google Cloud Storage, through one path type.

An object in a bucket appears whole or not at all, but nothing can be renamed there; on a disk it is
the other way round. What has to differ for that reason is here, and nowhere else.
"""

import errno
import importlib.util
import io
import json
import logging
import os
import pathlib
import uuid

import fsspec
import numpy as np
from etils import epath

from djepa_jax.runtime.errors import STORAGE_PACKAGES, UserError

BUCKET = "gs://"
SETTINGS = {"EPATH_USE_TF": "0", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # of etils and gcsfs

# What TensorStore says of storage that does not answer, or not to this user.
UNREACHABLE = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED",
)
PASSING = {
    errno.ESTALE,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EMFILE,
    errno.ENOMEM,
}


class PathError(UserError, ValueError):
    """A folder that cannot be used as asked; the message names it and the remedy."""


def as_path(text: str | os.PathLike) -> epath.Path:
    """An absolute path, local or `gs://...`.

    Raises:
        PathError: another kind of address, or one of a bucket where gcsfs is not installed.
    """
    text = os.fspath(text)
    if text.startswith(BUCKET):
        _set_up_bucket_access(text)
        return epath.Path(text)
    if "://" in text:
        raise PathError(
            f'"{text}" is neither a local path nor {BUCKET}BUCKET/FOLDER; name one of those.'
        )
    return epath.Path(pathlib.Path(os.path.expanduser(text)).absolute())


def may_pass(error: BaseException) -> bool:
    """Whether a failure to read may be gone the next time, and says nothing about what is
    stored.
    """
    if isinstance(error, (TimeoutError, ConnectionError, PermissionError)):
        return True
    if isinstance(error, OSError) and error.errno in PASSING:
        return True
    return (
        any(word in str(error) for word in UNREACHABLE)
        or type(error).__module__.partition(".")[0] in STORAGE_PACKAGES
    )


def _set_up_bucket_access(text: str) -> None:
    """Let paths go through gcsfs, TensorFlow or not, and never answer from a listing that was true
    some time ago.

    The parts of gcsfs that are called experimental would ask over gRPC, before every access, what
    kind of bucket it is, if the answer is refused. What gcsfs raises is reported; it would log it,
    too, with a traceback.
    """
    if not text.removeprefix(BUCKET).partition("/")[0]:
        raise PathError(f'"{text}" names no bucket; write {BUCKET}BUCKET/FOLDER.')
    if importlib.util.find_spec("gcsfs") is None:
        raise PathError(f'"{text}" needs the package gcsfs: pip install gcsfs.')
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def is_remote(path: os.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return os.fspath(path).startswith(BUCKET)


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Write a file so that a reader never sees half of it.

    Raises:
        OSError: it cannot be written; `filename` says which.
    """
    path = epath.Path(path)
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = os.fspath(path)  # which the system leaves out where a disk is full
        raise
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


def check_local(path: str | os.PathLike, flag: str, remedy: str = "name one") -> None:
    """Raise PathError if a flag that needs a local folder names another."""
    if not os.fspath(path) or "://" in os.fspath(path):
        raise PathError(f'{flag} "{path}" is not a local path; {remedy}.')


def bucket_reason(error: Exception) -> str:
    """What storage said, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def check_writable(folder: str | os.PathLike, flag: str = "--workdir") -> None:
    """Make sure that the folder a flag names can be written, before anything is computed; creates
    it.

    Raises:
        PathError: it is a file, may not be created or written, or its storage cannot be reached.
    """
    if not os.fspath(folder):
        raise PathError(f"{flag} is empty; name a folder.")
    path = as_path(folder)
    try:
        if not is_remote(
            path
            # there, a bucket that is missing would be made, in a place and for a price that nobody
            # chose
        ):
            path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"\n")
        probe.unlink()
    # storage services have exceptions of their own: no bucket, no permission, no network
    except Exception as error:
        if is_remote(path):
            reason, remedy = (
                bucket_reason(error),
                "check the bucket's name and your access (roles/storage.objectUser)",
            )
        elif isinstance(error, OSError):
            reason, remedy = error.strerror or str(error), "choose another folder"
        else:
            raise
        raise PathError(f'{flag} "{folder}" cannot be written ({reason}); {remedy}.') from error
