"""The shards of a latent cache: images are read ahead by threads, encoded batch by batch, and
written shard by shard.
"""

import dataclasses
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.core.models.autoencoder_kl import LOG_VARIANCE_RANGE
from djepa_jax.data import latent_cache
from djepa_jax.data.images import BrokenImage
from djepa_jax.data.latent_cache import Shard
from djepa_jax.data.layout import SHARDS_NAME
from djepa_jax.data.loader import read_in_order
from djepa_jax.data.records import DataError
from djepa_jax.runtime.shares import Shares
from djepa_jax.runtime.storage import write_json
from djepa_jax.runtime.units import format_seconds

AHEAD = 3  # batches of images that may wait, read, for the autoencoder
PROGRESS_SECONDS = 10.0  # between lines within a shard
SHOWN = 3  # broken images in an error message


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a cache is made of; the same command on an unfinished cache must have the same plan."""

    source: str
    contents: str  # checksum of what the source holds; where it lies does not matter
    examples: int
    shard_size: int
    image_size: int
    num_classes: int
    dtype: str
    autoencoder: str
    autoencoder_sha256: str

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return -(-self.examples // self.shard_size)

    def shard_name(self, index: int) -> str:
        """File name of a shard."""
        return f"{index:05d}-of-{self.num_shards:05d}.array_record"

    def examples_of(self, index: int) -> range:
        """Which examples of the source go into a shard."""
        return range(index * self.shard_size, min((index + 1) * self.shard_size, self.examples))

    def record_path(self, folder: pathlib.Path, index: int) -> pathlib.Path:
        """The JSON file of a shard."""
        return folder / SHARDS_NAME / f"{self.shard_name(index)}.json"

    def record(self, folder: pathlib.Path, index: int) -> Shard | None:
        """What the JSON file of a shard says; None where it does not exist or is damaged."""
        shard = latent_cache.read_shard_record(self.record_path(folder, index))
        return shard if shard is not None and shard.file == self.shard_name(index) else None


class _Reading(NamedTuple):
    """An attempt to read an image."""

    key: str
    image: np.ndarray | None  # uint8 [H, W, 3]
    label: int
    reason: str  # why there is no image


class _Readings:
    """Some examples of a source, in which broken ones are examples, too, so that threads can read
    them ahead.
    """

    def __init__(self, source, indices: np.ndarray):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> _Reading:
        index = int(self._indices[position])
        key = self._source.key(index) if hasattr(self._source, "key") else str(index)
        try:
            example = self._source[index]
        except BrokenImage as error:
            return _Reading(key, None, 0, str(error))
        return _Reading(key, example["example"], int(example["condition"]), "")


class _Progress:
    """Says how far it is, how fast it goes and how long it will take."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self._total, self._say, self._done = total, say, 0
        self._start, self._before = (
            time.perf_counter(),
            0,
        )  # when it began to count, and what was done by then
        self._warm, self._said = False, self._start

    def add(self, count: int) -> None:
        """Count some more images; says something every `PROGRESS_SECONDS`."""
        self._done += count
        if not self._warm:  # the first batch has waited for the compiler
            self._start, self._before, self._warm = time.perf_counter(), self._done, True
        if time.perf_counter() - self._said >= PROGRESS_SECONDS:
            self.say("")

    def say(self, what: str) -> None:
        """Say something, and how far it is."""
        self._said = time.perf_counter()
        rate = (self._done - self._before) / max(self._said - self._start, 1e-9)
        speed = (
            f", {rate:.0f} images/s, {format_seconds((self._total - self._done) / rate)} left"
            if rate
            else ""
        )
        self._say(f"{what}{self._done:,} of {self._total:,} images{speed}")


