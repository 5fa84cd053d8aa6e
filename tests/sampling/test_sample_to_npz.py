"""Samples that are written batch by batch: going on after a kill, what is begun anew, what stays of
a failure, and memory that does not grow.

A dummy stands for the sampler. Twenty samples are drawn in batches of eight.
"""

import errno
import json
import pathlib
import tracemalloc
import types

import numpy as np
import pytest
from buckets import reached
from dummy_sampler import PARAMS, DummySampler, make_generator
from object_store import ObjectStore
from tiny import arrays_of, tiny_config

from djepa_jax.checkpoints.integrity import CheckpointError
from djepa_jax.config.experiment import Experiment
from djepa_jax.runtime import storage
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.storage import PathError, as_path
from djepa_jax.sampling.sample_to_npz import check_target, parts_folder, write_samples

FLAGS = ("--config.sample.count=20", "--config.sample.batch_size=8")
SETTINGS = {"step": 3, "model": {"shape": (1, 2)}}


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return tiny_config(*FLAGS)


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory) -> dict[str, np.ndarray]:
    """What is in the file in the end, if nothing comes between."""
    target = tmp_path_factory.mktemp("whole") / "samples.npz"
    drawn, found = write(experiment, target)
    assert drawn == [0, 8, 16] and found["arr_0"].shape == (20, 8, 8, 1)
    return found


def write(experiment, target, params=PARAMS, settings=SETTINGS, before=lambda ids: None):
    """Draw and write: the first numbers of the batches that were drawn, and what is in the file."""
    sampler = DummySampler(before)
    generator = make_generator(sampler, experiment=experiment)
    settings = settings | {"sample": vars(experiment.sample)}
    write_samples(as_path(target), generator, params, settings)
    return sampler.drawn, arrays_of(target)


def kill_at(number: int):
    """Let a process die when it is about to draw the batch that begins with a sample."""

    def before(ids):
        if ids[0] >= number:
            raise KeyboardInterrupt

    return before


def killed(experiment, target: pathlib.Path, number: int = 16) -> pathlib.Path:
    """The folder that was left behind."""
    with pytest.raises(KeyboardInterrupt):
        write(experiment, target, before=kill_at(number))
    folder = parts_folder(as_path(target))
    assert sorted(target.parent.iterdir()) == [folder]
    return folder


def assert_same(found: dict, expected: dict):
    assert found.keys() == expected.keys() == {"arr_0", "arr_1", "settings"}
    for name in ("arr_0", "arr_1"):
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name])


def test_the_same_command_goes_on_after_a_kill_and_gives_the_same_file(
    experiment, whole, tmp_path, capsys
):
    target = tmp_path / "samples.npz"
    folder = killed(experiment, target)
    (folder / "00000016.npz.0a1b2c3d.tmp").write_bytes(b"half of it")
    (folder / "joined.tmp").write_bytes(b"half of it")
    drawn, found = write(experiment, target)
    assert drawn == [16] and str(folder) in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npz", "samples.png"]
    assert_same(found, whole)
    assert json.loads(str(found["settings"])) == json.loads(str(whole["settings"]))


def test_another_batch_size_goes_on_too(experiment, whole, tmp_path):
    target = tmp_path / "samples.npz"
    killed(experiment, target, number=8)
    drawn, found = write(experiment.updated({"sample.batch_size": 16}), target)
    assert drawn == [8]
    assert_same(found, whole)


def test_samples_of_something_else_are_never_mixed_in(experiment, tmp_path, capsys):
    for number, (changes, params, settings) in enumerate(
        [
            ({"sample.seed": 1}, PARAMS, {}),
            ({"sample.labels": "3"}, PARAMS, {}),
            ({"sample.cfg_scale": 4.0}, PARAMS, {}),
            ({"sample.count": 21}, PARAMS, {}),
            ({}, {"w": PARAMS["w"] * 1.001}, {}),
            ({}, PARAMS, {"step": 4}),
            ({}, PARAMS, {"model": {"shape": (1, 3)}}),
            ({}, PARAMS, {"autoencoder": "ab" * 32}),
        ]
    ):
        target = tmp_path / str(number) / "samples.npz"
        target.parent.mkdir()
        folder = killed(experiment, target)
        changed = experiment.updated(changes)
        drawn, found = write(changed, target, params, SETTINGS | settings)
        assert drawn == [0, 8, 16], (changes, settings)
        assert f"{folder} holds samples of other settings" in capsys.readouterr().out
        (tmp_path / "anew").mkdir(exist_ok=True)
        anew = write(changed, tmp_path / "anew" / "samples.npz", params, SETTINGS | settings)
        assert_same(found, anew[1])


