"""Image files in tar files as a source."""

import io
import json
import os
import pathlib
import tarfile

import pytest
from photos import crop, encode, labelled, write_shards, write_tar

from djepa_jax.core.modalities import MODALITIES
from djepa_jax.data import records
from djepa_jax.data.records import DataError
from djepa_jax.data.sources import open_source
from djepa_jax.data.tar_index import walk_tar
from djepa_jax.data.webdataset import expand_braces, find_shards

PIXELS = MODALITIES["image_pixels"](32, 3, 4)
PICTURE = encode(crop("flower"))
GOOD = {"0.jpg": PICTURE, "0.cls": b"1"}


def open_tar(path, num_classes=2, **options):
    return open_source("tar", str(path), PIXELS, num_classes, **options)


def members(file) -> list[tuple[str, bytes]]:
    with open(file, "rb") as handle:
        return [
            (m.name, os.pread(handle.fileno(), m.size, m.offset))
            for m in walk_tar(handle.fileno(), str(file))
        ]


# finding tar files


@pytest.mark.parametrize(
    "pattern",
    ["", "train-{000..002}.tar", "train-*.tar", "train-{000,001,002}.tar", "{train,train}-00*.tar"],
)
def test_ways_to_name_shards(tmp_path, pattern):
    root = write_shards(tmp_path)
    (tmp_path / ".hidden.tar").write_bytes(b"")
    assert find_shards(os.path.join(root, pattern)) == [
        f"{root}/train-{i:03d}.tar" for i in range(3)
    ]
    assert len(open_tar(os.path.join(root, pattern))) == len(labelled())


def test_one_shard_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", write_shards(tmp_path))
    assert len(open_tar("~/train-001.tar")) == len(labelled()) // 3


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{0..3}", ["0", "1", "2", "3"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{a,{b,c}}", ["a", "b", "c"]),
        ("x{,-y}", ["x", "x-y"]),
    ],
)
def test_braces(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    "pattern",
    ["{3..1}", "{a..c}", "{}", "{a}", "a{b", "a}b", "{0..999999999}", "{0..999}{0..999}{0..999}"],
)
def test_senseless_braces_are_refused(pattern):
    with pytest.raises(DataError, match="data.path"):
        expand_braces(pattern)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", "there are no tar files"),
        ("*.tar", "there are no tar files"),
        ("train-{000..004}.tar", "3 of 5 files are missing, such as .*train-002.tar"),
        ("no.tar", "1 of 1 files are missing"),
    ],
)
def test_missing_shards_are_named(tmp_path, pattern, words):
    if "{" in pattern:
        write_shards(tmp_path, shards=2)
    with pytest.raises(DataError, match=words):
        open_tar(f"{tmp_path}/{pattern}")


# members and labels


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_agrees_with_tarfile(tmp_path, form):
    names = ["0.txt", "dir/" + "n" * 90 + ".txt", "d" * 120 + "/" + "e" * 90 + ".txt"]
    names += (
        []
        if form == tarfile.USTAR_FORMAT
        else ["long/" * 60 + "name.txt", "ümlaut-" + "ß" * 80 + ".txt"]
    )
    contents = {
        name: os.urandom(size) for name, size in zip(names, (0, 1, 512, 513, 2000), strict=False)
    }
    file = write_tar(tmp_path / "a.tar", contents, format=form)
    with tarfile.open(file, "a", format=form) as tar:
        tar.addfile(tarfile.TarInfo("folder/"))
        folder = tarfile.TarInfo("folder2")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert members(file) == list(contents.items())