class _Maker:
    """Makes shards.

    Args:
        folder: of the cache.
        plan: what it is made of.
        autoencoder: that encodes.
        max_broken: images that may still be left out.
        progress: is told what is done.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        plan: Plan,
        autoencoder: Autoencoder,
        max_broken: int,
        progress: _Progress,
    ):
        self._folder, self._plan, self._autoencoder = folder, plan, autoencoder
        self._max_broken, self._progress = max_broken, progress

    def make(self, index: int, readings: Iterable[_Reading]) -> None:
        """Encode and write one shard, then its record.

        Raises:
            DataError: too many images are broken, or the autoencoder's values are of no use.
            OSError: the shard cannot be written.
        """
        skipped, records, labels, sums = {}, [], [], []
        for batch in self._batches(readings, skipped):
            moments = self._encode(index, np.stack([reading.image for reading in batch]))
            stored = moments.astype(latent_cache.DTYPES[self._plan.dtype])
            records += [
                latent_cache.pack(reading.label, reading.key, entry)
                for reading, entry in zip(batch, stored, strict=True)
            ]
            labels += [reading.label for reading in batch]
            sums.append(moment_sums(moments))
            self._progress.add(len(batch))
        self._progress.add(len(skipped))
        self._max_broken -= len(skipped)
        try:
            self._write(index, records, labels, skipped, sums)
        except OSError as error:
            advice = "free some space" if error.errno in latent_cache.FULL else "repair it"
            raise OSError(
                f"shard {index} of {self._plan.num_shards} cannot be written to {self._folder} "
                f"({error.strerror or error}); "
                f"finished shards are kept: {advice} and run the same command again."
            ) from error

    def _batches(
        self, readings: Iterable[_Reading], skipped: dict[str, str]
    ) -> Iterator[list[_Reading]]:
        """Whole images in batches of the autoencoder; broken ones go into `skipped`."""
        batch = []
        for number, reading in enumerate(readings, start=1):
            if reading.image is None:
                skipped[reading.key] = reading.reason
                if len(skipped) > self._max_broken:
                    raise too_many_broken(
                        skipped,
                        f"of the latest {number}",
                        f"allows only {max(self._max_broken, 0)} more",
                    )
                continue
            batch.append(reading)
            if len(batch) == self._autoencoder.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _encode(self, index: int, images: np.ndarray) -> np.ndarray:
        """Moments `[n, 2, h, w, 2c]` of images `[n, H, W, 3]`."""
        moments = self._autoencoder.encode(images)
        if not np.isfinite(moments).all():
            raise DataError(
                f"the autoencoder gives values that are not finite in shard {index}; is its "
                "weight file the right one?"
            )
        return moments

    def _write(
        self,
        index: int,
        records: list[bytes],
        labels: list[int],
        skipped: dict[str, str],
        sums: list,
    ) -> None:
        path = self._folder / SHARDS_NAME / self._plan.shard_name(index)
        latent_cache.write_shard(path, records)
        names, counts = np.unique(labels, return_counts=True)
        shard = Shard(
            file=path.name,
            count=len(records),
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
            class_counts={
                str(int(name)): int(count) for name, count in zip(names, counts, strict=True)
            },
            skipped=skipped,
            sum=math.fsum(total for total, _ in sums),
            sum_of_squares=math.fsum(squares for _, squares in sums),
        )
        record = self._plan.record_path(self._folder, index)
        write_json(record, dataclasses.asdict(shard))
        for leftover in record.parent.glob(
            f"{record.name}.*tmp"
        ):  # of a process that was killed while it wrote this one
            leftover.unlink(missing_ok=True)


def make_shards(
    folder: pathlib.Path,
    plan: Plan,
    source,
    autoencoder: Autoencoder,
    settings,
    shares: Shares,
    say,
) -> None:
    """Make this process's share of the shards that are not finished.

    Args:
        folder: of the cache.
        plan: what it is made of.
        source: the images.
        autoencoder: that encodes them.
        settings: `data.num_threads` read them, `prepare.max_broken` may be left out.
        shares: what the processes tell one another.
        say: told how far it is.

    Raises:
        DataError: too many images are broken, or one cannot be read at present.
        OSError: a shard cannot be written.
        HostsError: another process has failed.
    """
    mine = range(jax.process_index(), plan.num_shards, jax.process_count())
    missing = [index for index in mine if not _is_finished(folder, plan, index)]
    if len(missing) < len(mine):
        say(f"{len(mine) - len(missing)} of {len(mine)} shards are finished already")
    if not missing:
        return
    others = (
        plan.record(folder, index) for index in range(plan.num_shards) if index not in missing
    )
    left = settings.prepare.max_broken - sum(
        len(shard.skipped) for shard in others if shard is not None
    )
    indices = np.concatenate([plan.examples_of(index) for index in missing])
    progress = _Progress(len(indices), say)
    maker = _Maker(folder, plan, autoencoder, left, progress)
    readings = read_in_order(
        _Readings(source, indices), settings.data.num_threads, AHEAD * autoencoder.batch_size
    )
    for index in missing:
        shares.check()
        maker.make(index, itertools.islice(readings, len(plan.examples_of(index))))
        progress.say(f"shard {index} of {plan.num_shards} is finished; ")


def _is_finished(folder: pathlib.Path, plan: Plan, index: int) -> bool:
    """Whether a shard is whole, by its checksum."""
    shard = plan.record(folder, index)
    try:
        if shard is not None:
            latent_cache.check_shard(folder, shard, verify=True)
    except DataError:
        return False
    return shard is not None


def too_many_broken(skipped: dict[str, str], of: str, limit: str) -> DataError:
    """The error for images that cannot be read, by key; `of` says of how many, `limit` what
    prepare.max_broken does.
    """
    shown = "; ".join(f"{key}: {reason}" for key, reason in list(skipped.items())[:SHOWN])
    return DataError(
        f"too many images cannot be read: {len(skipped)} {of}, and prepare.max_broken {limit}: "
        f"{shown}. "
        "Repair them, or raise the limit; finished shards are kept."
    )


def moment_sums(moments: np.ndarray) -> tuple[float, float]:
    """Sums of x and of x squared that samples of these posteriors `[..., 2c]` have on average."""
    mean, log_variance = np.split(moments.astype(np.float64), 2, axis=-1)
    variance = np.exp(np.clip(log_variance, *LOG_VARIANCE_RANGE))
    return float(mean.sum()), float((np.square(mean) + variance).sum())
