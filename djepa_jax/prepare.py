"""The `--mode=prepare` command: encode a data set once into a latent cache, and go on after any interruption.

Shards are independent: each covers a fixed range of the source and is written under a temporary name, read back and
renamed; a small JSON file beside it then says that it is whole. A second run makes only what is missing. Several
processes share the shards between them. `metadata.json` is written last.
"""

import dataclasses
import errno
import json
import math
import pathlib
import re
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from djepa_jax import __version__, class_names, sharding
from djepa_jax import config as configuration
from djepa_jax.config import ConfigError
from djepa_jax.data import latents
from djepa_jax.data.images import BrokenImage
from djepa_jax.data.latents import METADATA_NAME, SHARDS_NAME, Metadata, Shard
from djepa_jax.data.records import DataError, Robust
from djepa_jax.data.sources import open_source
from djepa_jax.decoder import Autoencoder
from djepa_jax.lock import lock_workdir
from djepa_jax.logs import format_seconds
from djepa_jax.manifest import file_sha256
from djepa_jax.modalities.image_pixels import ImagePixels
from djepa_jax.models.autoencoder_kl import LOG_VARIANCE_RANGE
from djepa_jax.paths import check_local, check_writable, write_json

PLAN_NAME = "plan.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a cache is made of; the same command on an unfinished cache must have the same plan."""

    source: str
    path: str
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


def run_prepare(config, folder: str, measure_scale: bool = False, say: Callable[[str], None] = print) -> Metadata:
    """Make a latent cache in `folder`, or complete one.

    Args:
        config: `data` describes the cache, `prepare` the images, `autoencoder` the network.
        folder: of the cache.
        measure_scale: put the measured scale and shift into the metadata instead of `data.latent_scale` and `_shift`.
        say: told how far it is.

    Raises:
        ConfigError: settings that cannot work.
        DataError: unusable images, too many broken ones, or a cache with another plan in the folder.
        OSError: the disk is full, or cannot be written.
    """
    check_local(folder, "--workdir")
    configuration.build(config)
    source = open_raw(config.prepare, config.data.num_classes)
    mesh = sharding.make_mesh((-1, 1, 1), jax.local_devices())
    autoencoder = Autoencoder(config.autoencoder, mesh)
    plan = make_plan(config, source, autoencoder)
    check_writable(folder)
    path = pathlib.Path(folder)
    with lock_workdir(folder, f".lock-{jax.process_index()}"):  # a lock for each process that shares the work
        _begin(path, plan)
        _make_shards(path, plan, source, autoencoder, config.prepare.max_broken, say)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("shards are finished")
        if jax.process_index() == 0:
            _finish(path, plan, config, source, measure_scale)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("metadata is written")
    metadata = latents.read_metadata(path)
    say(f"{metadata.count:,} images of {metadata.num_classes} classes in {len(metadata.shards)} shards; {_describe(metadata)}")
    return metadata


def open_raw(settings, num_classes: int):
    """The images to encode, where a broken one is an error of its own."""
    modality = ImagePixels(settings.image_size, 3, 1)
    try:
        source = open_source(settings.source, settings.path, modality, num_classes, max_broken=settings.max_broken)
    except ValueError as error:
        message = re.sub(r"\bdata\.(path|source|image_size)\b", r"prepare.\1", str(error))  # sources speak of training
        raise DataError(message) from error
    return source.source if isinstance(source, Robust) else source


def make_plan(config, source, autoencoder: Autoencoder) -> Plan:
    """What the cache will be made of.

    Raises:
        ConfigError: image size, autoencoder and latent size do not belong together.
    """
    size, stride = config.prepare.image_size, autoencoder.config.stride
    if size != config.data.image_size * stride or config.data.channels != autoencoder.config.latent_channels:
        raise ConfigError(
            f"autoencoder {config.autoencoder.name} makes {size // stride} x {size // stride} x "
            f"{autoencoder.config.latent_channels} latents of {size} x {size} images; config.data has image_size "
            f"{config.data.image_size} and channels {config.data.channels}; set them, or prepare.image_size, to agree."
        )
    if config.data.modality != "image_latents":
        raise ConfigError(f'config.data.modality is "{config.data.modality}"; a latent cache is for "image_latents".')
    return Plan(
        source=config.prepare.source,
        path=config.prepare.path,
        examples=len(source),
        shard_size=config.prepare.shard_size,
        image_size=size,
        num_classes=config.data.num_classes,
        dtype=config.prepare.dtype,
        autoencoder=config.autoencoder.name,
        autoencoder_sha256=autoencoder.sha256,
    )


