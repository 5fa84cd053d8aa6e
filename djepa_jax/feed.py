"""Batches on the devices: each process reads the rows that its devices need, a few batches ahead."""

import collections
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from djepa_jax import sharding
from djepa_jax.data.pipeline import example_stream, row_batches
from djepa_jax.resident import ResidentCache

PREFETCH = 2  # batches that wait on the device


def local_rows(place: NamedSharding, batch_size: int) -> np.ndarray:
    """Which rows of a batch lie on this process's devices, ascending."""
    slices = [index[0] for index in place.addressable_devices_indices_map((batch_size,)).values()]
    return np.unique(np.concatenate([np.arange(*rows.indices(batch_size)) for rows in slices]))


def device_batches(config, source, mesh, consumed: int) -> Iterator[dict]:
    """The batches of a training from `consumed` examples on, split over the mesh; the same on any mesh."""
    place, size = sharding.batch_sharding(mesh), config.batch_size
    resident = ResidentCache(source, mesh) if config.data.device_resident else None
    stream = example_stream(resident.rows if resident else source, config.seed, config.data.random_flip)
    queue = collections.deque()
    for batch in row_batches(stream, size, consumed, local_rows(place, size), config.data.num_threads):
        batch = {
            name: jax.make_array_from_process_local_data(place, rows, (size, *rows.shape[1:])) for name, rows in batch.items()
        }
        queue.append(resident.fetch(batch) if resident else batch)
        if len(queue) > PREFETCH:
            yield queue.popleft()
