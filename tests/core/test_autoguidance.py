"""Guidance by a weaker model: what it is in closed form, and where it must change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled_params
from tiny import tiny_config

from djepa_jax.core import sharding
from djepa_jax.core.sampler import SampleInputs, SamplerConfig, make_sampler
from djepa_jax.sampling.generator import grow, jitted_sampler

LABELS = jnp.arange(8) % 3


def sampler_of(*flags: str, **changes) -> SamplerConfig:
    config = tiny_config("--config.sample.cfg_scale=2.0", *flags).sampler
    return dataclasses.replace(config, autoguided=True, **changes)


def inputs_of(config: SamplerConfig, guide, scale: float = 2.5) -> SampleInputs:
    scales = jnp.asarray(config.guidance(scale, "constant"))
    return SampleInputs(LABELS, jnp.arange(8), jnp.int32(0), scales, jnp.float32(1), guide=guide)


def draw(config: SamplerConfig, params, guide=None, scale: float = 2.5) -> np.ndarray:
    return np.asarray(jax.jit(make_sampler(config))(params, inputs_of(config, guide, scale)))


def alone(config: SamplerConfig) -> SamplerConfig:
    return dataclasses.replace(config, autoguided=False, guided=False)


@pytest.fixture(scope="module")
def both() -> tuple[dict, dict]:
    """The parameters of a model and of a weaker one."""
    model = sampler_of().model
    return filled_params(model, 0), filled_params(model, 1)


def test_one_step_leads_away_from_the_weaker_model(both):
    """All tokens in one step and one Euler step: w + s (x - w) of what either model draws alone."""
    config = sampler_of("--config.sample.num_denoise_steps=2", num_ar_steps=1)
    model, weaker = (draw(alone(config), params) for params in both)
    found = draw(config, *both, scale=2.5)
    np.testing.assert_allclose(found, weaker + 2.5 * (model - weaker), rtol=1e-4, atol=1e-4)
    assert np.abs(model - weaker).max() > 0.1


DIFFUSION = ["--config.loss.name=diffusion", "--config.sample.sampler=ddpm"]


@pytest.mark.parametrize("flags", [[], DIFFUSION])
def test_led_away_from_itself_a_model_stays(flags, both):
    """Whatever the scale, and over several steps of different shapes."""
    config = sampler_of(*flags, num_segments=3)
    params = filled_params(config.model, 0)
    np.testing.assert_allclose(
        draw(config, params, params), draw(alone(config), params), rtol=1e-3, atol=1e-3
    )


def test_steps_without_guidance_run_the_model_alone(both):
    config = sampler_of(cfg_interval=(0.0, 0.0), num_segments=2)
    np.testing.assert_allclose(draw(config, *both), draw(alone(config), both[0]), atol=1e-5)
    first = dataclasses.replace(config, cfg_interval=(0.0, 0.4))
    assert np.abs(draw(first, *both) - draw(config, *both)).max() > 1e-3


def test_samples_that_grow_end_as_the_sampler_does(both):
    config = sampler_of(num_segments=2)
    *_, last = grow(config, both[0], inputs_of(config, both[1]))
    np.testing.assert_allclose(last, draw(config, *both), atol=1e-4)


def test_a_mesh_changes_nothing(both):
    config, mesh = sampler_of(), sharding.make_mesh((-1, 1, 1))
    assert mesh.size == 8
    inputs = inputs_of(config, both[1])
    placed = jax.device_put((LABELS, inputs.sample_ids), sharding.batch_sharding(mesh))
    inputs = dataclasses.replace(inputs, conditions=placed[0], sample_ids=placed[1])
    found = jitted_sampler(config, mesh)(both[0], inputs)
    np.testing.assert_allclose(found, draw(config, *both), atol=1e-4)


def test_the_weaker_model_is_asked_for(both):
    with pytest.raises(ValueError, match="weaker model"):
        draw(sampler_of(), both[0])
