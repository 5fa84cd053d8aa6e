"""Compiled programs between runs: those that were cut off while they were written are compiled and
kept again.
"""

import os
import pathlib
import sys
import types
import warnings
import zlib

import jax
import pytest
from processes import CONTEXT, start

from djepa_jax.runtime import compilation_cache
from djepa_jax.runtime.compilation_cache import (
    CHECKED_NAME,
    ZSTD,
    remove_damaged,
    use_compilation_cache,
)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A folder with three programs as JAX writes them, the oldest one first."""
    for number, name in enumerate("abc"):
        write(
            tmp_path / f"{name}-cache", zlib.compress(os.urandom(3_000_000)), 10**9 * (number + 1)
        )
    return tmp_path


def write(path: pathlib.Path, data: bytes, time: int) -> None:
    """A file that was changed at a time in nanoseconds."""
    path.write_bytes(data)
    os.utime(path, ns=(time, time))


def cleaned(folder: pathlib.Path) -> str:
    """What is said of it."""
    said = []
    remove_damaged(folder, said.append)
    return "\n".join(said)


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "last byte": lambda data: data[:-1],
    "flip": flipped,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_program_that_was_cut_off_is_removed_and_others_stay(folder, damage):
    path = folder / "b-cache"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    (folder / "b-atime").touch()
    (folder / "note").write_text("not one of JAX's")
    assert (
        cleaned(folder)
        == f"removed {path}, a compiled program that was cut off; it is compiled again"
    )
    assert names(folder) == ["a-cache", "c-cache", CHECKED_NAME, "note"]


def test_whole_programs_are_looked_at_once(folder, monkeypatch):
    looked_at, is_whole = [], compilation_cache._is_whole
    monkeypatch.setattr(
        compilation_cache, "_is_whole", lambda path: looked_at.append(path.name) or is_whole(path)
    )
    assert cleaned(folder) == "" and sorted(looked_at) == ["a-cache", "b-cache", "c-cache"]
    looked_at.clear()
    checked = (folder / CHECKED_NAME).stat().st_mtime_ns
    write(folder / "d-cache", b"half", checked)
    assert cleaned(folder).startswith(f"removed {folder / 'd-cache'}") and looked_at == ["d-cache"]


def test_programs_that_another_python_compressed_stay(folder, monkeypatch):
    """Whether they are whole cannot be told."""
    (folder / "z-cache").write_bytes(ZSTD + b"half")
    for package in ("zstandard", "compression"):
        monkeypatch.setitem(sys.modules, package, None)
    assert cleaned(folder) == "" and "z-cache" in names(folder)


def test_zstandard_is_understood(folder):
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.ZstdCompressor().compress(os.urandom(3_000_000))
    (folder / "y-cache").write_bytes(data)
    (folder / "z-cache").write_bytes(data[:-5])
    assert cleaned(folder).startswith(f"removed {folder / 'z-cache'}") and "y-cache" in names(
        folder
    )


def life(folder: str, pipe) -> None:
    """In a process of its own with JAX's defaults: what was said, programs taken from the folder
    and put there, warnings.
    """
    jax.config.update("jax_compilation_cache_dir", folder)
    events, said = [], []
    jax.monitoring.register_event_listener(
        lambda event, **_: events.append(event.rpartition("/")[2])
    )
    use_compilation_cache(said.append)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(7)).block_until_ready()
    pipe.send((said, events.count("cache_hits"), events.count("cache_misses"), len(warned)))


def lived(folder: pathlib.Path) -> tuple:
    ours, theirs = CONTEXT.Pipe(duplex=False)
    start(life, str(folder), theirs).join()
    return ours.recv()


def test_a_folder_that_is_not_there_or_not_local_is_no_error(monkeypatch):
    looked_at, said = [], []

    def fail(folder, say):
        looked_at.append(folder)
        raise FileNotFoundError

    monkeypatch.setattr(compilation_cache, "remove_damaged", fail)
    for folder in ("/not/there", "gs://bucket/programs"):
        monkeypatch.setattr(compilation_cache, "jax", fake_jax(folder))
        use_compilation_cache(said.append)
    assert (looked_at, said) == ([pathlib.Path("/not/there")], [])


def fake_jax(folder: str) -> types.SimpleNamespace:
    """As far as it is asked: it was told where to keep programs, and which."""
    told = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.5}
    return types.SimpleNamespace(config=types.SimpleNamespace(**told), __version__="1")


def test_the_next_run_but_one_compiles_nothing(tmp_path):
    """Also in a folder that JAX was told of, and programs that compile in no time."""
    said, hits, programs, warned = lived(tmp_path)
    assert (said, hits, warned) == ([], 0, 0) and programs > 0
    entry = max(tmp_path.glob("*-cache"), key=lambda path: path.stat().st_size)
    entry.write_bytes(entry.read_bytes()[:100])
    said, hits, compiled, warned = lived(tmp_path)
    assert len(said) == 1 and (hits, compiled, warned) == (programs - 1, 1, 0)
    assert lived(tmp_path) == ([], programs, 0, 0)
