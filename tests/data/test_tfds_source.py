"""ImageNet as TensorFlow Datasets prepares it, from tiny tar files, and reading it back."""

import logging
import pathlib
import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from photos import NAMES, crop, encode, same, write_imagenet, write_tar
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as recipe

from djepa_jax.config.class_names import imagenet
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.data import ilsvrc as preparation
from djepa_jax.data import records
from djepa_jax.data.ilsvrc import TRAIN, VALIDATION, prepare_tfds
from djepa_jax.data.images import center_crop, decode_image
from djepa_jax.data.loader import example_stream, row_batches
from djepa_jax.data.records import MAX_PIXELS, DataError
from djepa_jax.data.sources import open_source
from djepa_jax.data.tfds import open_tfds

PIXELS = MODALITIES["image_pixels"](32, 3, 4)
CLASSES = ("n01440764", "n01443537", "n02086240")
ORIGINAL_TF = recipe.tf
LABELS = {wnid: label for label, (wnid, _) in enumerate(imagenet())}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder of data sets, and all images that went in by name."""
    root = tmp_path_factory.mktemp("imagenet")
    logging.getLogger("absl").setLevel(logging.ERROR)
    images = write_imagenet(root / "manual", CLASSES)
    counts = prepare_tfds(str(root / "manual"), str(root / "data"))
    assert counts == {"train": dict.fromkeys(CLASSES, 5), "validation": 5}
    return root / "data", images


def open_prepared(path, num_classes=1000):
    return open_source("tfds", str(path), PIXELS, num_classes)


def test_training_images_come_back(prepared):
    data_dir, images = prepared
    source = open_prepared(f"imagenet2012:5.1.0@{data_dir}")
    assert len(source) == 15 and source.labels is None and source.class_names[:2] == CLASSES[:2]
    found = {
        name: center_crop(decode_image(data, MAX_PIXELS), 32)
        for name, data in images.items()
        if name[0] == "n"
    }
    for example in source:
        name = next(name for name, pixels in found.items() if same(pixels, example["example"]))
        assert LABELS[name.partition("_")[0]] == example["condition"]
        del found[name]
    assert not found
    assert source.key(3) == "imagenet2012#train[3]"


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("imagenet2012@{}#validation", 5),
        ("imagenet2012@{}#train[:40%]", 6),
        ("imagenet2012:5.1.0@{}#train+validation", 20),
    ],
)
def test_splits(prepared, path, count):
    assert len(open_prepared(path.format(prepared[0]))) == count


def test_reading_needs_no_tensorflow_and_pickles(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # importing it fails, installed or not
    source = open_prepared(f"imagenet2012@{prepared[0]}")
    copy = pickle.loads(pickle.dumps(source))
    assert all(same(copy[i]["example"], source[i]["example"]) for i in (14, 3, 3, 0))
    batch = next(row_batches(example_stream(copy, seed=0), 4, consumed=2))
    assert batch["example"].shape == (4, 32, 32, 3)


def test_preparing_again_does_nothing_and_other_tars_are_noticed(prepared, tmp_path):
    write_imagenet(tmp_path, CLASSES[:2])
    with pytest.raises(
        DataError,
        match=r"the tar files hold {'train': 10, .* was prepared with {'train': 15.*remove",
    ):
        prepare_tfds(str(tmp_path), str(prepared[0]))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("imagenet2012@", "is written NAME"),
        ("/data/imagenet", "is written NAME"),
        (
            "imagenet2012:9.9.9@{}",
            '"{}/imagenet2012/9.9.9": .* which holds 5.1.0; python -m djepa_jax.data.ilsvrc '
            "--tars=TARS",
        ),
        (
            "imagenet2012@{}/elsewhere",
            "no prepared data set .* is empty or does not exist; .* two tar files of ILSVRC 2012",
        ),
        (
            "mnist@{}",
            '"{}/mnist/VERSION": .*tfds.builder."mnist", data_dir=DATA_DIR, '
            'file_format="array_record"',
        ),
        ("imagenet2012@{}#test", 'split "test" of .* cannot be opened: .*train'),
        ("imagenet2012@{}#train[:0]", "empty"),
    ],
)
def test_what_is_not_there_is_named(prepared, path, words):
    with pytest.raises(DataError, match=words.format(prepared[0])):
        open_prepared(path.format(prepared[0]))


def test_data_folder_of_tensorflow_datasets_is_the_default(prepared, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(prepared[0]))
    assert len(open_prepared("imagenet2012")) == 15


def test_too_many_classes_are_named(prepared):
    with pytest.raises(DataError, match="1000 classes .n01440764, .*, data.num_classes is 10"):
        open_prepared(f"imagenet2012@{prepared[0]}", num_classes=10)


@pytest.fixture
def damaged(prepared, tmp_path) -> pathlib.Path:
    """A copy of the data set, to be damaged."""
    shutil.copytree(prepared[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_checksum_tells_which_files_are_read_and_not_where_they_lie(prepared, damaged):
    def digest(folder, split="train") -> str:
        return open_tfds(f"imagenet2012@{folder}#{split}").digest()

    assert digest(prepared[0]) == digest(damaged)
    parts = ("train", "validation", "train[:40%]", "train[40%:]", "train+validation")
    assert len({digest(damaged, part) for part in parts}) == len(parts)
    with open(
        next((damaged / "imagenet2012" / "5.1.0").glob("*train.array_record*")), "ab"
    ) as shard:
        shard.write(bytes(2**16))
    assert digest(damaged, "validation") == digest(prepared[0], "validation") and digest(
        damaged
    ) != digest(prepared[0])


def test_record_that_cannot_be_read_is_an_error_and_no_broken_image(prepared, monkeypatch):
    monkeypatch.setattr(records, "WAITS", (0, 0))
    source, attempts = open_prepared(f"imagenet2012@{prepared[0]}"), []

    class Silent(list):
        def __getitem__(self, index):
            attempts.append(index)
            raise RuntimeError("DATA_LOSS")

    source.source.records.data = Silent(range(len(source)))
    words = r"train\[3\] cannot be read \(RuntimeError: DATA_LOSS\), after 3 attempts; .* copy the files of the data set again"
    with pytest.raises(DataError, match=words):
        source[3]
    assert attempts == [3, 3, 3] and source.broken == {}


def test_missing_and_cut_files_are_named(damaged, monkeypatch):
    monkeypatch.setattr(records, "WAITS", ())
    shard = next((damaged / "imagenet2012" / "5.1.0").glob("*train.array_record*"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be"):
        open_prepared(f"imagenet2012@{damaged}")
    shard.unlink()
    with pytest.raises(DataError, match="cannot be"):
        open_prepared(f"imagenet2012@{damaged}")
    (shard.parent / "features.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be opened"):
        open_prepared(f"imagenet2012@{damaged}")


class Words(tfds.core.GeneratorBasedBuilder):
    """A data set without images; or with labels that say "unknown"."""

    VERSION = tfds.core.Version("1.0.0")
    with_images = False

    def _info(self):
        image = {"image": tfds.features.Image(encoding_format="jpeg")} if self.with_images else {}
        label = {"label": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({**image, **label})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(3):
            image = {"image": encode(crop(NAMES[0], number))} if self.with_images else {}
            yield number, {**image, "label": number - 1}


def test_features_and_labels_are_checked(tmp_path):
    builder = Words(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    with pytest.raises(DataError, match='has the features label; it needs "image"'):
        open_prepared(f"words@{tmp_path}")


def test_unlabelled_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Words, "with_images", True)
    Words(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(
        DataError, match=r"words#train\[\d\] is of class -1, data.num_classes is 1000"
    ):
        for _ in open_prepared(f"words@{tmp_path}"):
            pass


# preparing


@pytest.mark.parametrize("missing", [TRAIN, VALIDATION])
def test_missing_tars_are_named(tmp_path, missing):
    write_imagenet(tmp_path, CLASSES[:1], per_class=1, validation=1)
    (tmp_path / missing).unlink()
    with pytest.raises(
        DataError, match=f"ImageNet is made from .* missing: {tmp_path}/{missing}. Download"
    ):
        prepare_tfds(str(tmp_path), str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("name", "members", "words"),
    [
        (TRAIN, {"n01440764_1.JPEG": b""}, "one tar file per class"),
        (
            TRAIN,
            {"n99999999.tar": b""},
            'holds "n99999999.tar"; it must hold one tar file per class',
        ),
        (
            TRAIN,
            {"n01440764.tar": b"\1" * 2000},
            "train.tar:n01440764.tar.* is no uncompressed tar file",
        ),
        (TRAIN, {"n01440764.tar": b"\1" * 99}, "train.tar:n01440764.tar.* is cut off"),
        (VALIDATION, {}, "without a gap"),
        (
            VALIDATION,
            {"ILSVRC2012_val_00000002.JPEG": b""},
            'it holds "ILSVRC2012_val_00000002.JPEG"',
        ),
    ],
)
def test_tars_of_another_layout_are_refused(tmp_path, name, members, words):
    write_imagenet(tmp_path, CLASSES[:1], per_class=1, validation=1)
    write_tar(tmp_path / name, members)
    with pytest.raises(DataError, match=words):
        prepare_tfds(str(tmp_path), str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_cut_validation_tar_is_refused(tmp_path):
    write_imagenet(tmp_path, CLASSES[:1], per_class=1)
    file = tmp_path / VALIDATION
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DataError, match='ILSVRC2012_img_val.tar" is .*(cut off|damaged)'):
        prepare_tfds(str(tmp_path), str(tmp_path / "data"))


def test_images_that_need_tensorflow_are_named_at_once(tmp_path, monkeypatch):
    special = recipe.CMYK_IMAGES[0]
    write_imagenet(tmp_path, (special.partition("_")[0],), per_class=2)
    inner = pathlib.Path(
        write_tar(tmp_path / "inner.tar", {special: encode(crop("flower"))})
    ).read_bytes()
    write_tar(tmp_path / TRAIN, {special.partition("_")[0] + ".tar": inner})
    monkeypatch.setattr(preparation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DataError,
        match=f"1 images that TensorFlow must encode anew, such as {special}; pip install",
    ):
        prepare_tfds(str(tmp_path), str(tmp_path / "data"))


def test_recipe_is_left_as_it_was(prepared):
    assert recipe.tf is ORIGINAL_TF
