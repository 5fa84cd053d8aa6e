"""Image files in tar files as a source, and the archive of ImageNet as it is handed out."""

import io
import json
import os
import pathlib
import tarfile

import pytest
from photos import crop, encode, labelled, opened, same, write_ilsvrc, write_shards, write_tar

from djepa_jax.data import ilsvrc, records
from djepa_jax.data.images import center_crop, decode_image
from djepa_jax.data.records import MAX_PIXELS, DataError
from djepa_jax.data.webdataset import expand_braces, tar_members

PICTURE = encode(crop("flower"))
GOOD = {"0.jpg": PICTURE, "0.cls": b"1"}
IMAGENET = {  # in another order than that of their labels
    wnid: {f"{wnid}_{i}.JPEG": encode(crop("flower", 9 * number + i)) for i in range(3)}
    for number, wnid in enumerate(("n01443537", "n02086240", "n01440764"))
}


def contents(file) -> dict[str, bytes]:
    with open(file, "rb") as handle:
        return {
            member.name: os.pread(handle.fileno(), member.size, member.offset)
            for member in tar_members(str(file))
        }


# finding tar files


def test_ways_to_name_shards(tmp_path):
    root = write_shards(tmp_path)
    (tmp_path / ".hidden.tar").write_bytes(b"")
    names = [f"train-{i:03d}.tar" for i in range(3)]
    for pattern in ("", "train-{000..002}.tar", "train-*.tar", f"{{{','.join(names)}}}"):
        source = opened("tar", f"{root}/{pattern}")
        assert len(source) == len(labelled())
        assert [os.path.basename(file) for file in source.source.records.files] == names


def test_names_with_brackets_and_braces_are_found(tmp_path):
    root = write_shards(tmp_path / "odd [1] {a,b}")
    assert len(opened("tar", root)) == len(labelled())
    assert len(opened("tar", f"{root}/train-001.tar")) == len(labelled()) // 3
    for pattern in ("train-{000..002}.tar", "train-*.tar", "t[r]ain-00?.tar"):
        assert len(opened("tar", f"{root}/{pattern}")) == len(labelled())
    with pytest.raises(DataError, match="1 of 4 tar files are missing"):
        opened("tar", f"{root}/train-{{000..003}}.tar")


def test_braces():
    for pattern, names in {
        "a.tar": ["a.tar"],
        "{0..3}": ["0", "1", "2", "3"],
        "{08..11}": ["08", "09", "10", "11"],
        "{8..11}": ["8", "9", "10", "11"],
        "{a,b}-{0..1}": ["a-0", "a-1", "b-0", "b-1"],
        "x{,-y}": ["x", "x-y"],
    }.items():
        assert expand_braces(pattern, "") == names
    for pattern in ("{3..1}", "{a..c}", "{}", "{a}"):
        with pytest.raises(DataError, match=r"data\.path.*range .* list"):
            expand_braces(pattern, "data.path")


def test_missing_shards_are_named(tmp_path):
    write_shards(tmp_path, shards=2)
    for pattern, words in {
        "x*.tar": "0 of 0 tar files",
        "train-{000..004}.tar": "3 of 5 tar files are missing.*train-002.tar",
        "{0..999999999}.tar": "missing",
    }.items():
        with pytest.raises(DataError, match=words):
            opened("tar", f"{tmp_path}/{pattern}")


# members and labels


def test_every_file_is_found_where_it_lies(tmp_path):
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        names = ["0.txt", "dir/" + "n" * 90 + ".txt", "d" * 120 + "/" + "e" * 90 + ".txt"]
        if form != tarfile.USTAR_FORMAT:
            names += ["long/" * 60 + "name.txt", "ümlaut-" + "ß" * 80 + ".txt"]
        found = dict(zip(names, map(os.urandom, (0, 1, 512, 513, 2000)), strict=False))
        file = write_tar(tmp_path / f"{form}.tar", found, format=form)
        add(file, "folder", tarfile.DIRTYPE)
        assert contents(file) == found