def _begin(folder: pathlib.Path, plan: Plan) -> None:
    """Write the plan, or find the same one there.

    Raises:
        DataError: the folder holds a cache with another plan.
    """
    path, wanted = folder / PLAN_NAME, dataclasses.asdict(plan)
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        (folder / SHARDS_NAME).mkdir(exist_ok=True)
        own = folder / f".{PLAN_NAME}-{jax.process_index()}"  # several processes may be here at once
        write_json(own, wanted)
        own.replace(path)
        return
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); name another --workdir.") from error
    changed = configuration.differences(found, wanted)
    if changed:
        lines = "\n  ".join(changed)
        raise DataError(f"{folder} holds a latent cache of something else (cache -> now):\n  {lines}\nName another --workdir.")


def _make_shards(folder: pathlib.Path, plan: Plan, source, autoencoder: Autoencoder, max_broken: int, say) -> None:
    """Make this process's share of the shards that are not finished."""
    mine = range(jax.process_index(), plan.num_shards, jax.process_count())
    found = {index: _finished(folder, plan, index) for index in mine}
    missing = [index for index, shard in found.items() if shard is None]
    max_broken -= sum(len(shard.skipped) for shard in found.values() if shard is not None)
    if len(missing) < len(mine):
        say(f"{len(mine) - len(missing)} of {len(mine)} shards are finished already")
    start, done, total = time.perf_counter(), 0, sum(len(plan.examples_of(index)) for index in missing)
    for index in missing:
        try:
            max_broken -= len(_make_shard(folder, plan, index, source, autoencoder, max_broken).skipped)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "disk" in str(error)
            advice = "free some space" if full else "repair it"
            raise OSError(
                f"shard {index} of {plan.num_shards} cannot be written to {folder} ({error}); finished shards are kept: {advice} "
                "and run the same command again."
            ) from error
        done += len(plan.examples_of(index))
        rate = done / (time.perf_counter() - start)
        say(f"{done:,} of {total:,} images, {rate:.0f} images/s, {format_seconds((total - done) / rate)} left")


def _record_path(folder: pathlib.Path, plan: Plan, index: int) -> pathlib.Path:
    return folder / SHARDS_NAME / f"{plan.shard_name(index)}.json"


def _finished(folder: pathlib.Path, plan: Plan, index: int) -> Shard | None:
    """The record of a shard that is whole, by its checksum; None if it has to be made."""
    shard = latents.read_shard_record(_record_path(folder, plan, index))
    if shard is None or shard.file != plan.shard_name(index):
        return None
    try:
        latents.check_shard(folder, shard, verify=True)
    except DataError:
        return None
    return shard


def _make_shard(folder: pathlib.Path, plan: Plan, index: int, source, autoencoder: Autoencoder, max_broken: int) -> Shard:
    """Encode and write one shard, then its record."""
    images, labels, keys, skipped = _read_examples(plan.examples_of(index), source, max_broken)
    moments = autoencoder.encode(images) if len(images) else np.zeros((0, 1), np.float32)  # [n, 2, h, w, 2c]
    if not np.isfinite(moments).all():
        raise DataError(f"the autoencoder gives values that are not finite in shard {index}; is its weight file the right one?")
    dtype, path = latents.DTYPES[plan.dtype], folder / SHARDS_NAME / plan.shard_name(index)
    records = [latents.pack(*entry) for entry in zip(labels, keys, moments.astype(dtype), strict=True)]
    latents.write_shard(path, records)
    total, squares = moment_sums(moments) if len(images) else (0.0, 0.0)
    names, counts = np.unique(labels, return_counts=True)
    shard = Shard(
        file=path.name,
        count=len(records),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        class_counts={str(name): int(count) for name, count in zip(names, counts, strict=True)},
        skipped=skipped,
        sum=total,
        sum_of_squares=squares,
    )
    record = _record_path(folder, plan, index)
    write_json(record, dataclasses.asdict(shard))
    for leftover in record.parent.glob(f"{record.name}.*tmp"):  # of a process that was killed while it wrote this one
        leftover.unlink(missing_ok=True)
    return shard


