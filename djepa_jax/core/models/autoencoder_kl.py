"""The autoencoder of latent diffusion with a Gaussian posterior (Rombach et al. 2022).

Images are `[B, H, W, 3]` in [-1, 1]; an encoder halves the sides once per level but the first, a
decoder doubles them again. GroupNorm, softmax and the posterior are always float32; `dtype` is that
of convolutions and matrix products.
"""

import dataclasses
import functools
from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from djepa_jax.core.models.keys import Keys
from djepa_jax.core.models.vit import precision_of, torch_linear_init, zeros_init

GROUPS, EPSILON = 32, 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of the networks."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    encoder_attention: tuple[int, ...] = (4,)  # levels whose blocks attend; the middle always does
    latent_channels: int = 16
    image_channels: int = 3

    @property
    def stride(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, the finest first."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)


# KL-16 as MAR and D-JEPA use it, and the f8 layout of Stable Diffusion.
AUTOENCODERS = {
    "kl16": AutoencoderConfig(),
    "kl8": AutoencoderConfig(multipliers=(1, 2, 4, 4), encoder_attention=(), latent_channels=4),
}


class Conv(nnx.Module):
    """A convolution over `[B, H, W, C]`, kernel `[k, k, in, out]`."""

    def __init__(self, fan_in: int, fan_out: int, size: int, dtype, rngs: Keys):
        self.dtype = dtype
        shape = (size, size, fan_in, fan_out)
        kernel = torch_linear_init(rngs.params(), shape, fan_in=size * size * fan_in)
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(zeros_init(rngs.params(), (fan_out,)))

    def __call__(self, x: jax.Array, stride: int = 1, padding="SAME") -> jax.Array:
        """Convolve."""
        kernel = self.kernel[...].astype(self.dtype)
        how = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": precision_of(self.dtype)}
        strides = (stride, stride)
        x = jax.lax.conv_general_dilated(x.astype(self.dtype), kernel, strides, padding, **how)
        return x + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
    """Normalise groups of channels over a whole map, in float32."""

    def __init__(self, width: int):
        self.groups = min(GROUPS, width)
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> the same, in the type of x."""
        grouped = rearrange(x.astype(jnp.float32), "b h w (g c) -> b g (h w c)", g=self.groups)
        centred = grouped - grouped.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + EPSILON)
        normed = rearrange(normed, "b g (h w c) -> b h w (g c)", h=x.shape[1], w=x.shape[2])
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Twice norm, swish, 3 x 3 convolution; beside them 1 x 1 where the width changes."""

    def __init__(self, fan_in: int, fan_out: int, dtype, rngs: Keys):
        self.norm1, self.norm2 = GroupNorm(fan_in), GroupNorm(fan_out)
        self.conv1 = Conv(fan_in, fan_out, 3, dtype, rngs)
        self.conv2 = Conv(fan_out, fan_out, 3, dtype, rngs)
        self.shortcut = Conv(fan_in, fan_out, 1, dtype, rngs) if fan_in != fan_out else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, in]` -> `[B, H, W, out]`."""
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return (x if self.shortcut is None else self.shortcut(x)) + hidden


class MapAttention(nnx.Module):
    """Single-head attention among the places of a map, with a residual connection."""

    def __init__(self, width: int, dtype, rngs: Keys):
        self.norm = GroupNorm(width)
        self.q, self.k, self.v, self.out = (Conv(width, width, 1, dtype, rngs) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> the same."""
        height, normed = x.shape[1], self.norm(x)
        maps = (project(normed) for project in (self.q, self.k, self.v))
        q, k, v = (rearrange(m, "b h w c -> b (h w) c") for m in maps)
        how = {"precision": precision_of(q.dtype)}
        scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32, **how)
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5).astype(v.dtype)  # [B, H W, H W]
        mixed = jnp.einsum("bqk,bkc->bqc", weights, v, **how)
        return x + self.out(rearrange(mixed, "b (h w) c -> b h w c", h=height))


class Middle(nnx.Module):
    """Block, attention, block at the coarsest level."""

    def __init__(self, width: int, dtype, rngs: Keys):
        self.block_0 = ResidualBlock(width, width, dtype, rngs)
        self.attention = MapAttention(width, dtype, rngs)
        self.block_1 = ResidualBlock(width, width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> the same."""
        return self.block_1(self.attention(self.block_0(x)))


class Level(nnx.Module):
    """Residual blocks of one resolution, and the convolution that changes to the next, if any."""

    def __init__(self, fan_in, width, num_blocks, attend, resample, dtype, rngs):
        self.num_blocks, self.attend = num_blocks, attend
        for index in range(num_blocks):
            block = ResidualBlock(width if index else fan_in, width, dtype, rngs)
            setattr(self, f"block_{index}", block)
            if attend:
                setattr(self, f"attention_{index}", MapAttention(width, dtype, rngs))
        self.resample = Conv(width, width, 3, dtype, rngs) if resample else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """The blocks, at their resolution."""
        for index in range(self.num_blocks):
            x = getattr(self, f"block_{index}")(x)
            if self.attend:
                x = getattr(self, f"attention_{index}")(x)
        return x


class Encoder(nnx.Module):
    """Images `[B, H, W, 3]` -> what the moments are made of, `[B, H/s, W/s, 2c]`."""

    def __init__(self, config: AutoencoderConfig, dtype, rngs: Keys):
        widths, blocks = config.widths, config.num_blocks
        self.num_levels = len(widths)
        self.conv_in = Conv(config.image_channels, config.channels, 3, dtype, rngs)
        for index, (fan_in, width) in enumerate(pairwise((config.channels, *widths))):
            attend, resample = index in config.encoder_attention, index + 1 < self.num_levels
            level = Level(fan_in, width, blocks, attend, resample, dtype, rngs)
            setattr(self, f"level_{index}", level)
        self.middle = Middle(widths[-1], dtype, rngs)
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Encode; halving pads one row below and one column to the right, as the reference does."""
        x = self.conv_in(x)
        for index in range(self.num_levels):
            level = getattr(self, f"level_{index}")
            x = level(x)
            if level.resample is not None:
                x = level.resample(x, stride=2, padding=((0, 1), (0, 1)))
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    """Latents `[B, h, w, c]` -> images `[B, h s, w s, 3]`."""

    def __init__(self, config: AutoencoderConfig, dtype, rngs: Keys):
        widths, blocks = config.widths, config.num_blocks + 1
        self.num_levels = len(widths)
        self.conv_in = Conv(config.latent_channels, widths[-1], 3, dtype, rngs)
        self.middle = Middle(widths[-1], dtype, rngs)
        for index in reversed(range(self.num_levels)):
            fan_in = widths[min(index + 1, self.num_levels - 1)]
            level = Level(fan_in, widths[index], blocks, False, index > 0, dtype, rngs)
            setattr(self, f"level_{index}", level)
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = Conv(widths[0], config.image_channels, 3, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Decode; doubling repeats every value, then convolves."""
        x = self.middle(self.conv_in(x))
        for index in reversed(range(self.num_levels)):
            level = getattr(self, f"level_{index}")
            x = level(x)
            if level.resample is not None:
                x = level.resample(x.repeat(2, axis=1).repeat(2, axis=2))
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Encoder and decoder with the 1 x 1 convolutions between them and the latents."""

    def __init__(self, config: AutoencoderConfig, *, dtype=jnp.float32, rngs: Keys):
        latents = config.latent_channels
        self.encoder = Encoder(config, dtype, rngs)
        self.decoder = Decoder(config, dtype, rngs)
        self.quant_conv = Conv(2 * latents, 2 * latents, 1, dtype, rngs)
        self.post_quant_conv = Conv(latents, latents, 1, dtype, rngs)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images `[B, H, W, 3]` -> moments `[B, H/s, W/s, 2c]` float32: means, log-variances."""
        return self.quant_conv(self.encoder(images)).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents `[B, h, w, c]` -> images `[B, h s, w s, 3]` float32, about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)


def sample_posterior(moments: jax.Array, noise: jax.Array) -> jax.Array:
    """Latents `[..., c]` from moments `[..., 2c]` and standard normal noise `[..., c]`."""
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean + jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE_RANGE)) * noise


@functools.lru_cache(maxsize=8)  # building all modules takes seconds
def split_autoencoder(config: AutoencoderConfig, dtype=jnp.float32):
    """Graph definition and shapes of the parameters (a nested dict); allocates nothing."""
    model = nnx.eval_shape(lambda: AutoencoderKL(config, dtype=dtype, rngs=Keys(0)))
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


def decode_tiled(decode: Callable, latents: jax.Array, tile: int, overlap: int) -> jax.Array:
    """Decode large maps in overlapping square tiles, blended linearly, to bound the memory.

    `[B, h, w, c]` -> `[B, h s, w s, 3]`; `tile` is a side and `overlap`, below it, what neighbours
    share, in latents. Equal to `decode` where one tile covers the map; otherwise close to it, since
    norms and attention of a tile see that tile alone.
    """
    height, width = latents.shape[1:3]
    if height <= tile and width <= tile:
        return decode(latents)
    total, weights = 0.0, 0.0
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            piece = decode(latents[:, top : top + tile, left : left + tile])  # [B, t s, t s, 3]
            rows, columns = piece.shape[1:3]
            stride = rows // min(tile, height)
            ramps = _ramp(rows, overlap * stride), _ramp(columns, overlap * stride)
            ramp = jnp.outer(*ramps)[..., None]  # [t s, t s, 1]
            below, right = (height - top) * stride - rows, (width - left) * stride - columns
            edges = (top * stride, below), (left * stride, right)
            total += jnp.pad(piece * ramp, ((0, 0), *edges, (0, 0)))
            weights += jnp.pad(ramp, (*edges, (0, 0)))
    return total / weights


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover `size`, the last one flush with the end."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramp(size: int, overlap: int) -> jax.Array:
    """Weights of a tile along a side: rising from near 0 over the overlap, 1 inside, falling."""
    distance = jnp.minimum(jnp.arange(size), jnp.arange(size)[::-1]) + 1.0
    return jnp.minimum(distance / (overlap + 1.0), 1.0)