def test_labels_in_either_form_and_what_is_left_out(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {
            "./0.jpg": PICTURE,
            "./0.cls": b" 1\n",
            "dir/b.c.PNG": b"left out: its kind is c.png",
            "dir/1.jpeg": PICTURE,
            "dir/1.json": json.dumps({"label": 2, "caption": "a flower"}).encode(),
            "2.WEBP": encode(crop("flower"), "WEBP"),
            "2.cls": b"3",  # wins
            "2.json": b'{"label": 0}',
            "._2.webp": b"macOS",
            "3.json": b'{"caption": "no image, no label"}',
            "readme.txt": b"",
        },
    )
    source = opened("tar", tmp_path, 4)
    assert source.labels.tolist() == [1, 2, 3] and source.class_names is None
    assert [int(source[i]["condition"]) for i in range(3)] == [1, 2, 3]
    keys = [source.source.key(i) for i in range(3)]
    assert keys == ["a.tar:./0.jpg", "a.tar:dir/1.jpeg", "a.tar:2.WEBP"]


def test_content_decides_what_is_read_and_the_rest_is_counted(tmp_path):
    mask = encode(crop("temple"), "PNG")
    files = {
        **{"0.jfif": PICTURE, "0.cls": b"0", "0.seg.png": mask, "0.txt": b"a caption"},
        **{"1": PICTURE, "1.cls": b"1", "2.img": PICTURE, "2.cls": b"0", "2.seg.png": mask},
        **{"3.heic": b"\0\0\0\x18ftypheic" + bytes(99), "3.cls": b"1", "readme.md": b"x"},
    }
    write_tar(tmp_path / "a.tar", files)
    source = opened("tar", tmp_path)
    assert [source.source.key(i) for i in range(3)] == ["a.tar:0.jfif", "a.tar:1", "a.tar:2.img"]
    assert [int(item["condition"]) for item in source] == [0, 1, 0] and source.broken == {}
    assert source.source.records.left_out == {".heic": 1, ".md": 1}


def test_unusable_members_are_named(tmp_path):
    for changes, words in (
        ({"0.cls": b"one"}, '"0.cls" in .* a whole number'),
        ({"0.cls": b"9" * 30}, "a whole number"),
        ({"0.json": b'{"label": true}'}, "a whole number"),
        ({"0.json": b"[" * 100_000}, "a whole number"),
        ({"1.jpg": PICTURE}, '"1" in .* label'),
        ({"1.cls": b"0"}, '"1" in .* image'),
        ({"0.png": PICTURE}, '"0" in .* one image'),
        ({"0.cls": b"2"}, "class 2.* below 2"),
        ({"0.cls": b"-1"}, "class -1"),
        ({"0.jpg": None, "0.cls": None}, "no images"),
    ):
        members = {name: data for name, data in (GOOD | changes).items() if data is not None}
        write_tar(tmp_path / "a.tar", members)
        with pytest.raises(DataError, match=words):
            opened("tar", tmp_path)


# evil and damaged archives


def add(file, name, kind=tarfile.REGTYPE, data=b"", **fields):
    with tarfile.open(file, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(data))


