"""Batches on the devices: each process reads the rows that its devices need, a few batches
ahead.
"""

import collections
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from djepa_jax.core import sharding
from djepa_jax.data.device_cache import ResidentCache
from djepa_jax.data.loader import example_stream, row_batches

PREFETCH = 2  # batches that wait on the device


def local_rows(place: NamedSharding, batch_size: int) -> np.ndarray:
    """Which rows of a batch lie on this process's devices, ascending."""
    slices = [index[0] for index in place.addressable_devices_indices_map((batch_size,)).values()]
    return np.unique(np.concatenate([np.arange(*rows.indices(batch_size)) for rows in slices]))


def place_rows(
    values: np.ndarray, rows: np.ndarray, place: NamedSharding, batch_size: int
) -> jax.Array:
    """A batch `[B, ...]` of which this process has `values` for some `rows`, wherever its devices
    are in the mesh.
    """

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return values[np.searchsorted(rows, np.arange(*index[0].indices(batch_size)))]

    return jax.make_array_from_callback((batch_size, *values.shape[1:]), place, part)


def device_batches(config, source, mesh, consumed: int) -> Iterator[dict]:
    """The batches of a training from `consumed` examples on, split over the mesh; the same on any
    mesh.
    """
    place, size = sharding.batch_sharding(mesh), config.batch_size
    resident = ResidentCache(source, mesh) if config.data.device_resident else None
    stream = example_stream(
        resident.rows if resident else source, config.seed, config.data.random_flip
    )
    rows, queue = local_rows(place, size), collections.deque()
    for batch in row_batches(stream, size, consumed, rows, config.data.num_threads):
        batch = {name: place_rows(values, rows, place, size) for name, values in batch.items()}
        queue.append(resident.fetch(batch) if resident else batch)
        if len(queue) > PREFETCH:
            yield queue.popleft()
