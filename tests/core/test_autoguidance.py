"""Guidance by a weaker model: what it is in closed form, and where it must change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled_params
from tiny import tiny_config

from djepa_jax.core import sharding
from djepa_jax.core.models.autoguidance import Guide
from djepa_jax.core.sampler import SampleInputs, SamplerConfig, make_sampler
from djepa_jax.sampling.generator import grow, jitted_sampler

LABELS, SCALE, AWAY = jnp.arange(8) % 3, 2.5, 1.75  # of guidance by no condition, by a weaker model


def sampler_of(*flags: str, guided: bool = False, **changes) -> SamplerConfig:
    config = tiny_config("--config.sample.cfg_scale=2.0", *flags).sampler
    return dataclasses.replace(config, autoguided=True, guided=guided, **changes)


def inputs_of(config: SamplerConfig, guide, labels=LABELS) -> SampleInputs:
    scales, guide = config.guidance(SCALE, "constant"), guide and Guide(guide, jnp.float32(AWAY))
    how = jnp.int32(0), jnp.asarray(scales), jnp.float32(1)
    return SampleInputs(labels, jnp.arange(8), *how, guide=guide)


def draw(config: SamplerConfig, params, guide=None, labels=LABELS) -> np.ndarray:
    return np.asarray(jax.jit(make_sampler(config))(params, inputs_of(config, guide, labels)))


def alone(config: SamplerConfig, **changes) -> SamplerConfig:
    return dataclasses.replace(config, autoguided=False, **{"guided": False, **changes})


@pytest.fixture(scope="module")
def both() -> tuple[dict, dict]:
    """The parameters of a model and of a weaker one."""
    model = sampler_of().model
    return filled_params(model, 0), filled_params(model, 1)


@pytest.mark.parametrize("guided", [False, True])
def test_one_step_leads_away_from_the_weaker_model(guided, both):
    """All tokens in one step and one Euler step: of what each draws alone, x + (s - 1) (x - w), and
    with both guidances as much again of x less what the model draws without a condition.
    """
    config = sampler_of("--config.sample.num_denoise_steps=2", num_ar_steps=1, guided=guided)
    model, weaker = (draw(alone(config), params) for params in both)
    null = draw(alone(config), both[0], labels=config.model.conditioner.null(8))
    expected = model + (AWAY - 1) * (model - weaker) + guided * (SCALE - 1) * (model - null)
    np.testing.assert_allclose(draw(config, *both), expected, rtol=1e-4, atol=1e-4)
    assert min(np.abs(model - other).max() for other in (weaker, null)) > 0.1


DIFFUSION = ["--config.loss.name=diffusion", "--config.sample.sampler=ddpm"]


@pytest.mark.parametrize("flags, guided", [([], True), (DIFFUSION, False)])
def test_led_away_from_itself_a_model_stays(flags, guided):
    """Whatever the scale, over several steps of different shapes, with and without the other."""
    config = sampler_of(*flags, num_segments=2, guided=guided)
    params = filled_params(config.model, 0)
    plain = draw(alone(config, guided=guided), params)
    error = np.abs(draw(config, params, params) - plain).max()
    assert error < 1e-4 * np.abs(plain).max()


def test_steps_without_guidance_run_the_model_alone(both):
    config = sampler_of(cfg_interval=(0.0, 0.0), num_segments=2, guided=True)
    np.testing.assert_allclose(draw(config, *both), draw(alone(config), both[0]), atol=1e-5)
    first = dataclasses.replace(config, cfg_interval=(0.0, 0.4))
    found = [draw(dataclasses.replace(first, num_segments=n), *both) for n in (1, 3)]
    np.testing.assert_allclose(*found, atol=1e-4)  # steps that share a program with guided ones
    assert np.abs(found[0] - draw(config, *both)).max() > 1e-3


def test_samples_that_grow_end_as_the_sampler_does(both):
    config = sampler_of(num_segments=2)
    *_, last = grow(config, both[0], inputs_of(config, both[1]))
    np.testing.assert_allclose(last, draw(config, *both), atol=1e-4)


def test_regions_are_guided_by_their_own_condition(both):
    """Two regions of one class are one."""
    config = sampler_of(guided=True)
    halves = dataclasses.replace(config, regions=(0,) * 8 + (1,) * 8)
    found = draw(halves, *both, labels=jnp.stack([LABELS, LABELS], axis=1))
    np.testing.assert_allclose(found, draw(config, *both), atol=1e-4)


def test_a_mesh_changes_nothing(both):
    config, mesh = sampler_of(guided=True), sharding.make_mesh((-1, 1, 1))
    assert mesh.size == 8
    inputs = inputs_of(config, both[1])
    placed = jax.device_put((LABELS, inputs.sample_ids), sharding.batch_sharding(mesh))
    inputs = dataclasses.replace(inputs, conditions=placed[0], sample_ids=placed[1])
    found = jitted_sampler(config, mesh)(both[0], inputs)
    np.testing.assert_allclose(found, draw(config, *both), atol=1e-4)


def test_the_weaker_model_is_asked_for(both):
    with pytest.raises(ValueError, match="weaker model"):
        draw(sampler_of(), both[0])
