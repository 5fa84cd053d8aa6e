"""Samples that are written batch by batch: going on after a kill, what is refused, and memory that
does not grow.
"""

import errno
import json
import pathlib
import tracemalloc

import numpy as np
import pytest
from buckets import reached
from djepa_jax.sampling.sample_to_npz.parts import Parts, unfinished_folder, write_large_npz
from etils import epath
from object_store import ObjectStore

from djepa_jax.runtime.storage import PathError, as_path
from djepa_jax.sampling.sample_to_npz import parts as parting

IDENTITY = {"step": 3, "weights": "abc", "sample": {"shape": (1, 2)}}
COUNT = 10
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 4, 4, 3), np.uint8)
LATENTS = np.random.default_rng(1).standard_normal((COUNT, 2, 2, 5)).astype(np.float32)


@pytest.fixture
def target(tmp_path) -> epath.Path:
    return as_path(tmp_path / "samples.npz")


def batch(start: int, stop: int) -> dict[str, np.ndarray]:
    return {"images": IMAGES[start:stop], "latents": LATENTS[start:stop]}


def begun(target, identity=IDENTITY, count: int = COUNT) -> tuple[Parts, int]:
    """The parts, as a process that comes finds them, and how many samples it finds."""
    parts = Parts(target, identity, count)
    parts.folder.mkdir(exist_ok=True)
    return parts, parts.begin()


def interrupted(target) -> pathlib.Path:
    """The folder that a process left behind which was killed in its third batch: two are counted,
    the third is half there.
    """
    parts, first = begun(target)
    assert first == 0
    parts.add(batch(0, 3))
    parts.add(batch(3, 6))
    with (parts.folder / "images.npy").open("ab") as file:
        file.write(b"\xff" * 70)
    return parts.folder


@pytest.mark.parametrize("left", ["archive.tmp", "progress.json.0a1b2c3d.tmp"])
def test_nothing_stays_of_a_process_that_was_killed_while_it_wrote(target, left):
    folder = interrupted(target)
    (folder / left).write_bytes(b"half of it")
    parts, first = begun(target)
    parts.add(batch(first, COUNT))
    write_large_npz(target, parts.arrays(), parts.folder)
    parts.remove()
    assert [path.name for path in target.parent.iterdir()] == ["samples.npz"]


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"bytes": {}, "done": 1, "count": 10, "identity": {"a": 1}}', "[]", "{}"],
)
def test_progress_that_tells_nothing_is_begun_anew(target, text):
    (interrupted(target) / "progress.json").write_text(text)
    assert begun(target)[1] == 0


def test_what_was_killed_goes_on_and_gives_the_same_file(target, capsys):
    folder = interrupted(target)
    parts, first = begun(target)
    assert first == 6 and f"6 of 10 samples are in {folder}; going on" in capsys.readouterr().out
    parts.add(batch(6, 7))  # batches need not be as large as before
    parts.add(batch(7, 10))
    write_large_npz(target, parts.arrays(), parts.folder)
    parts.remove()
    assert [path.name for path in target.parent.iterdir()] == ["samples.npz"], (
        "nothing is left beside it"
    )
    with np.load(target, allow_pickle=False) as arrays:
        assert arrays["images"].dtype == np.uint8 and arrays["latents"].dtype == np.float32
        np.testing.assert_array_equal(arrays["images"], IMAGES)
        np.testing.assert_array_equal(arrays["latents"], LATENTS)


def test_the_end_can_be_killed_too(target):
    """All samples are there, the npz file is not: nothing is drawn again."""
    parts, _ = begun(target)
    parts.add(batch(0, COUNT))
    parts, first = begun(target)
    assert first == COUNT
    np.testing.assert_array_equal(parts.arrays()["images"], IMAGES)


@pytest.mark.parametrize(
    "change", [{"weights": "abd"}, {"step": 4}, {"sample": {"shape": (1, 3)}}, {"more": 1}]
)
def test_samples_of_something_else_are_not_mixed_in(target, capsys, change):
    folder = interrupted(target)
    parts, first = begun(target, IDENTITY | change)
    assert (
        first == 0
        and f"{folder} holds samples of other settings or weights; starting anew"
        in capsys.readouterr().out
    )
    parts.add({"latents": LATENTS})
    assert parts.arrays().keys() == {"latents"}, "what was there is gone"


