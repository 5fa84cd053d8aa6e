"""An `ObjectStore` that the test process itself uses, too, and what the command line says of it."""

import contextlib
import json
from collections.abc import Iterator

import fsspec
import pytest
from etils import epath
from object_store import ObjectStore
from orbax.checkpoint._src.path import gcs_utils
from processes import LEASE

from djepa_jax.main import main
from djepa_jax.runtime import lock

WORKDIR = "gs://bucket/run"


@contextlib.contextmanager
def reached(store: ObjectStore) -> Iterator[None]:
    """Lead this process to the store instead of to Google, as `processes.reach` does for good."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", json.loads(store.environment["FSSPEC_GCS"]))
        for name, value in zip(("RENEW_SECONDS", "STALE_SECONDS"), LEASE, strict=True):
            patch.setattr(lock, name, value)
        _forget_storage()
        yield
    _forget_storage()


def _forget_storage() -> None:
    """Drop what was remembered of other storage."""
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.get_filesystem_class("gcs").clear_instance_cache()
    gcs_utils.get_bucket.cache_clear()


def refusal(capsys, *arguments: str) -> str:
    """The one line that the command line ends with."""
    assert main(["djepa_jax", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line
