"""Gaussian diffusion on single tokens: noise prediction with a learned-range variance.

Ho et al. 2020 for the process, Nichol and Dhariwal 2021 for the cosine schedule, the learned range
and respacing, Song et al. 2021 for DDIM. Schedules are float64 on the host and float32 on the
device.
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.core.bounds import AtLeastZero, Bound, OneOf, Positive, check_bounds
from djepa_jax.core.losses.base import Denoiser, Shares, denoise, guide
from djepa_jax.core.models.embedding import look_up
from djepa_jax.core.schedules import guided_steps

NUM_TRAIN_STEPS = 1000
COSINE_OFFSET = 0.008
MAX_BETA = 0.999
BIN_HALF_WIDTH = 1 / 255
DenoiseSteps = Annotated[
    int, Bound(lambda x: 1 <= x <= NUM_TRAIN_STEPS, f"between 1 and {NUM_TRAIN_STEPS}")
]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Coefficients of a reverse process with S steps, each `[S]` float64 (`timesteps` integer)."""

    timesteps: np.ndarray
    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance: np.ndarray
    posterior_mean_x0: np.ndarray
    posterior_mean_xt: np.ndarray

    def coefficients(self) -> dict[str, np.ndarray]:
        """What a step multiplies with, `[S]` float32."""
        values = dict(
            log_beta=np.log(self.betas),
            signal=np.sqrt(self.alphas_cumprod),
            sigma=np.sqrt(1 - self.alphas_cumprod),
            signal_prev=np.sqrt(self.alphas_cumprod_prev),
            sigma_prev=np.sqrt(1 - self.alphas_cumprod_prev),
            posterior_log_variance=self.posterior_log_variance,
            posterior_mean_x0=self.posterior_mean_x0,
            posterior_mean_xt=self.posterior_mean_xt,
        )
        return {name: value.astype(np.float32) for name, value in values.items()}


