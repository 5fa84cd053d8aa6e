"""The latent cache: moments of an autoencoder's posterior for every image and its mirror image.

Clips are images, frame by frame.

A cache is a folder with `metadata.json`, written last, and `shards/`. A shard is an array_record
file of a fixed range of the source's examples; beside it lies a small JSON file with its checksum
and counts, which is what makes an unfinished cache go on.
"""

import dataclasses
import json
import os
import pathlib
import struct
import uuid
from collections.abc import Sequence

import grain
import jax.numpy as jnp
import numpy as np
from array_record.python import array_record_module

from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.config.class_names import IMAGENET, imagenet, resolve
from djepa_jax.data.records import DataError, Source
from djepa_jax.runtime.staging import local_copy
from djepa_jax.runtime.storage import as_path, is_remote, write_bytes, write_json

METADATA_NAME, SHARDS_NAME = "metadata.json", "shards"
FORMAT = 1
DTYPES = {"bfloat16": jnp.bfloat16, "float32": np.float32}
HEADER = struct.Struct("<iH")  # class, bytes of the key
WRITER_OPTIONS = "group_size:1,uncompressed"  # moments are as good as noise
VERIFIED_BYTES = 2**32  # larger caches are not read through when they are opened


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard; the sums are of posterior samples' expected values, over all latents."""

    file: str
    count: int
    bytes: int
    sha256: str
    class_counts: dict[str, int]
    skipped: dict[str, str]  # key of every image that could not be read, and why
    sum: float
    sum_of_squares: float
    captions: list[str] = dataclasses.field(default_factory=list)  # of all examples, or none

    def __post_init__(self):
        numbers = all(map(str.isdecimal, self.class_counts))
        counts = {self.count, sum(self.class_counts.values()), len(self.captions) or self.count}
        if len(counts) > 1 or not numbers:
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
    num_frames: int = 0  # of clips; 0 for images

    def __post_init__(self):
        if self.format != FORMAT:
            raise ValueError(f"it has format {self.format}, this version reads {FORMAT}")
        count = sum(shard.count for shard in self.shards)
        if self.count != count or self.dtype not in DTYPES or "sha256" not in self.autoencoder:
            raise ValueError("its counts do not agree, or its type or autoencoder is unknown")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the moments of one image or clip: means, then log-variances."""
        frames = (self.num_frames,) if self.num_frames else ()
        return (*frames, self.latent_size, self.latent_size, 2 * self.latent_channels)


def pack(label: int, key: str, moments: np.ndarray) -> bytes:
    """One record: class, key, and the moments `[2, (T,) h, w, 2c]` of image and mirror image."""
    name = key.encode(errors="surrogateescape")  # names of files need not be Unicode
    return HEADER.pack(label, len(name)) + name + np.ascontiguousarray(moments).tobytes()


def unpack(record: bytes, shape: Sequence[int], dtype) -> tuple[int, str, np.ndarray]:
    """Inverse of `pack`; `shape` is that of one image's moments."""
    label, length = HEADER.unpack_from(record)
    start = HEADER.size + length
    moments = np.frombuffer(record, dtype, offset=start).reshape(2, *shape)
    return label, record[HEADER.size : start].decode(errors="surrogateescape"), moments


