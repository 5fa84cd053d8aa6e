"""The operation counts: against independently worked numbers, and against what traced programs
do.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from djepa_jax.config import experiment as configuration
from djepa_jax.core import flops
from djepa_jax.core.losses import SAMPLERS, Diffusion, FlowMatching
from djepa_jax.core.masking import MaskPlan
from djepa_jax.core.models.djepa import SIZES, ModelConfig, init_params
from djepa_jax.core.sampler import SampleSpec, make_sampler, plan_segments
from djepa_jax.core.train_step import init_state, make_train_step

# Worked out apart from this code (closed forms over the exact distribution of masks); they leave
# out the small
# projections at the inputs, and no other difference is allowed for.
SMALL_PROJECTIONS = 0.003

TRAINING_GFLOP = {"B": 465.113, "L": 1365.01, "H": 2838.89}  # one image, forward and backward
SAMPLING_TFLOP = {  # (size, autoregressive steps, denoising steps, guided): one image
    ("B", 64, 100, False): 6.94889,
    ("B", 64, 100, True): 13.8978,
    ("B", 32, 25, True): 6.06548,
    ("B", 16, 25, False): 1.72187,
    ("B", 8, 10, False): 0.808482,
    ("L", 64, 100, True): 44.6109,
    ("L", 16, 25, False): 5.51794,
    ("H", 64, 100, True): 93.0220,
    ("H", 16, 25, False): 11.5049,
}
SEGMENT_ENDS = [
    13,
    23,
    32,
    40,
    47,
    55,
    61,
    64,
]  # the best cut of 64 steps into 8, the same for B, L and H
SEGMENT_COST = {
    ("B", 8): 1.0356,
    ("L", 8): 1.0331,
    ("H", 8): 1.0329,
    ("B", 1): 1.4567,
    ("L", 1): 1.4121,
    ("H", 1): 1.4102,
}


def published(size: str) -> ModelConfig:
    return ModelConfig(
        num_tokens=256, token_dim=16, num_classes=1000, denoiser_out=32, **SIZES[size]
    )


def test_one_layer_is_the_textbook_count():
    d, n, q = 768, 320, 10
    layer = 24 * d**2 * n + 4 * n**2 * d
    assert flops.trunk(d, 12, 4.0, n) == 12 * layer
    last = (
        4 * d**2 * n + 20 * d**2 * q + 4 * n * q * d
    )  # keys and values of all, the rest of q places
    assert flops.trunk(d, 12, 4.0, n, q) == 11 * layer + last


@pytest.mark.parametrize("size", SIZES)
def test_training_costs_what_was_worked_out(size):
    counted = flops.train_image(published(size), MaskPlan(256, 2048), 4)
    assert 1 <= counted / (TRAINING_GFLOP[size] * 1e9) < 1 + SMALL_PROJECTIONS


def test_mean_number_of_masked_tokens():
    assert flops.mean_masked(MaskPlan(256, 2048)) == pytest.approx(256 - 33.545, abs=0.01)


@pytest.mark.parametrize("size, steps, denoise_steps, guided", SAMPLING_TFLOP)
def test_sampling_costs_what_was_worked_out(size, steps, denoise_steps, guided):
    counted = flops.sample_image(published(size), steps, denoise_steps, guided)
    assert (
        1
        <= counted / (SAMPLING_TFLOP[size, steps, denoise_steps, guided] * 1e12)
        < 1 + SMALL_PROJECTIONS
    )


@pytest.mark.parametrize("size, segments", SEGMENT_COST)
def test_best_segments_and_their_cost(size, segments):
    spec = SampleSpec(published(size), Diffusion(num_denoise_steps=100), 64, True, segments)
    plan = plan_segments(spec)
    assert [segment.stop for segment in plan] == (SEGMENT_ENDS if segments == 8 else [64])
    exact = flops.sample_image(spec.model, 64, 100, True)
    assert flops.padded_sample_image(spec.model, plan, 100, True) / exact == pytest.approx(
        SEGMENT_COST[size, segments], abs=1e-3
    )


def test_one_segment_a_step_pads_nothing():
    spec = SampleSpec(published("B"), Diffusion(num_denoise_steps=100), 64, False, 64)
    exact = flops.sample_image(spec.model, 64, 100, False)
    assert flops.padded_sample_image(spec.model, plan_segments(spec), 100, False) == pytest.approx(
        exact, rel=1e-12
    )


def test_padding_costs_more_and_the_jepa_head_costs_something():
    model, plan = published("B"), MaskPlan(256, 2048)
    ideal, padded = (
        flops.train_image(model, plan, 4),
        flops.train_image(model, plan, 4, padded=True),
    )
    assert 1.0 < padded / ideal < 1.1
    assert flops.train_image(dataclasses.replace(model, jepa_head=False), plan, 4) < 0.9 * ideal


def test_times_are_a_table_in_diffusion_and_rows_in_flow_matching():
    plan = MaskPlan(256, 2048)
    assert flops.time_rows(Diffusion(), plan) == 0
    assert flops.time_rows(Diffusion(), plan, padded=True) == 1000 / 2048
    assert flops.time_rows(FlowMatching(noise_multiplicity=2), plan) == 2 * flops.mean_masked(plan)
    assert flops.time_rows(FlowMatching(), plan, padded=True) >= flops.time_rows(
        FlowMatching(), plan
    )


def test_products_are_counted_as_often_as_they_run():
    def body(x, w):
        return jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), None  # [3, 4]

    x, w = jnp.ones((3, 4)), jnp.ones((5, 4, 4))
    once = 5 * 2 * 3 * 4 * 4
    assert (
        flops.count_products(jax.make_jaxpr(lambda x: jax.lax.scan(body, x, w)[0])(x).jaxpr) == once
    )
    grad = jax.make_jaxpr(jax.grad(lambda w: jax.lax.scan(body, x, w)[0].sum()))(w)
    assert (
        flops.count_products(grad.jaxpr) == 4 * once
    )  # forward, again for the gradient, and two products for that
    batched = jax.make_jaxpr(lambda a: jnp.einsum("bhqd,bhkd->bhqk", a, a))(jnp.ones((2, 3, 4, 5)))
    assert flops.count_products(batched.jaxpr) == 2 * 2 * 3 * 4 * 4 * 5


def base_widths(loss: str, **sample):
    """The widths of the published B with few layers and steps."""
    config = default.get_config()
    config.model.update(
        size="B", encoder_depth=2, predictor_depth=2, denoiser_depth=2, remat="none"
    )
    config.batch_size, config.loss.name = 16, loss
    config.sample.update(num_ar_steps=6, num_denoise_steps=4, num_segments=2, **sample)
    return configuration.build(config)


@pytest.mark.parametrize("loss", SAMPLERS)
def test_padded_count_is_what_the_training_step_does(loss):
    spec = base_widths(loss, sampler=SAMPLERS[loss][0]).train
    state = jax.eval_shape(lambda: init_state(spec))
    batch = {"example": jnp.zeros((16, 16, 16, 16)), "condition": jnp.zeros(16, jnp.int32)}
    traced = flops.count_products(jax.make_jaxpr(make_train_step(spec))(state, batch).jaxpr)
    rows = flops.time_rows(spec.token_loss, spec.plan, padded=True)
    padded = flops.train_image(spec.model, spec.plan, 4, padded=True, time_rows=rows)
    assert traced / (16 * padded) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "loss, sampler", [(loss, sampler) for loss, names in SAMPLERS.items() for sampler in names]
)
def test_padded_count_is_what_the_sampler_does(loss, sampler):
    spec = base_widths(loss, sampler=sampler).sample
    params = jax.eval_shape(lambda: init_params(spec.model, jax.random.key(0)))
    ids = np.arange(64, dtype=np.int32)  # they share the embedded times, which are not counted
    jaxpr = jax.make_jaxpr(make_sampler(spec))(
        params, ids, ids, 0, np.ones(6, np.float32), 1.0
    ).jaxpr
    calls = spec.token_loss.denoiser_calls
    padded = flops.padded_sample_image(spec.model, plan_segments(spec), calls, spec.guided)
    # the predictor's last layer projects q at all 64 + 256 places, though it uses new ones only
    # (0.3 % of B's sampling)
    unused = sum((s.stop - s.start) * 2 * 768**2 * (320 - s.new) for s in plan_segments(spec)) * (
        2 if spec.guided else 1
    )
    assert flops.count_products(jaxpr) / (64 * (padded + unused)) == pytest.approx(1, abs=0.003)


def test_peaks_by_device_name():
    assert flops.peak_flops("NVIDIA H200") == flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("TPU v5 lite") == 197e12
    assert flops.peak_flops("TPU v5p") == flops.peak_flops("TPU v5") == 459e12
    assert flops.peak_flops("cpu") is None
