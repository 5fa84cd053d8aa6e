"""Data of which no source can be made: what is wrong with it is named with its setting."""

import numpy as np
import pytest
from photos import crop, encode, write_folder
from tiny import load_config

from djepa_jax.core.modalities import MODALITIES
from djepa_jax.data.records import DataError
from djepa_jax.data.sources import open_data, open_source

PIXELS = MODALITIES["image_pixels"](32, 3, 4)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "holds no folders"),
        (["stray.jpg"], "holds no folders"),
        (["a/x.jpg", "b/readme.txt"], r'1 of the 2 folders .* hold no images .* such as "b"'),
        (
            ["train/a/x.jpg", "val/a/x.jpg"],
            "holds train, val, which are splits.*name one of them, such as .*train",
        ),
        ([".hidden/x.jpg"], "holds no folders"),
        (
            ["a/x.jpg", "b/x.jpg", "c/x.jpg", "d/x.jpg"],
            r"4 classes \(a, b, c, \.\.\.\), data.num_classes is 2; .*num_classes=4",
        ),
    ],
)
def test_unusable_folder_is_refused(tmp_path, files, words):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encode(crop("flower")))
    with pytest.raises(DataError, match=words):
        open_source("folder", str(tmp_path), PIXELS, num_classes=2)


@pytest.mark.parametrize("path", ["/no/such/folder", __file__])
def test_missing_folder_is_named(path):
    with pytest.raises(DataError, match=f'data.path is "{path}", where there is no folder'):
        open_source("folder", path, PIXELS, num_classes=2)


@pytest.mark.parametrize(
    "modality", [MODALITIES["image_latents"](4, 16, 1, 0.2), MODALITIES["image_pixels"](32, 4, 4)]
)
def test_image_files_need_a_modality_of_pixels(tmp_path, modality):
    with pytest.raises(
        DataError,
        match=r'"folder" gives square uint8 images with 1 or 3 channels, the config expects .*\(.*\)',
    ):
        open_source("folder", write_folder(tmp_path), modality, num_classes=2)


@pytest.mark.parametrize("group", ["data", "prepare"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "latents",
            "a latent cache .*make one with --mode=prepare --workdir=CACHE .* "
            "launch/prepare_imagenet.sh",
        ),
        ("folder", "a folder that holds a folder of images per class"),
        *(
            ("npz", "an npz file"),
            ("tar", "tar files"),
            ("tfds", "a data set that TensorFlow Datasets has"),
        ),
    ],
)
def test_an_empty_path_is_named_with_its_flag(name, words, group):
    with pytest.raises(
        DataError, match=f'^{group}.path is empty, and {group}.source is "{name}"; name {words}'
    ) as caught:
        open_source(name, "", PIXELS, num_classes=2, group=group)
    assert f"--config.{group}.path=PATH" in str(caught.value)


def test_an_empty_path_of_a_cache_is_named_by_training():
    config = load_config("djepa_l")
    with pytest.raises(
        DataError,
        match="^data.path is empty, .* with --config.data.path=PATH; make one with --mode=prepare",
    ):
        open_data(config, MODALITIES["image_latents"](16, 16, 1, 0.2325))


@pytest.mark.parametrize("name", ["folder", "tar", "npz", "tfds"])
def test_errors_name_the_setting_that_is_wrong(name):
    with pytest.raises(ValueError, match=r"prepare\.path") as caught:
        open_source(name, "/no such/{", PIXELS, num_classes=2, group="prepare")
    assert "data.path" not in str(caught.value)


def test_latents_without_mirror_images_are_not_mirrored(tmp_path):
    np.savez(tmp_path / "x.npz", latents=np.zeros((3, 4, 4, 16), np.float32), labels=np.arange(3))
    flags = (
        "data.source=npz",
        f"data.path={tmp_path}/x.npz",
        "data.image_size=4",
        "data.num_classes=3",
        "data.class_names=",
    )
    modality = MODALITIES["image_latents"](4, 16, 1, 0.2325)
    config = load_config("djepa_b", *(f"--config.{flag}" for flag in flags))
    assert config.data.random_flip
    with pytest.raises(
        DataError,
        match=r'data.random_flip is True, but data.path ".*x.npz" holds latents without .*flip=False',
    ):
        open_data(config, modality)
    config.data.random_flip = False
    assert len(open_data(config, modality)) == 3


def test_unknown_source_names_all():
    with pytest.raises(
        ValueError, match="one of digits, folder, latents, npz, synthetic, tar, tfds"
    ):
        open_source("folders", "", PIXELS, num_classes=2)
