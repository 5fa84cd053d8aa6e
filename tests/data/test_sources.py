"""Image files as a source: folders, what all sources of image files share, and their classes."""

import errno
import os
import pathlib
import shutil

import numpy as np
import pytest
from photos import (
    NAMES,
    PER_CLASS,
    PIXELS,
    crop,
    encode,
    labelled,
    opened,
    same,
    settings,
    with_broken,
    write_folder,
    write_shards,
)
from PIL import Image
from tiny import tiny_config

from djepa_jax.config.class_names import imagenet
from djepa_jax.config.convert import ConfigError
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.data import records
from djepa_jax.data.images import center_crop, decode_image
from djepa_jax.data.loader import example_stream, row_batches
from djepa_jax.data.records import MAX_PIXELS, DataError, match_classes
from djepa_jax.data.sources import open_source, open_training_data

COUNT = 2 * PER_CLASS
KINDS = ("folder", "tar")
SOME = ("n01443537", "n02099601", "n15075141")  # classes 1, 207 and 999 of ImageNet
IDS = tuple(wnid for wnid, _ in imagenet())


def expected(index: int, size: int = 32) -> np.ndarray:
    return center_crop(decode_image(labelled()[index][1], MAX_PIXELS), size)


def write(kind: str, root, images=None) -> str:
    return (write_folder if kind == "folder" else write_shards)(root, images)


