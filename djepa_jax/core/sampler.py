"""Generation: reveal random sets of tokens over T autoregressive steps.

1. Every place is masked; the order of each sample is drawn from (seed, sample index).
2. Step s reveals the next `counts[s]` places of the order (the same counts for all samples).
3. The context encoder reads the tokens revealed so far, the predictor gives cond at the new places.
4. The token loss draws the new tokens from noise; with guidance, conditional and unconditional
   halves share it, and that of a weaker model.
5. After T steps the tokens are put back into raster order.

Tokens that are given (`Known`) stand in front of the order, and are visible from the start. Where a
model is told nothing else, guidance is by them: the unconditional half does not see them.

The noise of a token depends on (seed, sample index, its place in the order) alone. So sample i is
the same whatever the batch size, the number of devices or the cutting into segments.

Steps run in a few `lax.scan` segments with static shapes, each padded to its own largest counts.
Shape letters: B batch, N tokens, C channels, D width, P prefix, V visible (padded), K new (padded),
S noises per token, G halves of guidance, T autoregressive steps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from djepa_jax.core.losses.base import TokenLoss
from djepa_jax.core.masking import to_order, to_raster
from djepa_jax.core.models.autoguidance import Guide, Pair, loop_denoiser, open_model, scales_at
from djepa_jax.core.models.conditioning import Condition, Nothing
from djepa_jax.core.models.djepa import ModelConfig
from djepa_jax.core.schedules import (
    ORDERS,
    falling_steps,
    guidance_scales,
    known_first,
    reveal_counts,
)
from djepa_jax.core.segments import Segment, plan_segments

ORDER_STREAM, NOISE_STREAM = 0, 1


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Static settings of the sampler.

    Attributes:
        order: a key of `schedules.ORDERS`.
        reveal: a key of `schedules.REVEALS`.
        num_known: tokens of every sample that are given; the steps reveal the others.
        regions: which of a sample's conditions (R) each token has, in raster order; () = the one.
        final_denoise_steps: of the last step, to which those of the loss fall; 0 = all the same.
        cfg_interval: shares of the steps between which there is guidance.
        reuse_unconditional: of so many guided steps, one runs both halves (`predict_halves`).
        autoguided: whether guidance leads away from a weaker model, too (`Pair`).
    """

    model: ModelConfig
    token_loss: TokenLoss
    num_ar_steps: int
    guided: bool
    num_segments: int = 8
    order: str = "random"
    reveal: str = "cosine"
    num_known: int = 0
    regions: tuple[int, ...] = ()
    final_denoise_steps: int = 0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    reuse_unconditional: int = 1
    autoguided: bool = False

    @property
    def num_regions(self) -> int:
        """Conditions of every sample (R)."""
        return max(self.regions, default=0) + 1

    @property
    def counts(self) -> list[int]:
        """Tokens revealed in each step."""
        hidden = self.model.num_tokens - self.num_known
        return reveal_counts(hidden, self.num_ar_steps, self.reveal)

    def loss_at(self, step: int) -> TokenLoss:
        """The token loss that draws the tokens of a step, which has steps of its own."""
        if not self.final_denoise_steps:
            return self.token_loss
        first = self.token_loss.num_denoise_steps
        steps = falling_steps(self.num_ar_steps, first, self.final_denoise_steps)
        try:
            return dataclasses.replace(self.token_loss, num_denoise_steps=steps[step])
        except ValueError as error:
            raise ValueError(f"final_denoise_steps: {error}") from error

    @property
    def guides_by_known(self) -> bool:
        """Whether the unconditional half does not see what is given, since nothing else is told."""
        is_untold = isinstance(self.model.conditioner, Nothing)
        return bool(self.guided and self.num_known and is_untold)

    @property
    def halves(self) -> int:
        """How often a guided step runs the networks (G)."""
        return 1 + self.guided + self.autoguided

    @property
    def reuses(self) -> bool:
        """Whether some steps with guidance run the networks for the conditional half alone."""
        return self.guided and self.reuse_unconditional > 1

    def guidance(self, cfg_scale: float, schedule: str) -> np.ndarray:
        """Guidance scale of each step `[T]`; `schedule` is a key of `schedules.GUIDANCE`."""
        how = self.num_known, self.cfg_interval
        return guidance_scales(self.counts, cfg_scale, schedule, *how)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Known:
    """Tokens that are given; where `mask` is False they are of no account."""

    tokens: jax.Array  # [B, N, C] in raster order
    mask: jax.Array  # [B, N], True in as many places of each sample as `num_known` says


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleInputs:
    """What the sampler is given beside the parameters."""

    conditions: Any  # as the conditioner takes them, leading axis B, or B, R; labels [B]
    sample_ids: jax.Array  # [B]
    seed: jax.Array
    cfg_scales: jax.Array  # [T]
    temperature: jax.Array
    known: Known | None = None
    guide: Guide | None = None  # the weaker model of `SamplerConfig.autoguided`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleState:
    """What one step hands to the next."""

    tokens: jax.Array  # [B, N, C] in order coordinates; zero where not yet revealed
    num_visible: jax.Array  # scalar, the same for all samples
    gap: jax.Array | None = None  # [B, N, D] in order coordinates, null less cond