def test_labels_in_either_form_and_what_is_left_out(tmp_path):
    label = {"label": 2, "caption": "a flower"}
    write_tar(
        tmp_path / "a.tar",
        {
            "./0.jpg": PICTURE,
            "./0.cls": b" 1\n",
            "dir/b.c.PNG": b"left out: its kind is c.png",
            "dir/1.jpeg": PICTURE,
            "dir/1.json": json.dumps(label).encode(),
            "2.WEBP": encode(crop("flower"), "WEBP"),
            "2.json": b'{"label": 0}',
            "2.cls": b"3",  # wins
            "._2.webp": b"macOS",
            "3.json": b'{"caption": "no image, no label"}',
            "readme.txt": b"",
        },
    )
    source = open_tar(tmp_path, num_classes=4)
    assert source.labels.tolist() == [1, 2, 3] and source.class_names is None
    assert [source.key(i) for i in range(3)] == [
        "a.tar:./0.jpg",
        "a.tar:dir/1.jpeg",
        "a.tar:2.WEBP",
    ]
    assert [int(source[i]["condition"]) for i in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"0.cls": b"one"}, '"0.cls" in .* must be one whole number, it starts with'),
        ({"0.cls": b""}, "must be one whole number"),
        ({"0.cls": b"9" * 30}, "must be one whole number"),
        ({"0.json": b'{"label": true}'}, 'must be an object with a whole number as "label"'),
        ({"0.json": b'{"label": 1.5}'}, "must be an object"),
        ({"0.json": b"[" * 100_000}, "must be an object"),
        ({"0.json": b"[1]"}, "must be an object"),
        ({"1.jpg": PICTURE}, '"1.jpg" in .* has no label'),
        ({"1.jpg": PICTURE, "1.json": b"{}"}, '"1.jpg" in .* has no label'),
        ({"1.cls": b"0"}, '"1" in .* has a label but no image'),
        ({"0.png": PICTURE}, 'two images of one key, "0.jpg" and "0.png"'),
        ({"0.cls": b"2"}, "class 2, data.num_classes is 2"),
        ({"0.cls": b"-1"}, "class -1, data.num_classes is 2"),
        ({"0.cls": b"0" * (2**20 + 1)}, r"has 1048577 bytes, the limit is 1048576"),
    ],
)
def test_unusable_members_are_named(tmp_path, changes, words):
    write_tar(tmp_path / "a.tar", GOOD | changes)
    with pytest.raises(DataError, match=words):
        open_tar(tmp_path)


def test_tar_without_images_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"notes.txt": b"x"})
    with pytest.raises(DataError, match="1 tar files .* hold no images"):
        open_tar(tmp_path)


# evil and damaged archives


def add(file, name, kind=tarfile.REGTYPE, data=b"", **fields):
    with tarfile.open(file, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("../evil.jpg", {}, r'"\.\./evil.jpg" in .* is not a path inside'),
        ("a/../../evil.jpg", {}, "is not a path inside"),
        ("/etc/evil.jpg", {}, '"/etc/evil.jpg" in .* is not a path inside'),
        ("1.jpg", {"kind": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, '"1.jpg" in .* is a link'),
        ("1.jpg", {"kind": tarfile.LNKTYPE, "linkname": "0.jpg"}, "is a link"),
        ("1.jpg", {"kind": tarfile.CHRTYPE}, "is a special file"),
        ("1.jpg", {"kind": tarfile.FIFOTYPE}, "is a special file"),
        ("1.jpg", {"kind": tarfile.GNUTYPE_SPARSE}, "is a special file"),
        ("1.jpg", {"pax_headers": {"path": "../" * 60 + "evil"}}, "is not a path inside"),
        ("1.jpg", {"pax_headers": {"GNU.sparse.major": "1"}}, "sparse"),
    ],
)
def test_evil_members_are_refused_by_name(tmp_path, name, fields, words):
    file = write_tar(tmp_path / "a.tar", GOOD)
    add(file, name, **fields)
    with pytest.raises(DataError, match=words):
        open_tar(tmp_path)


