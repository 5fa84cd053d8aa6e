"""The convolutional autoencoder of latent diffusion with a Gaussian posterior (Rombach et al. 2022,
arXiv 2112.10752).

Images are `[B, H, W, 3]` in [-1, 1]; an encoder halves the sides once per level but the first, a
decoder doubles them again. GroupNorm, softmax and the posterior are always float32; `dtype` is that
of convolutions and matrix products.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from djepa_jax.core.models.vit import precision_of, torch_linear_init, zeros_init

GROUPS, EPSILON = 32, 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of the networks. `encoder_attention` lists the levels whose encoder blocks attend; the
    middle always does.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    encoder_attention: tuple[int, ...] = (4,)
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

    def __init__(self, fan_in: int, fan_out: int, size: int, *, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        taps = size * size * fan_in
        kernel = torch_linear_init(rngs.params(), (taps, fan_out)).reshape(
            size, size, fan_in, fan_out
        )
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(zeros_init(rngs.params(), (fan_out,)))

    def __call__(self, x: jax.Array, stride: int = 1, padding="SAME") -> jax.Array:
        """Convolve."""
        kernel = self.kernel[...].astype(self.dtype)
        layout = ("NHWC", "HWIO", "NHWC")
        how = {"dimension_numbers": layout, "precision": precision_of(self.dtype)}
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel, (stride, stride), padding, **how
        )
        return x + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
    """Normalise groups of channels over a whole map, in float32."""

    def __init__(self, width: int):
        self.groups = min(GROUPS, width)
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> the same, in the type of x."""
        grouped = rearrange(x.astype(jnp.float32), "b h w (g c) -> b g (h w c)", g=self.groups)
        mean = grouped.mean(-1, keepdims=True)
        variance = jnp.square(grouped - mean).mean(-1, keepdims=True)
        normed = rearrange(
            (grouped - mean) * jax.lax.rsqrt(variance + EPSILON),
            "b g (h w c) -> b h w (g c)",
            h=x.shape[1],
            w=x.shape[2],
        )
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Twice norm, swish, 3 x 3 convolution; a 1 x 1 convolution beside them where the width
    changes.
    """

    def __init__(self, fan_in: int, fan_out: int, *, dtype, rngs: nnx.Rngs):
        self.norm1, self.conv1 = GroupNorm(fan_in), Conv(fan_in, fan_out, 3, dtype=dtype, rngs=rngs)
        self.norm2, self.conv2 = (
            GroupNorm(fan_out),
            Conv(fan_out, fan_out, 3, dtype=dtype, rngs=rngs),
        )
        self.shortcut = (
            Conv(fan_in, fan_out, 1, dtype=dtype, rngs=rngs) if fan_in != fan_out else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, in]` -> `[B, H, W, out]`."""
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return (x if self.shortcut is None else self.shortcut(x)) + hidden


class MapAttention(nnx.Module):
    """Single-head attention among the places of a map, with a residual connection."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        self.norm = GroupNorm(width)
        self.q, self.k, self.v, self.out = (
            Conv(width, width, 1, dtype=dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> the same."""
        height, normed = x.shape[1], self.norm(x)
        q, k, v = (
            rearrange(project(normed), "b h w c -> b (h w) c")
            for project in (self.q, self.k, self.v)
        )
        precision = precision_of(q.dtype)
        scores = (
            jnp.einsum(
                "bqc,bkc->bqk", q, k, precision=precision, preferred_element_type=jnp.float32
            )
            * q.shape[-1] ** -0.5
        )
        mixed = jnp.einsum(
            "bqk,bkc->bqc", jax.nn.softmax(scores).astype(v.dtype), v, precision=precision
        )
        return x + self.out(rearrange(mixed, "b (h w) c -> b h w c", h=height))


class Middle(nnx.Module):
    """Block, attention, block at the coarsest level."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        self.block_0 = ResidualBlock(width, width, dtype=dtype, rngs=rngs)
        self.attention = MapAttention(width, dtype=dtype, rngs=rngs)
        self.block_1 = ResidualBlock(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> the same."""
        return self.block_1(self.attention(self.block_0(x)))


