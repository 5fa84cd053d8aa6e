"""Random orders and mask ratios.

An order lists the raster places of an image's tokens: in training the first `num_visible` of them
are visible and the rest masked; in sampling tokens are revealed from its front. Shapes are static
whatever the ratios: visible tokens are padded to the most that the smallest ratio allows, masked
rows are packed to a bound that holds for every draw.

A batch is divided in four ways:

- a *group* shares a mask ratio (`group_size` examples);
- a *stratum* is one of the equal parts of the ratio's distribution, of which each group of a pack
  draws from another, so that the sum over a pack hardly varies;
- a *pack* is the groups whose masked rows are put together into a static number of rows;
- an *accumulation step* takes whole packs (`train_step.accumulate`).

Shape letters: B batch, N tokens, V visible (padded), K packed rows of a pack.
"""

import dataclasses
import itertools
import math
import statistics

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.scipy.special import ndtri

from djepa_jax.core.bounds import AboveZero, Positive, Ratio, check_bounds
from djepa_jax.core.schedules import ORDERS

STRATA_PER_PACK = 32
NUM_LENGTHS = 4  # to how many lengths the visible tokens of a pack's examples are padded
RATIO_MEAN = 1.0
RATIO_MAX = 1.0


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """How a training batch is masked.

    The ratio of hidden tokens is normal(1, ratio_std) cut to [ratio_min, 1] (paper and code). Each
    group of `group_size` examples shares one: 1 draws per example, 32 is the authors' per-process
    draw, the batch size draws one per step. Each ratio has exactly the cut normal distribution,
    though the ratios of a pack are stratified.
    """

    num_tokens: Positive
    batch_size: Positive
    ratio_min: Ratio = 0.7
    ratio_std: AboveZero = 0.25
    group_size: Positive = 1

    def __post_init__(self):
        check_bounds(self)
        if self.batch_size % self.group_size:
            raise ValueError(
                f"mask_group {self.group_size} must divide the batch size {self.batch_size}."
            )

    @property
    def max_visible(self) -> int:
        """The most tokens that can be visible (V)."""
        return self.num_tokens - max(1, math.ceil(self.num_tokens * self.ratio_min - 1e-6))

    @property
    def pack_size(self) -> int:
        """Examples whose masked rows are packed together; it divides the batch on any devices."""
        groups = self.batch_size // self.group_size
        most = min(groups, max(4, STRATA_PER_PACK // self.group_size))
        return self.group_size * max(n for n in range(1, most + 1) if groups % n == 0)

    @property
    def strata(self) -> int:
        """Parts of the ratio's distribution, of which each group of a pack draws from another."""
        return self.pack_size // self.group_size

    @property
    def slack(self) -> float:
        """By how much a number of tokens may be off, since ratios are drawn in float32."""
        return 1e-3 + 1e-6 * self.num_tokens

    @property
    def packed_rows(self) -> int:
        """Rows per pack that hold all its masked tokens, whatever the draw (K)."""
        most = (self.masked_at((i + 1) / self.strata, self.slack) for i in range(self.strata))
        return self.group_size * sum(most)

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """Parts of a pack that is sorted by `sort_packs`: (examples, the most tokens they show)."""
        cuts = sorted({-(-self.strata * part // NUM_LENGTHS) for part in range(NUM_LENGTHS + 1)})
        parts = []
        for start, stop in itertools.pairwise(cuts):
            most = self.num_tokens - self.masked_at(start / self.strata, -self.slack)
            parts.append(((stop - start) * self.group_size, min(most, self.max_visible)))
        return tuple(parts)

    def masked_at(self, u: float, slack: float = 0.0) -> int:
        """Masked tokens at quantile `u` of the ratio's distribution, rounded up."""
        low, high = self.cdf_range
        ratio = statistics.NormalDist(RATIO_MEAN, self.ratio_std).inv_cdf(low + u * (high - low))
        return min(self.num_tokens, max(1, math.ceil(self.num_tokens * ratio - 1e-6 + slack)))

    @property
    def cdf_range(self) -> tuple[float, float]:
        """Values of the normal's distribution function where it is cut."""
        normal = statistics.NormalDist(RATIO_MEAN, self.ratio_std)
        return normal.cdf(self.ratio_min), normal.cdf(RATIO_MAX)


def draw_num_visible(key: jax.Array, config: MaskingConfig) -> jax.Array:
    """Number of visible tokens of each example: `[B]` int32 in 0..config.max_visible."""
    packs, strata = config.batch_size // config.pack_size, config.strata
    shuffle_key, offset_key = jax.random.split(key)
    pack_keys = jax.random.split(shuffle_key, packs)
    ranks = jax.vmap(lambda key: jax.random.permutation(key, strata))(pack_keys)
    u = (ranks + jax.random.uniform(offset_key, ranks.shape)) / strata  # [packs, strata]
    low, high = config.cdf_range
    ratio = RATIO_MEAN + config.ratio_std * ndtri(low + u * (high - low))
    masked = jnp.ceil(config.num_tokens * ratio - 1e-4).astype(jnp.int32)
    masked = jnp.clip(masked, config.num_tokens - config.max_visible, config.num_tokens)
    return config.num_tokens - jnp.repeat(masked.reshape(-1), config.group_size)


def sort_packs(examples, num_visible: jax.Array, config: MaskingConfig):
    """A tree of arrays `[B, ...]` with the examples of each pack sorted, most visible first."""
    counts = rearrange(num_visible, "(p e) -> p e", e=config.pack_size)
    index = jnp.argsort(-counts, axis=-1, stable=True)  # [packs, size]

    def sort(x: jax.Array) -> jax.Array:
        packs = x.reshape(*index.shape, *x.shape[1:])
        return jax.vmap(lambda pack, chosen: pack[chosen])(packs, index).reshape(x.shape)

    return jax.tree.map(sort, examples)


def draw_orders(key: jax.Array, batch_size: int, num_tokens: int) -> jax.Array:
    """A uniform random permutation of the tokens for each example: `[B, N]` int32."""
    noise = jax.random.bits(key, (batch_size, num_tokens))
    return jnp.argsort(noise, axis=-1).astype(jnp.int32)


def draw_mixed_orders(
    key: jax.Array, batch_size: int, grid: tuple[int, ...], modes: tuple[tuple[str, float], ...]
) -> jax.Array:
    """Orders `[B, N]` of which each is by a key of `schedules.ORDERS`, drawn with its share."""
    mode_key, order_key = jax.random.split(key)
    names, shares = zip(*modes, strict=True)
    chosen = jax.random.choice(mode_key, len(names), (batch_size,), p=jnp.asarray(shares))  # [B]
    keys = jax.random.split(order_key, batch_size)
    orders = jnp.stack([jax.vmap(lambda k, n=name: ORDERS[n](k, grid))(keys) for name in names])
    return orders[chosen, jnp.arange(batch_size)]  # of [modes, B, N]


def to_order(tokens: jax.Array, order: jax.Array) -> jax.Array:
    """Permute raster tokens `[B, N, C]` into order coordinates."""
    return jnp.take_along_axis(tokens, order[..., None], axis=1)


def to_raster(tokens: jax.Array, order: jax.Array) -> jax.Array:
    """Inverse of `to_order`."""
    return jnp.take_along_axis(tokens, jnp.argsort(order, axis=-1)[..., None], axis=1)


def masked_weights(num_visible: jax.Array, config: MaskingConfig) -> jax.Array:
    """Weight of every place in the losses `[B, N]`: zero where visible, and summing to one.

    A group averages over its own masked tokens and groups count alike, as if each were a process.
    """
    is_masked = jnp.arange(config.num_tokens) >= num_visible[:, None]  # [B, N]
    per_group = rearrange(is_masked.astype(jnp.float32), "(g e) n -> g (e n)", e=config.group_size)
    weights = per_group / per_group.sum(-1, keepdims=True) / per_group.shape[0]
    return rearrange(weights, "g (e n) -> (g e) n", e=config.group_size)


def pack_masked(num_visible: jax.Array, config: MaskingConfig):
    """A function that picks the masked rows of `[B, N, ...]` arrays: result `[packs, K, ...]`.

    Masked rows come first, then visible ones, of weight zero, that fill the static bound.
    """
    size, rows = config.pack_size, config.packed_rows
    is_visible = jnp.arange(config.num_tokens) < num_visible[:, None]  # [B, N]
    is_visible = rearrange(is_visible, "(p e) n -> p (e n)", e=size)
    index = jnp.argsort(is_visible, axis=-1, stable=True)[:, :rows]  # [packs, K]

    def pack(x: jax.Array) -> jax.Array:
        x = rearrange(x, "(p e) n ... -> p (e n) ...", e=size)
        return jax.vmap(lambda x, index: x.at[index].get(unique_indices=True))(x, index)

    return pack