def header(name: str = "0.jpg", **patches: bytes) -> bytes:
    """A block with some fields changed, and the checksum of that."""
    block = bytearray(tarfile.TarInfo(name).tobuf())
    for field, value in patches.items():
        start = {"size": 124, "kind": 156}[field]
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            header(size=b"77777777777\0") + bytes(1024),
            '"0.jpg" claims 8589934591 bytes, more than there are',
        ),
        (header(size=b"\x80" + b"\xff" * 11) + bytes(1024), "claims .* bytes, more than there are"),
        (
            header(size=b"\xff" * 12) + bytes(1024),
            "claims .* bytes, more than there are",
        ),  # minus one
        (header(size=b"-0000000001\0") + bytes(1024), "is not a number"),
        (header(kind=b"L"), "cut off"),
        (header(), "cut off"),  # without the end mark
        (b"", "cut off at byte 0"),
        (b"some text" * 1000, "no uncompressed tar file"),
        (
            header(kind=b"x", size=b"%011o\0" % 8) + b"0 path=x".ljust(1536, b"\0"),
            "an extended header is damaged",
        ),
        (
            header(kind=b"x", size=b"%011o\0" % 8) + b"99 path=".ljust(1536, b"\0"),
            "an extended header is damaged",
        ),
    ],
)
def test_damaged_archives_are_refused(tmp_path, data, words):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=words):
        open_tar(tmp_path)


@pytest.mark.parametrize(
    "start",
    [
        header(size=b"\x80" + bytes(10) + b"\3"),  # a binary number
        header(kind=b"x", size=b"%011o\0" % 9)
        + b"9 size=3\n".ljust(512, b"\0")
        + header(size=b"%011o\0" % 0),
    ],
)
def test_sizes_of_large_files_are_understood(tmp_path, start):
    (tmp_path / "a.tar").write_bytes(start + b"abc".ljust(512, b"\0") + bytes(1024))
    assert members(tmp_path / "a.tar") == [("0.jpg", b"abc")]


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_long_names_are_not_read_without_limit(tmp_path, kind):
    (tmp_path / "a.tar").write_bytes(header(kind=kind, size=b"%011o\0" % 2**32))
    os.truncate(tmp_path / "a.tar", 2**33)  # takes no space
    with pytest.raises(DataError, match=f"an extended header claims {2**32} bytes"):
        open_tar(tmp_path)


def test_absurd_image_is_refused_by_name(tmp_path):
    (tmp_path / "a.tar").write_bytes(header(size=b"%011o\0" % 2**32))
    os.truncate(tmp_path / "a.tar", 2**33)
    with pytest.raises(DataError, match=f'"0.jpg" in .* has {2**32} bytes, the limit is'):
        open_tar(tmp_path)


def test_compressed_and_flipped_and_cut_archives(tmp_path):
    packed = write_shards(tmp_path / "packed", shards=1)
    data = pathlib.Path(packed, "train-000.tar").read_bytes()
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.add(packed, "x")
    with pytest.raises(DataError, match="no uncompressed tar file"):
        open_tar(tmp_path / "b.tar")
    second = 512 + -(-len(labelled()[0][1]) // 512) * 512
    (tmp_path / "c.tar").write_bytes(
        data[:second] + b"\xff" + data[second + 1 :]
    )  # tarfile would end there
    with pytest.raises(DataError, match=f"damaged at byte {second}"):
        open_tar(tmp_path / "c.tar")
    end = len(data.rstrip(b"\0"))
    for cut in (100, 512, 700, second, second + 600, end // 2, end - 1000, end):
        (tmp_path / "d.tar").write_bytes(data[:cut])
        with pytest.raises(DataError, match="cut off|more than there are"):
            open_tar(tmp_path / "d.tar")


def test_shard_cut_or_removed_after_opening_is_an_error_and_breaks_no_image(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "WAITS", (0, 0))
    source = open_tar(write_shards(tmp_path, shards=1))
    again = open_tar(tmp_path)
    os.truncate(tmp_path / "train-000.tar", 1000)
    with pytest.raises(
        DataError,
        match=r"tar:.* cannot be read \(the tar file ends before it\), after 3 .* copy its tar",
    ):
        source[3]
    os.remove(tmp_path / "train-000.tar")
    with pytest.raises(
        DataError, match=r"tar:.* cannot be read \(No such file or directory\), after 3 attempts"
    ):
        again[3]
    assert source.broken == again.broken == {}