def write_shard(path: pathlib.Path, records: list[bytes], contents: dict) -> Shard:
    """Write records under a temporary name, read them back, name the file, and describe it."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        writer = array_record_module.ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        reader = array_record_module.ArrayRecordReader(str(temporary))
        if reader.read_all() != records:
            raise OSError("it does not hold what was written to it")
        size, sha256 = temporary.stat().st_size, file_sha256(temporary)
        shard = Shard(file=path.name, bytes=size, sha256=sha256, **contents)
        temporary.replace(path)
        write_json(path.with_name(f"{path.name}.json"), dataclasses.asdict(shard))
        return shard
    except (OSError, RuntimeError, ValueError, IndexError) as error:  # of failed system calls
        raise OSError(
            f"shard {path} cannot be written ({error}); make room or repair the disk, and run the "
            "same command again: finished shards are kept."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_metadata(folder: pathlib.Path) -> Metadata:
    """What a complete cache holds."""
    path = folder / METADATA_NAME
    if not path.is_file():
        what = "an unfinished" if (folder / SHARDS_NAME).is_dir() else "no"
        raise DataError(
            f'data.path is "{folder}", which holds {what} latent cache; make one with '
            "--mode=prepare, or copy it again."
        )
    try:
        values = json.loads(path.read_text("utf-8"))
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        return Metadata(shards=shards, **values | {"class_names": tuple(values["class_names"])})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); run --mode=prepare again, which only writes this "
            "file anew."
        ) from error


def local_cache(path: str, staging: str) -> pathlib.Path:
    """The folder of a cache on a local disk; one in a bucket is copied, unless it was before."""
    if not is_remote(path):
        return local_copy(path, staging)
    folder = as_path(path)
    metadata, text = read_metadata(folder), (folder / METADATA_NAME).read_bytes()
    files = [(f"{SHARDS_NAME}/{s.file}", s.bytes, f"sha256:{s.sha256}") for s in metadata.shards]
    copy = local_copy(path, staging, files=files)
    write_bytes(copy / METADATA_NAME, text)  # not among the files: scales may change, shards stay
    return copy


def check_shard(folder: pathlib.Path, shard: Shard, verify: bool) -> None:
    """Raise DataError if a shard is missing, cut, or (with `verify`) differs from its checksum."""
    path, wrong = folder / SHARDS_NAME / shard.file, None
    if not path.is_file():
        wrong = "is missing"
    elif path.stat().st_size != shard.bytes:
        wrong = f"has {path.stat().st_size} bytes instead of {shard.bytes}"
    elif verify and file_sha256(path) != shard.sha256:
        wrong = f"differs from its checksum, sha256 {shard.sha256}"
    if wrong:
        raise DataError(
            f"shard {path} {wrong}; copy it again, or remove it and run --mode=prepare "
            f"--workdir={folder} again, which makes only what is missing."
        )


def find_shard(folder: pathlib.Path, name: str, verify: bool = False) -> Shard | None:
    """The shard with this name of a file; None unless it is there and whole, as `check_shard`."""
    try:
        path = folder / SHARDS_NAME / f"{name}.json"
        shard = Shard(**json.loads(path.read_text("utf-8")))
        check_shard(folder, shard, verify)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return shard if shard.file == name else None


class LatentCache(Source):
    """A complete cache as a source.

    An item has `example`, the moments `[(T,) h, w, 2c]`, `mirror`, those of the mirror image, and
    `condition`, the class.
    """

    def __init__(self, path: str | os.PathLike):
        self.folder = pathlib.Path(path)
        self.metadata = read_metadata(self.folder)
        shards, self.class_names = self.metadata.shards, self.metadata.class_names
        self.captions = [text for shard in shards for text in shard.captions]
        self.labels = np.array(sorted({int(label) for s in shards for label in s.class_counts}))
        verify = sum(shard.bytes for shard in shards) <= VERIFIED_BYTES
        for shard in shards:
            check_shard(self.folder, shard, verify)
        paths = [str(self.folder / SHARDS_NAME / shard.file) for shard in shards]
        try:
            self._records = grain.sources.ArrayRecordDataSource(paths)
        except (RuntimeError, ValueError) as error:  # a damaged index
            for shard in shards:  # only the checksums tell in which shard
                check_shard(self.folder, shard, verify=True)
            raise DataError(f"{self.folder} cannot be opened: {error}; copy it again.") from error

    def __len__(self) -> int:
        return self.metadata.count

    def __getitem__(self, index: int) -> dict:
        label, _, moments = self._read(index)
        return {"example": moments[0], "mirror": moments[1], "condition": np.int32(label)}

    def key(self, index: int) -> str:
        """What an image is called."""
        return self._read(index)[1]

    def _read(self, index: int) -> tuple[int, str, np.ndarray]:
        metadata = self.metadata
        try:
            return unpack(self._records[index], metadata.shape, DTYPES[metadata.dtype])
        except (RuntimeError, ValueError, struct.error) as error:
            ends = np.cumsum([shard.count for shard in metadata.shards])
            shard = metadata.shards[int(np.searchsorted(ends, index, side="right"))]
            raise DataError(
                f"example {index} in shard {self.folder / SHARDS_NAME / shard.file} cannot be read "
                f"(its sha256 should be {shard.sha256}): {error}; remove that file and run "
                "--mode=prepare again."
            ) from error


def check_cache(metadata: Metadata, data, any_class: bool = False) -> None:
    """Raise DataError, naming the flags that would agree, if a cache is not for `config.data`."""
    classes_matter = data.num_classes > 0 and not (data.unconditional or any_class)
    keys = {
        "image_size": metadata.latent_size,
        "channels": metadata.latent_channels,
        "num_classes": metadata.num_classes if classes_matter else data.num_classes,
        "latent_scale": metadata.scale,
        "latent_shift": metadata.shift,
    }
    now = {key: getattr(data, key) for key in keys}
    if metadata.num_frames and data.modality == "video_latents":
        keys["options.num_frames"] = metadata.num_frames
        now["options.num_frames"] = data.options.get("num_frames", 8)
    elif metadata.num_frames or data.modality == "video_latents":
        keys["modality"] = "video_latents" if metadata.num_frames else "image_latents"
        now["modality"] = data.modality
    wrong = [
        f"--config.data.{key}={value!r} (now {now[key]!r})"
        for key, value in keys.items()
        if value != now[key]
    ]
    if wrong:
        raise DataError(
            f"the latent cache {data.path} was made for another config; it needs "
            f"{', '.join(wrong)}."
        )
    if data.unconditional or any_class or not data.class_names:
        return
    names = resolve(data.class_names, metadata.num_classes)
    fitting = [names, resolve("", metadata.num_classes)]  # or only numbers
    if data.class_names == IMAGENET:
        fitting.append(tuple(wnid for wnid, _ in imagenet()))
    if metadata.class_names not in fitting:
        pairs = set(zip(metadata.class_names, names, strict=True))
        found, wanted = min(pair for pair in pairs if pair[0] != pair[1])
        raise DataError(
            f'the latent cache {data.path} has a class "{found}", data.class_names calls it '
            f'"{wanted}"; name a file with the names of the cache, or write '
            "--config.data.class_names= for those of the cache."
        )


def latents_made_by(source: Source, autoencoder, decoder: str) -> str:
    """The sha256 of the autoencoder that made a source's latents, "" where that is not known.

    Raises:
        DataError: `decoder`, the sha256 of what decodes samples, or `autoencoder.sha256` differs.
    """
    cache, made_by = getattr(source, "source", source), autoencoder.sha256  # of `SingleClass`
    if isinstance(cache, LatentCache):
        made_by = cache.metadata.autoencoder["sha256"]
    found = {f"config.autoencoder.path {autoencoder.path}": decoder}
    found["config.autoencoder.sha256"] = autoencoder.sha256
    for what, sha256 in found.items():
        if made_by and sha256 not in ("", made_by):
            raise DataError(
                f"the latents were made with the autoencoder of sha256 {made_by}, {what} has "
                f"{sha256}; name the file of that one, and leave config.autoencoder.sha256 empty."
            )
    return made_by