def shorten(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


DAMAGE = [  # what happens to the folder, the batches that are drawn then
    (lambda folder: shorten(folder / "00000000.npz"), [0, 8, 16]),
    (lambda folder: shorten(folder / "00000008.npz"), [8, 16]),
    (lambda folder: (folder / "00000000.npz").unlink(), [0, 8, 16]),
    (lambda folder: (folder / "00000008.npz").write_bytes(b""), [8, 16]),
    (lambda folder: (folder / "identity.json").unlink(), [0, 8, 16]),
    (lambda folder: shorten(folder / "identity.json"), [0, 8, 16]),
    (lambda folder: (folder / "identity.json").write_text("[]"), [0, 8, 16]),
    (lambda folder: (folder / "identity.json").write_text("[" * 100_000), [0, 8, 16]),
]


def test_what_is_damaged_is_drawn_again(experiment, whole, tmp_path):
    for number, (damage, expected) in enumerate(DAMAGE):
        target = tmp_path / str(number) / "samples.npz"
        target.parent.mkdir()
        damage(killed(experiment, target))
        drawn, found = write(experiment, target)
        assert drawn == expected, number
        assert_same(found, whole)


def test_a_full_disk_keeps_what_is_there(experiment, whole, tmp_path, monkeypatch):
    target = tmp_path / "samples.npz"
    folder = killed(experiment, target, number=8)

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            write(experiment, target)
    assert caught.value.filename == str(folder / "00000008.npz")
    drawn, found = write(experiment, target)
    assert drawn == [8, 16]
    assert_same(found, whole)


def test_a_file_is_replaced_whole_or_not_at_all(experiment, whole, tmp_path, monkeypatch):
    target = tmp_path / "samples.npz"
    write(experiment, target)
    before = target.read_bytes()

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array_header_1_0", fail)  # of the joined file
        with pytest.raises(OSError, match="full"):
            write(experiment, target, settings=SETTINGS | {"step": 4})
    assert target.read_bytes() == before
    assert check_target(str(target), "", False) == as_path(target), "samples may be replaced"
    drawn, found = write(experiment, target, settings=SETTINGS | {"step": 4})
    assert drawn == [], "all samples were there"
    np.testing.assert_array_equal(found["arr_0"], whole["arr_0"])


OTHERS = {  # files in a folder -> whether --out=FOLDER/x.png and --out=FOLDER/ may be written there
    ("y.npz", "photo.png", "12_apple.png"): (True, True),
    ("x.npz",): (False, True),
    ("x.png",): (False, True),
    ("samples.png",): (True, False),
    ("000001_apple.png",): (True, False),
}


@pytest.mark.parametrize("content", ["npz", "npy", "settings", "text"])
def test_only_samples_are_replaced_unless_one_asks_for_more(content, tmp_path):
    def may_be_written(out: str, overwrite: bool = False) -> bool:
        try:
            check_target(out, str(tmp_path), overwrite)
            return True
        except CheckpointError as error:
            assert "--overwrite" in str(error)
            return False

    for number, (names, expected) in enumerate(OTHERS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            with (folder / name).open("wb") as file:
                if content == "npy":
                    np.save(file, np.zeros(3))
                elif content == "text":
                    file.write(b"precious")
                else:
                    np.savez(file, **{content: 3})
        outs = (f"{folder}/x.png", f"{folder}/")
        assert tuple(map(may_be_written, outs)) == expected
        assert all(may_be_written(out, overwrite=True) for out in outs)


def test_two_processes_do_not_write_the_same_file(experiment, tmp_path):
    target = tmp_path / "samples.npz"
    folder = killed(experiment, target)
    with lock_workdir(folder), pytest.raises(PathError, match=f'"{target}" is in use by process'):
        write(experiment, target)


def peak_of(target: pathlib.Path, count: int) -> int:
    """Bytes that are held at most while so many pictures of 12 KiB are written, 8 at a time."""
    flags = (f"--config.sample.count={count}", "--config.data.image_size=64")
    experiment = tiny_config(*flags, "--config.data.channels=3", "--config.data.patch_size=16")
    rows = {"images": np.zeros((8, 64, 64, 3), np.uint8)}

    def batches(*_, **__):
        return (dict(rows) for _ in range(count // 8))

    generator = types.SimpleNamespace(experiment=experiment, decodes=False, batches=batches)
    settings = SETTINGS | {"sample": vars(experiment.sample)}
    tracemalloc.start()
    write_samples(as_path(target), generator, PARAMS, settings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    with np.load(target) as arrays:
        assert arrays["arr_0"].shape == (count, 64, 64, 3)
    return peak


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    target = tmp_path / "samples.npz"
    few, many = peak_of(target, 800), peak_of(target, 2400)  # 10 and 29 MB of pictures
    assert many < 25e6 and many - few < 1e6


def test_a_file_in_a_bucket_is_put_together_in_the_users_cache(
    experiment, whole, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target, sampler = as_path("gs://bucket/run/samples.npz"), DummySampler()
    generator = make_generator(sampler, experiment=experiment)
    settings = SETTINGS | {"sample": vars(experiment.sample)}
    folder = parts_folder(target)
    assert folder.is_relative_to(tmp_path / "djepa_jax" / "samples")
    assert folder != parts_folder(as_path("gs://bucket/other/samples.npz"))
    with ObjectStore() as store, reached(store):
        with store.refused_uploads("run/*"), pytest.raises(Exception, match="403|[Ff]orbidden"):
            write_samples(target, generator, PARAMS, settings)
        assert not store.objects
        write_samples(target, generator, PARAMS, settings)
        assert sampler.drawn == [0, 8, 16], "nothing was drawn twice"
        with target.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            assert_same(dict(arrays), whole)
        assert set(store.objects) == {"run/samples.npz", "run/samples.png"}
    assert not folder.exists()
