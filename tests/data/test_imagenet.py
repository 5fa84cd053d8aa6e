"""Preparing ImageNet when the disk is full, a run was killed or another one is at it, and with
TensorFlow itself.
"""

import contextlib
import importlib.util
import io
import logging
import pathlib
import resource

import numpy as np
import pytest
from photos import crop, encode, write_imagenet, write_tar
from PIL import Image
from tensorflow_datasets.core import shuffle
from tensorflow_datasets.core.utils import file_utils
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as recipe

from djepa_jax.data import ilsvrc as preparation
from djepa_jax.data.ilsvrc import LOCK, TRAIN, main, prepare_tfds
from djepa_jax.data.images import decode_image
from djepa_jax.data.records import MAX_PIXELS, DataError
from djepa_jax.data.tfds import open_tfds
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.storage import PathError

CLASSES = ("n01440764", "n01443537")
COUNTS = {"train": dict.fromkeys(CLASSES, 5), "validation": 5}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No lines of progress; and no TensorFlow, installed or not, unless a test asks for it."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        preparation.importlib.util,
        "find_spec",
        lambda name: None if name == "tensorflow" else real(name),
    )


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tars")
    write_imagenet(folder, CLASSES)
    return str(folder)


@pytest.fixture
def data_dir(tmp_path) -> pathlib.Path:
    return tmp_path / "data"


def leave_incomplete(data_dir: pathlib.Path, size: int = 5000) -> pathlib.Path:
    """What a killed run leaves, under the name that TensorFlow Datasets chooses."""
    folder = pathlib.Path(
        file_utils._get_incomplete_dir(data_dir / "imagenet2012" / str(recipe.Builder.VERSION))
    )
    folder.mkdir(parents=True)
    with open(folder / "bucket_train_000.tmp", "wb") as file:
        file.truncate(size)
    return folder


def contents(data_dir: pathlib.Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in (data_dir / "imagenet2012" / "5.1.0").glob("*array_record*")
    }


