"""Rules of generation: in which order tokens are revealed, how many in each step, how guided.

Each is a plain function in a table; `config.sample` names them by their keys.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Positions along each axis of an example; of one of several parts, the grids of the parts.
Grid = tuple[int, ...] | tuple[tuple[int, ...], ...]


def parts_of(grid: Grid) -> tuple[tuple[int, ...], ...]:
    """The grids of the parts of an example, one after the other; mostly there is one."""
    return grid if isinstance(grid[0], tuple) else (grid,)


def num_places(grid: Grid) -> int:
    """The number of tokens of a grid (N)."""
    return sum(math.prod(part) for part in parts_of(grid))


def as_one(grid: Grid) -> tuple[int, ...]:
    """The grid, of several parts all their tokens in a row."""
    return (num_places(grid),) if isinstance(grid[0], tuple) else grid


def random_order(key: jax.Array, grid: Grid) -> jax.Array:
    """A uniform random permutation of the N tokens of a grid: `[N]` int32."""
    return jnp.argsort(jax.random.bits(key, (num_places(grid),))).astype(jnp.int32)


def raster_order(key: jax.Array, grid: Grid) -> jax.Array:
    """The last axis of the grid fastest, as tokens are stored: `[N]` int32."""
    return jnp.arange(num_places(grid), dtype=jnp.int32)


def part_order(key: jax.Array, grid: Grid, part: int) -> jax.Array:
    """The tokens of one part (from 0), if there is one, then the others, both at random: `[N]`."""
    sizes = [math.prod(each) for each in parts_of(grid)]
    is_later = np.repeat(np.arange(len(sizes)) != part, sizes)
    return jnp.argsort(is_later + jax.random.uniform(key, is_later.shape)).astype(jnp.int32)


def checkerboard_order(key: jax.Array, grid: Grid) -> jax.Array:
    """Places whose coordinates have an even sum, then those between them, each at random: `[N]`.

    The half first, as in generation-then-reconstruction (2510.17171).
    """
    parity = np.indices(as_one(grid)).sum(0).ravel() % 2  # [N]
    return jnp.argsort(parity + jax.random.uniform(key, parity.shape)).astype(jnp.int32)


def frame_causal_order(key: jax.Array, grid: Grid) -> jax.Array:
    """Along the first axis (time, of clips), at random within what lies side by side: `[N]`."""
    frame = np.indices(as_one(grid))[0].ravel()
    return jnp.argsort(frame + jax.random.uniform(key, frame.shape)).astype(jnp.int32)


def ends_order(key: jax.Array, grid: Grid) -> jax.Array:
    """From both ends of the first axis to its middle, at random within what is as far: `[N]`."""
    frame = np.indices(as_one(grid))[0].ravel()
    from_end = np.minimum(frame, frame.max() - frame)
    return jnp.argsort(from_end + jax.random.uniform(key, frame.shape)).astype(jnp.int32)


def halton_order(key: jax.Array, grid: Grid) -> jax.Array:
    """Places as a Halton sequence first meets them (2503.17076), moved by a random shift: `[N]`."""
    return _shifted(key, as_one(grid), halton_places(as_one(grid)))


def blue_noise_order(key: jax.Array, grid: Grid) -> jax.Array:
    """Each place where there is the largest void between those before, moved at random: `[N]`."""
    return _shifted(key, as_one(grid), void_filling_places(as_one(grid)))


def _shifted(key: jax.Array, grid: tuple[int, ...], places: np.ndarray) -> jax.Array:
    """Raster places of coordinates `[N, axes]` after a random shift with wrap-around: `[N]`."""
    shift = jax.random.randint(key, (len(grid),), 0, np.asarray(grid))
    moved = (places + shift) % np.asarray(grid)
    return jnp.ravel_multi_index(tuple(moved.T), grid, mode="wrap").astype(jnp.int32)


@functools.cache
def halton_places(grid: tuple[int, ...]) -> np.ndarray:
    """Coordinates `[N, axes]` in the order in which a Halton sequence first meets them."""
    bases, found, index = (2, 3, 5, 7)[: len(grid)], {}, 0
    while len(found) < math.prod(grid):
        point = (_radical_inverse(index, base) for base in bases)
        found.setdefault(tuple(int(x * size) for x, size in zip(point, grid, strict=True)))
        index += 1
    return np.array(list(found))


def _radical_inverse(index: int, base: int) -> float:
    """The digits of a number behind the point in reverse: van der Corput's sequence in [0, 1)."""
    value, scale = 0.0, 1.0
    while index:
        index, digit = divmod(index, base)
        scale /= base
        value += digit * scale
    return value


