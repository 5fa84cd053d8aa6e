"""Guidance that runs the unconditional half of the networks in some steps only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled_params
from tiny import tiny_config

from djepa_jax.core import sampler
from djepa_jax.core.losses.base import guide
from djepa_jax.core.models.conditioning import Condition
from djepa_jax.core.models.djepa import split_model
from djepa_jax.core.sampler import Draws, Known, SampleInputs, make_draws, make_sampler, run_steps
from djepa_jax.sampling.generator import grow

LABELS, NULL, SCALE, WIDTH = np.arange(3), 10, 2.0, 16


def config_of(steps: int, **changes) -> sampler.SamplerConfig:
    experiment = tiny_config("--config.sample.cfg_scale=2.0")
    experiment = experiment.updated({"sample.num_ar_steps": steps})
    return dataclasses.replace(experiment.sampler, **changes)


def feature_of(raw, place, visible):
    """What the stand-in predicts at a place, while so many are visible."""
    return (raw + 1.0) * (place + 100.0 * visible)


class Networks:
    """In place of a model: features are known, and rows that the encoder is given are counted."""

    def __init__(self):
        self.ran = []

    def embed_condition(self, raw):
        return Condition(raw[:, None, None], None)

    def context_encoder(self, tokens, order, condition, num_visible, num_unseen):
        rows = len(order)
        jax.debug.callback(lambda n: self.ran.append((int(n), rows)), num_visible[0])
        return condition.prefix  # [B, 1, 1]

    def predictor(self, encoded, order, num_visible, mask, query_ids, num_unseen):
        features = feature_of(encoded, query_ids[:, None], num_visible[:, None, None])
        return jnp.repeat(features, WIDTH, axis=2)  # [B, K, D]


class Guided:
    """A token loss whose sample is the guided features."""

    noises_per_token, denoiser_calls, out_per_channel = 1, 1, 1

    def sample(self, denoiser, cond, noise, cfg_scale, temperature):
        return guide(cond, cfg_scale)[..., :4]


def drawn(config, monkeypatch) -> tuple[np.ndarray, list]:
    """A channel of the tokens, in the order of their revealing, and what the encoder ran."""
    monkeypatch.setattr(sampler, "loop_denoiser", lambda model: None)
    mask = jnp.arange(16) < config.num_known
    known = Known(jnp.zeros((3, 16, 4)), jnp.tile(mask, (3, 1))) if config.num_known else None
    order, model = make_draws(config, 0, jnp.arange(3), known).order, Networks()
    scales = config.guidance(SCALE, "constant")

    @jax.jit
    def run(order, known):
        draws = Draws(order, lambda places: jnp.zeros((3, len(places), 1, 4)))
        return run_steps(config, model, draws, jnp.asarray(LABELS), scales, 1.0, known)

    tokens = np.asarray(run(order, known))[..., 0]
    jax.effects_barrier()
    return np.take_along_axis(tokens, np.asarray(order), axis=1), sorted(model.ran)


def expected(config, paired: list[int]) -> tuple[np.ndarray, list]:
    """The same, worked out step by step."""
    scales, visible = config.guidance(SCALE, "constant"), config.num_known
    tokens, ran, last = np.zeros((3, 16)), [], 0
    for step, (new, scale) in enumerate(zip(config.counts, scales, strict=True)):
        last = visible if step in paired else last
        ran.append((visible, 6 if step in paired else 3))
        for place in range(visible, visible + new):
            gap = feature_of(NULL, place, last) - feature_of(LABELS, place, last)
            tokens[:, place] = feature_of(LABELS, place, visible) + (1 - scale) * gap
        visible += new
    return tokens, ran


@pytest.mark.parametrize(
    "steps, changes, paired",
    [
        (6, {"reuse_unconditional": 1, "num_segments": 2}, [0, 1, 2, 3, 4, 5]),
        (6, {"reuse_unconditional": 2, "num_segments": 1}, [0, 2, 4]),
        (6, {"reuse_unconditional": 2, "num_segments": 6}, [0, 2, 4]),
        (16, {"reuse_unconditional": 3, "num_segments": 4}, [0, 3, 6, 9, 12, 15]),
        (6, {"reuse_unconditional": 100, "num_segments": 3}, [0]),
        (8, {"reuse_unconditional": 2, "num_segments": 1, "reveal": "halves"}, [0, 2, 4, 6]),
        (8, {"reuse_unconditional": 2, "cfg_interval": (0.4, 0.8), "num_segments": 2}, [3, 5]),
        (4, {"reuse_unconditional": 3, "num_known": 7, "num_segments": 2}, [0, 3]),
        (6, {"reuse_unconditional": 2, "guided": False, "num_segments": 2}, []),
    ],
)
def test_the_last_difference_is_added_to_the_conditional_half(steps, changes, paired, monkeypatch):
    """At the same places; and the unconditional half of the networks runs in no other step."""
    config = config_of(steps, token_loss=Guided(), **changes)
    if not config.guided:
        monkeypatch.setattr(sampler, "guidance_scales", lambda counts, *_: np.ones(len(counts)))
    tokens, ran = drawn(config, monkeypatch)
    wanted, should_run = expected(config, paired)
    np.testing.assert_allclose(tokens, wanted, rtol=1e-6)
    assert ran == should_run


def test_a_model_is_unchanged_where_the_condition_is_the_null_one():
    """Of others the first tokens are; and steps of their own give what the whole loop gives."""
    config = config_of(4, num_segments=1)
    reusing = dataclasses.replace(config, reuse_unconditional=3)
    params = filled_params(config.model)
    labels, ids = jnp.asarray([3, NULL]), jnp.arange(2)
    inputs = SampleInputs(labels, ids, jnp.int32(0), jnp.full(4, SCALE), jnp.float32(1))
    before, tokens = (
        np.asarray(jax.jit(make_sampler(each))(params, inputs)) for each in (config, reusing)
    )
    np.testing.assert_allclose(tokens[1], before[1], rtol=1e-4, atol=1e-4)
    first, *_, last = make_draws(config, 0, ids).order[0]
    np.testing.assert_allclose(tokens[0, first], before[0, first], rtol=1e-4, atol=1e-4)
    assert np.abs(tokens[0, last] - before[0, last]).max() > 1e-3
    *_, grown = grow(reusing, params, inputs)
    np.testing.assert_allclose(grown, tokens, rtol=1e-4, atol=1e-4)


def test_without_reuse_or_guidance_the_program_is_what_it_was():
    def traced(**changes):
        config = config_of(4, num_segments=2, **changes)
        _, params = split_model(config.model)
        inputs = SampleInputs(jnp.arange(2), jnp.arange(2), 0, jnp.ones(4), 1.0)
        return str(jax.make_jaxpr(make_sampler(config))(params, inputs))

    assert "cond[" in traced(reuse_unconditional=2) and "cond[" not in traced()
    assert traced(guided=False, reuse_unconditional=2) == traced(guided=False)