def test_another_count_starts_anew(target):
    interrupted(target)
    assert begun(target, count=COUNT + 1)[1] == 0


def shorten(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


DAMAGE = {
    "an array is short": lambda folder: shorten(folder / "latents.npy"),
    "an array is missing": lambda folder: (folder / "images.npy").unlink(),
    "progress is cut": lambda folder: shorten(folder / "progress.json"),
    "progress is a list": lambda folder: (folder / "progress.json").write_text("[]"),
    "progress is missing": lambda folder: (folder / "progress.json").unlink(),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_damaged_starts_anew(target, capsys, case):
    DAMAGE[case](interrupted(target))
    assert begun(target)[1] == 0 and "starting anew" in capsys.readouterr().out
    assert not list(unfinished_folder(target).glob("*.npy"))


def test_a_foreign_file_is_left_alone(target):
    folder = interrupted(target)
    (folder / "thesis.txt").write_text("years of work")
    parts, _ = begun(target, {})
    parts.remove()
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_full_disk_keeps_what_is_there(target, monkeypatch):
    interrupted(target)
    parts, _ = begun(target)
    with monkeypatch.context() as patch:
        patch.setattr(
            parting.os,
            "fsync",
            lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
        )
        with pytest.raises(
            OSError,
            match=r"images.npy cannot be written \(No space left .* 6 of 10 samples are kept",
        ):
            parts.add(batch(6, 10))
    assert begun(target)[1] == 6


def test_two_processes_do_not_write_the_same_file(target):
    first, second = Parts(target, IDENTITY, COUNT), Parts(target, IDENTITY, COUNT)
    told = f'--out "{target}" is in use by process'
    with first.held(), pytest.raises(PathError, match=told), second.held():
        pass


def peak_of(target: epath.Path, count: int) -> int:
    """Bytes that are held at most while so many pictures of 12 KiB are written, 8 at a time."""
    rows = np.zeros((8, 64, 64, 3), np.uint8)
    parts, _ = begun(target, count=count)
    tracemalloc.start()
    for _ in range(count // 8):
        parts.add({"images": rows})
    write_large_npz(target, {"arr_0": parts.arrays()["images"]}, parts.folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    parts.remove()
    with np.load(target) as arrays:
        assert arrays["arr_0"].shape == (count, 64, 64, 3)
    return peak


def test_memory_does_not_grow_with_the_number_of_samples(target):
    few, many = peak_of(target, 3200), peak_of(target, 6400)  # 39 and 79 MB of pictures
    assert many < 40e6 and many - few < 1e6


def test_an_npz_file_is_replaced_whole_or_not_at_all(target, monkeypatch):
    write_large_npz(target, {"a": IMAGES}, target.parent)
    before = target.read_bytes()
    monkeypatch.setattr(
        parting.os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(OSError, match="full"):
        write_large_npz(target, {"a": LATENTS}, target.parent)
    assert target.read_bytes() == before and [path.name for path in target.parent.iterdir()] == [
        "samples.npz"
    ]


def test_a_file_in_a_bucket_is_put_together_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ObjectStore() as store, reached(store):
        target = as_path("gs://bucket/run/samples.npz")
        parts = Parts(target, IDENTITY, COUNT)
        assert parts.folder.is_relative_to(tmp_path / "djepa_jax" / "samples")
        assert (
            parts.folder
            == unfinished_folder(target)
            != unfinished_folder(as_path("gs://bucket/other/samples.npz"))
        )
        with parts.held():
            parts.begin()
            parts.add(batch(0, COUNT))
            write_large_npz(target, parts.arrays(), parts.folder)
            with (
                store.refused_uploads("run/*"),
                pytest.raises(Exception, match="403|[Ff]orbidden|refuse"),
            ):
                write_large_npz(target, {"images": LATENTS}, parts.folder)
        with target.open("rb") as file, np.load(file) as arrays:
            np.testing.assert_array_equal(arrays["images"], IMAGES)
        parts.remove()
        assert set(store.objects) == {"run/samples.npz"} and not parts.folder.exists()


def test_progress_says_what_is_there(target):
    found = json.loads((interrupted(target) / "progress.json").read_text())
    assert (
        found["done"] == 6
        and found["count"] == COUNT
        and found["identity"]["sample"] == {"shape": [1, 2]}
    )
