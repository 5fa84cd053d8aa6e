"""What a token loss is.

A token loss models p(token | cond) with a denoiser that it is handed: any object with the three
methods of `Denoiser` below. It returns one number per token; masking and averaging are done
elsewhere. The noise that its sampler uses is an argument, so that a replay and a fresh draw are the
same code.
"""

from typing import Protocol

import jax


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

    The fields `noise_multiplicity` (draws per token in training), `num_denoise_steps` and `sampler`
    come from the configuration, all others from `config.loss.options`, as keyword arguments; a
    value out of bounds is a ValueError that names the field.

    Attributes:
        samplers: what `sampler` may be, the default first.
        out_per_channel: denoiser outputs per token channel.
    """

    samplers: tuple[str, ...]
    out_per_channel: int

    @property
    def noises_per_token(self) -> int:
        """How many noise vectors sampling one token takes (S)."""

    @property
    def denoiser_calls(self) -> int:
        """Denoiser evaluations that sampling one token takes."""

    @property
    def time_table_size(self) -> int:
        """Rows of the table of time embeddings that a training step looks up; 0 where times are
        continuous.
        """

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Times `[..., K]` and noise `[..., K, C]` to train tokens of the shape `[..., C]` with, K
        = `noise_multiplicity`.
        """

    def loss(
        self, denoiser: Denoiser, x0: jax.Array, cond: jax.Array, t: jax.Array, noise: jax.Array
    ) -> jax.Array:
        """Loss of clean tokens `[..., C]` under conditions `[..., D]` and draws, of which it takes
        the mean: `[...]` float32.
        """

    def sample(
        self,
        denoiser: Denoiser,
        cond: jax.Array,
        noise: jax.Array,
        cfg_scale: jax.Array,
        temperature: jax.Array,
    ):
        """Draw tokens.

        Args:
            denoiser: the network.
            cond: `[G, ..., D]`; G = 1, or 2 for guidance (conditional, then unconditional).
            noise: standard normal `[..., S, C]`, S = `noises_per_token`; the first vector is the
                start.
            cfg_scale: guidance scale, a scalar; used when G = 2.
            temperature: factor on the noise that is added on the way, a scalar.

        Returns:
            tokens `[..., C]` float32.
        """


def guide(outputs: jax.Array, cfg_scale: jax.Array) -> jax.Array:
    """Classifier-free guidance: `[G, ...]` -> `[...]`, uncond + s (cond - uncond) when G = 2."""
    if outputs.shape[0] == 1:
        return outputs[0]
    conditional, unconditional = outputs
    return unconditional + cfg_scale * (conditional - unconditional)