def _read_examples(indices: range, source, max_broken: int) -> tuple[np.ndarray, list[int], list[str], dict[str, str]]:
    """Images `[n, H, W, 3]`, labels and keys of some examples; those that cannot be read are named with the reason.

    Raises:
        DataError: more than `max_broken`, what is left of the limit, of them are broken.
    """
    images, labels, keys, skipped = [], [], [], {}
    for index in indices:
        key = source.key(index) if hasattr(source, "key") else str(index)
        try:
            example = source[index]
        except BrokenImage as error:
            skipped[key] = str(error)
            continue
        images.append(example["image"])
        labels.append(int(example["label"]))
        keys.append(key)
    if len(skipped) > max_broken:
        shown = "; ".join(f"{key}: {reason}" for key, reason in list(skipped.items())[:3])
        raise DataError(
            f"too many images cannot be read: {len(skipped)} of the latest {len(indices)}, and prepare.max_broken allows only "
            f"{max(max_broken, 0)} more: {shown}. Repair them, or raise the limit; finished shards are kept."
        )
    return np.array(images), labels, keys, skipped


def moment_sums(moments: np.ndarray) -> tuple[float, float]:
    """Sums of x and of x squared that samples of these posteriors `[..., 2c]` have on average."""
    mean, log_variance = np.split(moments.astype(np.float64), 2, axis=-1)
    variance = np.exp(np.clip(log_variance, *LOG_VARIANCE_RANGE))
    return float(mean.sum()), float((np.square(mean) + variance).sum())


def _finish(folder: pathlib.Path, plan: Plan, config, source, measure_scale: bool) -> None:
    """Check that every shard is there and write `metadata.json`."""
    shards = [latents.read_shard_record(_record_path(folder, plan, index)) for index in range(plan.num_shards)]
    for index, shard in enumerate(shards):
        if shard is None:
            raise DataError(f"shard {plan.shard_name(index)} of {folder} is missing; run the same command again.")
        latents.check_shard(folder, shard, verify=False)
    count = sum(shard.count for shard in shards)
    if not count:
        raise DataError(f"none of the {plan.examples} images in {plan.path} can be read.")
    mean, std = measure(shards, count * 2 * config.data.image_size**2 * config.data.channels)
    scale, shift = (1 / std, mean) if measure_scale else (config.data.latent_scale, config.data.latent_shift)
    metadata = Metadata(
        format=latents.FORMAT,
        count=count,
        num_classes=plan.num_classes,
        class_names=_names(config, source),
        image_size=plan.image_size,
        latent_size=config.data.image_size,
        latent_channels=config.data.channels,
        dtype=plan.dtype,
        autoencoder={"name": plan.autoencoder, "sha256": plan.autoencoder_sha256},
        scale=scale,
        shift=shift,
        measured_mean=mean,
        measured_std=std,
        source={"name": plan.source, "path": plan.path, "crop": "adm_center", "djepa_jax": __version__},
        shards=tuple(shards),
    )
    write_json(folder / METADATA_NAME, dataclasses.asdict(metadata))


def measure(shards: list[Shard], values: int) -> tuple[float, float]:
    """Mean and standard deviation of all latents, from the sums of the shards."""
    mean = math.fsum(shard.sum for shard in shards) / values
    return mean, math.sqrt(max(math.fsum(shard.sum_of_squares for shard in shards) / values - mean**2, 1e-12))


def _names(config, source) -> tuple[str, ...]:
    """The data's own class names where it has them, else those of the config."""
    own = getattr(source, "class_names", None)
    if own is not None and len(own) == config.data.num_classes and config.data.class_names != class_names.IMAGENET:
        return tuple(own)
    return class_names.resolve(config.data.class_names, config.data.num_classes)


def _describe(metadata: Metadata) -> str:
    skipped = sum(len(shard.skipped) for shard in metadata.shards)
    return (
        f"{skipped} could not be read; latents have mean {metadata.measured_mean:.4f} and standard deviation "
        f"{metadata.measured_std:.4f}; train with --config.data.latent_scale={metadata.scale!r} "
        f"--config.data.latent_shift={metadata.shift!r}"
    )
