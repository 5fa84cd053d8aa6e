"""Latent caches written by hand, of twelve images in three shards."""

import dataclasses
import pathlib

import numpy as np

from djepa_jax.data.latent_cache import DTYPES, Metadata, pack, write_shard
from djepa_jax.runtime.storage import write_json

SHAPE = (4, 4, 6)  # of the moments of one image: three channels of means, three of log-variances
COUNTS = (5, 4, 3)
TOTAL = sum(COUNTS)
SHA = "ab" * 32  # of the autoencoder


def entries(dtype: str = "bfloat16") -> list[tuple[int, str, np.ndarray]]:
    """Class, key and moments of every image; keys of every length, so that arrays begin anywhere in
    a record.
    """
    moments = np.random.default_rng(0).standard_normal((TOTAL, 2, *SHAPE)).astype(DTYPES[dtype])
    return [(i % 3, "é" * (i % 2) + "k" * i + str(i), moments[i]) for i in range(TOTAL)]


def write_cache(folder: pathlib.Path, dtype: str = "bfloat16") -> pathlib.Path:
    """A cache of `entries`."""
    (folder / "shards").mkdir(parents=True)
    rest, shards = entries(dtype), []
    for number, count in enumerate(COUNTS):
        chosen, rest = rest[:count], rest[count:]
        path = folder / "shards" / f"{number:05d}-of-00003.array_record"
        classes = {str(label): [entry[0] for entry in chosen].count(label) for label in range(3)}
        contents = {"count": count, "class_counts": classes, "skipped": {}}
        records = [pack(*entry) for entry in chosen]
        shards.append(write_shard(path, records, contents | {"sum": 0.0, "sum_of_squares": 1.0}))
        path.with_name(f"{path.name}.json").unlink()
    metadata = Metadata(
        format=1,
        count=TOTAL,
        num_classes=3,
        class_names=("a", "b", "c"),
        image_size=32,
        latent_size=4,
        latent_channels=3,
        dtype=dtype,
        autoencoder={"name": "kl8", "sha256": SHA},
        scale=0.25,
        shift=-0.5,
        measured_mean=0.0,
        measured_std=1.0,
        source={"name": "folder"},
        shards=tuple(shards),
    )
    write_json(folder / "metadata.json", dataclasses.asdict(metadata))
    return folder
