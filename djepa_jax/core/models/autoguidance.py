"""Autoguidance: a weaker model in place of no condition (Karras et al. 2024, arXiv 2406.02507).

What a model gets wrong a smaller or less trained one gets wrong in the same places, and worse. So
leading away from it leads to better samples, and not to the typical ones of a class, as leading
away from no condition does.

Both models are told the same. They stand as one in the doubled batch of guidance, whose rows are
`(b g)`: the first model for even rows, the second for odd ones.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from djepa_jax.core.models.conditioning import Condition
from djepa_jax.core.models.denoiser import LoopDenoiser
from djepa_jax.core.models.djepa import DJepa, cast_linear, split_model

if TYPE_CHECKING:
    from djepa_jax.core.sampler import SamplerConfig


class Pair:
    """Two models of one shape, as the sampler calls one."""

    def __init__(self, models: Sequence[DJepa]):
        self.models = tuple(models)

    def embed_condition(self, raw) -> Condition:
        """As `DJepa`, for twice the rows."""
        return self._each("embed_condition", raw)

    def context_encoder(self, tokens, orders, condition, **rows) -> jax.Array:
        """As `DJepa`, for twice the rows."""
        return self._each("context_encoder", tokens, orders, condition, **rows)

    def predictor(self, encoded, orders, num_visible, mask, *, query_ids, **rows) -> jax.Array:
        """As `DJepa`, for twice the rows; both predict at the same places `[K]`."""
        own = encoded, orders, num_visible, mask
        return self._each("predictor", *own, fixed={"query_ids": query_ids}, **rows)

    def _each(self, name: str, *rows, fixed=None, **named_rows):
        halves = (half_of((rows, named_rows), i) for i in range(2))
        found = [
            getattr(model, name)(*rows, **named, **(fixed or {}))
            for model, (rows, named) in zip(self.models, halves, strict=True)
        ]
        return jax.tree.map(lambda *both: rearrange([*both], "g b ... -> (b g) ..."), *found)


class PairDenoiser:
    """Two denoisers as one: outputs `[2, ...]` of conditions `[2, ...]`, a row of each."""

    def __init__(self, denoisers: Sequence[LoopDenoiser]):
        self.denoisers = tuple(denoisers)

    def time(self, t: jax.Array) -> jax.Array:
        """Embed times `[...]`: `[..., 2, w]`."""
        return jnp.stack([denoiser.time(t) for denoiser in self.denoisers], axis=-2)

    def condition(self, cond: jax.Array) -> jax.Array:
        """Project conditions `[2, ..., D]`: `[2, ..., w]`."""
        both = zip(self.denoisers, cond, strict=True)
        return jnp.stack([denoiser.condition(own) for denoiser, own in both])

    def __call__(self, xt: jax.Array, time: jax.Array, condition: jax.Array) -> jax.Array:
        """Denoise `[..., C]` by both: `[2, ..., out]` float32."""
        return jnp.stack(
            [
                denoiser(xt, time[..., i, :], condition[i])
                for i, denoiser in enumerate(self.denoisers)
            ]
        )


def half_of(rows, number: int):
    """Every other row of arrays `[2 B, ...]`, from that number on."""
    return jax.tree.map(lambda x: x[number::2], rows)


def loop_denoiser(model: DJepa | Pair) -> LoopDenoiser | PairDenoiser:
    """The denoiser of a model, or those of two, as loops call it."""
    if isinstance(model, Pair):
        return PairDenoiser([loop_denoiser(half) for half in model.models])
    return LoopDenoiser(model.denoiser)


def open_model(config: "SamplerConfig", params: dict, guide: dict | None) -> DJepa | Pair:
    """A model with the weights of its products cast once; if autoguided, both models as one."""
    if config.autoguided and guide is None:
        raise ValueError("an autoguided sampler needs the parameters of the weaker model.")
    graph, _ = split_model(config.model)
    both = [params, guide] if config.autoguided else [params]
    models = [nnx.merge(graph, cast_linear(each, config.model.dtype)) for each in both]
    return Pair(models) if config.autoguided else models[0]
