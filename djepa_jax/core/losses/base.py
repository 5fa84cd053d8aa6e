"""What a token loss is.

A token loss models p(token | cond) (Li et al. 2024, section 3) with a denoiser that it is handed:
any object with the three methods of `Denoiser`. It returns one number per token; masking and
averaging are done elsewhere. The noise that its sampler uses is an argument, so that a replay and a
fresh draw are the same code.
"""

import itertools
import operator
from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np

from djepa_jax.core.schedules import guided_steps

Shares = tuple[float, float]


class Denoiser(Protocol):
    """The network, in the parts that a sampler can hoist. All leading axes broadcast."""

    def time(self, t: jax.Array) -> jax.Array:
        """Embed times `[...]`: `[..., w]`."""

    def condition(self, cond: jax.Array) -> jax.Array:
        """Project conditions `[..., D]`: `[..., w]`."""

    def __call__(self, xt: jax.Array, time: jax.Array, condition: jax.Array) -> jax.Array:
        """Denoise `[..., C]`: `[..., out]` float32."""


class TokenLoss(Protocol):
    """A loss and the sampler that belongs to it; implementations are frozen dataclasses.

    The fields `noise_multiplicity` (K, draws per token in training), `num_denoise_steps`, `sampler`
    and `guided_shares` (of the denoising steps, between which there is guidance) come from the
    configuration, all others from `config.loss.options`, as keyword arguments; a value out of
    bounds is a ValueError that names the field.
    """

    samplers: tuple[str, ...]  # what `sampler` may be, the default first
    predicts: str  # what the denoiser gives; of weights that were trained to give something else,
    # the last layer is of no use
    out_per_channel: int  # denoiser outputs per token channel
    noises_per_token: int  # noise vectors that sampling one token takes (S)
    denoiser_calls: int  # denoiser evaluations that sampling one token takes
    time_table_size: int  # time embeddings that a training step looks up; 0 for continuous times
    # For counting work alone; these may be absent: time embeddings of a denoiser call (1), denoiser
    # calls per draw in training that have no gradient (0), and those of `denoiser_calls` that are
    # outside of `guided_shares` (0)
    times_per_call: int
    target_calls: int
    unguided_calls: int

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Times `[..., K]` and noise `[..., K, C]` to train tokens of the shape `[..., C]` with."""

    def loss(self, denoiser: Denoiser, x0, cond, t, noise) -> jax.Array:
        """Mean over draws for tokens `[..., C]` under conditions `[..., D]`: `[...]` float32."""

    def sample(self, denoiser: Denoiser, cond, noise, cfg_scale, temperature) -> jax.Array:
        """Draw tokens `[..., C]` float32.

        Args:
            denoiser: the network.
            cond: `[G, ..., D]`; the conditional one first, then what guidance leads away from.
            noise: standard normal `[..., S, C]`; the first vector is the start.
            cfg_scale: guidance scale, used when G = 2; with G = 3 a tuple of two.
            temperature: factor on the noise that is added on the way.
        """


def guide(outputs: jax.Array, cfg_scale: jax.Array | tuple) -> jax.Array:
    """Guidance (Ho and Salimans 2022, eq. 6; s = 1 + w), `[G, ...]` -> `[...]`: away from all
    outputs but the first, each with its scale.
    """
    conditional, *others = outputs
    if not others:
        return conditional
    scales = cfg_scale if isinstance(cfg_scale, tuple) else (cfg_scale,)
    if len(others) == 1:
        return others[0] + scales[0] * (conditional - others[0])
    away = zip(scales, others, strict=True)
    return sum(((scale - 1) * (conditional - other) for scale, other in away), conditional)


def denoise(step: Callable, start: jax.Array, inputs, condition: jax.Array, guided_shares: Shares):
    """Denoising steps in turn, from the noise `start` `[..., C]` to tokens `[..., C]`.

    Args:
        step: `(x, condition, inputs of the step) -> x`.
        start: the noise.
        inputs: arrays `[steps, ...]`.
        condition: `[G, ..., w]`; steps outside of `guided_shares` see the first of the G alone,
            which leads away from nothing (Kynkaanniemi et al. 2024).
        guided_shares: of the steps, between which there is guidance.
    """
    num_steps = len(jax.tree.leaves(inputs)[0])
    guided = guided_steps(num_steps, guided_shares) | (len(condition) == 1)  # [steps]
    borders = [0, *(np.flatnonzero(np.diff(guided)) + 1).tolist(), num_steps]
    x = start
    for begin, end in itertools.pairwise(borders):
        seen = condition if guided[begin] else condition[:1]

        def body(x, own, seen=seen):
            return step(x, seen, own), None

        part = jax.tree.map(operator.itemgetter(slice(begin, end)), inputs)
        x, _ = jax.lax.scan(body, x, part)
    return x
