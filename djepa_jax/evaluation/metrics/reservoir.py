"""A uniform choice of rows from a stream, for figures that need the rows themselves."""

import numpy as np


class Reservoir:
    """At most `size` of the rows seen: those of the smallest random keys, all of them while fewer.

    A row's key is a function of the seed and its index alone, so that parts of the stream, in any
    order and split in any way, merge to the same choice.
    """

    def __init__(self, size: int, seed: int = 0):
        self._size, self._seed, self._bound = size, seed, np.inf
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # keys, indices, rows

    def update(self, rows: np.ndarray, start: int) -> None:
        """Take in rows `[n, ...]`, of which the first has the index `start` in the stream."""
        keys = np.random.Generator(np.random.PCG64(self._seed).advance(start)).random(len(rows))
        entering = np.flatnonzero(keys < self._bound)
        self._parts.append((keys[entering], start + entering, rows[entering]))
        if sum(len(keys) for keys, _, _ in self._parts) > 2 * self._size:
            self._shrink()

    def merge(self, other: "Reservoir") -> None:
        """Take in what another one has, of the same size and seed."""
        self._parts += other._parts
        self._bound = min(self._bound, other._bound)

    def rows(self) -> np.ndarray | None:
        """The rows `[min(n, size), ...]` in the order of the stream; None if there were none."""
        if not self._parts:
            return None
        self._shrink()
        return self._parts[0][2]

    def state(self) -> dict[str, np.ndarray]:
        """What it holds, as arrays by name; empty before the first rows."""
        if self.rows() is None:
            return {}
        keys, indices, rows = self._parts[0]
        return {"keys": keys, "indices": indices, "rows": rows}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Hold what `state` gave."""
        self._parts = [(state["keys"], state["indices"], state["rows"])] if state else []

    def _shrink(self) -> None:
        keys, indices, rows = (np.concatenate(each) for each in zip(*self._parts, strict=True))
        kept = np.argsort(keys, kind="stable")[: self._size]
        if len(kept) == self._size:
            self._bound = keys[kept[-1]]
        kept = kept[np.argsort(indices[kept], kind="stable")]
        self._parts = [(keys[kept], indices[kept], rows[kept])]
