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
from djepa_jax.core.losses.base import Denoiser, guide

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


def cosine_betas() -> np.ndarray:
    """The 1000 betas of the cosine schedule, each capped at 0.999."""
    t = np.arange(NUM_TRAIN_STEPS + 1, dtype=np.float64) / NUM_TRAIN_STEPS
    alpha_bar = np.cos((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)


def respaced_timesteps(num_steps: int) -> np.ndarray:
    """Which of the 1000 original steps each of `num_steps` even steps stands for, first and last
    included.

    A single step is the last one, the only choice that starts from noise.
    """
    if num_steps == 1:
        return np.array([NUM_TRAIN_STEPS - 1])
    stride = (NUM_TRAIN_STEPS - 1) / (num_steps - 1)
    position, steps = 0.0, []
    for _ in range(num_steps):
        steps.append(round(position))
        position += stride
    return np.array(steps)


@functools.lru_cache
def make_schedule(num_steps: int) -> Schedule:
    """The schedule respaced to `num_steps` (1000 gives the training schedule)."""
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

    The second half interpolates (in log space, -1..1) between the clipped posterior variance and
    beta.
    """
    noise, range_value = jnp.split(output, 2, axis=-1)
    share = (range_value + 1) / 2
    return noise, share * log_beta + (1 - share) * posterior_log_variance


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """1000-step cosine diffusion, noise prediction, learned variance.

    Attributes:
        noise_multiplicity: draws of (t, noise) per token and step.
        num_denoise_steps: reverse steps in sampling, 1..1000, evenly respaced.
        sampler: "ddpm" (ancestral) or "ddim" (deterministic).
        clip_x0: clip the implied clean token to [-clip_x0, clip_x0] in every reverse step; 0 leaves
            it alone, as the published weights expect. The first steps multiply the error of the
            noise prediction by hundreds, so a young model without the clip runs away.
    """

    noise_multiplicity: Positive = 4
    num_denoise_steps: DenoiseSteps = 100
    sampler: Annotated[str, OneOf(("ddpm", "ddim"))] = "ddpm"
    clip_x0: AtLeastZero = 0.0

    samplers = ("ddpm", "ddim")
    out_per_channel = 2
    time_table_size = NUM_TRAIN_STEPS

    def __post_init__(self):
        check_bounds(self)

    @property
    def denoiser_calls(self) -> int:
        """One per reverse step."""
        return self.num_denoise_steps

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

    def loss(
        self, denoiser: Denoiser, x0: jax.Array, cond: jax.Array, t: jax.Array, noise: jax.Array
    ) -> jax.Array:
        """Squared noise error plus variational term per token, averaged over the draws: `[...]`."""
        mse, bound = self.terms(denoiser, x0, cond, t, noise)
        return (mse + bound).mean(-1)

    def terms(self, denoiser: Denoiser, x0, cond, t, noise) -> tuple[jax.Array, jax.Array]:
        """Both terms for given steps `[..., K]` and noise `[..., K, C]`: two `[..., K]`.

        The variational term is in bits per dimension, is not rescaled, and trains the variance
        alone: its mean prediction carries no gradient.
        """
        clean = x0.astype(jnp.float32)[..., None, :]  # [..., 1, C]
        at = _gather(make_schedule(NUM_TRAIN_STEPS), t)
        xt = at["signal"] * clean + at["sigma"] * noise
        time = jnp.take(denoiser.time(jnp.arange(NUM_TRAIN_STEPS)), t, axis=0)  # [..., K, w]
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
        """Run the reverse process; see `base.TokenLoss.sample`. Guidance acts on the noise
        prediction only.
        """
        steps = self.reverse_steps()
        time_table = denoiser.time(steps.pop("timesteps"))  # [S, w]
        condition = denoiser.condition(cond)  # [G, ..., w]
        start, added = noise[..., 0, :].astype(jnp.float32), jnp.moveaxis(noise[..., 1:, :], -2, 0)

        def step(x, inputs):
            at, time, z = inputs
            return self.reverse(denoiser(x, time, condition), x, at, z, cfg_scale, temperature)[
                "sample"
            ], None

        if self.sampler == "ddim":
            added = jnp.zeros((self.num_denoise_steps, 1))
        return jax.lax.scan(step, start, (steps, time_table, added))[0]

    def reverse_steps(self) -> dict[str, jax.Array]:
        """Coefficients of the reverse steps in the order of use (highest first), each `[S]`."""
        schedule = make_schedule(self.num_denoise_steps)
        at = _coefficients(schedule)
        at["noise_scale"] = (np.arange(len(schedule.betas)) > 0).astype(np.float32)
        return {"timesteps": jnp.asarray(schedule.timesteps[::-1].copy())} | {
            k: jnp.asarray(v[::-1].copy()) for k, v in at.items()
        }

    def reverse(self, outputs, x, at, z, cfg_scale, temperature) -> dict[str, jax.Array]:
        """One reverse step from denoiser outputs `[G, ..., 2C]`: mean, log_variance, x0 and sample
        `[..., C]`.
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


def _coefficients(schedule: Schedule) -> dict[str, np.ndarray]:
    values = dict(
        log_beta=np.log(schedule.betas),
        signal=np.sqrt(schedule.alphas_cumprod),
        sigma=np.sqrt(1 - schedule.alphas_cumprod),
        signal_prev=np.sqrt(schedule.alphas_cumprod_prev),
        sigma_prev=np.sqrt(1 - schedule.alphas_cumprod_prev),
        posterior_log_variance=schedule.posterior_log_variance,
        posterior_mean_x0=schedule.posterior_mean_x0,
        posterior_mean_xt=schedule.posterior_mean_xt,
    )
    return {name: value.astype(np.float32) for name, value in values.items()}


def _gather(schedule: Schedule, t: jax.Array) -> dict[str, jax.Array]:
    """The coefficients at steps `[...]`, each `[..., 1]`."""
    return {
        name: jnp.asarray(value)[t][..., None] for name, value in _coefficients(schedule).items()
    }


def gaussian_kl(mean1, log_variance1, mean2, log_variance2) -> jax.Array:
    """KL divergence of two diagonal Gaussians in nats, elementwise."""
    ratio = jnp.exp(log_variance1 - log_variance2)
    return 0.5 * (
        log_variance2
        - log_variance1
        + ratio
        - 1
        + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    )


def _normal_cdf(x: jax.Array) -> jax.Array:
    """The tanh approximation of the normal distribution function that the reference uses."""
    return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def discretised_nll(x, mean, log_scale) -> jax.Array:
    """Negative log-probability (nats) of the bin of width 2/255 around `x`; the outermost bins are
    open.
    """
    inverse = jnp.exp(-log_scale)
    upper = _normal_cdf(inverse * (x - mean + BIN_HALF_WIDTH))
    lower = _normal_cdf(inverse * (x - mean - BIN_HALF_WIDTH))
    probability = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return -jnp.log(jnp.maximum(probability, 1e-12))
