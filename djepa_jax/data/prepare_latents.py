"""The `--mode=prepare` command: encode a data set once into a latent cache, and go on after any
interruption.

Shards are independent: each covers a fixed range of the source and is written under a temporary
name, read back and renamed; a small JSON file beside it then says that it is whole. A second run
makes only what is missing. Several processes share the shards between them. `metadata.json` is
written last. `shards.py` makes the shards.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from djepa_jax import __version__
from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.config import class_names
from djepa_jax.config import experiment as configuration
from djepa_jax.config.experiment import ConfigError
from djepa_jax.core import sharding
from djepa_jax.core.modalities.image import ImagePixels
from djepa_jax.data import latent_cache
from djepa_jax.data.latent_cache import Metadata, Shard
from djepa_jax.data.layout import METADATA_NAME, SHARDS_NAME
from djepa_jax.data.records import ANY_CLASS, DataError, Robust
from djepa_jax.data.shards import Plan, make_shards, too_many_broken
from djepa_jax.data.sources import Unlabelled, open_source
from djepa_jax.runtime import distributed
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.shares import Shares
from djepa_jax.runtime.storage import as_path, check_local, check_writable, write_json

PLAN_NAME = "plan.json"
SOURCES = ("folder", "tar", "tfds", "npz")  # that hold images
PUBLISH = (
    "prepare into a local folder and copy it with gcloud storage cp -r CACHE gs://BUCKET/CACHE"
)


def run_prepare(
    config, folder: str, measure_scale: bool = False, say: Callable[[str], None] = print
) -> Metadata:
    """Make a latent cache in `folder`, or complete one.

    Args:
        config: `data` describes the cache, `prepare` the images, `autoencoder` the network.
        folder: of the cache.
        measure_scale: put the measured scale and shift into the metadata instead of
            `data.latent_scale` and `_shift`.
        say: told how far it is.

    Raises:
        ConfigError: settings that cannot work.
        DataError: unusable images, too many broken ones, or a cache with another plan in the
            folder.
        HostsError: several processes do not see the same folder or images, or another of them has
            failed.
        OSError: the disk is full, or cannot be written.
    """
    check_local(folder, "--workdir", PUBLISH)
    configuration.build(config)
    source = open_raw(config)
    mesh = sharding.make_mesh((-1, 1, 1), jax.local_devices())
    autoencoder = Autoencoder(config.autoencoder, mesh, config.data.staging)
    plan = make_plan(config, source, autoencoder)
    distributed.run_on_main(lambda: check_writable(folder))
    path = pathlib.Path(folder)
    with distributed.held_by_main(lock_workdir(folder)):
        distributed.check_shared(as_path(folder))
        distributed.check_same(repr(plan), "the configuration, the images or the autoencoder")
        distributed.run_on_main(lambda: _begin(path, plan, config.prepare.path))
        with Shares(path) as shares:
            make_shards(path, plan, source, autoencoder, config, shares, say)
        distributed.run_on_main(lambda: _finish(path, plan, config, source, measure_scale, say))
    metadata = latent_cache.read_metadata(path)
    say(
        f"{metadata.count:,} images of {metadata.num_classes} classes in {len(metadata.shards)} "
        f"shards; {_describe(metadata)}"
    )
    return metadata


class RawImages(ImagePixels):
    """RGB images to encode."""

    def check_example(self, example: np.ndarray) -> None:
        """Raise DataError unless an example has this shape, uint8."""
        if tuple(example.shape) != self.example_shape or example.dtype != self.example_dtype:
            raise DataError(
                f"prepare.path holds {example.dtype} examples of shape {tuple(example.shape)}; "
                "with prepare.image_size "
                f"{self.size} they must be uint8 of shape {self.example_shape}: crop them to "
                "that, or set prepare.image_size."
            )


def open_raw(config):
    """The images to encode, where a broken one is an error of its own.

    Raises:
        ConfigError: `prepare.source` holds no images.
        ValueError: as `open_source`.
    """
    settings, data = config.prepare, config.data
    if settings.source not in SOURCES:
        raise ConfigError(
            f'config.prepare.source is "{settings.source}"; it must be one of '
            f"{', '.join(sorted(SOURCES))}."
        )
    source = open_source(
        settings.source,
        settings.path,
        RawImages(settings.image_size, 3, 1),
        ANY_CLASS if data.unconditional else data.num_classes,
        class_names=data.class_names,
        max_broken=settings.max_broken,
        group="prepare",
        staging=data.staging,
    )
    source = source.source if isinstance(source, Robust) else source
    return Unlabelled(source) if data.unconditional else source


def make_plan(config, source, autoencoder: Autoencoder) -> Plan:
    """What the cache will be made of.

    Raises:
        ConfigError: image size, autoencoder and latent size do not belong together.
    """
    size, stride = config.prepare.image_size, autoencoder.config.stride
    if (
        size != config.data.image_size * stride
        or config.data.channels != autoencoder.config.latent_channels
    ):
        raise ConfigError(
            f"autoencoder {config.autoencoder.name} makes {size // stride} x {size // stride} x "
            f"{autoencoder.config.latent_channels} latents of {size} x {size} images; config.data "
            "has image_size "
            f"{config.data.image_size} and channels {config.data.channels}; set them, or "
            "prepare.image_size, to agree."
        )
    if config.data.modality != "image_latents":
        raise ConfigError(
            f'config.data.modality is "{config.data.modality}"; a latent cache is for '
            '"image_latents".'
        )
    return Plan(
        source=config.prepare.source,
        contents=source.digest(),
        examples=len(source),
        shard_size=config.prepare.shard_size,
        image_size=size,
        num_classes=config.data.num_classes,
        dtype=config.prepare.dtype,
        autoencoder=config.autoencoder.name,
        autoencoder_sha256=autoencoder.sha256,
    )


def _begin(folder: pathlib.Path, plan: Plan, source_path: str) -> None:
    """Write the plan, or find the same one there.

    Raises:
        DataError: the folder holds a cache with another plan.
    """
    path, wanted = folder / PLAN_NAME, dataclasses.asdict(plan)
    try:
        found = dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        write_json(path, wanted)
        found = wanted
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); name another --workdir.") from error
    if (
        "contents" not in found and found.pop("path", None) == source_path
    ):  # of a version that told sources by their path
        found["contents"] = plan.contents
    changed = configuration.differences(found, wanted)
    if changed:
        lines = "\n  ".join(changed)
        restore = ""
        if found.get("contents", plan.contents) != plan.contents:
            restore = (
                "The images, their names or their classes have changed since: put back what was "
                "there, or else: "
            )
        raise DataError(
            f"{folder} holds a latent cache of something else (cache -> now):\n  "
            f"{lines}\n{restore}Name another --workdir."
        )
    (folder / SHARDS_NAME).mkdir(exist_ok=True)


def _finish(
    folder: pathlib.Path,
    plan: Plan,
    config,
    source,
    measure_scale: bool,
    say: Callable[[str], None],
) -> None:
    """Check that every shard is there and write `metadata.json`."""
    shards = [plan.record(folder, index) for index in range(plan.num_shards)]
    for index, shard in enumerate(shards):
        if shard is None:
            raise DataError(
                f"shard {plan.shard_name(index)} of {folder} is missing; run the same command "
                "again."
            )
        latent_cache.check_shard(folder, shard, verify=False)
    skipped = {key: reason for shard in shards for key, reason in shard.skipped.items()}
    if len(skipped) > config.prepare.max_broken:  # which no process has seen alone
        raise too_many_broken(skipped, f"of {plan.examples}", f"is {config.prepare.max_broken}")
    count = sum(shard.count for shard in shards)
    if not count:
        raise DataError(f"none of the {plan.examples} images in {config.prepare.path} can be read.")
    mean, std = measure(shards, count * 2 * config.data.image_size**2 * config.data.channels)
    scale, shift = (1 / std, mean) if measure_scale else _scale(folder, config.data, say)
    metadata = Metadata(
        format=latent_cache.FORMAT,
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
        source={
            "name": plan.source,
            "path": config.prepare.path,
            "crop": "adm_center",
            "djepa_jax": __version__,
        },
        shards=tuple(shards),
    )
    write_json(folder / METADATA_NAME, dataclasses.asdict(metadata))


def measure(shards: list[Shard], values: int) -> tuple[float, float]:
    """Mean and standard deviation of all latents, from the sums of the shards."""
    mean = math.fsum(shard.sum for shard in shards) / values
    return mean, math.sqrt(
        max(math.fsum(shard.sum_of_squares for shard in shards) / values - mean**2, 1e-12)
    )


def _scale(folder: pathlib.Path, data, say: Callable[[str], None]) -> tuple[float, float]:
    """Scale and shift of the finished cache, which trainings may be using already, or else those of
    the config.
    """
    given = (data.latent_scale, data.latent_shift)
    try:
        finished = latent_cache.read_metadata(folder)
    except DataError:
        return given
    stored = (finished.scale, finished.shift)
    if stored != given:
        say(
            f"the finished cache keeps its scale {stored[0]!r} and shift {stored[1]!r} (the "
            f"config has {given[0]!r} and "
            f"{given[1]!r}, which a run takes when {folder / METADATA_NAME} is removed)"
        )
    return stored


def _names(config, source) -> tuple[str, ...]:
    """The class names of the config, or the data's own where the config has none."""
    own = getattr(source, "class_names", None)
    if config.data.class_names == "" and own is not None:
        return tuple(own)
    return class_names.resolve(config.data.class_names, config.data.num_classes)


def _describe(metadata: Metadata) -> str:
    skipped = sum(len(shard.skipped) for shard in metadata.shards)
    return (
        f"{skipped} could not be read; latents have mean {metadata.measured_mean:.4f} and "
        "standard deviation "
        f"{metadata.measured_std:.4f}; train with --config.data.latent_scale={metadata.scale!r} "
        f"--config.data.latent_shift={metadata.shift!r}"
    )
