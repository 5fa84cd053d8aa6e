"""Local paths and writes; those in a bucket are in test_object_store.py."""

import errno
import json
import os
import pathlib

import numpy as np
import pytest

from djepa_jax.runtime import storage
from djepa_jax.runtime.storage import (
    PathError,
    as_path,
    check_local,
    check_writable,
    is_remote,
    write_bytes,
    write_json,
    write_npz,
)


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert as_path("a/b") == as_path(tmp_path / "a" / "b")
    assert as_path("~/run") == as_path(tmp_path / "home" / "run")
    assert os.fspath(as_path("a//b/")) == str(tmp_path / "a" / "b")
    assert not is_remote(as_path("gs/bucket"))


def test_links_are_kept(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert os.fspath(as_path(tmp_path / "link")) == str(tmp_path / "link")


def test_addresses_of_buckets_stay_as_they_are(monkeypatch):
    for variable in storage.SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    path = as_path("gs://bucket/some/run")
    assert (
        os.fspath(path) == "gs://bucket/some/run"
        and is_remote(path)
        and is_remote(path / "config.json")
    )
    assert as_path(path) == path and os.fspath(path.parent / "other") == "gs://bucket/some/other"
    assert {name: os.environ[name] for name in storage.SETTINGS} == storage.SETTINGS, (
        "TensorFlow is not used where it is installed"
    )


@pytest.mark.parametrize(
    "text", ["s3://bucket/run", "http://host/run", "file:///run", "gs://", "gs:///run"]
)
def test_other_addresses_are_refused(text):
    with pytest.raises(PathError, match=f'"{text}".*gs://BUCKET/FOLDER'):
        as_path(text)


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "file"
    for data in (b"one", b""):
        write_bytes(path, data)
        assert path.read_bytes() == data and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os if step == "fsync" else type(as_path(path)), step, fail)
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_json_ends_with_a_line(tmp_path):
    write_json(tmp_path / "a.json", {"step": 4})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"step": 4} and text.endswith("}\n")


def test_arrays_can_be_read(tmp_path):
    arrays = {"arr_0": np.arange(6, dtype=np.float32).reshape(2, 3), "settings": np.asarray("{}")}
    write_npz(tmp_path / "a.npz", arrays)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == list(arrays) and str(file["settings"]) == "{}"
        np.testing.assert_array_equal(file["arr_0"], arrays["arr_0"])


@pytest.mark.parametrize("path", ["gs://bucket/export", "s3://bucket/export", ""])
def test_some_flags_need_a_disk(path):
    with pytest.raises(PathError, match=f'--out "{path}" is not a local path'):
        check_local(path, "--out")
    check_local(pathlib.Path("export"), "--out")


def test_folder_is_made_and_left_empty(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "b"]


def test_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(PathError, match="--out is empty"):
        check_writable("", "--out")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            PathError, match=f'--workdir "{folder}" cannot be written .*; choose another folder.'
        ):
            check_writable(folder)


def test_mistakes_in_the_program_are_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.uuid, "uuid4", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check_writable(tmp_path)


def test_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """The system says only that the disk is full."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'a.json'}'"):
        storage.write_json(tmp_path / "a.json", {})
    assert list(tmp_path.iterdir()) == []
