"""Files from strangers: nothing in them is run, and none takes more memory than it has a right to.

What belongs to one format is tested with that format: code in weights in
test_importing_refusals.py, archives in test_tars.py, images in test_images.py. Here is what holds
for all of the source, and the bombs.
"""

import ast
import io
import json
import os
import pathlib
import pickle
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from caches import write_cache
from photos import crop, encode, write_imagenet, write_tar

from djepa_jax.config import class_names
from djepa_jax.data import arrays
from djepa_jax.data.ilsvrc import TRAIN, VALIDATION, prepare_tfds
from djepa_jax.data.images import BrokenImage, decode_image
from djepa_jax.data.latent_cache import LatentCache, read_shard_record
from djepa_jax.data.records import DataError
from djepa_jax.data.sources import load_npz

ROOT = pathlib.Path(__file__).parents[2]
IMAGES, LABELS = np.zeros((3, 4, 4, 1), np.uint8), np.zeros(3, np.int64)

# the source: nothing that could run what is in a file

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "joblib",
    "subprocess",
    "code",
    "runpy",
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
}
OPTIONS = {  # what may be called only with an option written out
    "np.load": ("allow_pickle", False),
    "np.lib.format.read_array": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}


def faults(source: str) -> list[str]:
    """What a piece of Python may not have here."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).replace("numpy.", "np.").replace("builtins.", "")
            if name in CALLS:
                found.append(name)
            wanted = OPTIONS.get(name)
            given = [(word.arg, getattr(word.value, "value", None)) for word in node.keywords]
            if wanted and wanted not in given:
                found.append(name)
    return found


def test_source_has_nothing_that_runs_what_is_in_a_file():
    files = [
        path
        for folder in ("djepa_jax", "configs", "launch")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 40
    assert {
        path.name: faults(path.read_text("utf-8"))
        for path in files
        if faults(path.read_text("utf-8"))
    } == {}


@pytest.mark.parametrize(
    "line",
    [
        *(
            "import pickle",
            "import os, dill.source",
            "from cloudpickle import loads",
            "import marshal as m",
        ),
        *(
            "eval('1')",
            "builtins.exec(code)",
            "__import__('os')",
            "yaml.load(file)",
            "os.system('ls')",
        ),
        *("np.load(path)", "numpy.load(path, allow_pickle=True)", "np.load(path, None, flag)"),
        *(
            "torch.load(path)",
            "torch.load(path, weights_only=False)",
            "np.lib.format.read_array(file)",
        ),
    ],
)
def test_the_test_above_finds_what_it_looks_for(line):
    assert len(faults(line)) == 1


def test_what_is_allowed_is_not_found():
    assert (
        faults(
            "np.load(p, allow_pickle=False); torch.load(p, weights_only=True); re.compile(p); "
            "model.eval()"
        )
        == []
    )


# npz


def npy(
    array: np.ndarray | None = None,
    *,
    shape: str | None = None,
    descr: str = "'|u1'",
    version: int = 1,
    data=b"",
) -> bytes:
    """An array in numpy's format, or one whose header claims something."""
    if array is not None:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()
    text = (
        f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117)
        + b"\n"
    )
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", len(text))
        + text
        + data
    )


def write_npz(path: pathlib.Path, packing: int = zipfile.ZIP_STORED, **members: bytes) -> str:
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, data in ({"labels": npy(LABELS)} | members).items():
            archive.writestr(f"{name}.npy", data)
    return str(path)


