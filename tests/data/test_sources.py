"""Image files in folders as a source, and what all sources of image files share."""

import errno
import os
import pathlib
import pickle

import numpy as np
import pytest
from photos import NAMES, PER_CLASS, crop, encode, labelled, same, write_folder, write_shards
from PIL import Image

from djepa_jax.core.modalities import MODALITIES
from djepa_jax.data import records
from djepa_jax.data.image_folder import open_folder
from djepa_jax.data.images import center_crop, decode_image
from djepa_jax.data.loader import example_stream, row_batches
from djepa_jax.data.records import MAX_PIXELS, DataError, ImageSource, Robust
from djepa_jax.data.sources import load_npz, open_source

PIXELS = MODALITIES["image_pixels"](32, 3, 4)
GRAY = MODALITIES["image_pixels"](16, 1, 4)
COUNT = 2 * PER_CLASS


def expected(index: int, size: int = 32) -> np.ndarray:
    return center_crop(decode_image(labelled()[index][1], MAX_PIXELS), size)


@pytest.fixture(params=["folder", "tar"])
def kind(request):
    return request.param


def write(kind: str, root, images=None) -> str:
    return (write_folder if kind == "folder" else write_shards)(root, images)


def with_broken(*broken: int) -> list[tuple[str, bytes, int]]:
    """The labelled images, some of them cut in half."""
    return [
        (key, data[: len(data) // 2] if i in broken else data, label)
        for i, (key, data, label) in enumerate(labelled())
    ]


# images and labels


def test_folder_gives_decoded_and_cropped_images(tmp_path):
    source = open_source("folder", write_folder(tmp_path), PIXELS, num_classes=2)
    assert len(source) == COUNT and source.class_names == NAMES
    for i in range(COUNT):
        assert same(source[i]["example"], expected(i))
        assert (
            source[i]["condition"] == labelled()[i][2] and source[i]["condition"].dtype == np.int32
        )
        assert source.key(i) == labelled()[i][0] + ".jpg"
    assert source.labels.tolist() == [0] * PER_CLASS + [1] * PER_CLASS


def test_folder_and_tar_give_identical_images(tmp_path):
    folder = open_source("folder", write_folder(tmp_path / "folder"), PIXELS, num_classes=2)
    tar = open_source("tar", write_shards(tmp_path / "tar"), PIXELS, num_classes=2)
    by_key = {tar.key(i).partition(":")[2]: i for i in range(len(tar))}
    assert len(folder) == len(tar) == len(by_key) == COUNT
    for i in range(COUNT):
        twin = tar[by_key[folder.key(i)]]
        assert (
            same(twin["example"], folder[i]["example"])
            and twin["condition"] == folder[i]["condition"]
        )
        assert tar.labels[by_key[folder.key(i)]] == folder.labels[i]


def test_channels_follow_the_modality(tmp_path, kind):
    source = open_source(kind, write(kind, tmp_path), GRAY, num_classes=2)
    assert source[0]["example"].shape == (16, 16, 1)
    luminance = np.asarray(Image.fromarray(expected(0, 16)).convert("L"))
    assert same(source[0]["example"][..., 0], luminance)


def test_order_of_access_does_not_matter(tmp_path, kind):
    source = open_source(kind, write(kind, tmp_path), PIXELS, num_classes=2)
    whole = [source[i] for i in range(COUNT)]
    assert len(list(source)) == COUNT  # iterating ends
    for i in np.random.default_rng(0).permutation(3 * COUNT) % COUNT:
        assert (
            same(source[int(i)]["example"], whole[i]["example"])
            and source[int(i)]["condition"] == whole[i]["condition"]
        )


def test_sources_pickle(tmp_path, kind):
    images = with_broken(2)
    source = open_source(kind, write(kind, tmp_path, images), PIXELS, num_classes=2)
    first = [source[i] for i in range(COUNT)]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.broken == source.broken and len(copy.broken) == 1
    assert all(
        same(copy[i]["example"], first[i]["example"]) and copy.key(i) == source.key(i)
        for i in range(COUNT)
    )


def test_grain_reads_in_threads(tmp_path, kind):
    source = open_source(kind, write(kind, tmp_path, with_broken(1, 8)), PIXELS, num_classes=2)
    stream = example_stream(source, seed=3, random_flip=True)
    one_by_one = [stream[i] for i in range(8)]
    batches = row_batches(stream, 4, consumed=0)
    for start in (0, 4):
        batch = next(batches)
        assert batch["example"].shape == (4, 32, 32, 3) and batch["example"].dtype == np.uint8
        for row in range(4):
            assert same(batch["example"][row], one_by_one[start + row]["example"])
            assert batch["condition"][row] == one_by_one[start + row]["condition"]


def test_folder_finds_what_it_should(tmp_path):
    picture = encode(crop("flower"))
    for name in ("b/x.JPG", "b/deep/er/y.jpeg", "a/z.PNG", "A/q.webp", "a/10.jpg", "a/9.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(
            encode(crop("temple"), "PNG") if name.endswith("PNG") else picture
        )
    for name in ("b/.hidden.jpg", "b/notes.txt", ".git/c.jpg", "b/.cache/d.jpg", "stray.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    source = open_source("folder", str(tmp_path), PIXELS, num_classes=4)
    assert source.class_names == ("A", "a", "b", "linked") and source.labels.tolist() == [
        0,
        1,
        1,
        1,
        2,
        2,
        3,
        3,
        3,
    ]
    assert [source.key(i) for i in range(6)] == [
        "A/q.webp",
        "a/10.jpg",
        "a/9.jpg",
        "a/z.PNG",
        "b/deep/er/y.jpeg",
        "b/x.JPG",
    ]
    assert source[5]["condition"] == 2


def test_names_need_not_be_unicode(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(folder)
    with open(folder + b"/\xff.jpg", "wb") as file:
        file.write(encode(crop("flower")))
    source = pickle.loads(pickle.dumps(open_source("folder", str(tmp_path), PIXELS, num_classes=1)))
    assert (
        source[0]["example"].shape == (32, 32, 3)
        and os.fsencode(source.key(0)) == b"caf\xe9/\xff.jpg"
    )


# what is there, wherever it lies


def test_checksum_tells_what_is_there_and_not_where(tmp_path, kind):
    def digest(name: str, images=None) -> str:
        return open_source(
            kind, write(kind, tmp_path / name, images), PIXELS, num_classes=2
        ).source.digest()

    images = labelled()
    renamed = [("flower/other", *images[0][1:]), *images[1:]]
    moved = [("temple/000x", images[0][1], 1), *images[1:]]
    assert digest("a") == digest("b/c")
    assert (
        len({digest("d"), digest("e", renamed), digest("f", moved), digest("g", images[:-1])}) == 4
    )
    if kind == "tar":
        longer = [(images[0][0], images[0][1] + bytes(600), 0), *images[1:]]
        assert digest("h", longer) != digest("a"), "sizes are known without reading"


def test_checksum_of_arrays_is_of_every_value(tmp_path):
    images, labels = np.zeros((3, 4, 4, 1), np.uint8), np.arange(3)
    changed = images.copy()
    changed[2, 3, 3] = 1
    files = {
        "a": (images, labels),
        "b": (images, labels),
        "c": (changed, labels),
        "d": (images, labels[::-1]),
    }
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", images=arrays[0], labels=arrays[1])
    first, second, *others = (load_npz(str(tmp_path / f"{name}.npz")).digest() for name in "abcd")
    assert first == second and len({first, *others}) == 3


# storage that fails


@pytest.fixture
def storage(monkeypatch):
    """Makes reading of some files fail for some attempts; counts the attempts."""
    monkeypatch.setattr(records, "WAITS", (0, 0, 0))
    read, failures, attempts = pathlib.Path.read_bytes, {}, []

    def read_bytes(path):
        attempts.append(path.name)
        left, number = failures.get(path.name, (0, 0))
        if left:
            failures[path.name] = left - 1, number
            raise OSError(number, os.strerror(number))
        return read(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    failures["attempts"] = attempts
    return failures


def test_storage_that_recovers_costs_no_image(tmp_path, storage, caplog):
    source = open_source("folder", write_folder(tmp_path), PIXELS, num_classes=2)
    storage["002.jpg"] = 3, errno.EIO
    assert (
        same(source[2]["example"], expected(2))
        and source.broken == {}
        and storage["attempts"].count("002.jpg") == 4
    )
    assert "flower/002.jpg cannot be read (Input/output error); trying again" in caplog.text


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT, errno.EMFILE]
)
def test_storage_that_stays_away_is_an_error_and_no_broken_image(tmp_path, storage, number):
    source = open_source("folder", write_folder(tmp_path), PIXELS, num_classes=2)
    storage["002.jpg"] = 99, number
    words = rf"flower/002.jpg cannot be read \({os.strerror(number)}\), after 4 attempts; .* same command again .* an empty file"
    with pytest.raises(DataError, match=words):
        source[2]
    assert source.broken == {}
    storage["002.jpg"] = 0, 0
    assert same(source[2]["example"], expected(2)), "nothing is remembered of it"
    (tmp_path / "flower" / "002.jpg").write_bytes(b"")  # the remedy
    assert same(source[2]["example"], expected(3)) and source.broken == {
        "flower/002.jpg": "it is empty"
    }


def test_a_disk_that_is_gone_breaks_no_image(tmp_path, storage):
    source = open_source("folder", write_folder(tmp_path / "disk"), PIXELS, num_classes=2)
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    with pytest.raises(
        DataError,
        match=r"flower/002.jpg cannot be read \(No such file or directory\), after 4 attempts",
    ):
        source[2]
    assert source.broken == {}


# broken images


def test_broken_image_is_replaced_by_the_next(tmp_path, caplog):
    source = open_source(
        "folder", write_folder(tmp_path, with_broken(2, 3, COUNT - 1)), PIXELS, num_classes=2
    )
    assert source.broken == {}
    for broken, stand_in in ((2, 4), (3, 4), (COUNT - 1, 0)):
        for _ in range(2):
            assert same(source[broken]["example"], expected(stand_in))
            assert source[broken]["condition"] == labelled()[stand_in][2]
    assert list(source.broken) == ["flower/002.jpg", "flower/003.jpg", "temple/005.jpg"]
    assert all("truncated" in reason for reason in source.broken.values())
    assert (
        caplog.text.count("skipping") == 3
        and "skipping flower/003.jpg: it cannot be decoded" in caplog.text
    )


def test_broken_image_at_the_start_does_not_stop_opening(tmp_path, kind):
    source = open_source(kind, write(kind, tmp_path, with_broken(0)), PIXELS, num_classes=2)
    assert len(source.broken) == 1 and len(source) == COUNT


def test_too_many_broken_images_are_an_error(tmp_path):
    folder = write_folder(tmp_path, with_broken(2, 3, 5, 7, 9))
    source = open_source("folder", folder, PIXELS, num_classes=2, max_broken=4)
    for i in (2, 3, 5, 7, 7):
        assert source[i]["example"].shape == (32, 32, 3)
    words = r"5 of 12 .* 4 are allowed: flower/002.jpg: .*; flower/005.jpg: .*; and 2 more. Repair .* or raise data.max_broken"
    with pytest.raises(DataError, match=words):
        source[9]
    assert len(source.broken) == 5
    with pytest.raises(DataError, match="1 of 12 images cannot be read, 0 are allowed"):
        open_source("folder", folder, PIXELS, num_classes=2, max_broken=0)[2]


def test_all_images_broken_is_an_error(tmp_path, kind):
    path = write(kind, tmp_path, with_broken(*range(COUNT)))
    with pytest.raises(DataError, match="12 of 12 images cannot be read"):
        open_source(kind, path, PIXELS, num_classes=2)


def test_image_of_too_many_pixels_is_broken(tmp_path, kind):
    images = [*labelled(), ("temple/bomb", encode(crop("temple", width=400, height=300)), 1)]
    source = open_source(
        kind, write(kind, tmp_path, images), PIXELS, num_classes=2, max_pixels=100_000
    )
    assert len(list(source)) == COUNT + 1
    ((key, reason),) = source.broken.items()
    assert "temple/bomb" in key and "400 x 300 pixels, the limit is 100000" in reason


def test_file_that_vanished_or_is_no_file_is_broken(tmp_path):
    folder = write_folder(tmp_path)
    os.remove(tmp_path / "flower" / "001.jpg")
    os.mkfifo(tmp_path / "flower" / "001.jpg")
    source = open_source("folder", folder, PIXELS, num_classes=2)
    os.remove(tmp_path / "temple" / "003.jpg")
    assert same(source[1]["example"], expected(2)) and same(
        source[PER_CLASS + 3]["example"], expected(PER_CLASS + 4)
    )
    assert list(source.broken.values()) == ["it is not a file", "there is no such file any more"]


def test_huge_file_is_not_read(tmp_path):
    folder = write_folder(tmp_path)
    os.truncate(tmp_path / "flower" / "001.jpg", 2**40)  # takes no space
    source = open_source("folder", folder, PIXELS, num_classes=2)
    assert same(source[1]["example"], expected(2))
    assert f"{2**40} bytes" in source.broken["flower/001.jpg"]


def test_index_beyond_the_end(tmp_path):
    source = Robust(ImageSource(open_folder(write_folder(tmp_path)), (32, 32, 3), 2))
    assert same(source[-1]["example"], source[COUNT - 1]["example"])
    with pytest.raises(IndexError):
        source[COUNT]
