"""Generation: reveal random sets of tokens over T autoregressive steps.

1. Every place is masked; the order of each sample is a random permutation drawn from (seed, sample
   index).
2. Step s reveals the next `counts[s]` places of the order (cosine schedule, the same for all
   samples).
3. The context encoder reads the tokens revealed so far, the predictor gives cond at the new places
   only.
4. The token loss draws the new tokens from noise; with guidance, conditional and unconditional
   halves share it.
5. After T steps the tokens are put back into raster order.

The noise of a token depends on (seed, sample index, its place in the order) alone. So sample i is
the same picture whatever the batch size, the number of devices or the cutting into segments.

Steps run in a few `lax.scan` segments with static shapes, each padded to its own largest counts.
Shape letters: B batch, N tokens, C channels, D width, V visible (padded), K new (padded), S noises
per token.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from djepa_jax.core import flops
from djepa_jax.core.losses.base import TokenLoss
from djepa_jax.core.masking import reveal_counts, to_raster
from djepa_jax.core.models.djepa import ModelConfig, split_model

ORDER_STREAM, NOISE_STREAM = 0, 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleState:
    """What one step hands to the next."""

    tokens: jax.Array  # [B, N, C] in order coordinates; zero where not yet revealed
    num_visible: jax.Array  # scalar, the same for all samples


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of steps that share padded shapes: steps [start, stop), V visible places, K new
    ones.
    """

    start: int
    stop: int
    visible: int
    new: int


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """Static settings of the sampler."""

    model: ModelConfig
    token_loss: TokenLoss
    num_ar_steps: int
    guided: bool
    num_segments: int = 8

    def start(self, batch_size: int) -> SampleState:
        """Nothing revealed yet."""
        tokens = jnp.zeros((batch_size, self.model.num_tokens, self.model.token_dim))
        return SampleState(tokens=tokens, num_visible=jnp.zeros((), jnp.int32))


def plan_segments(spec: SampleSpec) -> list[Segment]:
    """Cut the steps into at most `num_segments` runs so that padding costs the fewest operations.

    A dynamic programme over the ends of runs: best[s] holds the cheapest cutting of the first s
    steps.
    """
    counts = reveal_counts(spec.model.num_tokens, spec.num_ar_steps)
    before = [sum(counts[:s]) for s in range(len(counts))]  # visible tokens when step s starts

    @functools.cache
    def segment(start: int, stop: int) -> tuple[float, Segment]:
        shape = Segment(start, stop, before[stop - 1], max(counts[start:stop]))
        cost = flops.ar_step(spec.model, shape.visible, shape.new, spec.token_loss.denoiser_calls)
        return cost * (stop - start), shape

    best: dict[int, tuple[float, tuple[Segment, ...]]] = {0: (0.0, ())}
    for _ in range(min(spec.num_segments, len(counts))):
        longer = dict(best)
        for stop in range(1, len(counts) + 1):
            options = [
                (cost + segment(s, stop)[0], (*runs, segment(s, stop)[1]))
                for s, (cost, runs) in best.items()
                if s < stop
            ]
            longer[stop] = min(options, key=lambda option: option[0])
        best = longer
    return list(best[len(counts)][1])


def ar_step(
    spec: SampleSpec,
    model,
    state: SampleState,
    order,
    labels,
    num_new,
    cfg_scale,
    temperature,
    noise_of,
    segment: Segment,
):
    """Reveal the next `num_new` tokens of every sample.

    Args:
        spec: static settings.
        model: the networks, with the moving average's parameters.
        state: what is known so far.
        order: `[B, N]`.
        labels: `[B]`.
        num_new: scalar, at most `segment.new`.
        cfg_scale: scalar guidance scale of this step.
        temperature: scalar.
        noise_of: places `[K]` -> noise `[B, K, S, C]`.
        segment: gives the padded shapes.

    Returns:
        the next `SampleState`.
    """
    num_tokens = spec.model.num_tokens
    places = state.num_visible + jnp.arange(segment.new)  # [K]
    inside = jnp.minimum(places, num_tokens - 1)
    cond = conditions(spec, model, state, order, labels, inside, segment.visible)  # [G, B, K, D]
    new = spec.token_loss.sample(
        model.denoiser, cond, noise_of(inside), cfg_scale, temperature
    )  # [B, K, C]
    target = jnp.where(
        jnp.arange(segment.new) < num_new, places, num_tokens
    )  # out of range is dropped
    tokens = state.tokens.at[:, target].set(new, mode="drop")
    return SampleState(tokens=tokens, num_visible=state.num_visible + num_new)


