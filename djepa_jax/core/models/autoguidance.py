"""Autoguidance: a weaker model as a guide (Karras et al. 2024, arXiv 2406.02507).

What a model gets wrong a smaller or less trained one gets wrong in the same places, and worse. So
leading away from it leads to better samples, and not to the typical ones of a class, as leading
away from no condition does.

Both models are told the same. They stand as one in the batch of guidance, whose rows are `(b g)`:
for each sample one or two of the model (with and without the condition), then one of the weaker.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from djepa_jax.core.models.conditioning import Condition
from djepa_jax.core.models.denoiser import LoopDenoiser
from djepa_jax.core.models.djepa import DJepa, cast_linear, split_model
from djepa_jax.core.schedules import guided_steps

if TYPE_CHECKING:
    from djepa_jax.core.sampler import SamplerConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guide:
    """What the sampler is given of a weaker model."""

    params: Any
    scale: jax.Array  # of the guidance away from it


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two models of one shape, as the sampler calls one."""

    model: DJepa
    weaker: DJepa
    copies: int  # rows of the model, of each sample
    scale: jax.Array

    def embed_condition(self, raw) -> Condition:
        """As `DJepa`, for rows of both."""
        return self._both("embed_condition", raw)

    def context_encoder(self, tokens, orders, condition, **rows) -> jax.Array:
        """As `DJepa`, for rows of both."""
        return self._both("context_encoder", tokens, orders, condition, **rows)

    def predictor(self, encoded, orders, num_visible, mask, *, query_ids, **rows) -> jax.Array:
        """As `DJepa`, for rows of both; all predict at the same places `[K]`."""
        own = encoded, orders, num_visible, mask
        return self._both("predictor", *own, fixed={"query_ids": query_ids}, **rows)

    def _both(self, name: str, *rows, fixed=None, **named):
        """Call a method of both, each on its rows; what is `fixed` has none."""
        first, second = self._split((rows, named), 0), self._split((rows, named), 1)
        fixed = fixed or {}
        ours = getattr(self.model, name)(*first[0], **first[1], **fixed)
        theirs = getattr(self.weaker, name)(*second[0], **second[1], **fixed)
        return jax.tree.map(self._join, ours, theirs)

    def _split(self, arrays, which: int):
        """The rows of the model (0) or of the weaker one (1)."""
        parts = slice(self.copies) if which == 0 else slice(self.copies, None)

        def rows_of(x):
            by_sample = rearrange(x, "(b g) ... -> b g ...", g=self.copies + 1)  # [B, G, ...]
            return rearrange(by_sample[:, parts], "b g ... -> (b g) ...")

        return jax.tree.map(rows_of, arrays)

    def _join(self, ours: jax.Array, theirs: jax.Array) -> jax.Array:
        """Rows of the model `[B (G - 1), ...]` and of the weaker one `[B, ...]`: `[B G, ...]`."""
        ours = rearrange(ours, "(b g) ... -> b g ...", g=self.copies)
        return rearrange(jnp.concatenate([ours, theirs[:, None]], 1), "b g ... -> (b g) ...")


@dataclasses.dataclass(frozen=True)
class PairDenoiser:
    """Two denoisers as one: outputs `[G, ...]` of conditions `[G, ...]`, the last of the weaker."""

    denoiser: LoopDenoiser
    weaker: LoopDenoiser

    def time(self, t: jax.Array) -> jax.Array:
        """Embed times `[...]`: `[..., 2, w]`."""
        return jnp.stack([self.denoiser.time(t), self.weaker.time(t)], axis=-2)

    def condition(self, cond: jax.Array) -> jax.Array:
        """Project conditions `[G, ..., D]`: `[G, ..., w]`."""
        parts = self.denoiser.condition(cond[:-1]), self.weaker.condition(cond[-1:])
        return jnp.concatenate(parts)

    def __call__(self, xt: jax.Array, time: jax.Array, condition: jax.Array) -> jax.Array:
        """Denoise `[..., C]` by both: `[G, ..., out]` float32; by the model alone if G is 1."""
        if len(condition) == 1:
            return self.denoiser(xt, time[..., 0, :], condition)
        ours = self.denoiser(xt, time[..., 0, :], condition[:-1])
        return jnp.concatenate([ours, self.weaker(xt, time[..., 1, :], condition[-1:])])


def loop_denoiser(model: DJepa | Pair) -> LoopDenoiser | PairDenoiser:
    """The denoiser of a model, or those of two, as loops call it."""
    if isinstance(model, Pair):
        return PairDenoiser(loop_denoiser(model.model), loop_denoiser(model.weaker))
    return LoopDenoiser(model.denoiser)


def open_model(config: "SamplerConfig", params: dict, guide: Guide | None) -> DJepa | Pair:
    """A model with the weights of its products cast once; if autoguided, both models as one."""
    graph, _ = split_model(config.model)

    def opened(own: dict) -> DJepa:
        return nnx.merge(graph, cast_linear(own, config.model.dtype))

    if not config.autoguided:
        return opened(params)
    if guide is None:
        raise ValueError("an autoguided sampler needs the parameters of the weaker model.")
    return Pair(opened(params), opened(guide.params), 1 + config.guided, guide.scale)


def scales_at(config: "SamplerConfig", model, num_visible: jax.Array, cfg_scale):
    """The scale of guidance, or both scales, of the step that begins with so many tokens; that by a
    weaker model is 1 outside of `config.cfg_interval`, as `cfg_scale` is.
    """
    if not config.autoguided:
        return cfg_scale
    starts = config.num_known + np.cumsum([0, *config.counts[:-1]])
    guided = starts[guided_steps(len(starts), config.cfg_interval)]
    own = jnp.where(jnp.isin(num_visible, guided), model.scale, 1.0)
    return (cfg_scale, own) if config.guided else own
