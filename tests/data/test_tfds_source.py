"""Data sets of TensorFlow Datasets as a source, without TensorFlow."""

import pathlib
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from photos import NAMES, PER_CLASS, labelled, opened, same

from djepa_jax.data import records
from djepa_jax.data.images import center_crop, decode_image
from djepa_jax.data.records import MAX_PIXELS, DataError
from djepa_jax.data.tfds import open_tfds

COUNT = 2 * PER_CLASS


class Photos(tfds.core.GeneratorBasedBuilder):
    """The labelled images; or no images, or labels that say "unknown"."""

    VERSION = tfds.core.Version("1.2.0")
    SUPPORTED_VERSIONS = [tfds.core.Version("1.10.0")]  # noqa: RUF012
    image = tfds.features.Image(encoding_format="jpeg")
    label = tfds.features.ClassLabel(names=NAMES)
    shift = 0

    def _info(self):
        known = {"image": self.image, "label": self.label}
        features = {name: feature for name, feature in known.items() if feature is not None}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"key": tfds.features.Text(), **features}),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(labelled()),
            "test": self._generate_examples(labelled()[:3]),
        }

    def _generate_examples(self, images):
        for key, data, label in images:
            example = {"key": key, "image": data, "label": label + self.shift}
            yield key, {name: example[name] for name in self.info.features}


class NoTensorFlow:
    """Importing it fails, installed or not."""

    def find_spec(self, name, *_):
        if name.partition(".")[0] == "tensorflow":
            raise ImportError(name)


def prepare(folder: pathlib.Path, **options) -> pathlib.Path:
    Photos(data_dir=folder, file_format="array_record", **options).download_and_prepare()
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    return prepare(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def damaged(prepared, tmp_path) -> pathlib.Path:
    """A copy of the data set, to be damaged."""
    shutil.copytree(prepared, tmp_path / "copy")
    return tmp_path / "copy"


def test_all_images_come_back_without_tensorflow(prepared, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [NoTensorFlow(), *sys.meta_path])
    source = opened("tfds", f"photos@{prepared}")
    assert len(source) == COUNT and source.labels is None and source.class_names == NAMES
    found = {key: center_crop(decode_image(data, MAX_PIXELS), 32) for key, data, _ in labelled()}
    for item in source:
        key = next(key for key, pixels in found.items() if same(pixels, item["example"]))
        assert NAMES[item["condition"]] == key.partition("/")[0]
        del found[key]
    assert not found and source.source.key(3) == "photos#train[3]"


def test_splits_versions_and_folders(prepared, tmp_path, monkeypatch):
    for path, count in {"#test": 3, "#train[:25%]": 3, ":1.2.0@{}#train+test": 15}.items():
        path = path if "@" in path else f"@{{}}{path}"
        assert len(opened("tfds", f"photos{path}".format(prepared))) == count
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(prepared))
    assert len(opened("tfds", "photos")) == COUNT
    shutil.copytree(prepared / "photos" / "1.2.0", tmp_path / "photos" / "1.2.0")
    prepare(tmp_path, version="1.10.0")
    assert opened("tfds", f"photos@{tmp_path}").source.records.data.dataset_info.version == "1.10.0"


def test_what_is_not_there_is_named(prepared):
    for path, words in {
        "photos:9.9.9@{}": "photos:9.9.9",
        "photos@{}/elsewhere": "elsewhere.*download_and_prepare",
        "mnist@{}": "mnist",
        "/data/photos": "NAME",
        "photos@{}#dev": "dev",
        "photos@{}#train[:0]": "0 examples",
    }.items():
        with pytest.raises(DataError, match=rf"data\.path.*{words}"):
            opened("tfds", path.format(prepared))


def test_checksum_tells_which_files_are_read_and_not_where_they_lie(prepared, damaged):
    def digest(folder, split="train") -> str:
        return open_tfds(f"photos@{folder}#{split}", "").digest()

    assert digest(prepared) == digest(damaged)
    parts = ("train", "test", "train[:40%]", "train[40%:]", "train+test")
    assert len({digest(damaged, part) for part in parts}) == len(parts)
    with open(next((damaged / "photos").glob("*/*train.array_record*")), "ab") as shard:
        shard.write(bytes(2**16))
    assert digest(damaged, "test") == digest(prepared, "test")
    assert digest(damaged) != digest(prepared)


def test_record_that_cannot_be_read_is_an_error_and_no_broken_image(prepared, monkeypatch):
    monkeypatch.setattr(records, "WAITS", (0, 0))
    source, attempts = opened("tfds", f"photos@{prepared}"), []

    class Silent(list):
        def __getitem__(self, index):
            attempts.append(index)
            raise RuntimeError("DATA_LOSS")

    source.source.records.data = Silent(range(len(source)))
    with pytest.raises(DataError, match=r"train\[3\] cannot be read .*DATA_LOSS.*3 attempts"):
        source[3]
    assert attempts == [3, 3, 3] and source.broken == {}


def test_missing_and_cut_files_are_named(damaged, monkeypatch):
    monkeypatch.setattr(records, "WAITS", ())
    (shard,) = (damaged / "photos").glob("*/*train.array_record*")
    for damage in (lambda: shard.write_bytes(shard.read_bytes()[:1000]), shard.unlink):
        damage()
        with pytest.raises(DataError, match="cannot be"):
            opened("tfds", f"photos@{damaged}")[0]


def test_features_and_labels_are_checked(tmp_path, monkeypatch):
    numbers = {"label": tfds.features.Scalar(np.int64), "shift": -1}
    for number, (changes, words) in enumerate(
        (
            ({"image": None}, 'features .*label.* it needs.*"image"'),
            (numbers, r"train\[\d+\] is of class -1"),
            ({}, "2 classes .flower, temple., data.num_classes is 1000"),
        )
    ):
        with monkeypatch.context() as patch, pytest.raises(DataError, match=words):
            for name, value in changes.items():
                patch.setattr(Photos, name, value)
            list(opened("tfds", f"photos@{prepare(tmp_path / str(number))}", 1000))
