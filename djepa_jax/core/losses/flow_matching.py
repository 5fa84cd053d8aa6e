"""Flow matching (Lipman et al. 2023): a velocity field from noise (t = 0) to data (t = 1)."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.core.bounds import AboveZero, Bound, OneOf, Positive, check_bounds
from djepa_jax.core.losses.base import Denoiser, Shares, denoise, guide
from djepa_jax.core.schedules import guided_steps


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """Straight paths xt = t x0 + (1 - t) noise to clean tokens x0, with velocity x0 - noise."""

    samplers = ("euler", "heun", "ancestral")  # the last adds noise on the way
    predicts = "velocity"
    out_per_channel = 1
    time_table_size = 0

    has_end = True  # whether there is a velocity at t = 1
    noise_multiplicity: Positive = 4  # draws of (t, noise) per token and training step
    # Points of the time grid of sampling, so one step fewer.
    num_denoise_steps: Annotated[int, Bound(lambda x: x >= 2, "at least 2")] = 100
    sampler: Annotated[str, OneOf(samplers)] = "euler"
    guided_shares: Shares = (0.0, 1.0)  # of the steps, between which there is guidance
    time_shift: AboveZero = 1.0  # s in t / (t + s - s t), which bends the grid; 1 leaves it even

    def __post_init__(self):
        check_bounds(self)

    @property
    def denoiser_calls(self) -> int:
        """One per step of the grid, two with Heun."""
        return (self.num_denoise_steps - 1) * (2 if self.sampler == "heun" else 1)

    @property
    def unguided_calls(self) -> int:
        """Those outside of `guided_shares`."""
        steps = self.num_denoise_steps - 1
        without = int((~guided_steps(steps, self.guided_shares)).sum())
        return self.denoiser_calls // steps * without

    @property
    def noises_per_token(self) -> int:
        """The start, and one for every ancestral step but the last, which ends at a clean token."""
        return self.num_denoise_steps - 1 if self.sampler == "ancestral" else 1

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

    def velocity(self, found: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Of what the network gives at `x` `[..., C]` and time `t`: that itself."""
        return found

    def sample(self, denoiser: Denoiser, cond, noise, cfg_scale, temperature) -> jax.Array:
        """Integrate the field from noise to data; temperature is for ancestral steps alone."""
        times = jnp.asarray(self.times())
        time_table = denoiser.time(times)  # [points, w]
        condition = denoiser.condition(cond)  # [G, ..., w]

        def slope_at(x, point, condition):
            found = guide(denoiser(x, time_table[point], condition), cfg_scale)
            return self.velocity(found, x, times[point])

        def step(x, condition, inputs):
            """Go from one point of the grid to the next."""
            point, z = inputs
            time, later, slope = times[point], times[point + 1], slope_at(x, point, condition)
            if self.sampler == "ancestral":
                return renew(x, slope, time, later, temperature * z)
            if self.sampler == "heun":
                mean = (slope + slope_at(x + (later - time) * slope, point + 1, condition)) / 2
                slope = jnp.where(self.has_end | (point < len(times) - 2), mean, slope)
            return x + (later - time) * slope

        start = noise[..., 0, :].astype(jnp.float32)  # [..., C]
        points, added = jnp.arange(len(times) - 1), None
        if self.sampler == "ancestral":  # [steps, ..., C], none in the last step
            added = jnp.moveaxis(noise[..., 1:, :], -2, 0)
            added = jnp.concatenate([added, jnp.zeros_like(start)[None]])
        return denoise(step, start, (points, added), condition, self.guided_shares)


def renew(x: jax.Array, velocity: jax.Array, time, later, z: jax.Array) -> jax.Array:
    """An ancestral step of `x` `[..., C]`: some of its noise is replaced by `z`.

    With s = (1 - t) / t the deviation of x / t around x0, the share of the noise that stays is
    s(later) / s(time), as in the reverse process of diffusion (Ho et al. 2020, eqs. 6-7). Errors of
    earlier steps go with the noise, where an ODE hands them on (Karras et al. 2022, section 4).
    """
    clean, noise = x + (1 - time) * velocity, x - time * velocity  # [..., C]
    stays = time * (1 - later) / (later * (1 - time))
    return later * clean + (1 - later) * (stays * noise + jnp.sqrt(1 - stays**2) * z)