def conditions(
    spec: SampleSpec, model, state: SampleState, order, labels, places, max_visible: int
):
    """Predictor features at `places` `[K]`: `[G, B, K, D]`, G = 2 with guidance (conditional
    first).
    """
    guidance = 2 if spec.guided else 1
    pairs = jnp.stack(
        [labels, jnp.full_like(labels, spec.model.null_label)][:guidance], axis=1
    )  # [B, G]
    labels = pairs.reshape(
        -1
    )  # pairs stay together, so a batch split over devices needs no exchange
    order = repeat(order, "b n -> (b g) n", g=guidance)
    tokens = repeat(state.tokens[:, :max_visible], "b v c -> (b g) v c", g=guidance)
    visible = jnp.broadcast_to(jnp.arange(max_visible) < state.num_visible, tokens.shape[:2])
    encoded = model.context_encoder(tokens, order[:, :max_visible], labels, visible=visible)
    num_visible = jnp.full(len(labels), state.num_visible)
    cond = model.predictor(encoded, order, num_visible, places=places)
    return rearrange(cond, "(b g) k d -> g b k d", g=guidance)


def run_steps(
    spec: SampleSpec, model, order, labels, cfg_scales, temperature, noise_of: Callable
) -> jax.Array:
    """The whole autoregressive loop: tokens `[B, N, C]` in raster order, for given orders and noise
    source.

    `cfg_scales` is `[T]`; `noise_of` maps places `[K]` to noise `[B, K, S, C]`.
    """
    counts = jnp.asarray(reveal_counts(spec.model.num_tokens, spec.num_ar_steps))
    state = spec.start(len(labels))
    for segment in plan_segments(spec):

        def step(state, inputs, segment=segment):
            num_new, scale = inputs
            return ar_step(
                spec, model, state, order, labels, num_new, scale, temperature, noise_of, segment
            ), None

        chosen = slice(segment.start, segment.stop)
        state, _ = jax.lax.scan(step, state, (counts[chosen], cfg_scales[chosen]))
    return to_raster(state.tokens, order)


def sample_streams(spec: SampleSpec, seed, sample_ids):
    """Orders `[B, N]` and the noise source of the samples `sample_ids` `[B]` under `seed`."""
    num_tokens = spec.model.num_tokens
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(sample_ids)  # [B]

    def order_of(key):
        bits = jax.random.bits(jax.random.fold_in(key, ORDER_STREAM), (num_tokens,))
        return jnp.argsort(bits).astype(jnp.int32)

    def noise_at(key, place):
        shape = (spec.token_loss.noises_per_token, spec.model.token_dim)
        return jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(key, NOISE_STREAM), place), shape
        )

    def noise_of(places):
        return jax.vmap(lambda key: jax.vmap(lambda place: noise_at(key, place))(places))(keys)

    return jax.vmap(order_of)(keys), noise_of


def make_sampler(spec: SampleSpec) -> Callable:
    """The pure function `(params, labels, sample_ids, seed, cfg_scales, temperature) -> tokens [B,
    N, C]`.
    """
    graph, _ = split_model(spec.model)

    def generate(params, labels, sample_ids, seed, cfg_scales, temperature):
        order, noise_of = sample_streams(spec, seed, sample_ids)
        return run_steps(
            spec, nnx.merge(graph, params), order, labels, cfg_scales, temperature, noise_of
        )

    return generate


def make_step(spec: SampleSpec, segment: Segment) -> Callable:
    """One step of `make_sampler` as a function of its own, for watching a picture grow.

    `(params, state, labels, sample_ids, seed, number, cfg_scale, temperature) -> (state, tokens [B,
    N, C])`; `number` is the step's, inside `segment`, and the tokens are in raster order, zero
    where nothing is revealed yet.
    """
    graph, _ = split_model(spec.model)
    counts = reveal_counts(spec.model.num_tokens, spec.num_ar_steps)

    def step(params, state, labels, sample_ids, seed, number, cfg_scale, temperature):
        order, noise_of = sample_streams(spec, seed, sample_ids)
        model = nnx.merge(graph, params)
        num_new = jnp.asarray(counts)[number]
        state = ar_step(
            spec, model, state, order, labels, num_new, cfg_scale, temperature, noise_of, segment
        )
        return state, to_raster(state.tokens, order)

    return step
