"""What the losses mean, on denoisers whose answers are known in closed form.

The first part holds for every entry of the table of token losses, so a new one is tested by being
listed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djepa_jax.core.losses import TOKEN_LOSSES, feature_statistics, jepa_loss
from djepa_jax.core.losses.base import guide
from djepa_jax.core.losses.diffusion import Diffusion, discretised_nll, gaussian_kl, make_schedule
from djepa_jax.core.losses.flow_matching import FlowMatching
from djepa_jax.core.losses.shortcut import Shortcut
from djepa_jax.core.losses.x_prediction import XPrediction

CHANNELS = 3
POINT = jnp.array([0.5, -1.0, 2.0])
KINDS = [(name, sampler) for name, loss in TOKEN_LOSSES.items() for sampler in loss.samplers]


@dataclasses.dataclass
class Field:
    """A denoiser given by a formula of the noisy token, the time `[..., 1]` and the condition."""

    formula: Callable

    def time(self, t):
        return t[..., None].astype(jnp.float32)

    def condition(self, cond):
        return cond

    def __call__(self, xt, time, condition):
        rows = jnp.broadcast_shapes(xt.shape[:-1], time.shape[:-1], condition.shape[:-1])
        return self.formula(jnp.broadcast_to(xt, (*rows, xt.shape[-1])), time, condition)


class Stretches(Field):
    """A field that is told start and length of a stretch as two numbers `[..., 2]`."""

    def time(self, t):
        return jnp.stack([jnp.minimum(t, 1), jnp.maximum(t - 1, 0)], axis=-1)


def mixed_field(token_loss) -> Field:
    """Something that depends on everything it is given."""

    def formula(xt, time, condition):
        out = jnp.tanh(xt + 0.001 * time + condition[..., :CHANNELS])
        return jnp.concatenate([out] * token_loss.out_per_channel, axis=-1)

    return Field(formula)


def with_variance(predicted, value=0.0):
    """A diffusion output: noise prediction and a constant variance value."""
    return jnp.concatenate([predicted, jnp.full_like(predicted, value)], axis=-1)


def ideal_noise(xt, time, condition):
    """The noise in `xt` if every token is `POINT`."""
    kept = jnp.asarray(make_schedule(1000).alphas_cumprod, jnp.float32)[time.astype(int)]
    return with_variance((xt - jnp.sqrt(kept) * POINT) / jnp.sqrt(1 - kept))


def ideal_velocity(xt, time, condition):
    """The velocity at `xt` if every token is `POINT`; time 1 is where the path ends."""
    return (POINT - xt) / jnp.maximum(1 - time, 1e-6)


IDEAL = {
    "diffusion": Field(ideal_noise),
    "flow_matching": Field(ideal_velocity),
    "shortcut": Stretches(lambda xt, time, _: ideal_velocity(xt, time[..., :1], _)),
    "x_prediction": Field(lambda xt, *_: jnp.broadcast_to(POINT, xt.shape)),
}


def sample(token_loss, field: Field, cond, noise, cfg_scale=1.0, temperature=1.0) -> jax.Array:
    """What a token loss draws, by one program."""
    draw = jax.jit(functools.partial(token_loss.sample, field))
    return draw(cond, noise, cfg_scale, temperature)


def losses(token_loss, field: Field, *inputs) -> jax.Array:
    """A token loss of all rows, by one program."""
    return jax.jit(functools.partial(token_loss.loss, field))(*inputs)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_one_loss_per_token(name):
    """The result has the tokens' leading axes, and a token's loss depends on that token alone."""
    token_loss = TOKEN_LOSSES[name](noise_multiplicity=2)
    x0, cond = (jax.random.normal(jax.random.key(i), (2, 5, CHANNELS)) for i in range(2))
    draws = token_loss.draw(jax.random.key(3), x0.shape)
    loss = jax.jit(lambda x0, cond: token_loss.loss(mixed_field(token_loss), x0, cond, *draws))
    before, after = loss(x0, cond), loss(x0.at[1, 2].add(1.0), cond.at[0, 4].add(1.0))
    assert before.shape == (2, 5) and before.dtype == jnp.float32 and jnp.isfinite(before).all()
    changed = np.zeros((2, 5), bool)
    changed[1, 2] = changed[0, 4] = True
    np.testing.assert_array_equal(np.asarray(before != after), changed)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_more_draws_only_calm_the_loss(name):
    """The number of draws changes the spread of the loss, not its mean."""
    zeros = jnp.zeros((4096, CHANNELS))

    @jax.jit
    def draw():
        losses = [TOKEN_LOSSES[name](noise_multiplicity=count) for count in (1, 8)]
        return [
            loss.loss(mixed_field(loss), zeros, zeros, *loss.draw(jax.random.key(0), zeros.shape))
            for loss in losses
        ]

    few, many = map(np.asarray, draw())
    assert abs(few.mean() - many.mean()) < 4 * few.std() / math.sqrt(
        len(few)
    ) + 4 * many.std() / math.sqrt(len(many))
    assert abs(few.std() / many.std() / math.sqrt(8) - 1) < 0.3


@pytest.mark.parametrize("guidance", [1, 2])
@pytest.mark.parametrize("name, sampler", KINDS)
def test_samples(name, sampler, guidance):
    """Shape, dtype, independence of other tokens, and equal halves make guidance idle."""
    token_loss = TOKEN_LOSSES[name](num_denoise_steps=4, sampler=sampler)
    cond = jnp.broadcast_to(
        jax.random.normal(jax.random.key(0), (2, 5, CHANNELS)), (guidance, 2, 5, CHANNELS)
    )
    noise = jax.random.normal(jax.random.key(1), (2, 5, token_loss.noises_per_token, CHANNELS))
    draw = jax.jit(functools.partial(token_loss.sample, mixed_field(token_loss)))
    tokens = draw(cond, noise, 3.0, 0.9)
    assert (
        tokens.shape == (2, 5, CHANNELS)
        and tokens.dtype == jnp.float32
        and jnp.isfinite(tokens).all()
    )
    np.testing.assert_allclose(
        tokens, draw(cond, noise, 1.0, 0.9), rtol=1e-4, atol=1e-4 * float(jnp.abs(tokens).max())
    )
    changed = draw(cond.at[:, 1, 2].add(1.0), noise.at[0, 4].add(1.0), 3.0, 0.9) != tokens
    np.testing.assert_array_equal(np.argwhere(changed.any(-1)), [[0, 4], [1, 2]])


@pytest.mark.parametrize("name", IDEAL)
def test_ideal_denoiser_of_a_point_has_no_error(name):
    token_loss, x0 = TOKEN_LOSSES[name](), jnp.broadcast_to(POINT, (64, CHANNELS))
    t = jax.random.uniform(jax.random.key(0), (64, 4), maxval=0.9)
    noise = jax.random.normal(jax.random.key(1), (64, 4, CHANNELS))
    t = (1000 * t).astype(int) if name == "diffusion" else t
    t = jnp.stack([t, (t + 0.9) / 2], axis=-1) if name == "shortcut" else t
    error = token_loss.terms if name == "diffusion" else token_loss.loss
    squared_error = jax.tree.leaves(
        jax.jit(functools.partial(error, IDEAL[name]))(x0, x0, t, noise)
    )[0]
    assert float(squared_error.max()) < 1e-6


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [1, 5, 100])
def test_diffusion_finds_the_point(sampler, steps):
    """The last step returns its implied clean token, whatever noise was added on the way."""
    token_loss = Diffusion(num_denoise_steps=steps, sampler=sampler)
    noise = jax.random.normal(jax.random.key(0), (6, token_loss.noises_per_token, CHANNELS))
    tokens = sample(token_loss, IDEAL["diffusion"], jnp.zeros((1, 6, CHANNELS)), noise)
    # A single step divides by the signal at step 999, 5e-5, and what rounding left with it.
    np.testing.assert_allclose(
        tokens, jnp.broadcast_to(POINT, tokens.shape), rtol=0, atol=1e-4 if steps > 1 else 0.02
    )


@pytest.mark.parametrize("sampler", FlowMatching.samplers)
@pytest.mark.parametrize("shift", [1.0, 0.5, 3.0])
def test_flow_finds_the_point(sampler, shift):
    """Paths to a point are straight, so any grid and integrator follow them exactly; an ancestral
    step goes to another of them.
    """
    token_loss = FlowMatching(num_denoise_steps=7, sampler=sampler, time_shift=shift)
    start = jax.random.normal(jax.random.key(0), (6, token_loss.noises_per_token, CHANNELS))

    def velocity(xt, time, condition):  # at time 1 the limit along the path
        return jnp.where(time < 1, ideal_velocity(xt, time, condition), POINT - start[:, 0])

    tokens = sample(token_loss, Field(velocity), jnp.zeros((1, 6, CHANNELS)), start)
    np.testing.assert_allclose(tokens, jnp.broadcast_to(POINT, tokens.shape), rtol=0, atol=2e-6)


@pytest.mark.parametrize("sampler", XPrediction.samplers)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_prediction_of_a_point_finds_it(sampler, steps):
    """In one step, too, which ends at what the network gives."""
    token_loss = XPrediction(num_denoise_steps=steps + 1, sampler=sampler, time_shift=0.5)
    shape, cond = (6, token_loss.noises_per_token, CHANNELS), jnp.zeros((1, 6, 1))
    start = jax.random.normal(jax.random.key(0), shape)
    tokens = sample(token_loss, IDEAL["x_prediction"], cond, start)
    np.testing.assert_allclose(tokens, jnp.broadcast_to(POINT, tokens.shape), rtol=0, atol=2e-6)


@pytest.mark.parametrize("sampler", ["euler", "ancestral"])
def test_prediction_is_flow_matching_by_another_network(sampler):
    """(x0 - xt) / (1 - t) as the velocity has the same loss and samples, but for Heun's end."""
    flow, prediction = (
        loss(num_denoise_steps=9, sampler=sampler) for loss in (FlowMatching, XPrediction)
    )
    found = mixed_field(flow).formula
    velocity = Field(lambda xt, t, c: (found(xt, t, c) - xt) / (1 - t))
    x0, cond = (jax.random.normal(jax.random.key(i), (64, CHANNELS)) for i in range(2))
    t, noise = flow.draw(jax.random.key(3), x0.shape)
    t = t * (1 - prediction.min_rest)
    both = (flow, velocity), (prediction, Field(found))
    np.testing.assert_allclose(*(losses(*each, x0, cond, t, noise) for each in both), rtol=1e-3)
    noise = jax.random.normal(jax.random.key(4), (64, flow.noises_per_token, CHANNELS))
    samples = (sample(*each, cond[None], noise) for each in both)
    np.testing.assert_allclose(*samples, atol=1e-5)


