"""Clips as tokens: boxes of pixels, or of latents of each frame, in time, rows and columns."""

import dataclasses
import functools
import os

import jax
import numpy as np
from einops import rearrange, reduce
from jax import numpy as jnp

from djepa_jax.core.modalities.image import draw_latents, to_pixels, to_range
from djepa_jax.core.modalities.lapped import ImageLapped

GAP = 1  # columns of white between the frames of a film strip
FRAME_MS = 120  # in files


@dataclasses.dataclass(frozen=True)
class VideoPixels:
    """uint8 clips `[frames, size, size, channels]` in boxes of `patch_frames` x `patch` x `patch`.

    The network sees values in [-1, 1], and one position table per axis, summed.
    """

    num_frames: int
    size: int
    channels: int
    patch: int
    patch_frames: int = 2

    example_dtype = np.dtype(np.uint8)
    needs_decoder = False
    factorised_positions = True

    def __post_init__(self):
        for name, length, part in (
            ("data.image_size", self.size, self.patch),
            ("data.options num_frames", self.num_frames, self.patch_frames),
        ):
            if part < 1 or length % part:
                raise ValueError(f"{name} {length} is not divisible by its patch of {part}.")

    @classmethod
    def from_settings(cls, data, **scaling) -> "VideoPixels":
        """Frames of `data.image_size` and `data.channels`; options are num_frames, patch_frames."""
        options = {"num_frames": 8} | data.options
        sizes = {"size": data.image_size, "channels": data.channels, "patch": data.patch_size}
        return cls(**sizes, **scaling, **options)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Boxes in time, rows and columns."""
        side = self.size // self.patch
        return (self.num_frames // self.patch_frames, side, side)

    @property
    def token_dim(self) -> int:
        """Values of a box."""
        return self.patch_frames * self.patch**2 * self.channels

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Frames, height, width, channels."""
        return (self.num_frames, self.size, self.size, self.channels)

    def check_example(self, example: np.ndarray) -> None:
        """Raise ValueError unless an example has exactly this shape and type."""
        if tuple(example.shape) != self.example_shape or example.dtype != self.example_dtype:
            raise ValueError(
                f"the data holds {example.dtype} clips of shape {tuple(example.shape)}, the config "
                f"expects {self.example_dtype} of shape {self.example_shape}; convert the data, or "
                "set data.options.num_frames, data.image_size and data.channels to match."
            )

    @property
    def _sizes(self) -> dict[str, int]:
        """Lengths of the axes for einops: t, h, w boxes of f frames and p x q pixels."""
        return dict(zip("thw", self.grid, strict=True)) | {
            "f": self.patch_frames,
            "p": self.patch,
            "q": self.patch,
        }

    def tokenize(self, examples: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """uint8 clips `[B, T, H, W, C]` -> tokens `[B, N, C f p q]` in [-1, 1]."""
        return self._boxes(to_range(examples))

    def _boxes(self, values: jax.Array) -> jax.Array:
        """Values `[B, T, H, W, C]` -> `[B, N, C f p q]`."""
        pattern = "b (t f) (h p) (w q) c -> b (t h w) (c f p q)"
        return rearrange(values, pattern, **self._sizes)

    def detokenize(self, tokens: jax.Array) -> jax.Array:
        """Tokens `[B, N, C f p q]` -> clips `[B, T, H, W, C]` in the same value range."""
        pattern = "b (t h w) (c f p q) -> b (t f) (h p) (w q) c"
        return rearrange(tokens, pattern, **self._sizes)

    def export(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """{"clips": uint8 `[B, T, H, W, C]`}."""
        return {"clips": to_pixels(jnp.asarray(self.detokenize(tokens)))}

    def tokens_at(self, places: np.ndarray) -> np.ndarray:
        """Which tokens `[B, N]` show any of some places `[B, T, H, W]`, of pictures, too."""
        pattern = "b (t f) (h p) (w q) -> b (t h w)"
        return reduce(places, pattern, "max", **dict(zip("thw", self.grid, strict=True)))

    def put_back(self, examples: np.ndarray, arrays: dict, mask: np.ndarray) -> np.ndarray:
        """Clips `[B, T, H, W, C]` whose places of a mask `[B, T, H, W]` are those of `clips`."""
        return np.where(mask[..., None], arrays["clips"], examples)

    def preview(self, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
        """Film strips: frames side by side, `[B, H, T (W + 1) - 1, C]`."""
        clips = arrays["clips"]
        padded = np.pad(clips, [(0, 0)] * 3 + [(0, GAP), (0, 0)], constant_values=255)
        return rearrange(padded, "b t h w c -> b h (t w) c")[:, :, :-GAP]

    def save(self, arrays: dict[str, np.ndarray], index: int, stem: os.PathLike) -> None:
        """Write a clip as GIF and as WebP without loss, and as mp4 where `av` is installed."""
        from PIL import Image  # sampling and training do not need it

        clip = arrays["clips"][index]
        frames = [Image.fromarray(f[..., 0] if f.shape[-1] == 1 else f) for f in clip]
        how = {"save_all": True, "append_images": frames[1:], "duration": FRAME_MS, "loop": 0}
        frames[0].save(f"{os.fspath(stem)}.gif", **how)
        frames[0].save(f"{os.fspath(stem)}.webp", lossless=True, **how)
        try:
            import av
        except ImportError:
            return
        with av.open(f"{os.fspath(stem)}.mp4", "w") as container:
            stream = container.add_stream("libx264", rate=round(1000 / FRAME_MS))
            stream.height, stream.width = clip.shape[1] // 2 * 2, clip.shape[2] // 2 * 2
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                picture = av.VideoFrame.from_image(frame.convert("RGB"))
                container.mux(stream.encode(picture))
            container.mux(stream.encode())


@dataclasses.dataclass(frozen=True)
class VideoLapped(VideoPixels):
    """Clips whose frames are made tokens as `ImageLapped` does; a token holds `patch_frames`."""

    cutoff: float = 0.45
    colour_cutoff: float = 0.13

    @functools.cached_property
    def frame(self) -> ImageLapped:
        """What makes tokens of a frame."""
        return ImageLapped(self.size, self.channels, self.patch, self.cutoff, self.colour_cutoff)

    @property
    def token_dim(self) -> int:
        """Values of all frames of a box."""
        return self.patch_frames * self.frame.token_dim

    def tokenize(self, examples: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """uint8 clips `[B, T, H, W, C]` -> tokens `[B, N, f C]`."""
        tokens = self.frame.tokenize(rearrange(examples, "b t h w c -> (b t) h w c"))
        sizes = {"t": self.grid[0], "f": self.patch_frames}
        return rearrange(tokens, "(b t f) n c -> b (t n) (f c)", **sizes)

    def detokenize(self, tokens: jax.Array) -> jax.Array:
        """Tokens `[B, N, f C]` -> clips `[B, T, H, W, C]` around [-1, 1]."""
        sizes = {"t": self.grid[0], "f": self.patch_frames}
        frames = rearrange(tokens, "b (t n) (f c) -> (b t f) n c", **sizes)
        images = self.frame.detokenize(frames)
        return rearrange(images, "(b t) h w c -> b t h w c", t=self.num_frames)


@dataclasses.dataclass(frozen=True)
class VideoLatents(VideoPixels):
    """Float latent maps of frames `[frames, size, size, channels]`, or moments, in such boxes.

    The network sees (latents - shift) * scale. Pictures are made frame by frame.
    """

    scale: float = 1.0
    shift: float = 0.0

    example_dtype = np.dtype(np.float32)
    needs_decoder = True

    @classmethod
    def from_settings(cls, data) -> "VideoLatents":
        """Latent maps of side `data.image_size`; options as of pixels."""
        return super().from_settings(data, scale=data.latent_scale, shift=data.latent_shift)

    def check_example(self, example: np.ndarray) -> None:
        """Raise ValueError unless an example has maps of latents or of moments."""
        moments = tuple(example.shape) == (*self.example_shape[:-1], 2 * self.channels)
        if not (moments and example.dtype in (np.float32, jnp.bfloat16)):
            super().check_example(example)

    def tokenize(self, examples: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Latents `[B, T, H, W, C]`, or moments `[B, T, H, W, 2C]` of which `key` draws."""
        return self._boxes((draw_latents(examples, self.channels, key) - self.shift) * self.scale)

    def export(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """{"latents": float32 `[B, T, H, W, C]`} in the autoencoder's own scale."""
        return {"latents": self.detokenize(tokens) / self.scale + self.shift}

    def preview(self, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
        """Film strips, where there are clips."""
        return super().preview(arrays) if "clips" in arrays else None

    def save(self, arrays: dict[str, np.ndarray], index: int, stem: os.PathLike) -> None:
        """Write a clip as those of pixels, latents without one as npy."""
        if "clips" in arrays:
            super().save(arrays, index, stem)
        else:
            np.save(f"{os.fspath(stem)}.npy", arrays["latents"][index])
