"""A latent cache kept on the devices, so that a training step takes its examples by index and the
host does nothing.

Rows of the table are example 0, its mirror image, example 1, its mirror image, and so on; they are
split over the devices that share a batch. The order of examples and the choice of mirror images are
those of the stream from disk.
"""

import collections
import concurrent.futures
import math

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.config.experiment import ConfigError
from djepa_jax.core import sharding
from djepa_jax.data.latent_cache import DTYPES, LatentCache
from djepa_jax.runtime import distributed

USABLE_SHARE = 0.5  # of a device's memory; the rest is for the training
READERS = 16  # threads that read records, when training starts


class ResidentCache:
    """The moments of a cache on the devices of a mesh.

    Attributes:
        rows: a source that gives row numbers where the cache gives moments.

    Raises:
        ConfigError: the source is no latent cache, or larger than half of the devices' memory.
    """

    def __init__(self, source, mesh):
        if not isinstance(source, LatentCache):
            raise ConfigError(
                'config.data.device_resident needs data.source "latents"; switch it off.'
            )
        self._source, place = source, sharding.batch_sharding(mesh)
        self._num_rows = _rows_per_device(source, mesh) * sharding.batch_divisor(mesh)
        self._check_memory(mesh)
        if distributed.is_main():
            print(f"reading {len(source):,} examples into the memory of the devices", flush=True)
        self.rows = RowNumbers(source)
        shape = (self._num_rows, *source.metadata.shape)
        self._table = jax.make_array_from_callback(shape, place, self._read)
        self._gather = jax.jit(
            lambda table, rows: jnp.take(table, rows, axis=0), out_shardings=place
        )

    def fetch(self, batch: dict) -> dict:
        """A batch with moments in the place of row numbers."""
        return {**batch, "example": self._gather(self._table, batch["example"])}

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
            collections.deque(
                pool.map(fill, range(start // 2, min(-(-stop // 2), len(self._source)))), maxlen=0
            )
        return values

    def _check_memory(self, mesh) -> None:
        needed = table_bytes(self._source, mesh)
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit and needed > USABLE_SHARE * limit:
            raise ConfigError(
                f"config.data.device_resident needs {needed / 2**30:.1f} GiB on each device, "
                f"which has {limit / 2**30:.1f} GiB "
                "in all; switch it off, or use more devices."
            )


def _rows_per_device(source: LatentCache, mesh) -> int:
    """Padded: every device that shares a batch holds as many."""
    return -(-2 * len(source) // sharding.batch_divisor(mesh))


def table_bytes(source: LatentCache, mesh) -> int:
    """Bytes that the table of a cache takes on each device."""
    metadata = source.metadata
    return (
        _rows_per_device(source, mesh)
        * math.prod(metadata.shape)
        * np.dtype(DTYPES[metadata.dtype]).itemsize
    )


class RowNumbers:
    """The examples of a cache by the numbers of their rows, in place of their moments."""

    def __init__(self, source: LatentCache):
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            self._labels = np.fromiter(
                pool.map(lambda index: source[index]["condition"], range(len(source))), np.int32
            )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict:
        return {
            "example": np.int32(2 * index),
            "mirror": np.int32(2 * index + 1),
            "condition": self._labels[index],
        }
