"""The classes of image files as a source: by WordNet id, or by their order, and always as the
config counts them.
"""

import pickle
import shutil

import pytest
from photos import NAMES, PER_CLASS, labelled, write_folder
from tiny import load_config

from djepa_jax.config.class_names import imagenet
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.data.records import ANY_CLASS, DataError, match_classes
from djepa_jax.data.sources import open_data, open_source

PIXELS = MODALITIES["image_pixels"](32, 3, 4)
COUNT = 2 * PER_CLASS
SOME = ("n01443537", "n02099601", "n15075141")  # classes 1, 207 and 999 of ImageNet
IDS = tuple(wnid for wnid, _ in imagenet())


def write_classes(root, *names: str) -> str:
    """A folder of one image per class."""
    return write_folder(root, [(f"{name}/0", labelled()[i][1], i) for i, name in enumerate(names)])


def test_wordnet_ids_give_the_labels_of_imagenet_whichever_are_there(tmp_path):
    source = open_source(
        "folder", write_classes(tmp_path, *SOME), PIXELS, 1000, class_names="imagenet"
    )
    assert source.labels.tolist() == [1, 207, 999] and [
        int(example["condition"]) for example in source
    ] == [1, 207, 999]
    assert source.class_names == IDS and source.key(1) == "n02099601/0.jpg"
    copy = pickle.loads(pickle.dumps(source))
    assert copy[2]["condition"] == 999 and copy.key(2) == "n15075141/0.jpg"
    shutil.rmtree(tmp_path / SOME[0])
    fewer = open_source("folder", str(tmp_path), PIXELS, 1000, class_names="imagenet")
    assert [int(example["condition"]) for example in fewer] == [207, 999], (
        "a class that is missing shifts none"
    )


class Named:
    """Records that have names of classes, and labels only beside the images."""

    labels, remedy = None, ""

    def __init__(self, *class_names: str):
        self.class_names = class_names

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return b"", index

    def key(self, index: int) -> str:
        return str(index)

    def digest(self) -> str:
        return ""


def test_wordnet_ids_count_in_any_order():
    found = match_classes(Named(*SOME[::-1]), 1000, "imagenet", "it")
    assert [found[i][1] for i in range(3)] == [999, 207, 1] and found.labels is None
    with pytest.raises(DataError, match="3 is of class 3, but only classes 0 to 2 have a name"):
        found[3]
    backwards = match_classes(Named(*IDS[::-1]), 1000, "imagenet", "it")
    assert [backwards[i][1] for i in range(9)] == list(range(999, 990, -1))
    assert found.digest() != match_classes(Named(*SOME), 1000, "imagenet", "it").digest(), (
        "other labels are other data"
    )


@pytest.mark.parametrize("names", ["", ["a", "b"]])
def test_classes_by_other_names_are_counted_by_their_order(tmp_path, names):
    source = open_source("folder", write_folder(tmp_path), PIXELS, 2, class_names=names)
    assert source.class_names == NAMES and source[PER_CLASS]["condition"] == 1


@pytest.mark.parametrize(
    ("present", "num_classes", "names", "words"),
    [
        (
            ("flower", "temple"),
            1000,
            "imagenet",
            r'"imagenet", but data.path "x" holds the class "flower", .*num_classes=2 ',
        ),
        (
            tuple(f"{i:04d}" for i in range(1000)),
            1000,
            "imagenet",
            'the class "0000", which is not the WordNet id',
        ),
        ((*SOME, "n99999999"), 1000, "imagenet", 'the class "n99999999"'),
        (
            ("flower", "temple"),
            3,
            "",
            r"2 classes \(flower, temple\), data.num_classes is 3; .*num_classes=2, or add classes",
        ),
        (
            ("flower", "temple"),
            1,
            "",
            r"2 classes \(flower, temple\), data.num_classes is 1; .*num_classes=2, or remove classes",
        ),
        (SOME, 1000, "", "3 classes .*, data.num_classes is 1000"),
    ],
)
def test_classes_that_are_not_those_of_the_config_are_refused(present, num_classes, names, words):
    with pytest.raises(DataError, match=words):
        match_classes(Named(*present), num_classes, names, 'data.path "x"')


def test_classes_do_not_matter_without_classes(tmp_path):
    folder, images = write_folder(tmp_path), Named(*SOME)
    assert match_classes(images, ANY_CLASS, "imagenet", "") is images
    flags = (
        "data.source=folder",
        f"data.path={folder}",
        "data.image_size=32",
        "data.patch_size=4",
        "data.class_names=",
    )
    config = load_config("djepa_b:unconditional+pixels", *(f"--config.{flag}" for flag in flags))
    source = open_data(config, PIXELS)
    assert len(source) == COUNT and {int(source[i]["condition"]) for i in range(COUNT)} == {0}
