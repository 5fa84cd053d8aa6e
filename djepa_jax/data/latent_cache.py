"""The latent cache: moments of an autoencoder's posterior for every image and its mirror image, in
array_record shards.

A cache is a folder with `metadata.json`, written last, and `shards/`. A shard holds a fixed range
of the source's examples; beside it lies a small JSON file with its checksum and counts, which is
what makes an unfinished cache go on.
"""

import dataclasses
import errno
import json
import os
import pathlib
import struct
from collections.abc import Sequence

import grain
import jax.numpy as jnp
import numpy as np
from array_record.python import array_record_module

from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.config.class_names import IMAGENET, imagenet, resolve
from djepa_jax.data.layout import METADATA_NAME, SHARDS_NAME
from djepa_jax.data.records import DataError

FORMAT = 1
DTYPES = {"bfloat16": jnp.bfloat16, "float32": np.float32}
HEADER = struct.Struct("<iH")  # class, bytes of the key
WRITER_OPTIONS = "group_size:1,uncompressed"  # moments are as good as noise
VERIFIED_BYTES = 2**32  # larger caches are not read through when they are opened
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of errors that more space would mend


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard."""

    file: str
    count: int
    bytes: int
    sha256: str
    class_counts: dict[str, int]
    skipped: dict[str, str]  # key of every image that could not be read, and why
    sum: (
        float  # of posterior samples' expected values, over all latents of images and mirror images
    )
    sum_of_squares: float

    def __post_init__(self):
        if self.count != sum(self.class_counts.values()) or not all(
            map(str.isdecimal, self.class_counts)
        ):
            raise ValueError(f"the counts of {self.file} do not agree")
        if pathlib.PurePath(self.file).name != self.file:
            raise ValueError(f"{self.file} is not the name of a file")


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a complete cache holds. The network sees (latents - shift) * scale."""

    format: int
    count: int
    num_classes: int
    class_names: tuple[str, ...]
    image_size: int
    latent_size: int
    latent_channels: int
    dtype: str
    autoencoder: dict[str, str]  # name and sha256
    scale: float
    shift: float
    measured_mean: float
    measured_std: float
    source: dict[str, str]
    shards: tuple[Shard, ...]

    def __post_init__(self):
        count = sum(shard.count for shard in self.shards)
        if self.count != count or self.dtype not in DTYPES or "sha256" not in self.autoencoder:
            raise ValueError("its counts do not agree, or its type or autoencoder is unknown")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the moments of one image: means, then log-variances."""
        return (self.latent_size, self.latent_size, 2 * self.latent_channels)


def pack(label: int, key: str, moments: np.ndarray) -> bytes:
    """One record: class, key, and the moments `[2, h, w, 2c]` of image and mirror image."""
    name = key.encode(errors="surrogateescape")  # names of files need not be Unicode
    return HEADER.pack(label, len(name)) + name + np.ascontiguousarray(moments).tobytes()


def unpack(record: bytes, shape: Sequence[int], dtype) -> tuple[int, str, np.ndarray]:
    """Inverse of `pack`; `shape` is that of one image's moments."""
    label, length = HEADER.unpack_from(record)
    start = HEADER.size + length
    moments = np.frombuffer(record, dtype, offset=start).reshape(2, *shape)
    return label, record[HEADER.size : start].decode(errors="surrogateescape"), moments


def write_shard(path: pathlib.Path, records: Sequence[bytes]) -> None:
    """Write records under a temporary name, read them back, and give the file its name.

    Raises:
        OSError: the file could not be written whole, as when the disk is full.
    """
    temporary = path.with_name(path.name + ".unfinished")
    temporary.unlink(missing_ok=True)
    try:
        writer = array_record_module.ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        reader = array_record_module.ArrayRecordReader(str(temporary))
        whole = reader.num_records() == len(records) and all(
            a == b for a, b in zip(reader.read_all(), records, strict=True)
        )
        reader.close()
    except (
        RuntimeError,
        ValueError,
        IndexError,
    ) as error:  # what the library makes of failed system calls
        number = next((number for number in FULL if os.strerror(number) in str(error)), errno.EIO)
        raise OSError(number, f"{temporary} could not be written: {error}") from error
    if not whole:
        raise OSError(errno.EIO, f"{temporary} does not hold what was written to it")
    temporary.replace(path)