class Level(nnx.Module):
    """Residual blocks of one resolution, and the convolution that changes to the next one, if there
    is a next one.
    """

    def __init__(
        self,
        fan_in: int,
        width: int,
        num_blocks: int,
        attend: bool,
        resample: bool,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.num_blocks, self.attend = num_blocks, attend
        for index in range(num_blocks):
            setattr(
                self,
                f"block_{index}",
                ResidualBlock(width if index else fan_in, width, dtype=dtype, rngs=rngs),
            )
            if attend:
                setattr(self, f"attention_{index}", MapAttention(width, dtype=dtype, rngs=rngs))
        self.resample = Conv(width, width, 3, dtype=dtype, rngs=rngs) if resample else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """The blocks, at their resolution."""
        for index in range(self.num_blocks):
            x = getattr(self, f"block_{index}")(x)
            if self.attend:
                x = getattr(self, f"attention_{index}")(x)
        return x


class Encoder(nnx.Module):
    """Images `[B, H, W, 3]` -> what the moments are made of, `[B, H/s, W/s, 2c]`."""

    def __init__(self, config: AutoencoderConfig, *, dtype, rngs: nnx.Rngs):
        widths = config.widths
        self.num_levels = len(widths)
        self.conv_in = Conv(config.image_channels, config.channels, 3, dtype=dtype, rngs=rngs)
        fan_in = config.channels
        for index, width in enumerate(widths):
            attend, resample = index in config.encoder_attention, index + 1 < len(widths)
            setattr(
                self,
                f"level_{index}",
                Level(fan_in, width, config.num_blocks, attend, resample, dtype=dtype, rngs=rngs),
            )
            fan_in = width
        self.middle = Middle(fan_in, dtype=dtype, rngs=rngs)
        self.norm_out = GroupNorm(fan_in)
        self.conv_out = Conv(fan_in, 2 * config.latent_channels, 3, dtype=dtype, rngs=rngs)

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

    def __init__(self, config: AutoencoderConfig, *, dtype, rngs: nnx.Rngs):
        widths = config.widths
        self.num_levels = len(widths)
        fan_in = widths[-1]
        self.conv_in = Conv(config.latent_channels, fan_in, 3, dtype=dtype, rngs=rngs)
        self.middle = Middle(fan_in, dtype=dtype, rngs=rngs)
        for index in reversed(range(len(widths))):
            width, blocks = widths[index], config.num_blocks + 1
            setattr(
                self,
                f"level_{index}",
                Level(fan_in, width, blocks, False, index > 0, dtype=dtype, rngs=rngs),
            )
            fan_in = width
        self.norm_out = GroupNorm(fan_in)
        self.conv_out = Conv(fan_in, config.image_channels, 3, dtype=dtype, rngs=rngs)

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

    def __init__(self, config: AutoencoderConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        double = 2 * config.latent_channels
        self.encoder, self.decoder = (
            Encoder(config, dtype=dtype, rngs=rngs),
            Decoder(config, dtype=dtype, rngs=rngs),
        )
        self.quant_conv = Conv(double, double, 1, dtype=dtype, rngs=rngs)
        self.post_quant_conv = Conv(
            config.latent_channels, config.latent_channels, 1, dtype=dtype, rngs=rngs
        )

    def encode(self, images: jax.Array) -> jax.Array:
        """Images `[B, H, W, 3]` in [-1, 1] -> moments `[B, H/s, W/s, 2c]` float32: means, then
        log-variances.
        """
        return self.quant_conv(self.encoder(images)).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents `[B, h, w, c]` -> images `[B, h s, w s, 3]` float32, about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)


def sample_posterior(moments: jax.Array, noise: jax.Array) -> jax.Array:
    """Latents `[..., c]` from moments `[..., 2c]` and standard normal noise `[..., c]`."""
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean + jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE_RANGE)) * noise


def split_autoencoder(config: AutoencoderConfig, dtype=jnp.float32):
    """Graph definition and abstract parameters (a nested dict of shapes) of an autoencoder;
    allocates nothing.
    """
    graph, state = nnx.split(
        nnx.eval_shape(lambda: AutoencoderKL(config, dtype=dtype, rngs=nnx.Rngs(0)))
    )
    return graph, nnx.to_pure_dict(state)


def decode_tiled(
    decode: Callable[[jax.Array], jax.Array], latents: jax.Array, tile: int, overlap: int
) -> jax.Array:
    """Decode large maps in overlapping square tiles, blended linearly where they overlap, to bound
    the memory.

    Equal to `decode` where one tile covers the map; otherwise close to it, since norms and
    attention of a tile see that tile alone.

    Args:
        decode: latents `[B, tile, tile, c]` -> images `[B, tile s, tile s, 3]`.
        latents: `[B, h, w, c]`.
        tile: side of a tile, in latents.
        overlap: latents that neighbouring tiles share, below `tile`.

    Returns:
        images `[B, h s, w s, 3]`.
    """
    height, width = latents.shape[1:3]
    if height <= tile and width <= tile:
        return decode(latents)
    total, weights = 0.0, 0.0
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            piece = decode(latents[:, top : top + tile, left : left + tile])  # [B, t s, t s, 3]
            stride = piece.shape[1] // min(tile, height)
            ramp = jnp.outer(
                _ramp(piece.shape[1], overlap * stride), _ramp(piece.shape[2], overlap * stride)
            )[..., None]
            edges = [
                (at * stride, size * stride - at * stride - piece.shape[axis])
                for at, size, axis in ((top, height, 1), (left, width, 2))
            ]
            total += jnp.pad(piece * ramp, ((0, 0), *edges, (0, 0)))
            weights += jnp.pad(ramp, (*edges, (0, 0)))
    return total / weights


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover `size`, the last one flush with the end."""
    if size <= tile:
        return [0]
    starts = list(range(0, size - tile, tile - overlap))
    return [*starts, size - tile]


def _ramp(size: int, overlap: int) -> jax.Array:
    """Weights of a tile along one side: rising from near 0 over the overlap, 1 inside, falling
    again.
    """
    distance = jnp.minimum(jnp.arange(size), jnp.arange(size)[::-1]) + 1.0
    return jnp.minimum(distance / (overlap + 1.0), 1.0)
