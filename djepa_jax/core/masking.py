"""Random orders, mask ratios and the reveal schedule.

An order lists the raster places of an image's tokens: in training the first `num_visible` of them
are visible and the rest masked; in sampling tokens are revealed from its front. Shapes are static
whatever the ratios: visible tokens are padded to the most that the smallest ratio allows, masked
rows are packed to a bound that holds for every draw.

Shape letters: B batch, N tokens, V visible (padded), K packed rows of a chunk.
"""

import dataclasses
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.scipy.special import ndtri

STRATA_PER_CHUNK = 32
RATIO_MEAN = 1.0
RATIO_MAX = 1.0


@dataclasses.dataclass(frozen=True)
class MaskPlan:
    """How a training batch is masked.

    The ratio of hidden tokens is normal(1, ratio_std) cut to [ratio_min, 1] (paper, section 3 and
    code). Each group of `group_size` examples shares one: 1 draws per example, 32 is the authors'
    per-process draw, the batch size draws one per step. Ratios are stratified inside chunks of
    examples: each has exactly the cut normal distribution, yet their sum hardly varies, so that
    masked rows pack into a static bound.
    """

    num_tokens: int
    batch_size: int
    ratio_min: float = 0.7
    ratio_std: float = 0.25
    group_size: int = 1

    def __post_init__(self):
        if not 0.0 < self.ratio_min <= 1.0:
            raise ValueError(
                f"mask_ratio_min is {self.ratio_min}; it must be above 0 and at most 1."
            )
        if self.group_size < 1 or self.batch_size % self.group_size:
            raise ValueError(
                f"mask_group {self.group_size} must divide the batch size {self.batch_size}."
            )

    @property
    def max_visible(self) -> int:
        """The most tokens that can be visible (V)."""
        return self.num_tokens - max(1, math.ceil(self.num_tokens * self.ratio_min - 1e-6))

    @property
    def chunk_size(self) -> int:
        """Examples whose masked rows are packed together; a divisor of the batch, independent of
        devices.
        """
        groups = self.batch_size // self.group_size
        target = max(4, STRATA_PER_CHUNK // self.group_size)
        return self.group_size * max(
            n for n in range(1, min(groups, target) + 1) if groups % n == 0
        )

    @property
    def packed_rows(self) -> int:
        """Rows per chunk that hold all its masked tokens, whatever the draw (K)."""
        strata = self.chunk_size // self.group_size
        slack = 1e-3 + 1e-6 * self.num_tokens  # the draw is made in float32
        return self.group_size * sum(self.masked_at((i + 1) / strata, slack) for i in range(strata))

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


def draw_num_visible(key: jax.Array, plan: MaskPlan) -> jax.Array:
    """Number of visible tokens of each example: `[B]` int32 in 0..plan.max_visible."""
    chunks, strata = plan.batch_size // plan.chunk_size, plan.chunk_size // plan.group_size
    shuffle_key, offset_key = jax.random.split(key)
    ranks = jax.vmap(lambda k: jax.random.permutation(k, strata))(
        jax.random.split(shuffle_key, chunks)
    )
    u = (ranks + jax.random.uniform(offset_key, ranks.shape)) / strata  # [chunks, strata]
    low, high = plan.cdf_range
    ratio = RATIO_MEAN + plan.ratio_std * ndtri(low + u * (high - low))
    masked = jnp.ceil(plan.num_tokens * ratio - 1e-4).astype(jnp.int32)
    masked = jnp.clip(masked, plan.num_tokens - plan.max_visible, plan.num_tokens)
    return plan.num_tokens - jnp.repeat(masked.reshape(-1), plan.group_size)


def draw_orders(key: jax.Array, batch_size: int, num_tokens: int) -> jax.Array:
    """A uniform random permutation of the tokens for each example: `[B, N]` int32."""
    noise = jax.random.bits(key, (batch_size, num_tokens))
    return jnp.argsort(noise, axis=-1).astype(jnp.int32)


def to_order(tokens: jax.Array, order: jax.Array) -> jax.Array:
    """Permute raster tokens `[B, N, C]` into order coordinates."""
    return jnp.take_along_axis(tokens, order[..., None], axis=1)


def to_raster(tokens: jax.Array, order: jax.Array) -> jax.Array:
    """Inverse of `to_order`."""
    return jnp.take_along_axis(tokens, jnp.argsort(order, axis=-1)[..., None], axis=1)


def masked_weights(num_visible: jax.Array, plan: MaskPlan) -> jax.Array:
    """Weight of every place in the losses `[B, N]`: zero where visible, and summing to one.

    Each group averages over its own masked tokens and groups count alike, as when every group is a
    process.
    """
    is_masked = jnp.arange(plan.num_tokens) >= num_visible[:, None]  # [B, N]
    per_group = rearrange(is_masked.astype(jnp.float32), "(g e) n -> g (e n)", e=plan.group_size)
    weights = per_group / per_group.sum(-1, keepdims=True) / per_group.shape[0]
    return rearrange(weights, "g (e n) -> (g e) n", e=plan.group_size)


def pack_masked(num_visible: jax.Array, plan: MaskPlan):
    """A function that picks the masked rows of `[B, N, ...]` arrays: result `[chunks, K, ...]`.

    Masked rows come first, then as many visible ones as fill the static bound; their loss weight is
    zero.
    """
    chunk, rows = plan.chunk_size, plan.packed_rows
    is_visible = jnp.arange(plan.num_tokens) < num_visible[:, None]  # [B, N]
    is_visible = rearrange(is_visible, "(c e) n -> c (e n)", e=chunk)
    index = jnp.argsort(is_visible, axis=-1, stable=True)[:, :rows]  # [chunks, K]

    def pack(x: jax.Array) -> jax.Array:
        x = rearrange(x, "(c e) n ... -> c (e n) ...", e=chunk)
        return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

    return pack


def reveal_counts(num_tokens: int, num_ar_steps: int) -> list[int]:
    """Tokens revealed in each autoregressive step (cosine schedule); positive and summing to
    `num_tokens`.

    After step s (from 0) floor(N cos(pi/2 (s+1)/T)) tokens stay hidden, at least one fewer than
    before and at least one; the last step reveals the rest.

    Raises:
        ValueError: `num_ar_steps` is below 1 or above the number of tokens.
    """
    if not 1 <= num_ar_steps <= num_tokens:
        raise ValueError(
            f"num_ar_steps is {num_ar_steps}; it must be between 1 and the number of tokens, "
            f"{num_tokens}."
        )
    hidden, counts = num_tokens, []
    for step in range(num_ar_steps):
        target = math.floor(num_tokens * math.cos(math.pi / 2 * (step + 1) / num_ar_steps))
        remaining = 0 if step == num_ar_steps - 1 else max(1, min(hidden - 1, target))
        counts.append(hidden - remaining)
        hidden = remaining
    return counts


def cfg_scales(num_tokens: int, num_ar_steps: int, cfg_scale: float, schedule: str) -> np.ndarray:
    """Guidance scale of each step `[T]` float32.

    "constant" is `cfg_scale` throughout; "linear" is 1 + (cfg_scale - 1) times the share of tokens
    known after the step. As in the authors' code the last step counts one token as still hidden.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule == "constant":
        return np.full(num_ar_steps, cfg_scale, np.float32)
    if schedule != "linear":
        raise ValueError(f'cfg_schedule is "{schedule}"; it must be "linear" or "constant".')
    hidden = num_tokens - np.cumsum(reveal_counts(num_tokens, num_ar_steps))
    hidden[-1] = 1
    return (1 + (cfg_scale - 1) * (num_tokens - hidden) / num_tokens).astype(np.float32)