def read_shard_record(path: pathlib.Path) -> Shard | None:
    """The finished shard whose JSON file is `path`, or None where there is none or it is
    damaged.
    """
    try:
        return Shard(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def read_metadata(folder: pathlib.Path) -> Metadata:
    """What a cache holds.

    Raises:
        DataError: there is no complete cache, or it is of another format.
    """
    path = folder / METADATA_NAME
    if not path.is_file():
        state = (
            "holds an unfinished latent cache"
            if (folder / SHARDS_NAME).is_dir()
            else "holds no latent cache"
        )
        raise DataError(
            f'data.path is "{folder}", which {state}; make one with --mode=prepare '
            f"--workdir={folder}."
        )
    try:
        values = json.loads(path.read_text("utf-8"))
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        metadata = Metadata(shards=shards, **values | {"class_names": tuple(values["class_names"])})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        advice = "run --mode=prepare again, which only writes this file anew"
        raise DataError(f"{path} cannot be read ({error}); {advice}.") from error
    if metadata.format != FORMAT:
        raise DataError(
            f"{path} has format {metadata.format}, this version reads {FORMAT}; prepare the data "
            "again."
        )
    return metadata


def check_shard(folder: pathlib.Path, shard: Shard, verify: bool) -> None:
    """Raise DataError if a shard is missing, cut, or (with `verify`) differs from its checksum."""
    path = folder / SHARDS_NAME / shard.file
    remedy = (
        f"copy it again, or remove it and run --mode=prepare --workdir={folder} again, which "
        "makes only what is missing"
    )
    if not path.is_file():
        raise DataError(f"shard {path} is missing; {remedy}.")
    if path.stat().st_size != shard.bytes:
        raise DataError(
            f"shard {path} has {path.stat().st_size} bytes instead of {shard.bytes}; {remedy}."
        )
    if verify and file_sha256(path) != shard.sha256:
        raise DataError(f"shard {path} differs from its checksum, sha256 {shard.sha256}; {remedy}.")


class LatentCache:
    """A complete cache as a source of examples.

    An item has `example`, the moments `[h, w, 2c]`, `mirror`, those of the mirror image, and
    `condition`, the class.

    Raises:
        DataError: the cache is unfinished or damaged.
    """

    def __init__(self, path: str):
        self.folder = pathlib.Path(path)
        self.metadata = read_metadata(self.folder)
        verify = sum(shard.bytes for shard in self.metadata.shards) <= VERIFIED_BYTES
        for shard in self.metadata.shards:
            check_shard(self.folder, shard, verify)
        paths = [str(self.folder / SHARDS_NAME / shard.file) for shard in self.metadata.shards]
        try:
            self._records = grain.sources.ArrayRecordDataSource(paths)
        except (
            RuntimeError,
            ValueError,
        ) as error:  # a damaged index; only the checksums tell in which shard
            for shard in self.metadata.shards:
                check_shard(self.folder, shard, verify=True)
            raise DataError(f"{self.folder} cannot be opened: {error}") from error

    def __len__(self) -> int:
        return self.metadata.count

    def __getitem__(self, index: int) -> dict:
        label, _, moments = self._read(index)
        return {"example": moments[0], "mirror": moments[1], "condition": np.int32(label)}

    def key(self, index: int) -> str:
        """What an image is called."""
        return self._read(index)[1]

    def _read(self, index: int) -> tuple[int, str, np.ndarray]:
        try:
            return unpack(self._records[index], self.metadata.shape, DTYPES[self.metadata.dtype])
        except (RuntimeError, ValueError, struct.error) as error:
            shard = self._shard_of(index)
            raise DataError(
                f"example {index} in shard {self.folder / SHARDS_NAME / shard.file} cannot be "
                "read (its sha256 should be "
                f"{shard.sha256}): {error}; remove that file and run --mode=prepare again."
            ) from error

    def _shard_of(self, index: int) -> Shard:
        ends = np.cumsum([shard.count for shard in self.metadata.shards])
        return self.metadata.shards[int(np.searchsorted(ends, index, side="right"))]

    @property
    def labels(self) -> np.ndarray:
        """The classes that occur, each once: what checks of ranges need."""
        return np.array(
            sorted({int(label) for shard in self.metadata.shards for label in shard.class_counts})
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the labels."""
        return self.metadata.class_names


def check_cache(metadata: Metadata, data) -> None:
    """Compare a cache with `config.data`.

    Raises:
        DataError: every value that differs, with the flag that would agree; or the names of its
            classes.
    """
    pairs = {
        "data.image_size": (metadata.latent_size, data.image_size),
        "data.channels": (metadata.latent_channels, data.channels),
        "data.num_classes": (
            metadata.num_classes,
            metadata.num_classes if data.unconditional else data.num_classes,
        ),
        "data.latent_scale": (metadata.scale, data.latent_scale),
        "data.latent_shift": (metadata.shift, data.latent_shift),
    }
    wrong = [
        f"--config.{key}={cache!r} (now {now!r})"
        for key, (cache, now) in pairs.items()
        if cache != now
    ]
    if wrong:
        raise DataError(
            f"the latent cache {data.path} was made for another config; it needs "
            f"{', '.join(wrong)}."
        )
    if data.class_names and not data.unconditional:
        _check_names(metadata.class_names, data)


def _check_names(found: Sequence[str], data) -> None:
    """Raise DataError unless a cache's classes have the names of `config.data`, or no names but
    their numbers.
    """
    wanted = resolve(data.class_names, data.num_classes)
    same = [wanted, resolve("", data.num_classes)]
    if data.class_names == IMAGENET:
        same.append(tuple(wnid for wnid, _ in imagenet()))
    if tuple(found) in same:
        return
    number = next(
        number
        for number, names in enumerate(zip(found, wanted, strict=True))
        if names[0] != names[1]
    )
    raise DataError(
        f"the latent cache {data.path} has other classes than data.class_names says: class "
        f'{number} is "{found[number]}" in the '
        f'cache and "{wanted[number]}" in the config; name a file with the names of the cache, or '
        "write "
        "--config.data.class_names= to call classes by their number."
    )


def check_autoencoder(metadata: Metadata, path: str, sha256: str) -> None:
    """Raise DataError unless a cache was made with the autoencoder that is to decode samples, by
    its sha256.
    """
    found = metadata.autoencoder["sha256"]
    if found != sha256:
        raise DataError(
            f"the latent cache was made with the autoencoder of sha256 {found}, "
            f"config.autoencoder.path {path} has "
            f"{sha256}; name the file that the cache was made with, or prepare the data again."
        )