def test_times_of_predictions_are_a_logistic_normal():
    loss = XPrediction(time_mean=0.5, time_deviation=2.0)
    t = np.asarray(loss.draw(jax.random.key(0), (20_000, CHANNELS))[0], float)
    logits = np.log(t / (1 - t))
    assert abs(logits.mean() - 0.5) < 0.05 and abs(logits.std() - 2) < 0.05


def test_orders_of_the_integrators():
    """On x' = x Euler's error halves with the step, Heun's falls fourfold and is smaller."""
    noise, cond = jnp.ones((1, 1, CHANNELS)), jnp.zeros((1, 1, CHANNELS))

    def error(sampler, steps):
        token_loss = FlowMatching(num_denoise_steps=steps + 1, sampler=sampler)
        tokens = sample(token_loss, Field(lambda x, t, c: x), cond, noise)
        return abs(float(tokens[0, 0]) - math.e)

    euler, heun = (
        [error(sampler, steps) for steps in (8, 16, 32)] for sampler in ("euler", "heun")
    )
    assert all(h < e / 10 for e, h in zip(euler, heun, strict=True))
    assert all(1.8 < coarse / fine < 2.1 for coarse, fine in zip(euler, euler[1:], strict=False))
    assert all(3.6 < coarse / fine < 4.1 for coarse, fine in zip(heun, heun[1:], strict=False))


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_ancestral_steps_keep_the_marginals(shift):
    """Of a Gaussian: its deviation, with a start that is forgotten; Euler hands it on instead."""
    deviation, count = 0.5, 4000

    def exact(xt, t, condition):  # E[x0 | xt] = t s^2 / (t^2 s^2 + (1 - t)^2) xt
        signal = t * deviation**2
        return signal / (t * signal + (1 - t) ** 2) * xt

    def run(sampler):
        loss = XPrediction(num_denoise_steps=101, sampler=sampler, time_shift=shift)
        noise = jax.random.normal(jax.random.key(0), (count, loss.noises_per_token, 1))
        tokens = sample(loss, Field(exact), jnp.zeros((1, count, 1)), noise)[:, 0]
        return float(tokens.std()), np.corrcoef(tokens, noise[:, 0, 0])[0, 1]

    (ancestral, left), (euler, kept) = run("ancestral"), run("euler")
    assert abs(ancestral / deviation - 1) < 0.05 and abs(euler / deviation - 1) < 0.05
    assert abs(left) < 4 / math.sqrt(count) and kept > 0.999


