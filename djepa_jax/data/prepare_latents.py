"""The `--mode=prepare` command: encode a data set once into a latent cache.

Shards are independent: each covers a fixed range of the source, and a small JSON file beside it,
written last, says that it is whole. A second run makes only what is missing. Several processes
share the shards with `--shard=i/n`. Whoever finds all of them there writes `metadata.json`.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np

from djepa_jax import __version__
from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import sharding
from djepa_jax.core.models.autoencoder_kl import LOG_VARIANCE_RANGE
from djepa_jax.core.models.text import Embeddings
from djepa_jax.data import latent_cache
from djepa_jax.data.images import BrokenImage
from djepa_jax.data.latent_cache import DTYPES, SHARDS_NAME, Metadata, find_shard, write_shard
from djepa_jax.data.records import DataError, Source, check_broken, digest_of, unwrapped
from djepa_jax.data.sources import (
    SingleClass,
    open_source,
    pictures_of,
    reader_of,
    with_classes_of,
)
from djepa_jax.data.summary import describe_data
from djepa_jax.runtime.lock import LOCK_NAME, lock_workdir
from djepa_jax.runtime.progress import Progress, say
from djepa_jax.runtime.storage import as_path, check_local, check_ours, check_writable, write_json

AHEAD = 3  # batches of images that may wait, read, for the autoencoder
PLAN_NAME = "plan.json"
PUBLISH = "prepare into a folder and copy it with gcloud storage cp -r CACHE gs://BUCKET/CACHE"


def run_prepare(
    experiment: Experiment, folder: str, measure_scale=False, shard="", say=say
) -> Metadata | None:
    """Make a latent cache in `folder`, or complete one; its metadata once it is complete.

    With `measure_scale` these have the measured scale and shift instead of those of `config.data`.
    With a `shard` "i/n" only every n-th shard is made, from the i-th on.
    """
    check_local(folder, "--workdir", PUBLISH)
    own = parse_share(shard)
    images = pictures_of(experiment)
    reader = reader_of(experiment)
    if isinstance(reader, Embeddings):
        raise ConfigError("latent caches keep captions as texts; set model.condition=text.")
    what = "prepare", experiment.prepare, experiment.data, images, reader is not None, reader
    captioned = open_source(*what)
    captions, contents = getattr(captioned, "captions", ()), digest_of(captioned)
    source = unwrapped(captioned)
    labelled = SingleClass(source) if experiment.data.unconditional else source
    experiment = with_classes_of(labelled, experiment)
    mesh = sharding.make_mesh((-1, 1, 1), jax.local_devices())
    autoencoder = Autoencoder(experiment.autoencoder, mesh, experiment.data.staging)
    plan = make_plan(experiment, len(source), contents, autoencoder)
    for line in describe_data(experiment, captioned):
        say(line)
    source = labelled
    check_writable(folder)
    path, parts = pathlib.Path(as_path(folder)), shard_parts(plan["examples"], plan["shard_size"])
    if not (path / PLAN_NAME).exists():
        check_ours(path / latent_cache.METADATA_NAME, "shards", "name another --workdir")
    name = f"{LOCK_NAME}-{shard.replace('/', '-of-')}" if shard else LOCK_NAME
    with lock_workdir(folder, name):
        claim(path, plan, experiment.prepare.path)
        names = list(parts)[own]
        missing = [name for name in names if find_shard(path, name, verify=True) is None]
        if len(missing) < len(names):
            say(f"{len(names) - len(missing)} of {len(names)} shards are finished already")
        wanted = {name: parts[name] for name in missing}
        num_threads = experiment.data.num_threads
        what = wanted, source, captions, autoencoder
        make_shards(path, *what, experiment.prepare, num_threads, say)
        shards = [find_shard(path, name) for name in parts]
        if None in shards:
            say(
                f"{shards.count(None)} of {len(shards)} shards are missing; other processes make "
                "them, or the same command without --shard"
            )
            return None
        claim(path, plan, experiment.prepare.path)  # others may have begun at the same moment
        metadata = make_metadata(path, plan, experiment, measure_scale, shards)
        finish(path, metadata)
    say(
        f"{metadata.count:,} images of {metadata.num_classes} classes in {len(shards)} shards; "
        f"{plan['examples'] - metadata.count} could not be read; latents have mean "
        f"{metadata.measured_mean:.4f} and standard deviation {metadata.measured_std:.4f}; train "
        f"with --config.data.latent_scale={metadata.scale!r} "
        f"--config.data.latent_shift={metadata.shift!r}"
    )
    return metadata


def parse_share(shard: str) -> slice:
    """Which shards "i/n" stands for; all of them for ""."""
    share = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
    if share is None or int(share[1]) >= int(share[2]):
        raise ConfigError(f'--shard is "{shard}"; write i/n, with i from 0 to n - 1, such as 0/4.')
    return slice(int(share[1]), None, int(share[2]))


def finish(folder: pathlib.Path, metadata: Metadata) -> None:
    """Write the metadata, which make a cache complete, and remove what killed processes left."""
    write_json(folder / latent_cache.METADATA_NAME, dataclasses.asdict(metadata))
    for leftover in (folder / SHARDS_NAME).iterdir():
        if leftover.suffix in (".unfinished", ".tmp"):
            leftover.unlink(missing_ok=True)


def make_plan(experiment: Experiment, count: int, contents: str, autoencoder: Autoencoder) -> dict:
    """What the cache will be made of; image size, autoencoder and latent size must agree."""
    size, data = experiment.prepare.image_size, experiment.data
    stride, channels = autoencoder.config.stride, autoencoder.config.latent_channels
    if size != data.image_size * stride or data.channels != channels:
        raise ConfigError(
            f"autoencoder {experiment.autoencoder.name} makes {size // stride} x {size // stride} "
            f"x {channels} latents of {size} x {size} images; config.data has image_size "
            f"{data.image_size} and channels {data.channels}; set them, or prepare.image_size, to "
            "agree."
        )
    return {
        "source": experiment.prepare.source,
        "contents": contents,  # a checksum; where they lie does not matter
        "examples": count,
        "shard_size": experiment.prepare.shard_size,
        "image_size": size,
        "num_frames": getattr(experiment.modality, "num_frames", 0),
        "num_classes": data.num_classes,
        "dtype": experiment.prepare.dtype,
        "autoencoder": experiment.autoencoder.name,
        "autoencoder_sha256": autoencoder.sha256,
    }


def shard_parts(examples: int, shard_size: int) -> dict[str, range]:
    """The name of every shard, and which examples of the source go into it."""
    parts = [range(examples)[start:][:shard_size] for start in range(0, examples, shard_size)]
    return {f"{i:05d}-of-{len(parts):05d}.array_record": part for i, part in enumerate(parts)}


def claim(folder: pathlib.Path, plan: dict, source_path: str) -> None:
    """Write the plan, or find the same one there; raises DataError if it is another."""
    path = folder / PLAN_NAME
    (folder / SHARDS_NAME).mkdir(exist_ok=True)
    try:
        if not path.exists():
            write_json(path, plan)
        found = {"num_frames": 0} | dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); name another --workdir.") from error
    # Early versions told sources by their path.
    if "contents" not in found and found.pop("path", None) == source_path:
        found["contents"] = plan["contents"]
    keys = [key for key in plan if found.get(key) != plan[key]]
    changed = [f"{key}: {found.get(key)} -> {plan[key]}" for key in keys]
    if changed:
        raise DataError(
            f"{folder} holds a latent cache of something else (cache -> now): "
            f"{'; '.join(changed)}. Undo what has changed (contents: the images, their names or "
            "their classes), or name another --workdir."
        )


def make_shards(
    folder: pathlib.Path,
    parts: dict,
    source: Source,
    captions: Sequence[str],
    autoencoder,
    prepare,
    num_threads: int,
    say,
) -> None:
    """Make some shards, with captions if there are some; threads read images ahead, in order."""
    numbers = [number for part in parts.values() for number in part]

    def read(number: int) -> tuple[str, dict | None, str]:
        """The key of an image and its example, or why there is none."""
        try:
            caption = {"caption": captions[number]} if captions else {}
            return source.key(number), source[number] | caption, ""
        except BrokenImage as error:
            return source.key(number), None, str(error)

    options = grain.ReadOptions(num_threads, max(AHEAD * autoencoder.batch_size, num_threads))
    stream = grain.MapDataset.source(numbers).map(read).to_iter_dataset(options)
    done, skipped = 0, {}
    with contextlib.closing(Progress("encoding", "image", len(numbers))) as progress:
        images = progress.over(stream)
        for name, part in parts.items():
            some = itertools.islice(images, len(part))
            records, contents = _encode(some, autoencoder, prepare.dtype)
            skipped |= contents["skipped"]
            check_broken(skipped, len(source), prepare.max_broken, "prepare.max_broken")
            write_shard(folder / SHARDS_NAME / name, records, contents)
            done += len(part)
            say(f"shard {name} is finished; {done:,} of {len(numbers):,} images")


def _encode(
    images: Iterator[tuple], autoencoder: Autoencoder, dtype: str
) -> tuple[list[bytes], dict]:
    """The records of a shard, and what its JSON file tells of them."""
    records, labels, captions, sums, squares, skipped = [], [], [], [], [], {}
    while batch := list(itertools.islice(images, autoencoder.batch_size)):
        skipped |= {key: reason for key, example, reason in batch if example is None}
        whole = [(key, example) for key, example, _ in batch if example is not None]
        if not whole:
            continue
        moments = autoencoder.encode(np.stack([example["example"] for _, example in whole]))
        if not np.isfinite(moments).all():
            raise DataError(
                f"the autoencoder gives values that are not finite for {whole[0][0]} or an image "
                "after it; is its weight file the right one?"
            )
        for (key, example), both in zip(whole, moments.astype(DTYPES[dtype]), strict=True):
            labels.append(int(example["condition"]))
            captions += [example["caption"]] if "caption" in example else []
            records.append(latent_cache.pack(labels[-1], key, both))
        # Of x and of x squared, as samples of the posteriors have them on average.
        mean, log_variance = np.split(moments.astype(np.float64), 2, axis=-1)
        variance = np.exp(np.clip(log_variance, *LOG_VARIANCE_RANGE))
        sums.append(float(mean.sum()))
        squares.append(float((np.square(mean) + variance).sum()))
    return records, {
        "count": len(records),
        "class_counts": {str(label): labels.count(label) for label in sorted({*labels})},
        "skipped": skipped,
        "sum": math.fsum(sums),
        "sum_of_squares": math.fsum(squares),
        "captions": captions,
    }


def make_metadata(
    folder: pathlib.Path,
    plan: dict,
    experiment: Experiment,
    measure_scale: bool,
    shards: list,
) -> Metadata:
    """The metadata of a cache whose shards are all there."""
    skipped = {key: reason for shard in shards for key, reason in shard.skipped.items()}
    check_broken(skipped, plan["examples"], experiment.prepare.max_broken, "prepare.max_broken")
    data, count = experiment.data, sum(shard.count for shard in shards)
    if not count:
        raise DataError(
            f"none of the images in prepare.path {experiment.prepare.path} can be read."
        )
    maps = count * 2 * (plan["num_frames"] or 1)
    values = maps * data.image_size**2 * data.channels
    mean = math.fsum(shard.sum for shard in shards) / values
    squares = math.fsum(shard.sum_of_squares for shard in shards) / values
    std = math.sqrt(max(squares - mean**2, 1e-12))
    scale, shift = (1 / std, mean) if measure_scale else (data.latent_scale, data.latent_shift)
    with contextlib.suppress(DataError):  # a finished cache keeps its own, which trainings may use
        if not measure_scale:
            finished = latent_cache.read_metadata(folder)
            scale, shift = finished.scale, finished.shift
    origin = {"name": plan["source"], "path": experiment.prepare.path, "crop": "adm_center"}
    return Metadata(
        format=latent_cache.FORMAT,
        count=count,
        num_classes=plan["num_classes"],
        class_names=experiment.class_names,
        image_size=plan["image_size"],
        latent_size=data.image_size,
        latent_channels=data.channels,
        dtype=plan["dtype"],
        autoencoder={"name": plan["autoencoder"], "sha256": plan["autoencoder_sha256"]},
        scale=scale,
        shift=shift,
        measured_mean=mean,
        measured_std=std,
        source=origin | {"djepa_jax": __version__},
        shards=tuple(shards),
        num_frames=plan["num_frames"],
    )
