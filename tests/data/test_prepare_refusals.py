"""Latent caches that cannot be made: another plan, settings that do not agree, weights and sources
that cannot be used.
"""

import pathlib

import numpy as np
import pytest
from photos import crop, encode, labelled, write_folder, write_shards
from small_autoencoder import files_of, folder_config, registered, write_weights

from djepa_jax.checkpoints.convert.mismatch import MismatchError
from djepa_jax.checkpoints.convert.tensor_files import SourceError
from djepa_jax.config.experiment import ConfigError
from djepa_jax.data.prepare_latents import run_prepare
from djepa_jax.data.records import DataError
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.storage import PathError


@pytest.fixture(scope="module", autouse=True)
def small():
    with registered():
        yield


@pytest.fixture
def config(tmp_path):
    """Settings for a cache of twelve images in three shards."""
    return folder_config(tmp_path)


@pytest.fixture
def cache(config, tmp_path) -> pathlib.Path:
    run_prepare(config, str(tmp_path / "cache"), say=lambda text: None)
    return tmp_path / "cache"


CHANGES = {
    "examples": ("prepare.path", lambda tmp_path: write_folder(tmp_path / "more", labelled()[:11])),
    "contents": (
        "prepare.path",
        lambda tmp_path: write_folder(tmp_path / "more", [*labelled()[:11], ("temple/9", b"", 1)]),
    ),
    "shard_size": ("prepare.shard_size", lambda tmp_path: 4),
    "dtype": ("prepare.dtype", lambda tmp_path: "bfloat16"),
    "source": ("prepare.source", lambda tmp_path: "tar"),
    "autoencoder_sha256": (
        "autoencoder.path",
        lambda tmp_path: write_weights(
            tmp_path / "b.safetensors", **{"quant_conv.bias": np.zeros(8, np.float32)}
        ),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_plan_is_refused(config, cache, tmp_path, change):
    key, make = CHANGES[change]
    files, (group, name) = files_of(cache), key.split(".")
    config[group][name] = make(tmp_path)
    if change == "source":
        config.prepare.path = write_shards(tmp_path / "tars")
    with pytest.raises(
        DataError,
        match=rf"(?s)holds a latent cache of something else .* {change}: .* -> .*another --workdir",
    ):
        run_prepare(config, str(cache))
    assert files_of(cache) == files


def test_images_that_have_changed_are_said_to_have(config, cache):
    """In the middle of an unfinished cache, where some would be left out and others encoded
    twice.
    """
    (cache / "metadata.json").unlink()
    pathlib.Path(config.prepare.path, "flower", "003.jpg").rename(
        pathlib.Path(config.prepare.path, "temple", "0000.jpg")
    )
    with pytest.raises(
        DataError,
        match=r"The images, their names or their classes have changed since: put back what was there",
    ):
        run_prepare(config, str(cache))


def test_another_number_of_classes_is_another_plan(config, tmp_path):
    config.prepare.source, config.prepare.path = "tar", write_shards(tmp_path / "tars")
    run_prepare(config, str(tmp_path / "new"))
    config.data.num_classes = 3
    with pytest.raises(DataError, match="num_classes: 2 -> 3"):
        run_prepare(config, str(tmp_path / "new"))


# settings that cannot work


def test_sizes_must_agree(config, tmp_path):
    for key, value in (("image_size", 4), ("channels", 16)):
        changed = config.copy_and_resolve_references()
        changed.data[key] = value
        with pytest.raises(
            ConfigError,
            match=rf"makes 8 x 8 x 4 latents of 16 x 16 images; config.data has .*{value}",
        ):
            run_prepare(changed, str(tmp_path / "new"))
    config.prepare.image_size = 17
    with pytest.raises(ConfigError, match="of 17 x 17 images"):
        run_prepare(config, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "case", ["no weights", "missing weights", "other weights", "weights that are not numbers"]
)
def test_unusable_weights_are_refused(config, tmp_path, case):
    path = tmp_path / "x.safetensors"
    config.autoencoder.path = "" if case == "no weights" else str(path)
    if case == "other weights":
        write_weights(path, other=np.zeros(1, np.float32))
    if case == "weights that are not numbers":
        write_weights(path, **{"quant_conv.bias": np.full(8, np.nan, np.float32)})
    error, words = {
        "no weights": (ConfigError, "config.autoencoder.path is empty; name the weights"),
        "missing weights": (SourceError, f'--config.autoencoder.path "{path}" does not exist'),
        "other weights": (MismatchError, "other +surplus"),
        "weights that are not numbers": (
            DataError,
            "not finite in shard 0; is its weight file the right one",
        ),
    }[case]
    with pytest.raises(error, match=words):
        run_prepare(config, str(tmp_path / "new"))


@pytest.mark.parametrize(
    ("source", "files", "words"),
    [
        ("folder", [], 'prepare.path ".*" holds no folders'),
        ("folder", ["a/x.txt"], "hold no images"),
        ("folder", ["a/x.jpg", "b/x.jpg", "c/x.jpg"], "3 classes .* data.num_classes is 2"),
        ("tar", [], 'prepare.path is ".*", where there are no tar files'),
        ("npz", [], 'prepare.path is ".*", where there is no file'),
        ("digits", [], 'prepare.source is "digits"; it must be one of folder, npz, tar, tfds'),
    ],
)
def test_empty_and_wrong_sources_are_refused(config, tmp_path, source, files, words):
    for name in files:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(encode(crop("flower")))
    (tmp_path / "data").mkdir(exist_ok=True)
    config.prepare.source, config.prepare.path = source, str(tmp_path / "data")
    with pytest.raises(ValueError, match=words):
        run_prepare(config, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_classes_that_are_not_those_of_imagenet_are_refused(config, tmp_path):
    config.data.num_classes, config.data.class_names = 1000, "imagenet"
    with pytest.raises(
        DataError,
        match=r'"imagenet", but prepare.path ".*/images" holds the class "flower", .*num_classes=2 ',
    ):
        run_prepare(config, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_arrays_of_another_size_are_refused(config, tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.zeros(3, int))
    config.prepare.source, config.prepare.path = "npz", str(tmp_path / "x.npz")
    with pytest.raises(
        DataError,
        match=r"prepare.path holds uint8 examples of shape \(8, 8, 3\); with prepare.image_size 16 ",
    ):
        run_prepare(config, str(tmp_path / "new"))


def test_images_that_are_all_broken_are_an_error(config, tmp_path):
    config.prepare.path = write_folder(
        tmp_path / "broken", [(key, data[:100], label) for key, data, label in labelled()]
    )
    with pytest.raises(DataError, match="12 of 12 images cannot be read"):
        run_prepare(config, str(tmp_path / "new"))


def test_workdir_that_is_in_use_or_cannot_be_written(config, cache):
    with lock_workdir(cache), pytest.raises(PathError, match="is in use by process"):
        run_prepare(config, str(cache))
    with pytest.raises(PathError, match="cannot be written"):
        run_prepare(config, str(cache / "plan.json"))
