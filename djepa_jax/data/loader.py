"""From a source to batches, with Grain.

The order of examples is a pure function of (seed, examples consumed): the whole stream is one
sequence, every epoch of it a fresh permutation, and augmentation is drawn from the position in it.
Batch n is the n-th piece of that sequence, on any number of processes; each of them reads the rows
of it that its devices need.
"""

from collections.abc import Iterator

import grain
import numpy as np

from djepa_jax.data.sources import Source


class RandomFlip(grain.transforms.RandomMap):
    """Mirror every second image.

    Latents cannot be mirrored: they must come with those of the mirror image, as `open_data` makes
    sure.
    """

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        """Take the mirror image with probability one half."""
        if rng.random() >= 0.5:
            return element
        return {
            **element,
            "example": element["mirror"] if "mirror" in element else element["example"][:, ::-1],
        }


class DropMirror(grain.transforms.Map):
    """Leave out the mirror image, once it was chosen or not."""

    def map(self, element: dict) -> dict:
        """Example and condition only."""
        return {"example": element["example"], "condition": element["condition"]}


def example_stream(source: Source, seed: int, random_flip: bool = False) -> grain.MapDataset:
    """The endless sequence of training examples; `stream[i]` is the i-th one consumed."""
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    stream = stream.random_map(RandomFlip()) if random_flip else stream
    return stream.map(DropMirror())


class _Rows:
    """Some rows of every batch of a stream, one after the other."""

    def __init__(self, stream: grain.MapDataset, batch_size: int, consumed: int, rows: np.ndarray):
        self._stream, self._batch_size, self._consumed, self._rows = (
            stream,
            batch_size,
            consumed,
            rows,
        )

    def __len__(self) -> int:
        return (len(self._stream) - self._consumed) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> dict:
        batch, position = divmod(index, len(self._rows))
        return self._stream[self._consumed + batch * self._batch_size + int(self._rows[position])]


def row_batches(
    stream: grain.MapDataset,
    batch_size: int,
    consumed: int,
    rows: np.ndarray | None = None,
    num_threads: int = 2,
) -> Iterator[dict]:
    """Some rows of every batch, after `consumed` examples of the stream.

    Args:
        stream: from `example_stream`.
        batch_size: of all processes together.
        consumed: examples already used by all processes together.
        rows: which rows of a batch this process needs; None for all.
        num_threads: that read examples; their number changes nothing but the speed.

    Yields:
        dicts of arrays with leading axis `len(rows)`.
    """
    rows = np.arange(batch_size) if rows is None else rows
    mine = grain.MapDataset.source(_Rows(stream, batch_size, consumed, rows))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * len(rows))
    yield from mine.to_iter_dataset(options).batch(len(rows), drop_remainder=True)


def read_in_order(source, num_threads: int, ahead: int) -> Iterator:
    """All elements of a source, whatever they are, in their order.

    Args:
        source: has a length, and gives elements by index; must be readable from several threads.
        num_threads: that read.
        ahead: elements that they may have read before they are wanted, which bounds the memory.
    """
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(ahead, num_threads)
    )
    yield from grain.MapDataset.source(source).to_iter_dataset(options)