@functools.cache
def void_filling_places(grid: tuple[int, ...]) -> np.ndarray:
    """Coordinates `[N, axes]`: each is where Gaussians around those before it sum to the least.

    The second half of void-and-cluster dithering (Ulichney 1993), from an empty grid; distances
    wrap around. Their deviation is 0.8 places: of 0.6 to 1.9, what spreads the first quarter best
    on grids of 7 and 8. Ties go to the first in a seeded shuffle.
    """
    coordinates = np.indices(grid).reshape(len(grid), -1).T  # [N, axes]
    shuffled = np.random.default_rng(0).permutation(len(coordinates))
    coordinates, sizes = coordinates[shuffled], np.asarray(grid)
    energy, chosen = np.zeros(len(coordinates)), []
    for _ in coordinates:
        chosen.append(int(np.argmin(energy.round(12))))
        distance = np.abs(coordinates - coordinates[chosen[-1]])
        distance = np.minimum(distance, sizes - distance)
        energy += np.exp(-np.square(distance).sum(1) / (2 * 0.8**2))
        energy[chosen[-1]] = np.inf
    return coordinates[chosen]


# Orders in which tokens are revealed: (key of the sample, positions per axis) -> `[N]`.
ORDERS: dict[str, Callable] = {
    "random": random_order,
    "raster": raster_order,
    "halton": halton_order,
    "checkerboard": checkerboard_order,
    "blue_noise": blue_noise_order,
    "frame_causal": frame_causal_order,
    "ends": ends_order,
    "first": functools.partial(part_order, part=0),
    "second": functools.partial(part_order, part=1),
}


def orders_for(grid: Grid) -> list[str]:
    """Orders that tell the places of a grid apart: some are for clips, or for pairs."""
    senseless = set() if len(grid) == 3 else {"frame_causal", "ends"}
    if not isinstance(grid[0], tuple):
        senseless |= {"first", "second"}
    return [name for name in ORDERS if name not in senseless]


def known_first(order: jax.Array, is_known: jax.Array) -> jax.Array:
    """An order `[N]` with the known tokens (`is_known` `[N]` by raster place) in front."""
    return order[jnp.argsort(~is_known[order], stable=True)]


def cosine_counts(num_tokens: int, num_ar_steps: int) -> list[int]:
    """The cosine schedule of MaskGIT (Chang et al. 2022, section 3.3).

    After step s (from 0) floor(N cos(pi/2 (s+1)/T)) tokens stay hidden, at least one fewer than
    before and at least one; the last step reveals the rest.
    """
    hidden, counts = num_tokens, []
    for step in range(num_ar_steps):
        target = math.floor(num_tokens * math.cos(math.pi / 2 * (step + 1) / num_ar_steps))
        remaining = 0 if step == num_ar_steps - 1 else max(1, min(hidden - 1, target))
        counts.append(hidden - remaining)
        hidden = remaining
    return counts


def halves_counts(num_tokens: int, num_ar_steps: int) -> list[int]:
    """Half of the tokens in three quarters of the steps, the others in the last quarter.

    With the checkerboard order, generation-then-reconstruction (2510.17171): places between known
    ones need fewer steps. Each half by `cosine_counts`.
    """
    last = max(1, num_ar_steps // 4)
    second = max(num_tokens // 2, last)  # half, or enough for a token in each step
    if last == num_ar_steps or num_tokens - second < num_ar_steps - last:
        return cosine_counts(num_tokens, num_ar_steps)
    first = cosine_counts(num_tokens - second, num_ar_steps - last)
    return first + cosine_counts(second, last)


# How many tokens are revealed in each step: (tokens, steps) -> `[T]`.
REVEALS: dict[str, Callable] = {"cosine": cosine_counts, "halves": halves_counts}


def reveal_counts(num_tokens: int, num_ar_steps: int, reveal: str = "cosine") -> list[int]:
    """Tokens revealed in each autoregressive step, positive and summing to `num_tokens`.

    By a key of `REVEALS`.
    """
    if not 1 <= num_ar_steps <= num_tokens:
        raise ValueError(
            f"num_ar_steps is {num_ar_steps}; it must be between 1 and the number of tokens, "
            f"{num_tokens}."
        )
    return REVEALS[reveal](num_tokens, num_ar_steps)


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
    counts: list[int],
    cfg_scale: float,
    schedule: str,
    num_known: int = 0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
    """Guidance scale of each step that reveals `counts` tokens, float32 `[T]`.

    By a key of `GUIDANCE`; `num_known` tokens are known before. Steps outside the `interval`
    (shares of the steps) have the scale 1, which is no guidance (Kynkaanniemi et al. 2024).
    """
    scales = GUIDANCE[schedule](cfg_scale, counts, num_known)
    return np.where(guided_steps(len(counts), interval), scales, 1).astype(np.float32)


def guided_steps(num_steps: int, interval: tuple[float, float]) -> np.ndarray:
    """Which steps lie in an interval of shares of all steps, bool `[T]`."""
    start, stop = (round(share * num_steps) for share in interval)
    return (np.arange(num_steps) >= start) & (np.arange(num_steps) < stop)


def falling_steps(num_ar_steps: int, first: int, last: int) -> list[int]:
    """Denoising steps in each autoregressive step, from `first` to `last` on a line (DiSA,
    2505.20297); `last` 0 stands for `first`.
    """
    return np.linspace(first, last or first, num_ar_steps).round().astype(int).tolist()