def exact_mean(x, time, condition):
    """The mean velocity on x' = x over a stretch, in closed form."""
    length = time[..., 1:]
    return x * jnp.where(length > 0, jnp.expm1(length) / jnp.where(length > 0, length, 1), 1)


def test_a_stretch_agrees_with_its_halves_if_and_only_if_it_is_the_mean_velocity():
    """The error of a stretch is 0 for the exact mean of x' = x, and not for its slope at the
    start, which Euler would take.
    """
    x, cond = jnp.ones((64, CHANNELS)), jnp.zeros((64, CHANNELS))
    shortcut = Shortcut(noise_multiplicity=4, flow_share=0.0)
    draws = shortcut.draw(jax.random.key(0), x.shape)
    assert (draws[0][..., 0] < draws[0][..., 1]).all()
    mean, slope = (
        losses(shortcut, Stretches(f), x, cond, *draws) for f in (exact_mean, lambda x, *_: x)
    )
    assert float(mean.max()) < 1e-10 and float(slope.min()) > 1e-4


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_mean_velocities_reach_the_end_in_any_number_of_steps(steps):
    shortcut = Shortcut(num_denoise_steps=steps + 1)
    one, none = jnp.ones((1, 1, CHANNELS)), jnp.zeros((1, 1, CHANNELS))
    tokens = sample(shortcut, Stretches(exact_mean), none, one)
    np.testing.assert_allclose(tokens[0], math.e, rtol=1e-5)


