"""Images in tar files, as webdataset writes them: `KEY.jpg` with `KEY.cls` or `KEY.json`.

A caption of it may be `KEY.txt`.
"""

import errno
import glob
import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np

from djepa_jax.data.images import ENDINGS, FORMATS, is_image
from djepa_jax.data.records import MAX_FILE_BYTES, NO_ENDING, DataError, checksum, counted

LABELS = (".json", ".cls")
MAX_HEADER_BYTES = 2**20  # of a label, or of a header, which may hold a long name
MAX_SHARDS = 100_000
THREADS = 8  # they wait for the disk, not for each other


class Member(NamedTuple):
    """A file inside a tar file, and where its bytes are there."""

    name: str
    offset: int
    size: int


class TarRecords:
    """Images in tar files, each read by its place there; `images` holds those of each file."""

    remedy = "copy its tar file again"

    def __init__(self, files: list[str], images: list[list[tuple[Member, int]]], class_names=None):
        self.files, self.class_names, self.left_out = files, class_names, Counter()
        found = [pair for pairs in images for pair in pairs]
        # Arrays take memory as a million objects would not.
        self._names = np.array([image.name.encode(errors="surrogateescape") for image, _ in found])
        self._places = np.array([image[1:] for image, _ in found], np.int64).reshape(-1, 2)
        counts = [len(pairs) for pairs in images]
        self._files = np.repeat(np.arange(len(files), dtype=np.int32), counts)
        self.labels = np.array([label for _, label in found], np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        offset, size = map(int, self._places[index])
        with open(self.files[self._files[index]], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) < size:  # it was longer when it was opened
            raise OSError(errno.EIO, "the tar file ends before it")
        return data, int(self.labels[index])

    def key(self, index: int) -> str:
        """The name of the tar file and the name inside it."""
        name = self._names[index].decode(errors="surrogateescape")
        return f"{os.path.basename(self.files[self._files[index]])}:{name}"

    def digest(self) -> str:
        """A checksum of all names, of where images lie in the files, and of the labels."""
        names = map(os.path.basename, self.files)
        return checksum(self._names, self._places, self._files, self.labels, *names)


class _Window:
    """A part of a file for `tarfile`, which would take any memory that a header claims."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size, self._position = file, start, size, 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError(f"a header claims {size} bytes")
        size = max(0, min(size, self._size - self._position))
        data = os.pread(self._file.fileno(), size, self._start + self._position)
        self._position += len(data)
        return data


def tar_members(file: str, inner: Member | None = None, limit=MAX_FILE_BYTES) -> list[Member]:
    """The files in a tar file, or in one inside it, in their order; nothing is unpacked.

    Raises:
        DataError: it is compressed, damaged or cut off, or has files of more bytes than the limit,
            links, special files or names that lead outside.
    """
    members = []
    try:
        with open(file, "rb", buffering=0) as stream:
            _, start, size = inner or Member("", 0, os.fstat(stream.fileno()).st_size)
            window = _Window(stream, start, size)
            tar = tarfile.TarFile(fileobj=window, encoding="utf-8")
            for entry in tar:
                plain = entry.isreg() and not entry.issparse()
                if not plain and not entry.isdir():
                    raise ValueError(f'"{entry.name}" is a link or a special file')
                if entry.name.startswith("/") or ".." in entry.name.split("/"):
                    raise ValueError(f'"{entry.name}" is not a path inside the archive')
                if not 0 <= entry.size <= limit:
                    raise ValueError(f'"{entry.name}" has {entry.size} bytes, the limit is {limit}')
                if plain:
                    members.append(Member(entry.name, start + entry.offset_data, entry.size))
            # `tarfile` takes a damaged header, and a file that is cut off there, for the end.
            window.seek(tar.offset)
            if window.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"it is damaged or cut off at byte {tar.offset}")
    except Exception as error:  # damaged headers make `tarfile` fail in ways nobody has listed
        where = f'"{file}"' if inner is None else f'"{inner.name}" in "{file}"'
        raise DataError(
            f"{where} cannot be read as an uncompressed tar file of plain files: {error}; make or "
            "copy it again."
        ) from error
    return members


def open_tars(path: str, where: str, captions: str = "") -> TarRecords:
    """All images of the tar files of a folder, of one file, of `train-{000..127}.tar` or a glob.

    With the ending of the files of `captions`, records have those, and labels may be absent.
    """
    if captions.lower() in (*LABELS, *ENDINGS):
        raise DataError(
            f'data.captions is "{captions}", the ending of images or of labels; name another, such '
            "as .txt."
        )
    folder, name = os.path.split(path)
    if os.path.isdir(path):
        folder, name = path, "*.tar"
    elif not os.path.isdir(folder):  # its name may be a pattern, too
        folder, name = "", path
    names = [name] if os.path.exists(path) else expand_braces(name, where)
    files = list(dict.fromkeys(file for name in names for file in _matching(folder, name)))
    missing = [file for file in files if not os.path.isfile(file)]
    if missing or not files:
        raise DataError(
            f"{where}: {len(missing)} of {len(files)} tar files are missing, {missing[:1]}; name a "
            "folder of .tar files, a glob, or train-{000..127}.tar with the right numbers."
        )
    left_out = [Counter() for _ in files]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(_labelled_images, files, left_out, itertools.repeat(captions)))
    records = TarRecords(files, [images for images, _ in found])
    records.captions = [text for _, texts in found for text in texts]
    records.left_out = sum(left_out, Counter())
    if not len(records):
        there = counted(records.left_out) or "nothing"
        raise DataError(f"the {len(files)} tar files of {where} hold no images but {there}.")
    return records


def _matching(folder: str, name: str) -> list[str]:
    """The files in a folder that a glob stands for; the name of a file that is there is none."""
    is_glob = glob.has_magic(name) and not os.path.exists(os.path.join(folder, name))
    found = sorted(glob.glob(name, root_dir=folder)) if is_glob else [name]
    return [os.path.join(folder, file) for file in found]


def expand_braces(pattern: str, where: str) -> list[str]:
    """What a shell makes of `{000..127}` (with leading zeros) and `{a,b}`."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    limits = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", braces[1])
    if limits and int(limits[1]) <= int(limits[2]):
        numbers = range(int(limits[1]), int(limits[2]) + 1)[:MAX_SHARDS]
        choices = [f"{number:0{len(limits[1])}d}" for number in numbers]
    elif "," in braces[1]:
        choices = braces[1].split(",")
    else:
        raise DataError(f'"{braces[0]}" in {where} is no range {{000..127}} and no list {{a,b}}.')
    head, tail = pattern[: braces.start()], pattern[braces.end() :]
    return [name for choice in choices for name in expand_braces(head + choice + tail, where)]


