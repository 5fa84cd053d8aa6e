"""Shortcut models (Frans et al. 2024): mean velocities over stretches of time, for few steps.

A stretch from t to r in one step goes where its two halves lead. The network is that of flow
matching: a length d is embedded as the time 1 + d, past the end of the path, and counts from that
of no length. So a network that was trained with flow matching is a shortcut model for stretches of
no length, and goes on from there.
"""

import dataclasses

import jax
import jax.numpy as jnp

from djepa_jax.core.bounds import Share
from djepa_jax.core.losses.base import Denoiser, denoise, guide
from djepa_jax.core.losses.flow_matching import FlowMatching


@dataclasses.dataclass(frozen=True)
class Shortcut(FlowMatching):
    """Flow matching for some draws of a token, agreement of a stretch with its halves for others.

    Times are a start and an end, `[..., K, 2]`.
    """

    samplers = ("euler",)
    times_per_call = 2  # time embeddings of a denoiser call, a start's and a length's
    target_calls = 2  # denoiser calls of a draw that have no gradient

    flow_share: Share = 0.5  # of the draws, which have no length; the rest are stretches

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Ends `[..., K, 2]`, the later one last, and noise `[..., K, C]`."""
        t, noise = super().draw(key, shape)
        kind_key, end_key = jax.random.split(jax.random.fold_in(key, 2))
        is_flow = jax.random.bernoulli(kind_key, self.flow_share, t.shape)
        other = jnp.where(is_flow, t, jax.random.uniform(end_key, t.shape))
        return jnp.stack([jnp.minimum(t, other), jnp.maximum(t, other)], axis=-1), noise

    def loss(self, denoiser: Denoiser, x0, cond, t, noise) -> jax.Array:
        """Mean squared error of mean velocities per token, averaged over the draws: `[...]`."""
        start, end = t[..., 0], t[..., 1]  # [..., K]
        clean = x0.astype(jnp.float32)[..., None, :]  # [..., 1, C]
        xt = start[..., None] * clean + (1 - start[..., None]) * noise  # [..., K, C]
        condition = denoiser.condition(cond)[..., None, :]
        halves = jax.lax.stop_gradient(self._halves(denoiser, xt, start, end, condition))
        target = jnp.where((start == end)[..., None], clean - noise, halves)  # [..., K, C]
        mean = denoiser(xt, embed(denoiser, start, end), condition)
        return jnp.square(mean - target).mean((-1, -2))

    def _halves(self, denoiser: Denoiser, x, start, end, condition) -> jax.Array:
        """The mean velocity `[..., C]` of both halves of stretches, the second from where the first
        leads.
        """
        middle = (start + end) / 2
        first = denoiser(x, embed(denoiser, start, middle), condition)
        x = x + (middle - start)[..., None] * first
        return (first + denoiser(x, embed(denoiser, middle, end), condition)) / 2

    def sample(self, denoiser: Denoiser, cond, noise, cfg_scale, temperature) -> jax.Array:
        """Step from point to point of the time grid; temperature plays no part."""
        times = jnp.asarray(self.times())
        table = embed(denoiser, times[:-1], times[1:])  # [steps, w]
        condition = denoiser.condition(cond)  # [G, ..., w]

        def step(x, condition, inputs):
            length, time = inputs
            return x + length * guide(denoiser(x, time, condition), cfg_scale)

        start = noise[..., 0, :].astype(jnp.float32)  # [..., C]
        return denoise(step, start, (jnp.diff(times), table), condition, self.guided_shares)


def embed(denoiser: Denoiser, start: jax.Array, end: jax.Array) -> jax.Array:
    """Embed stretches of time `[...]`: `[..., w]`; those of no length as `denoiser.time` does."""
    no_length = denoiser.time(jnp.ones(()))
    return denoiser.time(start) + denoiser.time(1 + end - start) - no_length
