"""Examples of several lengths in one array of rows, so that nothing is computed for padding.

Groups of examples are alike: in each, the first n1 examples have at most l1 places, the next n2 at
most l2, and so on. Rows hold a group's examples one after the other, cut to these lengths. All that
treats rows alone (linear maps, norms) runs on them at once; attention and dropout take the parts.

Shape letters: B examples, G groups of E examples, S places of the longest, R rows of a group.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Parts of a group: (number of examples, their places at most), E and R in all."""

    parts: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Examples of a group (E)."""
        return sum(count for count, _ in self.parts)

    @property
    def length(self) -> int:
        """Places of the longest examples."""
        return max(length for _, length in self.parts)

    def flatten(self, x: jax.Array) -> jax.Array:
        """Rows of examples `[B, S, ...]`: `[G, R, ...]`; places beyond a part's length go."""
        parts = self.of_examples(x)
        return self.join([part[:, :length] for part, (_, length) in self._with(parts)])

    def restore(self, rows: jax.Array, length: int) -> jax.Array:
        """Examples `[B, S, ...]` of rows `[G, R, ...]`, with zeros at the places that went."""
        parts = []
        for part, (count, own) in self._with(self.split(rows)):
            pad = ((0, 0), (0, length - own)) + ((0, 0),) * (rows.ndim - 2)
            parts.append(jnp.pad(part, pad).reshape(-1, count, length, *rows.shape[2:]))
        joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        return joined.reshape(-1, length, *rows.shape[2:])

    def split(self, rows: jax.Array) -> list[jax.Array]:
        """The examples of each part, `[G n, l, ...]`, of rows `[G, R, ...]`."""
        sizes = [count * length for count, length in self.parts]
        cut = self._cut(rows, sizes)
        return [x.reshape(-1, length, *rows.shape[2:]) for x, (_, length) in self._with(cut)]

    def join(self, parts: list[jax.Array]) -> jax.Array:
        """Rows `[G, R, ...]` of the examples of each part."""
        rows = [
            x.reshape(-1, count * x.shape[1], *x.shape[2:]) for x, (count, _) in self._with(parts)
        ]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)

    def of_examples(self, x: jax.Array | None) -> list:
        """Of something per example, `[B, ...]`, that of each part, `[G n, ...]`; None stays."""
        if x is None or len(self.parts) == 1:
            return [x] * len(self.parts)
        cut = self._cut(x.reshape(-1, self.size, *x.shape[1:]), [n for n, _ in self.parts])
        return [part.reshape(-1, *x.shape[1:]) for part in cut]

    def _with(self, parts: list):
        return zip(parts, self.parts, strict=True)

    @staticmethod
    def _cut(x: jax.Array, sizes: list[int]) -> list[jax.Array]:
        ends = list(itertools.accumulate(sizes))
        return [x[:, end - size : end] for size, end in zip(sizes, ends, strict=True)]


def whole(length: int) -> Ragged:
    """All examples with all their places: a group for each."""
    return Ragged(((1, length),))