def _labelled_images(
    file: str, left_out: Counter, captions: str
) -> tuple[list[tuple[Member, int]], list[bytes | None]]:
    """The images of a tar file, in their order, with their labels, and the captions of each.

    Other files are counted; those of a sample with an image are its own matter.
    """
    images, labels, texts, others = {}, {}, {}, {}
    with open(file, "rb", buffering=0) as stream:

        def read(member: Member) -> bytes:
            return os.pread(stream.fileno(), min(member.size, MAX_HEADER_BYTES), member.offset)

        for member in tar_members(file):
            folder, name = os.path.split(member.name.removeprefix("./"))
            stem, dot, ending = name.partition(".")
            key, ending = os.path.join(folder, stem), (dot + ending).lower()
            if not stem:  # hidden, such as what macOS adds for every file
                continue
            if ending in ENDINGS:
                images.setdefault(key, []).append(member)
            elif ending in LABELS:
                label = _read_label(read(member), f'"{member.name}" in "{file}"')
                if label is not None and (ending == ".cls" or key not in labels):
                    labels[key] = label
            elif captions and ending == captions:
                texts[key] = read(member)
            else:
                others.setdefault(key, []).append((member, ending))
        if captions:
            left_out[captions] += len(texts.keys() - images.keys() - others.keys())
            for key in images.keys() | (others.keys() & texts.keys()):
                labels.setdefault(key, 0)
        for key in [key for key in others if key not in images]:
            found = [
                member
                for member, ending in others[key]
                if key in labels
                and "." not in ending[1:]  # a map beside an image, as .seg.png
                and is_image(io.BytesIO(read(member)), ending)
            ]
            if found:
                images[key] = found
            else:
                left_out.update(ending or NO_ENDING for _, ending in others[key])
                labels.pop(key, None)
    for key in images | labels:
        if key not in labels or len(images.get(key, ())) != 1:
            raise DataError(
                f'"{key}" in "{file}" needs one image ({", ".join(FORMATS)}) and a label (.cls, or '
                '.json with "label"); add what is missing, or take it out.'
            )
    found = [(member, labels[key]) for key, (member,) in images.items()]
    return found, [texts.get(key) for key in images]


def _read_label(text: bytes, where: str) -> int | None:
    """The whole number that a .cls file is, and a .json file has as "label", or has none."""
    try:
        value = json.loads(text)
        label = value.get("label") if isinstance(value, dict) else value
        if (type(label) is int and abs(label) < 2**31) or (label is None and value is not None):
            return label
    except (ValueError, RecursionError):
        pass
    raise DataError(f'{where} must be a whole number, or have one as "label", not {text[:40]!r}.')