BAD_ARRAYS = {
    "more than there is": (
        npy(shape=f"({2**40},4,4)", data=bytes(99)),
        r"images.npy claims the shape \(1099511627776, 4, 4\)",
    ),
    "more than there can be": (
        npy(shape=f"({2**62},{2**62},4)", data=bytes(99)),
        "images.npy claims the shape",
    ),
    "less than there is": (
        npy(shape="(1,4,4)", data=bytes(99)),
        "claims the shape .* has 99 bytes",
    ),
    "a negative length": (npy(shape="(-3,-4,4)", data=bytes(48)), "claims the shape"),
    "endless items of no size": (npy(shape=f"({2**62},4,4)", descr="'|V0'"), "images"),
    "version 3": (npy(shape="(1,)", version=3, data=b"x"), r"unknown version \(3, 0\)"),
    "a header of 4 GB": (b"\x93NUMPY\2\0" + b"\xff" * 4 + b"x", "EOF|header"),
    "a program as header": (npy(shape="__import__('os').mkdir('trace')"), "malformed node"),
    "no array": (b"just some text" * 9, "magic"),
    "nothing": (b"", "EOF|magic"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_claim_what_they_have_not_are_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, words = BAD_ARRAYS[case]
    with pytest.raises(ValueError, match=words):
        load_npz(write_npz(tmp_path / "a.npz", images=data))
    assert not (tmp_path / "trace").exists()


def test_good_npz_of_every_packing_and_order(tmp_path):
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        for array in (images, np.asfortranarray(images)):
            source = load_npz(write_npz(tmp_path / "a.npz", packing, images=npy(array)))
            np.testing.assert_array_equal(source.images[..., 0], images)


def test_npz_that_unpacks_to_more_than_the_memory_is_not_unpacked(tmp_path, monkeypatch):
    size = 2**24
    path = write_npz(
        tmp_path / "a.npz",
        zipfile.ZIP_DEFLATED,
        images=npy(shape=f"({size},1,1)", data=bytes(size)),
    )
    assert os.path.getsize(path) < size / 500
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "total_memory", lambda: size // 2)
        with pytest.raises(
            ValueError, match="unpacked it has 16,[0-9,]* bytes, more than this machine's memory"
        ):
            load_npz(path)
    assert size < arrays.total_memory() < 2**60


@pytest.mark.parametrize(
    "packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2]
)
def test_damaged_npz_is_one_clear_error(packing, tmp_path):
    path = pathlib.Path(
        write_npz(
            tmp_path / "a.npz", packing, images=npy(np.random.default_rng(0).random((3, 4, 4)))
        )
    )
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert len(load_npz(str(path))) == 3, "only what nobody reads may change unnoticed"
        except ValueError as error:
            assert str(path) in str(error)


class Code:
    """Unpickled, it would create a folder."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["images", "labels"])
def test_code_in_an_npz_is_never_run(name, tmp_path):
    objects = np.empty(3, object)
    objects[:] = [Code(tmp_path / "trace")] * 3
    np.savez(tmp_path / "a.npz", **({"images": IMAGES, "labels": LABELS} | {name: objects}))
    with pytest.raises(ValueError, match=f"{name}.npy holds Python objects"):
        load_npz(str(tmp_path / "a.npz"))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Code(tmp_path / "trace")))
    with pytest.raises(ValueError, match="not a zip file"):
        load_npz(str(tmp_path / "b.npz"))
    assert not (tmp_path / "trace").exists()
    with np.load(tmp_path / "a.npz", allow_pickle=True) as arrays:
        _ = arrays[name]
    assert (tmp_path / "trace").exists(), "the file is dangerous indeed"


# images


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A gray PNG of some chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    pieces = [
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d))
        for kind, d in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


@pytest.mark.parametrize("chunk", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_in_an_image_is_not_unpacked_without_limit(chunk):
    packed, pixels = zlib.compress(bytes(2**25), 9), zlib.compress(bytes(5 * 4))
    body = {
        b"zTXt": b"k\0\0" + packed,
        b"iTXt": b"k\0\1\0\0\0" + packed,
        b"iCCP": b"k\0\0" + packed,
    }[chunk]
    assert decode_image(png(4, 4, (b"IDAT", pixels)), 100).size == (4, 4)
    try:
        assert decode_image(png(4, 4, (chunk, body), (b"IDAT", pixels)), 100).size == (4, 4)
    except BrokenImage as error:
        assert "too large" in str(error)


def test_pixels_beyond_the_size_of_an_image_are_not_unpacked():
    image = decode_image(png(4, 4, (b"IDAT", zlib.compress(bytes(2**27), 9))), 100)
    assert image.size == (4, 4) and image.tobytes() == bytes(48)


# archives of ImageNet, for TensorFlow Datasets reads their members whole


def evil_tar(path: pathlib.Path, name: str, **fields) -> None:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("../ILSVRC2012_val_00000001.JPEG", {}, "is not a path inside the archive"),
        ("/ILSVRC2012_val_00000001.JPEG", {}, "is not a path inside the archive"),
        (
            "ILSVRC2012_val_00000001.JPEG",
            {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
            "is a link",
        ),
    ],
)
def test_evil_archives_of_imagenet_are_refused(name, fields, words, tmp_path):
    write_imagenet(tmp_path, ("n01440764",), per_class=1, validation=1)
    evil_tar(tmp_path / VALIDATION, name, **fields)
    with pytest.raises(DataError, match=words):
        prepare_tfds(str(tmp_path), str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("archive", [TRAIN, VALIDATION])
def test_huge_member_of_an_imagenet_archive_is_refused(archive, tmp_path, monkeypatch):
    write_imagenet(tmp_path, ("n01440764",), per_class=1, validation=1)
    small = write_tar(tmp_path / "inner.tar", {"a.JPEG": encode(crop("flower"), quality=1)})
    limit = os.path.getsize(small)
    monkeypatch.setattr("djepa_jax.data.ilsvrc.MAX_FILE_BYTES", limit)
    members = {"ILSVRC2012_val_00000001.JPEG": bytes(limit + 1)}
    if archive == TRAIN:
        members = {
            "n01440764.tar": pathlib.Path(
                write_tar(tmp_path / "inner.tar", {"b.JPEG": bytes(limit + 1)})
            ).read_bytes()
        }
    write_tar(tmp_path / archive, members)
    with pytest.raises(
        DataError, match=rf'JPEG" in .*{archive}.* has {limit + 1} bytes, the limit is {limit}'
    ):
        prepare_tfds(str(tmp_path), str(tmp_path / "data"))


# text


def test_file_of_names_is_not_read_without_limit(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"name\n" * 2)
    assert class_names.resolve(str(tmp_path / "names.txt"), 2) == ("name", "name")
    os.truncate(tmp_path / "names.txt", 2**40)  # takes no space
    with pytest.raises(ValueError, match="names.txt.* more than 16,777,216 bytes"):
        class_names.resolve(str(tmp_path / "names.txt"), 2)


@pytest.mark.parametrize("place", ["/etc/hostname", "../../secret", "folder/shard"])
def test_latent_cache_names_no_file_outside_of_it(place, tmp_path):
    folder = write_cache(tmp_path / "cache")
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["shards"][0]["file"] = place
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(DataError, match=f"{place} is not the name of a file"):
        LatentCache(str(folder))


def test_deep_json_in_a_latent_cache_is_one_clear_error(tmp_path):
    folder = write_cache(tmp_path / "cache")
    (folder / "metadata.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"metadata.json cannot be read \(maximum recursion"):
        LatentCache(str(folder))
    assert read_shard_record(folder / "metadata.json") is None
