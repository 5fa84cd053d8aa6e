"""A latent cache kept on the devices: a training step takes its examples by index.

Rows of the table are example 0, its mirror image, example 1, its mirror image, and so on; they are
split over the devices that share a batch. The order of examples and the choice of mirror images are
those of the stream from disk.
"""

import concurrent.futures
import functools
import math

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from djepa_jax.config.convert import ConfigError
from djepa_jax.core import sharding
from djepa_jax.data.latent_cache import DTYPES, LatentCache
from djepa_jax.data.records import Source

USABLE_SHARE = 0.5  # of a device's memory; the rest is for the training
READERS = 16  # threads that read records, when training starts


class ResidentCache:
    """A cache on the devices of a mesh; its `rows` have numbers of rows in place of moments."""

    def __init__(self, source: Source, mesh):
        if not isinstance(source, LatentCache):
            raise ConfigError(
                'data.device_resident needs data.source "latents", without captions; switch it off.'
            )
        needed = table_bytes(source, mesh)
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit and needed > USABLE_SHARE * limit:
            raise ConfigError(
                f"data.device_resident needs {needed / 2**30:.1f} GiB on each device, which has "
                f"{limit / 2**30:.1f} GiB in all; switch it off, or use more devices."
            )
        logging.info("reading %d examples into the memory of the devices", len(source))
        self._source, place = source, sharding.batch_sharding(mesh)
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            conditions = pool.map(lambda number: source[number]["condition"], range(len(source)))
            self._conditions = np.array(list(conditions))
        self.rows = grain.MapDataset.range(len(source)).map(self._row)
        devices = sharding.batch_divisor(mesh)
        self._num_rows = -(-2 * len(source) // devices) * devices  # every device holds as many
        shape = (self._num_rows, *source.metadata.shape)
        self._table = jax.make_array_from_callback(shape, place, self._read)
        self._gather = jax.jit(functools.partial(jnp.take, axis=0), out_shardings=place)

    def fetch(self, batch: dict) -> dict:
        """A batch with moments in the place of row numbers."""
        return {**batch, "example": self._gather(self._table, batch["example"])}

    def _row(self, number: int) -> dict:
        rows = {"example": np.int32(2 * number), "mirror": np.int32(2 * number + 1)}
        return {**rows, "condition": self._conditions[number]}

    def _read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Some rows, read from the cache; each example once."""
        start, stop, _ = index[0].indices(self._num_rows)
        metadata = self._source.metadata
        values = np.zeros((stop - start, *metadata.shape), DTYPES[metadata.dtype])

        def fill(number: int) -> None:
            example = self._source[number]
            for row, name in ((2 * number, "example"), (2 * number + 1, "mirror")):
                if start <= row < stop:
                    values[row - start] = example[name]

        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fill, range(start // 2, min(-(-stop // 2), len(self._source)))))
        return values


def table_bytes(source: LatentCache, mesh) -> int:
    """Bytes that the table of a cache takes on each device."""
    size = math.prod(source.metadata.shape) * np.dtype(DTYPES[source.metadata.dtype]).itemsize
    return -(-2 * len(source) // sharding.batch_divisor(mesh)) * size
