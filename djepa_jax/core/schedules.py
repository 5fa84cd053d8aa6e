"""Rules of generation: in which order tokens are revealed, how many in each step, how guided.

Each is a plain function in a table; `config.sample` names them by their keys.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def random_order(key: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    """A uniform random permutation of the N tokens of a grid: `[N]` int32."""
    return jnp.argsort(jax.random.bits(key, (math.prod(grid),))).astype(jnp.int32)


def raster_order(key: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    """The last axis of the grid fastest, as tokens are stored: `[N]` int32."""
    return jnp.arange(math.prod(grid), dtype=jnp.int32)


# Orders in which tokens are revealed: (key of the sample, positions per axis) -> `[N]`.
ORDERS: dict[str, Callable] = {"random": random_order, "raster": raster_order}


def known_first(order: jax.Array, is_known: jax.Array) -> jax.Array:
    """An order `[N]` with the known tokens (`is_known` `[N]` by raster place) in front."""
    return order[jnp.argsort(~is_known[order], stable=True)]


def reveal_counts(num_tokens: int, num_ar_steps: int) -> list[int]:
    """Tokens revealed in each autoregressive step, positive and summing to `num_tokens`.

    The cosine schedule of MaskGIT (Chang et al. 2022, section 3.3): after step s (from 0)
    floor(N cos(pi/2 (s+1)/T)) tokens stay hidden, at least one fewer than before and at least one;
    the last step reveals the rest.
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


def constant_guidance(cfg_scale: float, counts: list[int], num_known: int = 0) -> np.ndarray:
    """The same scale in every step `[T]`."""
    return np.full(len(counts), cfg_scale)


def linear_guidance(cfg_scale: float, counts: list[int], num_known: int = 0) -> np.ndarray:
    """1 + (cfg_scale - 1) times the share of tokens known after each step `[T]`.

    As in the authors' code the last step counts one token as still hidden.
    """
    num_tokens = num_known + sum(counts)
    hidden = sum(counts) - np.cumsum(counts)
    hidden[-1] = 1
    return 1 + (cfg_scale - 1) * (num_tokens - hidden) / num_tokens


# Guidance over the steps: (cfg_scale, tokens revealed in each step, known before) -> scales `[T]`.
GUIDANCE: dict[str, Callable] = {"linear": linear_guidance, "constant": constant_guidance}


def guidance_scales(
    num_tokens: int, num_ar_steps: int, cfg_scale: float, schedule: str, num_known: int = 0
) -> np.ndarray:
    """Guidance scale of each step, float32 `[T]`, by a key of `GUIDANCE`.

    Of `num_tokens` tokens, `num_known` are given and not revealed.
    """
    counts = reveal_counts(num_tokens - num_known, num_ar_steps)
    return GUIDANCE[schedule](cfg_scale, counts, num_known).astype(np.float32)
