"""A bucket that refuses or cannot be reached: metrics wait for it, and what cannot work is one
line.

The bucket is an `ObjectStore` in this process, on loopback.
"""

import importlib
import json
import re
import socket
import sys
import tempfile
import types
from collections.abc import Iterator

import pytest
from buckets import WORKDIR, refusal
from tiny import CONFIG

from djepa_jax.runtime import metric_writer
from djepa_jax.runtime.storage import as_path, check_writable

# ---------------------------------------------------------------- metrics


def test_copies_are_made_up_for(empty, capsys):
    writer = metric_writer.MetricWriter(as_path(WORKDIR))
    with empty.refused_uploads("run/metrics.jsonl"):
        writer.write_scalars(1, {"loss": 1.0})
        writer.flush()
        assert "run/metrics.jsonl" not in empty.objects
    assert capsys.readouterr().out.startswith(f"WARNING: {WORKDIR}/metrics.jsonl was not written (")
    writer.write_scalars(2, {"loss": 0.5})
    writer.close()
    assert [
        json.loads(line)["step"] for line in empty.objects["run/metrics.jsonl"].splitlines()
    ] == [1, 2]
    assert (
        any("tfevents" in name for name in empty.objects)
        and not writer.folder.exists()
        and not capsys.readouterr().out
    )


@pytest.fixture
def unreachable(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """Nobody answers where the bucket should be; waiting for another attempt takes no time."""

    async def no_time(seconds: float) -> None:
        pass

    with socket.socket() as closed, monkeypatch.context() as patch:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        retry = importlib.import_module(
            "gcsfs.retry"
        )  # not above: gcsfs looks at the environment when it is imported
        patch.setattr(retry, "asyncio", types.SimpleNamespace(sleep=no_time))
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{closed.getsockname()[1]}")
        yield patch


def test_copies_are_made_up_for_when_the_storage_is_back(empty, unreachable, capsys):
    with unreachable.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", empty.url)
        writer = metric_writer.MetricWriter(as_path(WORKDIR))
    writer.write_scalars(1, {"loss": 1.0})
    writer.flush()
    first, second = capsys.readouterr().out.splitlines()
    assert (
        not empty.objects
        and first.startswith(f"WARNING: {WORKDIR}/events.out.tfevents.")
        and "Cannot connect" in first
    )
    assert (
        second.startswith(f"WARNING: {WORKDIR}/metrics.jsonl was not written (")
        and "tried again later" in second
    )
    unreachable.setenv("STORAGE_EMULATOR_HOST", empty.url)
    writer.write_scalars(2, {"loss": 0.5})
    writer.close()
    assert [
        json.loads(line)["step"] for line in empty.objects["run/metrics.jsonl"].splitlines()
    ] == [1, 2]
    assert not writer.folder.exists() and not capsys.readouterr().out


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_storage_that_cannot_be_reached_is_one_line(empty, unreachable, mode, capsys):
    line = refusal(capsys, f"--config={CONFIG}", f"--workdir={WORKDIR}", f"--mode={mode}")
    assert (
        line.startswith("error: ")
        and "Cannot connect to host 127.0.0.1" in line
        and not empty.objects
    )
    assert mode == "sample" or f'--workdir "{WORKDIR}" cannot be written (' in line


def test_what_could_not_be_copied_is_kept(empty, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with empty.refused_uploads():
        writer = metric_writer.MetricWriter(as_path(WORKDIR))
        writer.write_scalars(1, {"loss": 1.0})
        writer.close()
    *lines, last = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 2
        and last == f"WARNING: what could not be written to {WORKDIR} is kept in {writer.folder}"
    )
    assert json.loads((writer.folder / "metrics.jsonl").read_text())["step"] == 1


def test_copies_wait_until_they_are_due(empty, monkeypatch):
    monkeypatch.setattr(metric_writer, "MIRROR_SECONDS", 3600.0)
    writer = metric_writer.MetricWriter(as_path(WORKDIR))
    writer.write_scalars(1, {"loss": 1.0})
    assert not empty.objects
    writer.close()
    assert empty.objects


# ---------------------------------------------------------------- storage that cannot be used


def test_bucket_that_does_not_exist_is_named_and_not_made(empty, capsys):
    line = refusal(capsys, f"--config={CONFIG}", "--workdir=gs://no-bucket/run")
    assert (
        '--workdir "gs://no-bucket/run" cannot be written' in line
        and "check the bucket's name and your access" in line
    )
    assert not any(
        request.startswith("POST") and request.endswith("/b") for request in empty.requests
    )


def test_refused_access_is_said_before_anything_is_computed(empty, capsys):
    with empty.refused_uploads():
        line = refusal(capsys, f"--config={CONFIG}", f"--workdir={WORKDIR}")
    assert (
        f'--workdir "{WORKDIR}" cannot be written (' in line
        and "your access (roles/storage.objectUser)" in line
    )
    assert not empty.objects


@pytest.fixture
def without_gcsfs(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    known = importlib.import_module("fsspec.registry")._registry
    for name in ("gs", "gcs"):
        monkeypatch.delitem(known, name, raising=False)


@pytest.mark.parametrize("mode", ["train", "sample", "evaluate"])
def test_missing_package_is_named(without_gcsfs, mode, capsys):
    line = refusal(capsys, f"--config={CONFIG}", f"--workdir={WORKDIR}", f"--mode={mode}")
    assert line == f'error: "{WORKDIR}" needs the package gcsfs: pip install gcsfs.'


@pytest.mark.parametrize("mode", ["train", "sample"])
@pytest.mark.parametrize("workdir", ["s3://bucket/run", "https://bucket/run", "gs://"])
def test_other_addresses_are_refused(workdir, mode, capsys):
    line = refusal(capsys, f"--config={CONFIG}", f"--workdir={workdir}", f"--mode={mode}")
    assert line.startswith(f'error: "{workdir}" ') and "gs://BUCKET/FOLDER" in line


def test_bucket_without_a_checkpoint_is_told(empty, capsys):
    line = refusal(capsys, f"--config={CONFIG}", f"--workdir={WORKDIR}", "--mode=sample")
    assert re.match(f"error: {WORKDIR}/checkpoints holds no checkpoint; train first", line)


def test_check_leaves_nothing(empty):
    check_writable(WORKDIR)
    assert not empty.objects
