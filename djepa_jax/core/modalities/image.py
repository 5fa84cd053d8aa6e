"""Images as tokens: windows of pixels, or of the latents of an autoencoder."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from djepa_jax.core.models.autoencoder_kl import sample_posterior


def patchify(maps: jax.Array, patch: int) -> jax.Array:
    """Cut maps `[B, H, W, C]` into tokens `[B, H/p W/p, C p p]`, inside (channel, row, column)."""
    return rearrange(maps, "b (h p) (w q) c -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """Inverse of `patchify`: `[B, N, C p p]` -> `[B, height, width, C]`."""
    sizes = {"h": height // patch, "w": width // patch, "p": patch, "q": patch}
    return rearrange(tokens, "b (h w) (c p q) -> b (h p) (w q) c", **sizes)


def to_range(pixels: jax.Array) -> jax.Array:
    """uint8 values -> float32 in [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1


def to_pixels(values: jax.Array) -> jax.Array:
    """Values around [-1, 1] -> uint8: clipped, and rounded to the nearest level (ties to even)."""
    return jnp.clip(jnp.round((values + 1) * 127.5), 0, 255).astype(jnp.uint8)


def draw_latents(examples: jax.Array, channels: int, key: jax.Array | None) -> jax.Array:
    """Float32 latents `[..., C]`; of moments `[..., 2C]` what `key` draws, without one the mean."""
    if examples.shape[-1] != 2 * channels:
        return examples.astype(jnp.float32)
    shape = (*examples.shape[:-1], channels)
    noise = jnp.zeros(shape) if key is None else jax.random.normal(key, shape)
    return sample_posterior(examples.astype(jnp.float32), noise)


@dataclasses.dataclass(frozen=True)
class PatchedMaps:
    """Square maps `[size, size, channels]` in windows of `patch` x `patch`; a shared base."""

    size: int
    channels: int
    patch: int

    factorised_positions = False

    def __post_init__(self):
        if self.patch < 1 or self.size % self.patch:
            raise ValueError(
                f"data.image_size {self.size} is not divisible by data.patch_size {self.patch}; "
                "choose a patch size that divides it."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return (self.size // self.patch, self.size // self.patch)

    @property
    def token_dim(self) -> int:
        """Values per window."""
        return self.channels * self.patch**2

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Height, width, channels."""
        return (self.size, self.size, self.channels)

    def check_example(self, example: np.ndarray) -> None:
        """Raise ValueError unless an example has exactly this shape and type."""
        if tuple(example.shape) != self.example_shape or example.dtype != self.example_dtype:
            raise ValueError(
                f"the data holds {example.dtype} examples of shape {tuple(example.shape)}, the "
                f"config expects {self.example_dtype} of shape {self.example_shape}; convert the "
                "data, or set data.image_size and data.channels to match."
            )

    def detokenize(self, tokens: jax.Array) -> jax.Array:
        """Tokens `[B, N, C]` -> maps `[B, H, W, C]` in the same value range."""
        return unpatchify(tokens, self.patch, self.size, self.size)

    def tokens_at(self, places: np.ndarray) -> np.ndarray:
        """Which tokens `[B, N]` show any of some places `[B, H, W]` of maps, or of pictures."""
        rows, columns = self.grid
        return reduce(places, "b (h p) (w q) -> b (h w)", "max", h=rows, w=columns)

    def put_back(self, examples: np.ndarray, arrays: dict, mask: np.ndarray) -> np.ndarray:
        """Pictures `[B, H, W, C]` whose places of a mask `[B, H, W]` are those of `images`."""
        return np.where(mask[..., None], arrays["images"], examples)

    def preview(self, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
        """The images, where there are some."""
        return arrays.get("images")

    def save(self, arrays: dict[str, np.ndarray], index: int, stem: os.PathLike) -> None:
        """Write an image as PNG, latents without an image as npy."""
        if "images" not in arrays:
            np.save(f"{os.fspath(stem)}.npy", arrays["latents"][index])
            return
        from PIL import Image  # sampling and training do not need it

        image = arrays["images"][index]
        image = image[..., 0] if image.shape[-1] == 1 else image
        Image.fromarray(image).save(f"{os.fspath(stem)}.png")


@dataclasses.dataclass(frozen=True)
class ImagePixels(PatchedMaps):
    """Square uint8 images `[size, size, channels]`, seen by the network in [-1, 1]."""

    example_dtype = np.dtype(np.uint8)
    needs_decoder = False

    @classmethod
    def from_settings(cls, data) -> "ImagePixels":
        """Images of `data.image_size` and `data.channels`; options are further fields."""
        return cls(data.image_size, data.channels, data.patch_size, **data.options)

    def tokenize(self, examples: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """uint8 images `[B, H, W, C]` -> tokens in [-1, 1]."""
        return patchify(to_range(examples), self.patch)

    def export(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """{"images": uint8 `[B, H, W, C]`}."""
        return {"images": to_pixels(self.detokenize(tokens))}


@dataclasses.dataclass(frozen=True)
class ImageLatents(PatchedMaps):
    """Float latent maps `[size, size, channels]`, or the moments of their posterior, twice as deep.

    The network sees (latents - shift) * scale.
    """

    scale: float
    shift: float = 0.0

    example_dtype = np.dtype(np.float32)
    needs_decoder = True

    @classmethod
    def from_settings(cls, data) -> "ImageLatents":
        """Latent maps of side `data.image_size`."""
        scaling = (data.latent_scale, data.latent_shift)
        return cls(data.image_size, data.channels, data.patch_size, *scaling)

    def check_example(self, example: np.ndarray) -> None:
        """Raise ValueError unless an example is a map of latents or of moments."""
        moments = tuple(example.shape) == (self.size, self.size, 2 * self.channels)
        if not (moments and example.dtype in (np.float32, jnp.bfloat16)):
            super().check_example(example)

    def tokenize(self, examples: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Latents `[B, H, W, C]`, or moments `[B, H, W, 2C]` of which `key` draws -> tokens."""
        latents = draw_latents(examples, self.channels, key)
        return patchify((latents - self.shift) * self.scale, self.patch)

    def export(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """{"latents": float32 `[B, H, W, C]`} in the autoencoder's own scale."""
        return {"latents": self.detokenize(tokens) / self.scale + self.shift}