@contextlib.contextmanager
def files_of_at_most(size: int):
    """As on a disk that fills up: no file can grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# no room


@pytest.mark.parametrize("in_memory", [shuffle.MAX_MEM_BUFFER_SIZE, 1000])
def test_a_disk_that_fills_up_is_one_error_and_leaves_nothing(
    tars, data_dir, in_memory, monkeypatch, capsys
):
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", in_memory)
    with files_of_at_most(2000):
        assert main([f"--tars={tars}", f"--data_dir={data_dir}"]) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if "error: " in line
    ]  # others tell of progress
    assert len(lines) == 1
    error = lines[0].partition("error: ")[2]
    assert error.startswith(f'"{data_dir}/imagenet2012" could not be written (')
    assert "The disk may be full" in error and "make room or name another --data_dir" in error
    assert not list((data_dir / "imagenet2012").iterdir())
    assert prepare_tfds(tars, str(data_dir)) == COUNTS, "the same command, once there is room"


def test_mistakes_of_the_program_keep_their_traceback(tars, data_dir, monkeypatch):
    def fail(self, **options):
        raise KeyError("a mistake")

    monkeypatch.setattr(recipe.Builder, "download_and_prepare", fail)
    with pytest.raises(KeyError, match="a mistake"):
        prepare_tfds(tars, str(data_dir))


class Disk:
    """A disk without room."""

    free = 1000


def test_room_is_asked_for_before_anything_is_read_or_made(tars, data_dir, monkeypatch):
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda folder: Disk)
    monkeypatch.setattr(
        preparation, "_count_train", lambda *_: pytest.fail("the archives were read")
    )
    with pytest.raises(
        DataError,
        match=f'disk of "{data_dir}" has 0.0 GB free, the data set takes 0.[0-9] GB, .* make room',
    ):
        prepare_tfds(tars, str(data_dir))
    assert not data_dir.exists()


def test_what_will_be_removed_counts_as_room(tars, data_dir, monkeypatch):
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda folder: Disk)
    leave_incomplete(data_dir, size=10**7)
    assert prepare_tfds(tars, str(data_dir)) == COUNTS


def test_a_folder_that_cannot_be_made_is_named(tars, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f'--data_dir "{tmp_path}/file/data"'):
        prepare_tfds(tars, f"{tmp_path}/file/data")


# killed, and running


def test_what_a_killed_run_left_is_removed_and_nothing_else(tars, data_dir, capsys):
    old, older = leave_incomplete(data_dir), leave_incomplete(data_dir)
    others = [
        old.parent / name for name in ("5.0.0", "incomplete.ABCDEF", "my incomplete.ABCDEF_5.1.0")
    ]
    for folder in others:
        folder.mkdir()
    link = old.parent / "incomplete.LINKED_5.1.0"
    link.symlink_to(others[0])
    assert prepare_tfds(tars, str(data_dir)) == COUNTS
    assert (
        not old.exists() and not older.exists() and all(path.is_dir() for path in (*others, link))
    )
    assert f"removing {old}, which a run that was killed has left behind" in capsys.readouterr().out


def test_what_another_run_is_writing_stays(tars, data_dir):
    running = leave_incomplete(data_dir)
    with (
        lock_workdir(data_dir, LOCK),
        pytest.raises(
            PathError,
            match=f'--data_dir "{data_dir}" is in use by process .*; wait for it, stop it',
        ),
    ):
        prepare_tfds(tars, str(data_dir))
    assert list(running.iterdir())
    prepare_tfds(tars, str(data_dir))
    assert not running.exists()


def test_a_finished_data_set_is_only_read(tars, data_dir, monkeypatch):
    prepare_tfds(tars, str(data_dir))
    before = contents(data_dir)
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda folder: Disk)
    monkeypatch.setattr(
        preparation,
        "check_writable",
        lambda *_: pytest.fail("it may lie on a disk that cannot be written"),
    )
    assert prepare_tfds(tars, str(data_dir)) == COUNTS
    assert contents(data_dir) == before


# much data, and TensorFlow


def test_more_than_fits_into_memory_gives_the_same_files(tars, data_dir, tmp_path, monkeypatch):
    prepare_tfds(tars, str(data_dir))
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1000)
    original = shuffle.tf
    prepare_tfds(tars, str(tmp_path / "other"))
    assert contents(tmp_path / "other") == contents(data_dir) and len(contents(data_dir)) == 2
    assert shuffle.tf is original


@pytest.mark.slow
def test_tensorflow_makes_rgb_jpegs_of_the_two_odd_kinds(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow")
    monkeypatch.undo()  # it is to be found
    cmyk, png = recipe.CMYK_IMAGES[0], recipe.PNG_IMAGES[0]
    plain = png.partition("_")[0] + "_1.JPEG"
    files = {
        cmyk: encode(crop("flower").convert("CMYK"), quality=95),
        png: encode(crop("temple"), "PNG"),
        plain: encode(crop("temple", 3)),
    }
    write_imagenet(tmp_path, CLASSES[:1], per_class=1)
    inner = {}
    for wnid in {name.partition("_")[0] for name in files}:
        members = {name: data for name, data in files.items() if name.startswith(wnid)}
        inner[f"{wnid}.tar"] = pathlib.Path(write_tar(tmp_path / "inner.tar", members)).read_bytes()
    write_tar(tmp_path / TRAIN, inner)
    counts = prepare_tfds(str(tmp_path), str(tmp_path / "data"))
    assert counts == {"train": {"n01739381": 1, "n02105855": 2}, "validation": 5}

    found = open_tfds(f"imagenet2012@{tmp_path}/data").data
    stored = {example["file_name"].decode(): example["image"] for example in found}
    assert stored.keys() == files.keys() and stored[plain] == files[plain]
    for name in (cmyk, png):
        with Image.open(io.BytesIO(stored[name])) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
        old, new = (
            np.asarray(decode_image(data, MAX_PIXELS), np.float32)
            for data in (files[name], stored[name])
        )
        assert old.shape == new.shape and np.abs(old - new).mean() < 2
