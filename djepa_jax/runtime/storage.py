"""Files and folders on a local disk or in Google Cloud Storage, through one path type.

An object in a bucket appears whole or not at all, but nothing can be renamed there; on a disk it is
the other way round.
"""

import contextlib
import errno
import glob
import importlib.util
import io
import json
import logging
import os
import pathlib
import re
import uuid

import fsspec
import numpy as np
from etils import epath
from etils.epath.gpath import PosixGPath

from djepa_jax.runtime.errors import STORAGE_PACKAGES, UserError

BUCKET = "gs://"
# Of etils and gcsfs, whose experimental parts ask over gRPC what kind of bucket it is.
SETTINGS = {"EPATH_USE_TF": "0", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
# What TensorStore says of storage that does not answer, or not to this user.
UNREACHABLE = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED"
)
NETWORK = (errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH)
PASSING = (*NETWORK, errno.ESTALE, errno.EMFILE, errno.ENOMEM)


class PathError(UserError, ValueError):
    """A file or folder that cannot be used as asked; the message names it and the remedy."""


class LiteralPath(PosixGPath):
    """A path that etils and Orbax may search below, though its own name looks like a pattern."""

    def glob(self, pattern: str):
        """What matches below this path."""
        return epath.Path(glob.escape(os.fspath(self))).glob(pattern)


def as_path(text: str | os.PathLike) -> epath.Path:
    """An absolute path, local or `gs://...`; PathError for other addresses, or without gcsfs."""
    text = os.fspath(text)
    if "://" not in text:
        return LiteralPath(pathlib.Path(os.path.expanduser(text)).absolute())
    if not text.startswith(BUCKET) or not text.removeprefix(BUCKET).partition("/")[0]:
        raise PathError(
            f'"{text}" is neither a local path nor {BUCKET}BUCKET/FOLDER; name one of those.'
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise PathError(f'"{text}" needs the package gcsfs: pip install gcsfs.')
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    # Never answer from a listing that was true some time ago.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it raises is reported anyway
    return LiteralPath(text)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return os.fspath(path).startswith(BUCKET)


def user_cache(name: str) -> pathlib.Path | None:
    """A folder in the user's cache folder; None for a user without a home."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(root) / "djepa_jax" / name if os.path.isabs(root) else None


def may_pass(error: BaseException) -> bool:
    """Whether a failure to read may be gone the next time, and tells nothing of what is stored."""
    if isinstance(error, (TimeoutError, ConnectionError, PermissionError)):
        return True
    if isinstance(error, OSError) and error.errno in PASSING:
        return True
    is_storage = type(error).__module__.partition(".")[0] in STORAGE_PACKAGES
    return is_storage or bool(UNREACHABLE.search(str(error)))


def write_bytes(path: os.PathLike, data: bytes) -> None:
    """Write a file so that a reader never sees half of it; an OSError names it."""
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


def check_ours(path: os.PathLike, key: str, remedy: str) -> None:
    """Raise PathError if there is a file that is no JSON object with a key that ours has."""
    path = as_path(path)
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        if not path.exists() or key in json.loads(path.read_bytes()):
            return
    raise PathError(f'"{path}" exists and holds something else; {remedy}.')


def check_local(path: str | os.PathLike, flag: str, remedy: str = "name one") -> None:
    """Raise PathError if a flag that needs a local folder names another."""
    if not os.fspath(path) or "://" in os.fspath(path):
        raise PathError(f'{flag} "{path}" is not a local path; {remedy}.')


def check_writable(folder: str | os.PathLike, flag: str = "--workdir") -> None:
    """Make the folder that a flag names; PathError if it cannot be written."""
    if not os.fspath(folder):
        raise PathError(f"{flag} is empty; name a folder.")
    path = as_path(folder)
    probe = path / f".probe-{uuid.uuid4().hex}"
    remedy = "choose another folder"
    if is_remote(path):
        remedy = "check the bucket's name and your access (roles/storage.objectUser)"
    try:
        if not is_remote(path):  # there, a bucket would be made, at a price that nobody chose
            path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\n")
        probe.unlink()
    except Exception as error:  # storage services have exceptions of their own
        said = f'{flag} "{folder}" cannot be written ({reason(error)}); {remedy}.'
        raise PathError(said) from error


def reason(error: Exception) -> str:
    """What the system or storage said, on one line."""
    if type(error).__module__ == "builtins" and getattr(error, "strerror", None):
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())