def test_a_stretch_of_no_length_is_flow_matching_and_its_target_has_no_gradient():
    """With the same draws and a network that cannot tell lengths, the losses are the same."""
    flow, shortcut = FlowMatching(), Shortcut(flow_share=0.999999)
    x0, cond = (jax.random.normal(jax.random.key(i), (16, CHANNELS)) for i in range(2))
    ends, noise = shortcut.draw(jax.random.key(3), x0.shape)
    same = [
        losses(loss, mixed_field(loss), x0, cond, t, noise)
        for loss, t in ((flow, ends[..., 0]), (shortcut, ends))
    ]
    np.testing.assert_allclose(*same, rtol=1e-6)

    def total(weight, ends):
        field = Stretches(lambda x, time, _: weight * x)
        return shortcut.loss(field, x0, cond, ends, noise).sum()

    # At weight 1: d/dw of (w x - target)^2 with the target 1 + length / 4 times x held fixed
    ends = jnp.stack([jnp.zeros(ends.shape[:-1]), jnp.full(ends.shape[:-1], 0.8)], axis=-1)
    expected = (2 * (1 - 1.2) * jnp.square(noise)).mean((-1, -2)).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(total))(1.0, ends), expected, rtol=1e-4)


def test_temperature_scales_the_added_noise_alone():
    """Without it only the start is left of the noise; DDIM, Euler and Heun never use it."""
    cond = jnp.zeros((1, 4, CHANNELS))
    noise = jax.random.normal(jax.random.key(0), (4, 4, CHANNELS))
    other = noise.at[:, 1:].add(1.0)
    for noisy in (
        Diffusion(num_denoise_steps=3),
        FlowMatching(num_denoise_steps=5, sampler="ancestral"),
        XPrediction(num_denoise_steps=5, sampler="ancestral"),
    ):
        assert noisy.noises_per_token == 4
        draw = jax.jit(functools.partial(noisy.sample, mixed_field(noisy)))
        cold = [draw(cond, n, 1.0, 0.0) for n in (noise, other)]
        np.testing.assert_array_equal(*cold)
        assert (draw(cond, noise, 1.0, 1.0) != cold[0]).all()
    for still in (
        Diffusion(num_denoise_steps=3, sampler="ddim"),
        FlowMatching(num_denoise_steps=3),
        Shortcut(num_denoise_steps=3),
        XPrediction(num_denoise_steps=3),
    ):
        assert still.noises_per_token == 1
        draw = jax.jit(functools.partial(still.sample, mixed_field(still)))
        runs = [draw(cond, noise[:, :1], 1.0, t) for t in (0.0, 1.0)]
        np.testing.assert_array_equal(*runs)