def test_evil_members_are_refused_by_name(tmp_path):
    for number, (name, fields, words) in enumerate(
        (
            ("../evil.jpg", {}, r'"\.\./evil.jpg" is not a path inside'),
            ("/etc/evil.jpg", {}, '"/etc/evil.jpg" is not a path inside'),
            ("1.jpg", {"pax_headers": {"path": "../" * 60 + "evil"}}, "is not a path inside"),
            ("1.jpg", {"kind": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, '"1.jpg" is a link'),
            ("1.jpg", {"kind": tarfile.LNKTYPE, "linkname": "0.jpg"}, "is a link"),
            ("1.jpg", {"kind": tarfile.CHRTYPE}, "special file"),
            ("1.jpg", {"kind": tarfile.FIFOTYPE}, "special file"),
            ("1.jpg", {"kind": tarfile.GNUTYPE_SPARSE}, "special file"),
        )
    ):
        add(write_tar(tmp_path / "a.tar", GOOD), name, **fields)
        with pytest.raises(DataError, match=f'a.tar".*{words}'):
            opened("tar", tmp_path)
        archive = write_ilsvrc(tmp_path / str(number), IMAGENET)
        add(f"{archive}/{ilsvrc.TRAIN}", name, **fields)
        with pytest.raises(DataError, match=words):
            opened("ilsvrc", archive, 3)


def header(name: str = "0.jpg", **patches: bytes) -> bytes:
    """A block with some fields changed, and the checksum of that."""
    block = bytearray(tarfile.TarInfo(name).tobuf())
    for field, value in patches.items():
        start = {"size": 124, "kind": 156}[field]
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_damaged_archives_are_refused(tmp_path):
    for data in (
        header(size=b"77777777777\0") + bytes(1024),  # more than there is
        header(size=b"\xff" * 12) + bytes(1024),  # minus one
        header(size=b"-0000000001\0") + bytes(1024),
        header(kind=b"L"),
        header(kind=b"L", size=b"\xff" * 12) + bytes(1024),
        header(),  # without the end mark
        b"",
        b"some text" * 1000,
        header(kind=b"x", size=b"%011o\0" % 8) + b"0 path=x".ljust(1536, b"\0"),
    ):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(DataError, match="a.tar.* cannot be read"):
            opened("tar", tmp_path)


def test_huge_members_and_names_are_refused(tmp_path):
    for kind in (b"L", b"x", b"0"):
        (tmp_path / "a.tar").write_bytes(header(kind=kind, size=b"%011o\0" % 2**32))
        os.truncate(tmp_path / "a.tar", 2**33)  # takes no space
        with pytest.raises(DataError, match=rf"{2**32}.* bytes"):
            opened("tar", tmp_path)


def test_compressed_and_flipped_and_cut_archives(tmp_path):
    packed = write_shards(tmp_path / "packed", shards=1)
    data = pathlib.Path(packed, "train-000.tar").read_bytes()
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.add(packed, "x")
    with pytest.raises(DataError, match="uncompressed"):
        opened("tar", tmp_path / "b.tar")
    second = 512 + -(-len(labelled()[0][1]) // 512) * 512
    flipped = data[:second] + b"\xff" + data[second + 1 :]
    (tmp_path / "c.tar").write_bytes(flipped)  # `tarfile` would end there
    with pytest.raises(DataError, match=f"byte {second}"):
        opened("tar", tmp_path / "c.tar")
    end = len(data.rstrip(b"\0"))
    for cut in (100, 512, 700, second, second + 600, end // 2, end - 1000, end):
        (tmp_path / "d.tar").write_bytes(data[:cut])
        with pytest.raises(DataError, match="d.tar.* cannot be read"):
            opened("tar", tmp_path / "d.tar")


def test_shard_cut_or_removed_after_opening_is_an_error_and_breaks_no_image(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "WAITS", (0, 0))
    source = opened("tar", write_shards(tmp_path, shards=1))
    for damage, words in ((lambda file: os.truncate(file, 1000), "ends before"), (os.remove, "No")):
        damage(tmp_path / "train-000.tar")
        with pytest.raises(DataError, match=f"tar:.* cannot be read .*{words}.*3 attempts.*copy"):
            source[3]
    assert source.broken == {}


# ImageNet


def test_imagenet_is_read_where_it_lies(tmp_path):
    folder = write_ilsvrc(tmp_path, IMAGENET)
    source = opened("ilsvrc", folder, 1000, class_names="imagenet")
    found = {}
    for index, item in enumerate(source):
        name = source.source.key(index).partition(":")[2]
        found[name] = int(item["condition"])
        wnid, _, file = name.partition("/")
        pixels = center_crop(decode_image(IMAGENET[wnid][file], MAX_PIXELS), 32)
        assert same(item["example"], pixels)
    labels = {"n01440764": 0, "n01443537": 1, "n02086240": 155}
    assert found == {f"{w}/{w}_{i}.JPEG": label for w, label in labels.items() for i in range(3)}
    archive = opened("ilsvrc", f"{folder}/{ilsvrc.TRAIN}", 3)
    assert (
        archive.class_names == tuple(labels)
        and archive.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    )


def test_archives_of_another_layout_are_refused(tmp_path):
    for members, words in (
        ({"n01440764_1.JPEG": b""}, "one tar file per class"),
        ({}, "one tar file per class"),
        ({"n01440764.tar": b"\1" * 2000}, "n01440764.tar"),
        ({"n01440764.tar": b"\1" * 99}, "n01440764.tar"),
        ({"n99999999.tar": bytes(1024)}, "n99999999"),
    ):
        write_tar(tmp_path / ilsvrc.TRAIN, members)
        with pytest.raises(DataError, match=words):
            opened("ilsvrc", tmp_path, 1000, class_names="imagenet")


def test_links_inside_a_class_are_refused(tmp_path):
    inner = write_tar(tmp_path / "inner.tar", {"a.JPEG": PICTURE})
    add(inner, "b.JPEG", tarfile.SYMTYPE, linkname="/etc/passwd")
    write_tar(tmp_path / ilsvrc.TRAIN, {"n01440764.tar": pathlib.Path(inner).read_bytes()})
    with pytest.raises(DataError, match="n01440764.tar.*b.JPEG.* is a link"):
        opened("ilsvrc", tmp_path, 1)
