"""Paths, writes and checks of folders, on a disk and in a bucket (an `ObjectStore`)."""

import errno
import importlib
import json
import os
import pathlib
import socket
import sys
import types

import numpy as np
import pytest
from buckets import WORKDIR, refusal
from etils import epath
from tiny import CONFIG

from djepa_jax.runtime import storage
from djepa_jax.runtime.storage import (
    PathError,
    as_path,
    check_local,
    check_ours,
    check_writable,
    is_remote,
    may_pass,
    write_bytes,
    write_json,
    write_npz,
)


def test_local_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "link").symlink_to(tmp_path / "target")
    paths = {
        "a/b": "a/b",
        "a//b/": "a/b",
        "~/run": "home/run",
        "link": "link",
        "gs/bucket": "gs/bucket",
    }
    for text, expected in paths.items():
        assert os.fspath(as_path(text)) == str(tmp_path / expected)
        assert not is_remote(as_path(text))


def test_what_lies_in_a_folder_is_found_whatever_its_name(tmp_path):
    for name in ("[a]*?", "**", "plain"):
        folder = as_path(tmp_path) / name
        folder.mkdir()
        (folder / "x.json").touch()
        for path in (folder, as_path(folder)):
            assert [found.name for found in path.glob("*.json")] == ["x.json"]


def test_addresses_of_buckets_stay_as_they_are(monkeypatch):
    for variable in storage.SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    path = as_path("gs://bucket/some/run")
    assert os.fspath(path) == "gs://bucket/some/run" and is_remote(path / "config.json")
    assert as_path(path) == path and os.fspath(path.parent / "other") == "gs://bucket/some/other"
    assert {name: os.environ[name] for name in storage.SETTINGS} == storage.SETTINGS


def test_other_addresses_are_refused():
    for text in ("s3://bucket/run", "file:///run", "gs://", "gs:///run"):
        with pytest.raises(PathError, match=f'"{text}".*gs://BUCKET/FOLDER'):
            as_path(text)


def test_files_are_written_whole_whatever_their_name(tmp_path):
    names = ["[a]*?.json", "back\\slash", "\udce9", "a\nb", "~", "日本"]
    for name in names:
        for value in ({"step": 4}, {}):
            write_json(tmp_path / name, value)
            assert json.loads((tmp_path / name).read_text()) == value
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_a_failed_write_names_the_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, step in ((os, "fsync"), (type(epath.Path(path)), "replace")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=f"No space.*'{path}'"):
            patch.setattr(owner, step, fail)
            write_bytes(path, b"new")
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_arrays_can_be_read(tmp_path):
    arrays = {"arr_0": np.arange(6, dtype=np.float32).reshape(2, 3), "settings": np.asarray("{}")}
    write_npz(tmp_path / "a.npz", arrays)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == list(arrays) and str(file["settings"]) == "{}"
        np.testing.assert_array_equal(file["arr_0"], arrays["arr_0"])


def test_failures_that_may_pass_are_told_from_damage():
    http = importlib.import_module("gcsfs.retry").HttpError
    passing = [TimeoutError(), OSError(errno.ESTALE, "x"), ValueError("x UNAVAILABLE: y"), http({})]
    lasting = [OSError(errno.ENOENT, "x"), ValueError("DATA_LOSS"), KeyError("x")]
    assert [may_pass(error) for error in passing + lasting] == [True] * 4 + [False] * 3


# ---------------------------------------------------------------- checks of what flags name


def test_a_file_of_something_else_is_told_from_ours(tmp_path):
    path = tmp_path / "config.json"
    check_ours(path, "key", "")  # there is none
    path.write_text('{"key": 1}')
    check_ours(path, "key", "")
    for content in (b"", b"3", b"[]", b'{"other": "key"}', b"[" * 100_000, b"\xff"):
        path.write_bytes(content)
        with pytest.raises(PathError, match="name another"):
            check_ours(path, "key", "name another")


def test_some_flags_need_a_disk():
    for path in ("gs://bucket/export", "s3://bucket/export", ""):
        with pytest.raises(PathError, match=f'--out "{path}" is not a local path'):
            check_local(path, "--out")
    check_local(pathlib.Path("export"), "--out")


def test_a_folder_is_made_and_left_empty(tmp_path, empty):
    check_writable(tmp_path / "a" / "b")
    check_writable(WORKDIR)
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "b"]
    assert not empty.objects


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(PathError, match="--out is empty"):
        check_writable("", "--out")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PathError, match=f'--workdir "{folder}" cannot be written .*another'):
            check_writable(folder)


def test_a_bucket_that_refuses_is_named_and_not_made(empty):
    with pytest.raises(PathError, match='"gs://no-bucket/run" cannot be written .*your access'):
        check_writable("gs://no-bucket/run")
    with empty.refused_uploads(), pytest.raises(PathError, match=f'"{WORKDIR}" cannot .*Forbidden'):
        check_writable(WORKDIR)
    made = [text for text in empty.requests if text.startswith("POST") and text.endswith("/b")]
    assert not made and not empty.objects


def test_storage_that_cannot_be_reached_is_one_line(empty, monkeypatch, capsys):
    async def no_time(seconds: float) -> None:
        pass

    retry = importlib.import_module("gcsfs.retry")  # looks at the environment when imported
    monkeypatch.setattr(retry, "asyncio", types.SimpleNamespace(sleep=no_time))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{closed.getsockname()[1]}")
        for mode in ("train", "sample"):
            line = refusal(capsys, f"--config={CONFIG}", f"--workdir={WORKDIR}", f"--mode={mode}")
            assert line.startswith("error: ") and "Cannot connect to host 127.0.0.1" in line


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for mode in ("train", "sample", "evaluate"):
        line = refusal(capsys, f"--config={CONFIG}", f"--workdir={WORKDIR}", f"--mode={mode}")
        assert f'"{WORKDIR}" needs the package gcsfs: pip install gcsfs' in line
