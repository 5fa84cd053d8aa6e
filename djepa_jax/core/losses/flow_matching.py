"""Flow matching (Lipman et al. 2023): a velocity field from noise (t = 0) to data (t = 1)."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.core.bounds import AboveZero, Bound, OneOf, Positive, check_bounds
from djepa_jax.core.losses.base import Denoiser, guide


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """Straight paths xt = t x0 + (1 - t) noise to clean tokens x0, with velocity x0 - noise."""

    samplers = ("euler", "heun")
    predicts = "velocity"
    out_per_channel = 1
    noises_per_token = 1
    time_table_size = 0

    noise_multiplicity: Positive = 4  # draws of (t, noise) per token and training step
    # Points of the time grid of sampling, so one step fewer.
    num_denoise_steps: Annotated[int, Bound(lambda x: x >= 2, "at least 2")] = 100
    sampler: Annotated[str, OneOf(samplers)] = "euler"
    time_shift: AboveZero = 1.0  # s in t / (t + s - s t), which bends the grid; 1 leaves it even

    def __post_init__(self):
        check_bounds(self)

    @property
    def denoiser_calls(self) -> int:
        """One per step of the grid, two with Heun."""
        return (self.num_denoise_steps - 1) * (2 if self.sampler == "heun" else 1)

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Times `[..., K]` and noise `[..., K, C]` for tokens of the shape `[..., C]`."""
        time_key, noise_key = jax.random.split(key)
        rows = (*shape[:-1], self.noise_multiplicity)
        return jax.random.uniform(time_key, rows), jax.random.normal(noise_key, (*rows, shape[-1]))

    def loss(self, denoiser: Denoiser, x0, cond, t, noise) -> jax.Array:
        """Mean squared velocity error per token, averaged over the draws: `[...]`."""
        clean = x0.astype(jnp.float32)[..., None, :]  # [..., 1, C]
        xt = t[..., None] * clean + (1 - t[..., None]) * noise  # [..., K, C]
        velocity = denoiser(xt, denoiser.time(t), denoiser.condition(cond)[..., None, :])
        return jnp.square(velocity - (clean - noise)).mean((-1, -2))

    def times(self) -> np.ndarray:
        """The shifted time grid `[num_denoise_steps]`, from 0 to 1, float32."""
        t = np.linspace(0.0, 1.0, self.num_denoise_steps, dtype=np.float32)
        return (t / (t + self.time_shift - self.time_shift * t)).astype(np.float32)

    def sample(self, denoiser: Denoiser, cond, noise, cfg_scale, temperature) -> jax.Array:
        """Integrate the field from noise to data; temperature plays no part."""
        times = jnp.asarray(self.times())
        time_table = denoiser.time(times)  # [points, w]
        condition = denoiser.condition(cond)  # [G, ..., w]

        def velocity(x, time):
            return guide(denoiser(x, time, condition), cfg_scale)

        def step(x, inputs):
            dt, time, next_time = inputs
            slope = velocity(x, time)
            if self.sampler == "heun":
                slope = (slope + velocity(x + dt * slope, next_time)) / 2
            return x + dt * slope, None

        start = noise[..., 0, :].astype(jnp.float32)  # [..., C]
        return jax.lax.scan(step, start, (jnp.diff(times), time_table[:-1], time_table[1:]))[0]
