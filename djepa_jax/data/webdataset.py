"""Images in tar files, as webdataset writes them: `KEY.jpg` with `KEY.cls` or `KEY.json`."""

import errno
import glob
import json
import os
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from djepa_jax.data.records import MAX_FILE_BYTES, DataError, checksum
from djepa_jax.data.tar_index import Member, walk_tar

IMAGES, LABELS = (
    ("jpg", "jpeg", "png", "webp"),
    ("json", "cls"),
)  # of two labels, the last kind wins
MAX_LABEL_BYTES = 2**20
MAX_LABEL = 2**31 - 1
MAX_SHARDS = 100_000
THREADS = 8  # they wait for the disk, not for each other


class TarRecords:
    """Images in tar files, each read by its place there.

    Args:
        shards: the tar files.
        members: for each of them its images with their labels.
    """

    class_names = None
    remedy = "copy its tar file again"

    def __init__(self, shards: list[str], members: list[list[tuple[Member, int]]]):
        self.shards = tuple(shards)
        found = [image for images in members for image in images]
        # Arrays pickle and take memory as a million objects would not.
        self._names = np.array(
            [member.name.encode("utf-8", "surrogateescape") for member, _ in found]
        )
        self._places = np.array(
            [(member.offset, member.size) for member, _ in found], np.int64
        ).reshape(-1, 2)
        self._shards = np.repeat(
            np.arange(len(shards), dtype=np.int32), [len(images) for images in members]
        )
        self.labels = np.array([label for _, label in found], np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        offset, size = map(int, self._places[index])
        fd = os.open(self.shards[self._shards[index]], os.O_RDONLY)
        try:
            data = os.pread(fd, size, offset)
        finally:
            os.close(fd)
        if len(data) < size:  # it was longer when it was opened
            raise OSError(errno.EIO, "the tar file ends before it")
        return data, int(self.labels[index])

    def key(self, index: int) -> str:
        """The name of the tar file and the name inside it."""
        return f"{os.path.basename(self.shards[self._shards[index]])}:{_decode(self._names[index])}"

    def digest(self) -> str:
        """A checksum of the names of tar files and images, of where images lie in them, and of the
        labels.
        """
        return checksum(
            self._names,
            self._places,
            self._shards,
            self.labels,
            *map(os.path.basename, self.shards),
        )


def open_tars(path: str, key: str = "data.path") -> TarRecords:
    """All images of the tar files that `path` stands for (see `find_shards`).

    Args:
        path: a folder, a file, or a pattern.
        key: what its setting is called.

    Raises:
        DataError: no tar files, a damaged one, one with links or names that lead outside, or an
            image without a label.
    """
    shards = find_shards(path, key)
    with ThreadPoolExecutor(THREADS) as pool:
        records = TarRecords(shards, list(pool.map(_index_shard, shards)))
    if not len(records):
        raise DataError(
            f'the {len(shards)} tar files of {key} "{path}" hold no images; '
            f"they need KEY.{'|'.join(IMAGES)} with KEY.cls or KEY.json."
        )
    return records


def find_shards(path: str, key: str = "data.path") -> list[str]:
    """The tar files that are meant by a folder of them, one file, a pattern such as
    `train-{000..127}.tar`, or a glob.

    Raises:
        DataError: there are none, one of a pattern is missing, or a brace expression makes no
            sense.
    """
    path = os.path.expanduser(path)
    if path and os.path.isdir(path):
        found = sorted(
            str(file) for file in pathlib.Path(path).glob("*.tar") if not file.name.startswith(".")
        )
    elif os.path.isfile(path):
        found = [path]
    else:
        patterns = expand_braces(path, key)
        matches = [
            sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
            for pattern in patterns
        ]
        found = [file for files in matches for file in files]
    missing = [file for file in found if not os.path.isfile(file)]
    if missing or not found:
        what = (
            f"{len(missing)} of {len(found)} files are missing, such as {missing[0]}"
            if missing
            else "there are no tar files"
        )
        raise DataError(
            f'{key} is "{path}", where {what}; name a folder of .tar files, a glob, or '
            f"train-{{000..127}}.tar with "
            "the right numbers."
        )
    return found


def expand_braces(pattern: str, key: str = "data.path") -> list[str]:
    """What a shell makes of `{000..127}` (with leading zeros) and `{a,b}`.

    Raises:
        DataError: anything else in braces, or too many results.
    """
    inner = re.search(r"\{([^{}]*)\}", pattern)
    if inner is None:
        if "{" in pattern or "}" in pattern:
            raise DataError(f'{key} "{pattern}" has a brace without its partner.')
        return [pattern]
    head, tail = pattern[: inner.start()], pattern[inner.end() :]
    results = {}  # ordered, and each once
    for choice in _choices(inner[1], pattern, key):
        results |= dict.fromkeys(expand_braces(head + choice + tail, key))
        if len(results) > MAX_SHARDS:
            raise DataError(f'{key} "{pattern}" stands for more than {MAX_SHARDS} files.')
    return list(results)


def _choices(inner: str, pattern: str, key: str) -> list[str]:
    limits = re.fullmatch(r"([0-9]{1,9})\.\.([0-9]{1,9})", inner)
    if limits is None and "," in inner:
        return inner.split(",")
    if limits is None or int(limits[2]) < int(limits[1]):
        raise DataError(
            f'"{{{inner}}}" in {key} "{pattern}" is neither a range such as {{000..127}} nor a '
            f"list {{a,b}}."
        )
    padded = any(len(limit) > 1 and limit[0] == "0" for limit in limits.groups())
    width = max(map(len, limits.groups())) if padded else 0
    last = min(int(limits[2]), int(limits[1]) + MAX_SHARDS)
    return [f"{number:0{width}d}" for number in range(int(limits[1]), last + 1)]


def _index_shard(file: str) -> list[tuple[Member, int]]:
    """The images of a tar file, in their order, with their labels."""
    images, labels = {}, {kind: {} for kind in LABELS}
    try:
        fd = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise DataError(
            f'"{file}" cannot be read: {error.strerror}; correct its permissions.'
        ) from error
    try:
        for member in walk_tar(fd, file):
            folder, name = os.path.split(member.name.removeprefix("./"))
            stem, _, suffix = name.partition(".")
            if not stem:  # hidden, such as what macOS adds for every file
                continue
            key, suffix = os.path.join(folder, stem), suffix.lower()
            if suffix in IMAGES:
                _check_member(file, member, MAX_FILE_BYTES, twin=images.get(key))
                images[key] = member
            elif suffix in LABELS:
                _check_member(file, member, MAX_LABEL_BYTES)
                labels[suffix][key] = _read_label(
                    file, member, suffix, os.pread(fd, member.size, member.offset)
                )
    finally:
        os.close(fd)
    return _pair(
        file,
        images,
        {
            key: label
            for found in labels.values()
            for key, label in found.items()
            if label is not None
        },
    )


def _check_member(file: str, member: Member, max_bytes: int, twin: Member | None = None) -> None:
    if member.size > max_bytes:
        raise DataError(
            f'"{member.name}" in "{file}" has {member.size} bytes, the limit is {max_bytes}; take '
            "it out."
        )
    if twin is not None:
        raise DataError(
            f'"{file}" has two images of one key, "{twin.name}" and "{member.name}"; rename one '
            "with its label."
        )


def _read_label(file: str, member: Member, kind: str, text: bytes) -> int | None:
    """The whole number in a .cls file, or at "label" in a .json file; None if that has no
    "label".
    """
    try:
        label = int(text) if kind == "cls" else json.loads(text).get("label")
        if label is None or (type(label) is int and abs(label) <= MAX_LABEL):
            return label
    except (ValueError, AttributeError, RecursionError):
        pass
    wanted = "one whole number" if kind == "cls" else 'an object with a whole number as "label"'
    raise DataError(f'"{member.name}" in "{file}" must be {wanted}, it starts with {text[:40]!r}.')


def _pair(file: str, images: dict[str, Member], labels: dict[str, int]) -> list[tuple[Member, int]]:
    lonely = next((member.name for key, member in images.items() if key not in labels), None)
    if lonely is not None:
        raise DataError(
            f'"{lonely}" in "{file}" has no label; put a .cls file, or a .json file with "label", '
            "beside it."
        )
    unseen = next((key for key in labels if key not in images), None)
    if unseen is not None:
        raise DataError(
            f'"{unseen}" in "{file}" has a label but no image ({", ".join(IMAGES)}); add it, or '
            "take the label out."
        )
    return [(member, labels[key]) for key, member in images.items()]


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