def write_files(root: pathlib.Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        is_text = name.endswith(".txt")
        (root / name).write_bytes(b"P1 is text" if is_text else encode(crop("flower")))
    return str(root)


# images and labels


def test_folder_gives_decoded_and_cropped_images(tmp_path):
    source = opened("folder", write_folder(tmp_path))
    assert len(source) == COUNT and source.class_names == NAMES
    for i in np.random.default_rng(0).permutation(2 * COUNT) % COUNT:
        item = source[int(i)]
        assert same(item["example"], expected(i)) and item["condition"] == labelled()[i][2]
        assert item["condition"].dtype == np.int32
        assert source.source.key(i) == labelled()[i][0] + ".jpg"
    assert source.labels.tolist() == [0] * PER_CLASS + [1] * PER_CLASS
    assert same(source[-1]["example"], expected(COUNT - 1)) and len(list(source)) == COUNT


def test_folder_and_tar_give_identical_images(tmp_path):
    folder = opened("folder", write_folder(tmp_path / "folder")).source
    tar = opened("tar", write_shards(tmp_path / "tar")).source
    by_key = {tar.key(i).partition(":")[2]: i for i in range(len(tar))}
    assert len(folder) == len(tar) == len(by_key) == COUNT
    for i in range(COUNT):
        twin = tar[by_key[folder.key(i)]]
        assert same(twin["example"], folder[i]["example"])
        assert twin["condition"] == folder[i]["condition"] == tar.labels[by_key[folder.key(i)]]


def test_channels_follow_the_modality(tmp_path):
    for kind in KINDS:
        source = opened(
            kind, write(kind, tmp_path / kind), modality=MODALITIES["image_pixels"](16, 1, 4)
        )
        luminance = np.asarray(Image.fromarray(expected(0, 16)).convert("L"))
        assert same(source[0]["example"], luminance[..., None])


def test_grain_reads_in_threads(tmp_path):
    for kind in KINDS:
        source = opened(kind, write(kind, tmp_path / kind, with_broken(1, 8)))
        stream = example_stream(source, seed=3, random_flip=True)
        one_by_one = [stream[i] for i in range(8)]
        batches = row_batches(stream, 4, consumed=0)
        for start in (0, 4):
            batch = next(batches)
            for row in range(4):
                assert same(batch["example"][row], one_by_one[start + row]["example"])
                assert batch["condition"][row] == one_by_one[start + row]["condition"]


def test_folder_finds_what_it_should(tmp_path):
    write_files(tmp_path, "b/x.JPG", "b/deep/er/y.jpeg", "A/q.webp", "a/10.jpg", "a/9.jpg")
    write_files(tmp_path, "b/.hidden.jpg", "b/notes.txt", ".git/c.jpg", "b/.cache/d.jpg", "e.jpg")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    source = opened("folder", tmp_path, 4)
    assert source.class_names == ("A", "a", "b", "linked")
    assert source.labels.tolist() == [0, 1, 1, 2, 2, 3, 3]
    keys = [source.source.key(i) for i in range(5)]
    assert keys == ["A/q.webp", "a/10.jpg", "a/9.jpg", "b/deep/er/y.jpeg", "b/x.JPG"]


def write_bytes(root: pathlib.Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def test_content_decides_what_is_read_and_the_rest_is_counted(tmp_path):
    picture, small = encode(crop("flower")), encode(crop("temple"), "TIFF")
    heic = b"\0\0\0\x18ftypheic" + bytes(99)
    read = {"a.jfif": picture, "b.jpe": picture, "c": picture, "d.dat": picture, "e.TIFF": small}
    left = {"f.heic": heic, "g.HEIC": heic, "h.nef": small, "i": b"P1 of 2", "j.thm": picture}
    foreign = {"@eaDir/a.jpg/x.jpg": picture, "Thumbs.db": b"x", ".DS_Store": b"x"}
    path = write_bytes(tmp_path / "data" / "x", read | left | foreign)
    write_bytes(tmp_path / "data", {"__MACOSX/x/._a.jpg": b"x", "beside.png": picture})
    os.mkfifo(f"{path}/k.pipe")  # opening it would wait for ever
    source = opened("folder", tmp_path / "data", 1)
    assert [source.source.key(i) for i in range(len(source))] == [f"x/{name}" for name in read]
    assert len(list(source)) == len(read) and source.broken == {}
    assert source.source.records.left_out == {
        **{".heic": 2, ".nef": 1, "without an ending": 1, ".thm": 1, ".pipe": 1},
        **{"@eaDir": 1, "Thumbs.db": 1, "__MACOSX": 1, "beside the folders of classes": 1},
    }
    with pytest.raises(DataError, match=r'such as "y" .*1 .heic'):
        opened("folder", write_bytes(tmp_path / "bad", {"x/a.jpg": picture, "y/b.heic": heic}), 2)


def test_a_folder_without_folders_is_one_class(tmp_path):
    path = write_files(tmp_path / "my pictures", "b.jpg", "a.jpg", "notes.txt", ".cache/c.jpg")
    for options in ({}, {"num_classes": 0}, {"unconditional": True}):
        source = opened("folder", path, **{"num_classes": 1} | options)
        assert [int(item["condition"]) for item in source] == [0, 0]
    assert opened("folder", path, 0).class_names == ("my pictures",)
    records = opened("folder", path, 1).source.records
    assert records.key(0) == "a.jpg" and records.left_out == {".txt": 1}
    os.rename(path, tmp_path / "other")
    assert opened("folder", tmp_path / "other", 1).source.digest() == records.digest()
    with pytest.raises(FileNotFoundError):  # the disk is gone
        records[0]
    with pytest.raises(DataError, match="1 classes .my pictures., data.num_classes is 10"):
        opened("folder", (tmp_path / "other").rename(path), 10)


def test_folders_that_are_numbers_are_counted_as_numbers(tmp_path):
    path = write_files(tmp_path, *(f"{number}/x.jpg" for number in range(12)))
    source = opened("folder", path, 0)
    assert source.class_names == tuple(map(str, range(12)))
    assert [source.source.key(i) for i in range(12)] == [f"{number}/x.jpg" for number in range(12)]
    assert source.labels.tolist() == [int(item["condition"]) for item in source] == [*range(12)]


def test_names_need_not_be_unicode(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(folder)
    with open(folder + b"/\xff.jpg", "wb") as file:
        file.write(encode(crop("flower")))
    source = opened("folder", tmp_path, 1).source
    assert source[0]["example"].shape == (32, 32, 3)
    assert os.fsencode(source.key(0)) == b"caf\xe9/\xff.jpg" and len(source.digest()) == 64
    assert source.class_names == (r"caf\xe9",), "it can be printed and stored"


def test_checksum_tells_what_is_there_and_not_where(tmp_path):
    def digest(kind: str, name: str, images=None) -> str:
        return opened(kind, write(kind, tmp_path / kind / name, images)).source.digest()

    images = labelled()
    renamed = [("flower/other", *images[0][1:]), *images[1:]]
    moved = [("temple/000x", images[0][1], 1), *images[1:]]
    others = {"d": renamed, "e": moved, "f": images[:-1]}
    for kind in KINDS:
        assert digest(kind, "a") == digest(kind, "b/c")
        assert len({digest(kind, "a"), *(digest(kind, *other) for other in others.items())}) == 4


def test_unusable_folder_is_refused(tmp_path):
    for number, (files, words) in enumerate(
        (
            ([".hidden/x.jpg"], "holds no folders and no images"),
            (["a/x.jpg", "b/readme.txt"], 'hold no images .* such as "b"'),
            (["train/a/x.jpg", "val/a/x.jpg"], "holds train, val"),
            (["a/x.jpg", "b/x.jpg", "c/x.jpg", "d/x.jpg"], r"4 classes \(a, b, c.*num_classes=4"),
            ([], "cannot be searched"),
        )
    ):
        path = write_files(tmp_path / str(number), *files)
        with pytest.raises(DataError, match=words) as caught:
            opened("folder", path)
        assert f'data.path "{path}"' in str(caught.value)


# storage that fails


@pytest.fixture
def storage(monkeypatch):
    """Makes reading of some files fail for some attempts."""
    monkeypatch.setattr(records, "WAITS", (0, 0, 0))
    read, failures = pathlib.Path.read_bytes, {}

    def read_bytes(path):
        left, number = failures.get(path.name, (0, 0))
        if left:
            failures[path.name] = left - 1, number
            raise OSError(number, os.strerror(number))
        return read(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    return failures


def test_storage_that_fails_is_asked_again_and_breaks_no_image(tmp_path, storage):
    source = opened("folder", write_folder(tmp_path))
    storage["002.jpg"] = 3, errno.EIO
    assert same(source[2]["example"], expected(2)) and source.broken == {}
    for number in (errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE):
        storage["002.jpg"] = 99, number
        words = rf"flower/002.jpg cannot be read \({os.strerror(number)}\).*4 attempts.*empty file"
        with pytest.raises(DataError, match=words):
            source[2]
    storage["002.jpg"] = 0, 0
    assert same(source[2]["example"], expected(2)), "nothing is remembered of it"
    (tmp_path / "flower" / "002.jpg").write_bytes(b"")  # the remedy
    assert same(source[2]["example"], expected(3))
    assert source.broken == {"flower/002.jpg": "it is empty"}


def test_a_disk_that_is_gone_breaks_no_image(tmp_path, storage):
    source = opened("folder", write_folder(tmp_path / "disk"))
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="flower/002.jpg cannot be read .No such file"):
        source[2]
    assert source.broken == {}


# broken images


def test_broken_image_is_replaced_by_the_next(tmp_path):
    source = opened("folder", write_folder(tmp_path, with_broken(0, 2, 3, COUNT - 1)))
    for broken, stand_in in ((0, 1), (2, 4), (3, 4), (COUNT - 1, 1)):
        for _ in range(2):
            item = source[broken]
            assert same(item["example"], expected(stand_in))
            assert item["condition"] == labelled()[stand_in][2]
    names = ["flower/000.jpg", "flower/002.jpg", "flower/003.jpg", "temple/005.jpg"]
    assert sorted(source.broken) == names
    assert all("truncated" in reason.lower() for reason in source.broken.values())


def test_too_many_broken_images_are_an_error(tmp_path):
    for kind in KINDS:
        path = write(kind, tmp_path / kind, with_broken(*range(1, COUNT)))
        source = opened(kind, path, max_broken=4)
        first = next(i for i in range(COUNT) if source.source.key(i).endswith("flower/000.jpg"))
        assert same(source[first]["example"], expected(0))
        with pytest.raises(
            DataError, match="5 of 12 images .* 4 are allowed.*raise data.max_broken"
        ):
            source[(first + 1) % COUNT]
        with pytest.raises(DataError, match="1 of 12 images"):
            opened(kind, path, max_broken=0)[(first + 1) % COUNT]


def test_what_is_no_file_of_an_image_is_broken(tmp_path, monkeypatch):
    write_folder(tmp_path, [*labelled(), ("temple/bomb", encode(crop("temple", 0, 400, 300)), 1)])
    monkeypatch.setattr(records, "MAX_PIXELS", 100_000)
    os.remove(tmp_path / "flower" / "001.jpg")
    os.mkfifo(tmp_path / "flower" / "001.jpg")  # reading it would wait for ever
    os.truncate(tmp_path / "flower" / "003.jpg", 2**40)  # takes no space
    source = opened("folder", tmp_path)
    os.remove(tmp_path / "temple" / "003.jpg")
    assert same(source[1]["example"], expected(2)) and len(list(source)) == COUNT + 1
    names = ["flower/001.jpg", "flower/003.jpg", "temple/003.jpg", "temple/bomb.jpg"]
    assert sorted(source.broken) == names
    assert "400 x 300 pixels" in source.broken["temple/bomb.jpg"]


# classes


def test_wordnet_ids_give_the_labels_of_imagenet_whichever_are_there(tmp_path):
    images = [(f"{name}/0", labelled()[i][1], i) for i, name in enumerate(SOME)]
    source = opened("folder", write_folder(tmp_path, images), 1000, class_names="imagenet")
    assert source.labels.tolist() == [int(item["condition"]) for item in source] == [1, 207, 999]
    assert source.class_names == IDS and source.source.key(1) == "n02099601/0.jpg"
    assert source.source.digest() != opened("folder", tmp_path, 3).source.digest()
    shutil.rmtree(tmp_path / SOME[0])
    fewer = opened("folder", tmp_path, 1000, class_names="imagenet")
    assert [int(item["condition"]) for item in fewer] == [207, 999], "no other class is shifted"


def test_match_classes_by_wordnet_id_or_by_order():
    names, numbers = match_classes(SOME[::-1], 1000, "imagenet", "it")
    assert names == IDS and numbers.tolist() == [999, 207, 1]
    assert match_classes(IDS, 1000, "imagenet", "it") == (IDS, None)
    assert match_classes(NAMES, 2, ["a", "b"], "it") == (NAMES, None)
    assert match_classes(NAMES, 0, "", "it") == match_classes(NAMES, 0, NAMES, "it")
    assert match_classes(SOME, records.ANY_CLASS, "imagenet", "") == (SOME, None)


def test_classes_that_are_not_those_of_the_config_are_refused():
    for present, num_classes, names, words in (
        (NAMES, 1000, "imagenet", '"imagenet", but x holds the class "flower", .*num_classes=2 '),
        ((*SOME, "n99999999"), 1000, "imagenet", 'the class "n99999999"'),
        (NAMES, 3, "", r"2 classes \(flower, temple\), data.num_classes is 3; .*num_classes=2"),
        (SOME, 1, "", "3 classes .*, data.num_classes is 1"),
        (NAMES, 1, ("flower",), r"new: temple\), data.num_classes is 1; .*--init_from"),
        (NAMES, 2, ("temple", "flower"), 'another class "temple".* 0 flower, 1 temple'),
        (("0", "1"), 0, ("1", "0"), 'another class "1"'),
    ):
        with pytest.raises(DataError, match=words):
            match_classes(present, num_classes, names, "x")


def test_without_classes_all_images_are_of_class_0(tmp_path):
    source = opened("folder", write_folder(tmp_path), 1, unconditional=True, class_names="imagenet")
    assert {int(item["condition"]) for item in source} == {0} and len(source) == COUNT


def test_what_the_config_leaves_open_is_as_the_data_are(tmp_path):
    folder = write_folder(tmp_path / "folder")
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 32, 32, 3), np.uint8), labels=[0, 3, 1])
    flags = (
        "--config.data.image_size=32",
        "--config.data.channels=3",
        "--config.data.patch_size=4",
    )
    for source, path, found in (
        ("folder", folder, NAMES),
        ("tar", write_shards(tmp_path / "tar"), ("0", "1")),
        ("npz", tmp_path / "x.npz", ("0", "1", "2", "3")),
        ("synthetic", "", tuple(map(str, range(10)))),
    ):
        place = (f"--config.data.source={source}", f"--config.data.path={path}")
        experiment = tiny_config(*flags, *place, "--config.data.num_classes=0")
        _, experiment = open_training_data(experiment)
        assert experiment.class_names == found and experiment.data.num_classes == len(found)
        assert experiment.network.conditioner.num_classes == len(found)
    place = ("--config.data.source=folder", f"--config.data.path={folder}")
    nothing = tiny_config(*flags, *place, "--config.model.condition=nothing")
    assert open_training_data(nothing)[1] == nothing, "whose 10 classes do not matter"
    labels = (*place, "--config.data.num_classes=2", "--config.sample.labels=temple")
    assert set(open_training_data(tiny_config(*flags, *labels))[1].sample_conditions) == {1}
    with pytest.raises(ConfigError, match="wolf.*0 flower, 1 temple"):
        open_training_data(tiny_config(*flags, *labels[:-1], "--config.sample.labels=wolf"))