def test_guidance_acts_between_shares_of_the_steps():
    """Along a constant velocity the condition's difference counts for the guided time."""
    start, own, other, scale = jnp.ones((2, 1, CHANNELS)), 2.0, -1.0, 3.0
    cond = jnp.stack([jnp.full((2, CHANNELS), value) for value in (own, other)])
    for guided, share in (((0.5, 1.0), 0.5), ((0.25, 0.5), 0.25), ((0.0, 0.75), 0.75), ((1, 1), 0)):
        loss = FlowMatching(num_denoise_steps=9, guided_shares=guided)
        found = sample(loss, Field(lambda xt, t, c: c + 0 * xt), cond, start, scale)
        expected = 1 + own + share * (scale - 1) * (own - other)
        np.testing.assert_allclose(found, jnp.full_like(found, expected), rtol=1e-6)
        assert loss.unguided_calls == 8 * (1 - share)


@pytest.mark.parametrize("name, sampler", KINDS)
def test_guidance_in_all_steps_or_none(name, sampler):
    def guided_by(guided, halves):
        clip = {"clip_x0": 1.0} if name == "diffusion" else {}  # or the last steps outweigh all
        loss = TOKEN_LOSSES[name](
            num_denoise_steps=5, sampler=sampler, guided_shares=guided, **clip
        )
        shape = (4, loss.noises_per_token, CHANNELS)
        noise, key = jax.random.normal(jax.random.key(0), shape), jax.random.key(1)
        cond = jax.random.normal(key, (2, 4, CHANNELS))[:halves]
        return sample(loss, mixed_field(loss), cond, noise, 3.0)

    alone, both = guided_by((0.0, 1.0), 1), guided_by((0.0, 1.0), 2)
    for nothing in ((0.0, 0.0), (0.6, 0.6), (1.0, 1.0), (0.8, 0.2)):
        np.testing.assert_allclose(guided_by(nothing, 2), alone, rtol=1e-6, atol=1e-7)
    for some in ((0.0, 0.5), (0.5, 1.0)):
        found = guided_by(some, 2)
        assert (found != alone).any() and (found != both).any()


def test_variational_term_trains_the_variance_alone():
    x0, noise = jax.random.normal(jax.random.key(0), (2, 8, CHANNELS))
    t = jnp.array([0, 0, 1, 10, 100, 500, 900, 999])

    def terms(predicted, value):
        field = Field(lambda xt, *_: jnp.concatenate([predicted, value], axis=-1)[:, None])
        return Diffusion().terms(field, x0, x0, t[:, None], noise[:, None])

    zeros = jnp.zeros_like(x0)
    gradients = jax.jit(
        jax.jacrev(lambda *outputs: jax.tree.map(jnp.sum, terms(*outputs)), argnums=(0, 1))
    )
    (error_by_mean, error_by_variance), (bound_by_mean, bound_by_variance) = gradients(zeros, zeros)
    np.testing.assert_array_equal(bound_by_mean, 0)
    np.testing.assert_array_equal(error_by_variance, 0)
    assert (bound_by_variance != 0).all() and (error_by_mean != 0).all()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("bound", [0.5, 1.0])
def test_clip_tames_an_awful_denoiser(sampler, bound):
    noise = jax.random.normal(jax.random.key(0), (16, 11, CHANNELS))
    awful = Field(lambda xt, *_: with_variance(50 * jnp.sin(37 * xt)))

    def largest(clip):
        token_loss = Diffusion(num_denoise_steps=10, sampler=sampler, clip_x0=clip)
        few = noise[:, : token_loss.noises_per_token]
        return np.abs(sample(token_loss, awful, jnp.zeros((1, 16, CHANNELS)), few)).max()

    assert largest(bound) <= bound * (1 + 1e-6)
    assert largest(0.0) > 100


