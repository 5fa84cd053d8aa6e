"""Two modalities as one: the tokens of the first, then those of the second, in one sequence.

An example is a row of bytes, those of the first one's values and then the second's, so that what
reads, mixes and places examples need not know that there are two. Each part has position tables of
its own, in which a vector that all its tokens share is contained.
"""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.core.modalities.base import MADE, Modality


@dataclasses.dataclass(frozen=True)
class Joint:
    """Pairs of a `first` and a `second` modality whose tokens are of the same width."""

    first: Modality
    second: Modality

    example_dtype = np.dtype(np.uint8)
    needs_decoder = False
    factorised_positions = True
    places_shape = (2,)  # of a mask: the parts

    def __post_init__(self):
        if self.first.token_dim != self.second.token_dim:
            raise ValueError(
                f"data.options.first has tokens of {self.first.token_dim} values, and second of "
                f"{self.second.token_dim}; choose patches that make them the same."
            )
        if self.names[0] == self.names[1] or self.first.needs_decoder or self.second.needs_decoder:
            raise ValueError(
                f"data.options.first and second are of {' and '.join(self.names)}; they must be of "
                "two kinds out of pictures, clips and sounds, and not latents."
            )

    @classmethod
    def from_settings(cls, data) -> "Joint":
        """`first` and `second` of the options: `modality`, and the options of that."""
        from djepa_jax.core.modalities import MODALITIES  # this one is in it, too

        options = dict(data.options)
        for name in ("first", "second"):
            own = dict(options.get(name, {}))
            kind = own.pop("modality", "")
            known = [key for key, value in MODALITIES.items() if value is not cls]
            if kind not in known:
                raise ValueError(
                    f'data.options.{name}.modality is "{kind}"; it must be one of '
                    f"{', '.join(known)}."
                )
            part = dataclasses.replace(data, modality=kind, options=own)
            options[name] = MODALITIES[kind].from_settings(part)
        return cls(**options)

    @property
    def parts(self) -> tuple[Modality, Modality]:
        """Both."""
        return self.first, self.second

    @property
    def names(self) -> tuple[str, ...]:
        """What both export for people: images, clips or sound."""
        return tuple(MADE.get(len(part.example_shape), "others") for part in self.parts)

    @property
    def grid(self) -> tuple[tuple[int, ...], ...]:
        """The grids of both, one after the other."""
        return self.first.grid, self.second.grid

    @property
    def token_dim(self) -> int:
        """Values of a token of either."""
        return self.first.token_dim

    @property
    def sizes(self) -> list[int]:
        """Bytes of an example of each."""
        return [math.prod(p.example_shape) * p.example_dtype.itemsize for p in self.parts]

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Bytes of both."""
        return (sum(self.sizes),)

    def check_example(self, example: np.ndarray) -> None:
        """Raise ValueError unless an example has the bytes of both."""
        if tuple(example.shape) != self.example_shape or example.dtype != self.example_dtype:
            raise ValueError(
                f"the data holds {example.dtype} {example.shape}, the config expects pairs as "
                f"bytes {self.example_shape}; use a source of pairs, such as paired."
            )

    def join(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Examples of both, `[...]` or `[B, ...]`, as bytes `[K]` or `[B, K]`."""
        rows = []
        for part, example in zip(self.parts, (first, second), strict=True):
            leading = example.shape[: example.ndim - len(part.example_shape)]
            rows.append(np.ascontiguousarray(example).reshape(*leading, -1).view(np.uint8))
        return np.concatenate(rows, axis=-1)

    def split(self, examples: jax.Array) -> list[jax.Array]:
        """Bytes `[B, K]` -> the examples of both, each `[B, ...]`."""
        found, examples = [], jnp.split(jnp.asarray(examples), self.sizes[:1], axis=-1)
        for part, values in zip(self.parts, examples, strict=True):
            if part.example_dtype.itemsize > 1:
                values = values.reshape(len(values), -1, part.example_dtype.itemsize)
                values = jax.lax.bitcast_convert_type(values, part.example_dtype)
            found.append(values.reshape(len(values), *part.example_shape))
        return found

    def tokenize(self, examples: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Bytes `[B, K]` -> tokens `[B, N, C]`."""
        pairs = zip(self.parts, self.split(examples), strict=True)
        return jnp.concatenate([part.tokenize(each, key) for part, each in pairs], axis=1)

    def detokenize(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens `[B, N, C]` -> what either makes of its own."""
        count = math.prod(self.first.grid)
        return self.first.detokenize(tokens[:, :count]), self.second.detokenize(tokens[:, count:])

    def export(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """The arrays of both."""
        count = math.prod(self.first.grid)
        return self.first.export(tokens[:, :count]) | self.second.export(tokens[:, count:])

    def tokens_at(self, places: np.ndarray) -> np.ndarray:
        """The tokens `[B, N]` of some parts `[B, 2]`."""
        return np.repeat(places, [math.prod(part) for part in self.grid], axis=1)

    def named(self, examples: np.ndarray) -> dict[str, np.ndarray]:
        """Bytes `[B, K]` as the arrays that people want."""
        return dict(zip(self.names, map(np.asarray, self.split(examples)), strict=True))

    def put_back(self, examples: np.ndarray, arrays: dict, mask: np.ndarray) -> np.ndarray:
        """Bytes `[B, K]` of which the parts in a mask `[B, 2]` are those of exported arrays."""
        joined = []
        for part, given, anew in zip(self.parts, self.split(examples), mask.T, strict=True):
            places = anew.reshape(-1, *[1] * max(given.ndim - 2, 1))
            joined.append(part.put_back(np.asarray(given), arrays, places))
        return self.join(*joined)

    def preview(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """What is seen of the first above what is of the second: uint8 `[n, H, W, 1 or 3]`."""
        pictures = [part.preview(arrays) for part in self.parts]
        width, channels = (max(each.shape[axis] for each in pictures) for axis in (2, 3))
        rows = []
        for each in pictures:
            beside = width - each.shape[2]
            padding = [(0, 0), (0, 0), (beside // 2, beside - beside // 2), (0, 0)]
            padded = np.pad(each, padding, constant_values=255)
            rows.append(np.repeat(padded, channels // each.shape[3], axis=3))
        return np.concatenate(rows, axis=1)

    def save(self, arrays: dict[str, np.ndarray], index: int, stem: os.PathLike) -> None:
        """Write the files of both."""
        for part in self.parts:
            part.save(arrays, index, stem)