# what cannot be opened


def test_errors_name_the_setting_that_is_wrong():
    for name, path, words in (
        ("folders", "x", 'source is "folders".*digits, .*folder.*ilsvrc'),
        ("latents", "", "path is empty.*mode=prepare"),
        ("folder", "", "path is empty.*--config"),
        ("npz", "/no such/{", "path .*npz file"),
        ("tar", "/no such/{", "path .*tar files"),
        ("ilsvrc", "/no such/{", "path .*ILSVRC2012_img_train.tar"),
        ("tfds", "/no such/{", "path .*NAME"),
        ("tar", "gs://bucket/x", "path .* in a bucket.*--mode=prepare"),
    ):
        for group in ("data", "prepare"):
            with pytest.raises(ValueError, match=words) as caught:
                open_source(group, settings(name, path), settings(name), PIXELS)
            assert f"{group}." in str(caught.value), name


def test_image_files_need_a_modality_of_pixels(tmp_path):
    write_folder(tmp_path)
    for modality in (
        MODALITIES["image_latents"](4, 16, 1, 0.2),
        MODALITIES["image_pixels"](32, 4, 4),
    ):
        with pytest.raises(DataError, match='"folder" gives square uint8 .*data.modality'):
            opened("folder", tmp_path, modality=modality)


def test_latents_without_mirror_images_are_not_mirrored(tmp_path):
    np.savez(tmp_path / "x.npz", latents=np.zeros((3, 4, 4, 16), np.float32), labels=np.arange(3))
    modality = MODALITIES["image_latents"](4, 16, 1, 0.2325)
    with pytest.raises(DataError, match="data.random_flip is True.*x.npz.*random_flip=False"):
        opened("npz", tmp_path / "x.npz", 3, modality, random_flip=True)
    assert len(opened("npz", tmp_path / "x.npz", 3, modality)) == 3


def test_a_condition_that_the_data_do_not_deliver_is_refused():
    changes = {"model.condition": "text", "model.condition_options": {"num_prefix_tokens": 2}}
    experiment = tiny_config("--config.model.num_prefix_tokens=2").updated(changes)
    with pytest.raises(DataError, match='condition "text"'):
        open_training_data(experiment)