def test_guide():
    both = jnp.array([[1.0, 2.0], [0.5, -1.0]])  # conditional, unconditional
    np.testing.assert_array_equal(guide(both[:1], 7.0), both[0])
    for scale, expected in ((1.0, both[0]), (0.0, both[1]), (3.0, [2.0, 8.0])):
        np.testing.assert_allclose(guide(both, scale), expected)


def test_guidance_acts_on_the_noise_prediction_alone():
    """The variance of a guided reverse step is the conditional half's."""
    predicted, values = (
        jnp.array([[[1.0], [0.5]], [[-2.0], [0.0]]]),
        jnp.array([[[-1.0], [1.0]], [[0.3], [0.4]]]),
    )  # [G, rows, 1]
    diffusion = Diffusion(num_denoise_steps=10)
    at = {name: value[4] for name, value in diffusion.reverse_steps().items()}
    step = diffusion.reverse(
        jnp.concatenate([predicted, values], axis=-1),
        jnp.zeros((2, 1)),
        at,
        jnp.ones((2, 1)),
        3.0,
        1.0,
    )
    np.testing.assert_allclose(
        step["x0"], -at["sigma"] / at["signal"] * jnp.array([[7.0], [1.5]]), rtol=1e-5
    )
    np.testing.assert_allclose(
        step["log_variance"][:, 0], [at["posterior_log_variance"], at["log_beta"]], rtol=1e-5
    )


def test_gaussian_kl_and_discretised_probabilities():
    np.testing.assert_allclose(gaussian_kl(1.0, 0.0, 0.0, 0.0), 0.5)
    np.testing.assert_allclose(
        gaussian_kl(0.0, math.log(4.0), 0.0, 0.0), 0.5 * (4 - 1 - math.log(4)), rtol=1e-6
    )
    bins = jnp.linspace(-1, 1, 256)
    for mean, log_scale in ((0.0, -2.0), (0.9, 0.5), (-3.0, -1.0)):
        np.testing.assert_allclose(
            jnp.exp(-discretised_nll(bins, mean, log_scale)).sum(), 1, rtol=1e-4
        )


def test_smooth_l1_closed_form():
    predicted, target = jnp.array([[0.0, 1.0, -2.0, 5.0]]), jnp.zeros((1, 4))
    np.testing.assert_allclose(jepa_loss(predicted, target), [(0 + 0.25 + 1.0 + 4.0) / 4])
    assert jepa_loss(predicted.astype(jnp.bfloat16), target).dtype == jnp.float32


def test_jepa_target_has_no_gradient():
    predicted, target = jax.random.normal(jax.random.key(0), (2, 3, 4))
    by_predicted, by_target = jax.grad(lambda p, t: jepa_loss(p, t).sum(), argnums=(0, 1))(
        predicted, target
    )
    np.testing.assert_array_equal(by_target, 0)
    np.testing.assert_allclose(
        by_predicted, np.clip((predicted - target) / 2, -1, 1) / 4, rtol=1e-5
    )


def test_feature_statistics_closed_forms():
    axes = jnp.concatenate([jnp.eye(8), -jnp.eye(8)]) * math.sqrt(8)  # covariance is the identity
    isotropic = feature_statistics(2 * axes, axes + 5)
    np.testing.assert_allclose(
        [isotropic["target_rank"], isotropic["target_std"]], [8, 1], rtol=1e-5
    )
    line = jnp.linspace(-1, 1, 16)[:, None] * jnp.arange(1.0, 9.0)
    np.testing.assert_allclose(feature_statistics(line, line)["target_rank"], 1, rtol=1e-5)
    assert feature_statistics(line, jnp.ones((16, 8)))["target_std"] == 0
    for predicted, cosine in ((3 * axes, 1), (-axes, -1), (jnp.roll(axes, 1, axis=1), 0)):
        np.testing.assert_allclose(feature_statistics(predicted, axes)["cosine"], cosine, atol=1e-6)