@dataclasses.dataclass(frozen=True)
class Draws:
    """What is random in a batch of samples."""

    order: jax.Array  # [B, N]
    noise_of: Callable[[jax.Array], jax.Array]  # places [K] -> noise [B, K, S, C]


def embed_guided(config: SamplerConfig, model, conditions) -> Condition:
    """Conditions `[B, ...]` as prefix tokens `[B G, P, D]`: with guidance each beside the null one,
    and once more for a weaker model.

    Of regions, `[B, R, ...]` and `[B R G, P, D]`. What belongs to a sample stays together, so that
    a batch split over devices needs no exchange.
    """
    if config.num_regions > 1:
        conditions = jax.tree.map(lambda c: rearrange(c, "b r ... -> (b r) ..."), conditions)
    null = config.model.conditioner.null(len(jax.tree.leaves(conditions)[0]))
    sets = [conditions] + [null] * config.guided + [conditions] * config.autoguided
    conditions = jax.tree.map(lambda *each: rearrange([*each], "g b ... -> (b g) ..."), *sets)
    return model.embed_condition(conditions)


def ar_step(
    config: SamplerConfig, model, denoiser, draws: Draws, condition: Condition, segment: Segment
) -> Callable:
    """A function `(state, num_new, cfg_scale, temperature) -> state` that reveals the next tokens.

    The padded shapes are those of `segment`; `num_new` is at most `segment.new`.
    """
    num_tokens, loss = config.model.num_tokens, config.loss_at(segment.start)
    if segment.halves < config.halves:
        config, condition = without_guidance(config, condition)
        if isinstance(model, Pair):
            model, denoiser = model.model, denoiser.denoiser

    def step(state: SampleState, num_new, cfg_scale, temperature) -> SampleState:
        """Reveal the next `num_new` tokens."""
        places = state.num_visible + jnp.arange(segment.new)  # [K]
        query_ids = jnp.minimum(places, num_tokens - 1)
        cond, gap = predict_halves(config, model, state, draws.order, condition, query_ids, segment)
        noise = draws.noise_of(query_ids)[:, :, : loss.noises_per_token]  # [B, K, S, C]
        scales = scales_at(config, model, state.num_visible, cfg_scale)
        new = loss.sample(denoiser, cond, noise, scales, temperature)
        is_new = jnp.arange(segment.new) < num_new
        target = jnp.where(is_new, places, num_tokens)  # out of range is dropped
        tokens = state.tokens.at[:, target].set(new, mode="drop")
        return SampleState(tokens, state.num_visible + num_new, gap)

    return step


