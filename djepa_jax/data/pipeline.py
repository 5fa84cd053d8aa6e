"""From a source to batches, with Grain.

The order of examples is a pure function of (seed, examples consumed): the whole stream is one sequence, every
epoch of it a fresh permutation, and augmentation is drawn from the position in it. Each host takes every
`num_hosts`-th example from where training stands, so a step sees the same examples on any number of hosts.
"""

from collections.abc import Iterator

import grain
import numpy as np

from djepa_jax.data.sources import Source


class RandomFlip(grain.transforms.RandomMap):
    """Mirror every second image; latents cannot be mirrored, so they come with those of the mirror image."""

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        """Take the mirror image with probability one half."""
        if rng.random() >= 0.5:
            return element
        return {**element, "image": element["mirror"] if "mirror" in element else element["image"][:, ::-1]}


class DropMirror(grain.transforms.Map):
    """Leave out the mirror image, once it was chosen or not."""

    def map(self, element: dict) -> dict:
        """Image and label only."""
        return {"image": element["image"], "label": element["label"]}


def example_stream(source: Source, seed: int, random_flip: bool = False) -> grain.MapDataset:
    """The endless sequence of training examples; `stream[i]` is the i-th one consumed."""
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    stream = stream.random_map(RandomFlip()) if random_flip else stream
    return stream.map(DropMirror())


def host_batches(stream: grain.MapDataset, batch_size: int, consumed: int, host: int = 0, num_hosts: int = 1) -> Iterator[dict]:
    """This host's share of every batch, after `consumed` examples of the whole stream.

    Args:
        stream: from `example_stream`.
        batch_size: of all hosts together.
        consumed: examples already used by all hosts together.
        host: index of this host.
        num_hosts: how many there are; must divide `batch_size`.

    Yields:
        dicts of arrays with leading axis `batch_size / num_hosts`.
    """
    mine = stream[consumed + host :: num_hosts]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * batch_size // num_hosts)
    yield from mine.to_iter_dataset(options).batch(batch_size // num_hosts, drop_remainder=True)