def cosine_betas() -> np.ndarray:
    """The 1000 betas of the cosine schedule (Nichol and Dhariwal 2021, eq. 17), capped at 0.999."""
    t = np.arange(NUM_TRAIN_STEPS + 1, dtype=np.float64) / NUM_TRAIN_STEPS
    alpha_bar = np.cos((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)


def respaced_timesteps(num_steps: int) -> np.ndarray:
    """Which of the 1000 original steps each of `num_steps` even steps stands for, ends included.

    A single step is the last one, the only choice that starts from noise.
    """
    if num_steps == 1:
        return np.array([NUM_TRAIN_STEPS - 1])
    stride = (NUM_TRAIN_STEPS - 1) / (num_steps - 1)
    position, steps = 0.0, []
    for _ in range(num_steps):  # a running sum, so that halves round as in the reference
        steps.append(round(position))
        position += stride
    return np.array(steps)


@functools.lru_cache
def make_schedule(num_steps: int) -> Schedule:
    """The schedule respaced to `num_steps` (1000 gives the training schedule).

    The posterior q(x_{t-1} | x_t, x_0) is Ho et al. 2020, eqs. 6-7. Its variance is 0 at the first
    step, whose logarithm is replaced by that of the second.
    """
    timesteps = respaced_timesteps(num_steps)
    alphas_cumprod = np.cumprod(1 - cosine_betas())[timesteps]
    previous = np.append(1.0, alphas_cumprod[:-1])
    betas = 1 - alphas_cumprod / previous
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    log_variance = np.log(np.append(variance[1:2], variance[1:]) if num_steps > 1 else betas)
    return Schedule(
        timesteps=timesteps,
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        alphas_cumprod_prev=previous,
        posterior_variance=variance,
        posterior_log_variance=log_variance,
        posterior_mean_x0=betas * np.sqrt(previous) / (1 - alphas_cumprod),
        posterior_mean_xt=(1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
    )


def split_output(output: jax.Array, log_beta: jax.Array, posterior_log_variance: jax.Array):
    """Noise prediction and log-variance of a denoiser output `[..., 2C]`.

    The second half, -1..1, interpolates in log space between the clipped posterior variance and
    beta (Nichol and Dhariwal 2021, eq. 15).
    """
    noise, range_value = jnp.split(output, 2, axis=-1)
    share = (range_value + 1) / 2
    return noise, share * log_beta + (1 - share) * posterior_log_variance


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """1000-step cosine diffusion, noise prediction, learned variance.

    `clip_x0` bounds the clean token that a reverse step implies to [-clip_x0, clip_x0]; 0 leaves it
    alone, as the published weights expect. The first steps multiply the error of the noise
    prediction by hundreds, so a young model without the clip runs away.
    """

    samplers = ("ddpm", "ddim")  # ancestral, deterministic
    predicts = "noise"
    out_per_channel = 2
    time_table_size = NUM_TRAIN_STEPS

    noise_multiplicity: Positive = 4  # draws of (t, noise) per token and training step
    num_denoise_steps: DenoiseSteps = 100  # reverse steps in sampling, evenly respaced
    sampler: Annotated[str, OneOf(samplers)] = "ddpm"
    guided_shares: Shares = (0.0, 1.0)  # of the steps, between which there is guidance
    clip_x0: AtLeastZero = 0.0

    def __post_init__(self):
        check_bounds(self)

    @property
    def denoiser_calls(self) -> int:
        """One per reverse step."""
        return self.num_denoise_steps

    @property
    def unguided_calls(self) -> int:
        """Those outside of `guided_shares`."""
        return int((~guided_steps(self.num_denoise_steps, self.guided_shares)).sum())

    @property
    def noises_per_token(self) -> int:
        """The start, and one for every ancestral step."""
        return 1 if self.sampler == "ddim" else 1 + self.num_denoise_steps

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Steps `[..., K]` and noise `[..., K, C]` for tokens of the shape `[..., C]`."""
        time_key, noise_key = jax.random.split(key)
        rows = (*shape[:-1], self.noise_multiplicity)
        t = jax.random.randint(time_key, rows, 0, NUM_TRAIN_STEPS)  # [..., K]
        return t, jax.random.normal(noise_key, (*rows, shape[-1]))  # [..., K, C]

    def loss(self, denoiser: Denoiser, x0, cond, t, noise) -> jax.Array:
        """Squared noise error plus variational term per token, mean over the draws: `[...]`."""
        mse, bound = self.terms(denoiser, x0, cond, t, noise)
        return (mse + bound).mean(-1)

    def terms(self, denoiser: Denoiser, x0, cond, t, noise) -> tuple[jax.Array, jax.Array]:
        """Both terms (Nichol and Dhariwal 2021, eq. 16) of `t` `[..., K]`, `noise` `[..., K, C]`.

        Each is `[..., K]`. The variational term is in bits per dimension, is not rescaled, and
        trains the variance alone: its mean prediction carries no gradient.
        """
        clean = x0.astype(jnp.float32)[..., None, :]  # [..., 1, C]
        table = make_schedule(NUM_TRAIN_STEPS).coefficients()
        at = {name: jnp.asarray(value)[t][..., None] for name, value in table.items()}
        xt = at["signal"] * clean + at["sigma"] * noise  # Ho et al. 2020, eq. 4
        time = look_up(denoiser.time(jnp.arange(NUM_TRAIN_STEPS)), t, cond.dtype)  # [..., K, w]
        output = denoiser(xt, time, denoiser.condition(cond)[..., None, :])
        predicted, log_variance = split_output(output, at["log_beta"], at["posterior_log_variance"])
        mse = jnp.square(predicted - noise).mean(-1)
        implied = (xt - at["sigma"] * jax.lax.stop_gradient(predicted)) / at["signal"]
        mean = at["posterior_mean_x0"] * implied + at["posterior_mean_xt"] * xt
        true_mean = at["posterior_mean_x0"] * clean + at["posterior_mean_xt"] * xt
        kl = gaussian_kl(true_mean, at["posterior_log_variance"], mean, log_variance)
        nll = discretised_nll(clean, mean, log_variance / 2)
        bound = jnp.where((t == 0)[..., None], nll, kl).mean(-1) / jnp.log(2.0)
        return mse, bound

    def sample(self, denoiser: Denoiser, cond, noise, cfg_scale, temperature) -> jax.Array:
        """Run the reverse process; guidance acts on the noise prediction only."""
        steps = self.reverse_steps()
        time_table = denoiser.time(steps.pop("timesteps"))  # [S, w]
        condition = denoiser.condition(cond)  # [G, ..., w]
        start, added = noise[..., 0, :].astype(jnp.float32), jnp.moveaxis(noise[..., 1:, :], -2, 0)
        if self.sampler == "ddim":
            added = jnp.zeros((self.num_denoise_steps, 1))

        def step(x, condition, inputs):
            at, time, z = inputs
            outputs = denoiser(x, time, condition)  # [G, ..., 2C]
            return self.reverse(outputs, x, at, z, cfg_scale, temperature)["sample"]

        return denoise(step, start, (steps, time_table, added), condition, self.guided_shares)

    def reverse_steps(self) -> dict[str, jax.Array]:
        """Coefficients of the reverse steps in the order of use (highest first), each `[S]`."""
        schedule = make_schedule(self.num_denoise_steps)
        noise_scale = (np.arange(self.num_denoise_steps) > 0).astype(np.float32)
        steps = schedule.coefficients()
        steps |= {"timesteps": schedule.timesteps, "noise_scale": noise_scale}
        return {name: jnp.asarray(values[::-1].copy()) for name, values in steps.items()}

    def reverse(self, outputs, x, at, z, cfg_scale, temperature) -> dict[str, jax.Array]:
        """One reverse step from denoiser outputs `[G, ..., 2C]`: arrays `[..., C]`.

        DDPM draws from the posterior at the implied x0; DDIM is Song et al. 2021, eq. 12, sigma 0.
        """
        predicted = guide(outputs[..., : x.shape[-1]], cfg_scale)
        _, log_variance = split_output(outputs[0], at["log_beta"], at["posterior_log_variance"])
        x0 = (x - at["sigma"] * predicted) / at["signal"]
        if self.clip_x0:
            x0 = jnp.clip(x0, -self.clip_x0, self.clip_x0)
        mean = at["posterior_mean_x0"] * x0 + at["posterior_mean_xt"] * x
        if self.sampler == "ddim":
            direction = (x - at["signal"] * x0) / at["sigma"]
            sample = at["signal_prev"] * x0 + at["sigma_prev"] * direction
        else:
            sample = mean + at["noise_scale"] * jnp.exp(log_variance / 2) * z * temperature
        return dict(mean=mean, log_variance=log_variance, x0=x0, sample=sample)


def gaussian_kl(mean1, log_variance1, mean2, log_variance2) -> jax.Array:
    """KL divergence of two diagonal Gaussians in nats, elementwise."""
    ratio = jnp.exp(log_variance1 - log_variance2)
    distance = jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + ratio - 1 + distance)


def discretised_nll(x, mean, log_scale) -> jax.Array:
    """-log p in nats of the bin of width 2/255 around `x` (Ho et al. 2020, eq. 13)."""

    def cdf(x):  # of the normal distribution, in the approximation that the reference uses
        return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    inverse = jnp.exp(-log_scale)
    upper = cdf(inverse * (x - mean + BIN_HALF_WIDTH))
    lower = cdf(inverse * (x - mean - BIN_HALF_WIDTH))
    inside = jnp.where(x > 0.999, 1 - lower, upper - lower)  # the outermost bins are open
    probability = jnp.where(x < -0.999, upper, inside)
    return -jnp.log(jnp.maximum(probability, 1e-12))