def predict(config: SamplerConfig, model, state, order, condition, query_ids, max_visible: int):
    """Predictor features at `query_ids` `[K]`: `[G, B, K, D]`; with guidance conditional first."""
    copies = config.halves * config.num_regions
    orders = repeat(order, "b n -> (b c) n", c=copies)
    tokens = repeat(state.tokens[:, :max_visible], "b v c -> (b r) v c", r=copies)
    num_visible = jnp.full(len(orders), state.num_visible)
    unseen = {"num_unseen": None}
    if config.guides_by_known:
        unseen_by = jnp.array([0, config.num_known, 0][: config.halves])
        unseen["num_unseen"] = jnp.tile(unseen_by, len(orders) // config.halves)
    seen = tokens, orders[:, :max_visible]
    encoded = model.context_encoder(*seen, condition, num_visible=num_visible, **unseen)
    own = orders, num_visible, condition.mask
    cond = model.predictor(encoded, *own, query_ids=query_ids, **unseen)
    cond = rearrange(cond, "(b r g) k d -> r g b k d", g=config.halves, r=config.num_regions)
    if config.num_regions == 1:
        return cond[0]
    own = jnp.asarray(config.regions)[order[:, query_ids]]  # [B, K]
    return sum(jnp.where((own == r)[..., None], each, 0) for r, each in enumerate(cond))


def without_guidance(config: SamplerConfig, condition: Condition):
    """The same with the first of the halves alone that `embed_guided` gave."""
    half = jax.tree.map(lambda x: x[:: config.halves], condition)
    return dataclasses.replace(config, guided=False, autoguided=False), half


def predict_halves(config, model, state, order, condition, query_ids, segment: Segment):
    """Predictor features at `query_ids` `[G, B, K, D]`, perhaps at less work, and the new gap.

    With `reuse_unconditional`, steps of `segment.paired` run both halves, and keep how far apart
    they are at all places that are revealed before the next of them. The others run the conditional
    half alone, and add that to it (after LazyMAR, 2503.12450).
    """
    visible = segment.visible
    if not config.reuses:
        return predict(config, model, state, order, condition, query_ids, visible), state.gap

    def both():
        ahead = state.num_visible + jnp.arange(segment.ahead)  # [A], the first K are query_ids
        ids = jnp.minimum(ahead, config.model.num_tokens - 1)
        cond = predict(config, model, state, order, condition, ids, visible)
        gap = state.gap.at[:, ahead].set(cond[1] - cond[0], mode="drop")
        return cond[:, :, : segment.new], gap

    def one():
        alone, half = without_guidance(config, condition)
        cond = predict(alone, model, state, order, half, query_ids, visible)[0]
        return jnp.stack([cond, cond + state.gap[:, query_ids]]), state.gap

    if len(segment.paired) in (0, segment.stop - segment.start):
        return both() if segment.paired else one()
    visible_before = np.cumsum([config.num_known, *config.counts])[list(segment.paired)]
    return jax.lax.cond(jnp.isin(state.num_visible, visible_before), both, one)


def first_state(config: SamplerConfig, draws: Draws, known: Known | None) -> SampleState:
    """What is visible before the first step: nothing, or what is given."""
    model, shape = config.model, draws.order.shape
    gap = jnp.zeros((*shape, model.width), model.dtype) if config.reuses else None
    if known is None:
        tokens = jnp.zeros((*shape, model.token_dim))
        return SampleState(tokens, jnp.zeros((), jnp.int32), gap)
    tokens = to_order(jnp.where(known.mask[..., None], known.tokens, 0), draws.order)
    return SampleState(tokens, jnp.asarray(config.num_known, jnp.int32), gap)


def run_steps(
    config: SamplerConfig, model, draws: Draws, conditions, cfg_scales, temperature, known=None
) -> jax.Array:
    """The whole autoregressive loop for given draws: tokens `[B, N, C]` in raster order."""
    counts = jnp.asarray(config.counts)
    condition = embed_guided(config, model, conditions)
    state, denoiser = first_state(config, draws, known), loop_denoiser(model)
    for segment in plan_segments(config):
        step = ar_step(config, model, denoiser, draws, condition, segment)

        def body(state, inputs, step=step):
            return step(state, *inputs, temperature), None

        chosen = slice(segment.start, segment.stop)
        state, _ = jax.lax.scan(body, state, (counts[chosen], cfg_scales[chosen]))
    return to_raster(state.tokens, draws.order)


def make_draws(config: SamplerConfig, seed, sample_ids, known: Known | None = None) -> Draws:
    """Orders and noise of the samples `sample_ids` `[B]` under `seed`; known tokens come first."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(sample_ids)  # [B]
    shape = (config.token_loss.noises_per_token, config.model.token_dim)

    def order_of(key):
        return ORDERS[config.order](jax.random.fold_in(key, ORDER_STREAM), config.model.grid)

    def noise_at(key, place):
        key = jax.random.fold_in(jax.random.fold_in(key, NOISE_STREAM), place)
        return jax.random.normal(key, shape)

    noise_at_all = jax.vmap(jax.vmap(noise_at, (None, 0)), (0, None))
    order = jax.vmap(order_of)(keys)
    if known is not None:
        order = jax.vmap(known_first)(order, known.mask)
    return Draws(order, functools.partial(noise_at_all, keys))


def make_sampler(config: SamplerConfig) -> Callable:
    """The pure function `(params, SampleInputs) -> tokens [B, N, C]`."""

    def generate(params, inputs: SampleInputs) -> jax.Array:
        draws = make_draws(config, inputs.seed, inputs.sample_ids, inputs.known)
        model = open_model(config, params, inputs.guide)
        how = inputs.cfg_scales, inputs.temperature, inputs.known
        return run_steps(config, model, draws, inputs.conditions, *how)

    return generate


def make_start(config: SamplerConfig) -> Callable:
    """The pure function `SampleInputs -> SampleState` that `make_step` begins with."""

    def start(inputs: SampleInputs) -> SampleState:
        draws = make_draws(config, inputs.seed, inputs.sample_ids, inputs.known)
        return first_state(config, draws, inputs.known)

    return start


def make_step(config: SamplerConfig, segment: Segment) -> Callable:
    """One step of `make_sampler` as a function of its own, for watching a sample grow.

    `(params, state, SampleInputs, number) -> (state, tokens [B, N, C])`; `number` is the step's,
    inside `segment`, and the tokens are in raster order, zero where nothing is revealed yet.
    """

    def step(params, state: SampleState, inputs: SampleInputs, number):
        """Reveal the tokens of step `number`."""
        draws = make_draws(config, inputs.seed, inputs.sample_ids, inputs.known)
        model = open_model(config, params, inputs.guide)
        condition = embed_guided(config, model, inputs.conditions)
        reveal = ar_step(config, model, loop_denoiser(model), draws, condition, segment)
        num_new, scale = jnp.asarray(config.counts)[number], inputs.cfg_scales[number]
        state = reveal(state, num_new, scale, inputs.temperature)
        return state, to_raster(state.tokens, draws.order)

    return step
