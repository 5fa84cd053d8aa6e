"""Pictures as tokens without seams: frequencies of overlapping windows.

A lapped transform (Malvar 1992) in its time-domain form (Tran, Liang and Tu 2003): an orthogonal
filter across every border between blocks, then the cosine transform of each block. A token holds a
block's low frequencies, and its waveforms run smoothly into the neighbouring blocks. The transform
is fixed: there is nothing to train, to measure on the data or to keep.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.core.modalities.image import ImagePixels, patchify, to_range, unpatchify

# Brightness, red against blue, green against both: orthonormal rows.
OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
# Amplitudes of photographs fall off as 1 / frequency ** 1.2. Half of that exponent is taken away:
# the shape of things counts for more than their details, which are many and hard to foresee.
SCALE, FALLOFF, LOWEST = 0.8, 0.6, 0.3
COLOUR = np.array([1, 0.63, 0.45])
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # true float32


@dataclasses.dataclass(frozen=True)
class ImageLapped(ImagePixels):
    """Square uint8 images `[size, size, channels]` as frequencies of windows `patch` apart.

    Frequencies above a cutoff, a share of the highest along one axis, are left out; 1.5 keeps all.
    """

    cutoff: float = 0.45
    colour_cutoff: float = 0.13

    factorised_positions = True  # neighbours are found sooner than with a vector per place

    def __post_init__(self):
        super().__post_init__()
        cutoffs = (self.cutoff, self.colour_cutoff)
        if self.patch < 2 or self.channels not in (1, 3) or not min(cutoffs) > 0:
            raise ValueError(
                f"data.patch_size is {self.patch}, data.channels {self.channels}, and the cutoffs "
                f"in data.options are {cutoffs}; image_lapped takes patches of at least 2, 1 or 3 "
                "channels, and cutoffs above 0."
            )

    @property
    def token_dim(self) -> int:
        """Frequencies that are kept, of all channels."""
        return len(self.kept[0])

    @functools.cached_property
    def kept(self) -> tuple[np.ndarray, np.ndarray]:
        """Which of the `channels * patch**2` frequencies of a window are kept, and their scale."""
        axis = np.arange(self.patch) / self.patch
        frequency = np.hypot(axis[:, None], axis).ravel()  # [p p]
        cutoffs = [self.cutoff, self.colour_cutoff, self.colour_cutoff][: self.channels]
        kept = np.concatenate([frequency <= cutoff for cutoff in cutoffs])
        amplitude = SCALE * np.hypot(frequency, LOWEST / self.patch) ** -FALLOFF
        scale = COLOUR[: self.channels, None] * amplitude  # [channels, p p]
        return np.flatnonzero(kept), scale.ravel()[kept].astype(np.float32)

    def tokenize(self, examples: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """uint8 images `[B, H, W, C]` -> tokens; brightness has a deviation near one."""
        colours, transform = self._matrices()
        values = einsum("bhwc,ih,jw,kc->bijk", to_range(examples), transform, transform, colours)
        index, scale = self.kept
        return patchify(values, self.patch)[..., index] / scale

    def detokenize(self, tokens: jax.Array) -> jax.Array:
        """Tokens `[B, N, C]` -> images `[B, H, W, C]` around [-1, 1]."""
        index, scale = self.kept
        windows = jnp.zeros((*tokens.shape[:-1], self.channels * self.patch**2))
        windows = windows.at[..., index].set(tokens * scale)
        values = unpatchify(windows, self.patch, self.size, self.size)
        colours, transform = self._matrices()
        return einsum("bijk,ih,jw,kc->bhwc", values, transform, transform, colours)

    def _matrices(self) -> tuple[np.ndarray, np.ndarray]:
        colours = OPPONENT if self.channels == 3 else np.ones((1, 1))
        transform = lapped_transform(self.size, self.patch)
        return colours.astype(np.float32), transform.astype(np.float32)


def lapped_transform(size: int, patch: int) -> np.ndarray:
    """The orthogonal matrix `[size, size]` from samples to frequencies of windows, in their order.

    At both ends of the axis, where there is no neighbour, it is the plain cosine transform.
    """
    half = patch // 2
    eye, flip = np.eye(half), np.eye(half)[::-1]
    rotation = flip @ _cosines(half, 0.0).T @ _cosines(half, 0.5) @ flip
    split = np.block([[eye, flip], [flip, -eye]]) / np.sqrt(2)  # even and odd parts at a border
    none = np.zeros((half, half))
    border = split @ np.block([[eye, none], [none, rotation]]) @ split
    filtered = np.eye(size)
    for start in range(patch, size, patch):
        around = slice(start - half, start + half)
        filtered[around, around] = border
    return np.kron(np.eye(size // patch), _cosines(patch, 0.0)) @ filtered


def _cosines(size: int, shift: float) -> np.ndarray:
    """The orthogonal cosine transform of type II (`shift` 0) or IV (0.5): `[size, size]`."""
    rows, columns = np.arange(size)[:, None] + shift, np.arange(size) + 0.5
    matrix = np.cos(np.pi / size * rows * columns)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
