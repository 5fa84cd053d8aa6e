"""From a source to batches on the devices, with Grain.

The order of examples is a pure function of (seed, examples consumed): the whole stream is one
sequence, every epoch of it a fresh permutation, and augmentation is drawn from the position in it.
Batch n is the n-th piece of that sequence, on any number of processes; each of them reads the rows
of it that its devices need, a few batches ahead.
"""

import collections
from collections.abc import Iterator

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from djepa_jax.config.experiment import Experiment
from djepa_jax.core import sharding
from djepa_jax.data.device_cache import ResidentCache
from djepa_jax.data.records import Source

PREFETCH = 2  # batches that wait on the device


def example_stream(source: Source, seed: int, random_flip: bool = False) -> grain.MapDataset:
    """The endless sequence of training examples; `stream[i]` is the i-th one consumed."""
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    stream = stream.random_map(_flip) if random_flip else stream
    return stream.map(lambda item: {name: item[name] for name in ("example", "condition")})


def _flip(item: dict, rng: np.random.Generator) -> dict:
    """Mirror every second image or clip; latents come with those of the mirror image."""
    if rng.random() >= 0.5:
        return item
    mirror = item["mirror"] if "mirror" in item else item["example"][..., ::-1, :]
    return {**item, "example": mirror}


def row_batches(
    stream: grain.MapDataset,
    batch_size: int,
    consumed: int,
    rows: np.ndarray | None = None,
    num_threads: int = 2,
) -> Iterator[dict]:
    """Some rows (or all) of every batch, as arrays, after `consumed` examples of the stream.

    Batch size and examples are those of all processes together; the number of threads that read
    changes nothing but the speed.
    """
    rows = np.arange(batch_size) if rows is None else rows

    def example(index: int) -> dict:
        batch, position = divmod(index, len(rows))
        return stream[consumed + batch * batch_size + int(rows[position])]

    count = (len(stream) - consumed) // batch_size * len(rows)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * len(rows))
    examples = grain.MapDataset.range(count).map(example).to_iter_dataset(options)
    yield from examples.batch(len(rows), drop_remainder=True)


def in_batches(
    source: Source, indices: np.ndarray, batch_size: int, num_threads: int
) -> Iterator[dict]:
    """Some examples of a source in the order of `indices`, read ahead by threads."""
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * batch_size)
    numbers = grain.MapDataset.source(indices.tolist())
    yield from numbers.map(source.__getitem__).to_iter_dataset(options).batch(batch_size)


def local_rows(place: NamedSharding, batch_size: int) -> np.ndarray:
    """Which rows of a batch lie on this process's devices, ascending."""
    slices = [index[0] for index in place.addressable_devices_indices_map((batch_size,)).values()]
    return np.unique(np.concatenate([np.arange(*rows.indices(batch_size)) for rows in slices]))


def place_rows(
    values: np.ndarray, rows: np.ndarray, place: NamedSharding, batch_size: int
) -> jax.Array:
    """A batch `[B, ...]` of which this process has `values` for the `rows` of its devices."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return values[np.searchsorted(rows, np.arange(*index[0].indices(batch_size)))]

    return jax.make_array_from_callback((batch_size, *values.shape[1:]), place, part)


def device_batches(experiment: Experiment, source: Source, mesh, consumed: int) -> Iterator[dict]:
    """The batches of a training from `consumed` examples on, the same on any mesh."""
    place, size, data = sharding.batch_sharding(mesh), experiment.batch_size, experiment.data
    resident = ResidentCache(source, mesh) if data.device_resident else None
    examples = resident.rows if resident else source
    stream = example_stream(examples, experiment.seed, data.random_flip)
    rows, queue = local_rows(place, size), collections.deque()
    for batch in row_batches(stream, size, consumed, rows, data.num_threads):
        batch = jax.tree.map(lambda values: place_rows(values, rows, place, size), batch)
        queue.append(resident.fetch(batch) if resident else batch)
        if len(queue) > PREFETCH:
            yield queue.popleft()
