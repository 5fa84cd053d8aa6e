"""Flow matching whose network gives the clean token (Li and He 2025, arXiv 2511.13720, table 1).

The path from noise to data is that of flow matching, and so is what a perfect network would draw.
But noise fills all values of a token, and a network that gives the velocity has to hand all of it
on; clean tokens lie close to few of the directions there are. So tokens may have more values than
the denoiser is wide. Sampling ends at what the network gives: at t = 1 there is no velocity, and
Heun's last step is one of Euler.
"""

import dataclasses

import jax
import jax.numpy as jnp

from djepa_jax.core.bounds import AboveZero, Finite
from djepa_jax.core.losses.base import Denoiser
from djepa_jax.core.losses.flow_matching import FlowMatching


@dataclasses.dataclass(frozen=True)
class XPrediction(FlowMatching):
    """Flow matching by a network that gives x0; the velocity at xt is (x0 - xt) / (1 - t)."""

    predicts = "token"
    has_end = False

    time_mean: Finite = -0.8  # times are drawn as the logistic function of a normal variable
    time_deviation: AboveZero = 0.8
    min_rest: AboveZero = 0.05  # 1 - t in the loss is at least that, so that no draw outweighs all

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Times `[..., K]` and noise `[..., K, C]` for tokens of the shape `[..., C]`."""
        time_key, noise_key = jax.random.split(key)
        rows = (*shape[:-1], self.noise_multiplicity)
        logit = self.time_mean + self.time_deviation * jax.random.normal(time_key, rows)
        return jax.nn.sigmoid(logit), jax.random.normal(noise_key, (*rows, shape[-1]))

    def loss(self, denoiser: Denoiser, x0, cond, t, noise) -> jax.Array:
        """Mean squared velocity error per token, averaged over the draws: `[...]`."""
        clean = x0.astype(jnp.float32)[..., None, :]  # [..., 1, C]
        xt = t[..., None] * clean + (1 - t[..., None]) * noise  # [..., K, C]
        found = denoiser(xt, denoiser.time(t), denoiser.condition(cond)[..., None, :])
        error = (found - clean) / jnp.maximum(1 - t, self.min_rest)[..., None]
        return jnp.square(error).mean((-1, -2))

    def velocity(self, found: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Of the clean token that the network gives at `x` `[..., C]` and time `t`, before 1."""
        return (found - x) / (1 - t)
