"""The operation counts: against independently worked numbers, and against what traced programs
do.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import load_config

from djepa_jax.core import flops
from djepa_jax.core.losses import TOKEN_LOSSES, Diffusion, FlowMatching
from djepa_jax.core.masking import MaskingConfig
from djepa_jax.core.models.conditioning import Classes
from djepa_jax.core.models.djepa import SIZES, ModelConfig, init_params
from djepa_jax.core.sampler import SampleInputs, SamplerConfig, make_sampler
from djepa_jax.core.segments import plan_segments
from djepa_jax.core.train_step import make_train_step, state_shapes

# Worked out apart from this code (closed forms over the exact distribution of masks); they leave
# out the small projections at the inputs, and no other difference is allowed for.
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
        grid=(16, 16), token_dim=16, conditioner=Classes(1000), denoiser_out=32, **SIZES[size]
    )


def test_one_layer_is_the_textbook_count():
    d, n, q = 768, 320, 10
    layer = 24 * d**2 * n + 4 * n**2 * d
    assert flops.trunk(d, 12, 4.0, n) == 12 * layer
    last = (
        4 * d**2 * n + 20 * d**2 * q + 4 * n * q * d
    )  # keys and values of all, the rest of q places
    assert flops.trunk(d, 12, 4.0, n, q) == 11 * layer + last


def test_training_costs_what_was_worked_out():
    masking = MaskingConfig(256, 2048)
    for size in SIZES:
        model = published(size)
        counted = flops.train_image(model, masking, 4)
        assert 1 <= counted / (TRAINING_GFLOP[size] * 1e9) < 1 + SMALL_PROJECTIONS, size
        padded = flops.train_image(model, masking, 4, padded=True)
        assert 1.0 < padded / counted < 1.03, size
        without_head = dataclasses.replace(model, jepa_head=False)
        assert flops.train_image(without_head, masking, 4) < 0.9 * counted, size
    assert flops.mean_masked(masking) == pytest.approx(256 - 33.545, abs=0.01)


def test_sampling_costs_what_was_worked_out():
    for (size, *settings), tflop in SAMPLING_TFLOP.items():
        counted = flops.sample_image(published(size), *settings)
        assert 1 <= counted / (tflop * 1e12) < 1 + SMALL_PROJECTIONS, (size, settings)


def test_best_segments_and_their_cost():
    loss = Diffusion(num_denoise_steps=100)
    for (size, segments), cost in SEGMENT_COST.items():
        config = SamplerConfig(published(size), loss, 64, True, segments)
        plan = plan_segments(config)
        assert [segment.stop for segment in plan] == (SEGMENT_ENDS if segments == 8 else [64])
        exact = flops.sample_image(config.model, 64, 100, True)
        padded = flops.padded_sample_image(config.model, plan)
        assert padded / exact == pytest.approx(cost, abs=1e-3), (size, segments)
    config = SamplerConfig(published("B"), loss, 64, False, 64)  # one for each step pads nothing
    exact = flops.sample_image(config.model, 64, 100, False)
    padded = flops.padded_sample_image(config.model, plan_segments(config))
    assert padded == pytest.approx(exact, rel=1e-12)


def test_times_are_a_table_in_diffusion_and_rows_in_flow_matching():
    masking, flow = MaskingConfig(256, 2048), FlowMatching()
    assert flops.time_rows(Diffusion(), masking) == 0
    assert flops.time_rows(Diffusion(), masking, padded=True) == 1000 / 2048
    twice = flops.time_rows(FlowMatching(noise_multiplicity=2), masking)
    assert twice == 2 * flops.mean_masked(masking)
    assert flops.time_rows(flow, masking, padded=True) >= flops.time_rows(flow, masking)


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
    depths = {"encoder_depth": 2, "predictor_depth": 2, "denoiser_depth": 2}
    model = {"size": "B", "remat": "none"} | depths
    sample = {"num_ar_steps": 6, "num_denoise_steps": 4, "num_segments": 2} | sample
    changes = {"batch_size": 16, "loss.name": loss}
    changes |= {f"model.{key}": value for key, value in model.items()}
    changes |= {f"sample.{key}": value for key, value in sample.items()}
    return load_config("default", *(f"--config.{key}={value}" for key, value in changes.items()))


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_padded_count_is_what_the_training_step_does(loss):
    spec = base_widths(loss, sampler=TOKEN_LOSSES[loss].samplers[0]).train
    state = state_shapes(spec)
    batch = {"example": jnp.zeros((16, 16, 16, 16)), "condition": jnp.zeros(16, jnp.int32)}
    traced = flops.count_products(jax.make_jaxpr(make_train_step(spec))(state, batch).jaxpr)
    rows = flops.time_rows(spec.token_loss, spec.masking, padded=True)
    further = flops.further_work(spec.model, spec.masking, spec.token_loss, padded=True)
    how = {"padded": True, "time_rows": rows, "further": further}
    padded = flops.train_image(spec.model, spec.masking, 4, **how)
    assert traced / (16 * padded) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_padded_count_is_what_the_sampler_does(loss):
    # Where every step is a segment, none of them chooses what it runs
    reusing = {"reuse_unconditional": 2, "num_segments": 6}
    late = {"cfg_denoise_start": 0.5}
    samplers = TOKEN_LOSSES[loss].samplers
    ways = [(name, {}) for name in samplers] + [(samplers[0], reusing), (samplers[-1], late)]
    for name, more in ways:
        config = base_widths(loss, sampler=name, **more).sampler
        params = jax.eval_shape(lambda c=config.model: init_params(c, jax.random.key(0)))
        ids = np.arange(64, dtype=np.int32)  # they share the embedded times, not counted here
        inputs = SampleInputs(ids, ids, 0, np.ones(6, np.float32), 1.0)
        jaxpr = jax.make_jaxpr(make_sampler(config))(params, inputs).jaxpr
        plan = plan_segments(config)
        padded = flops.padded_sample_image(config.model, plan)
        # the predictor's last layer projects q at all 64 + 256 places, though it uses new ones
        # only (0.3 % of B's sampling)
        rows = sum(
            2 * len(s.paired) * (320 - s.ahead) + (s.stop - s.start - len(s.paired)) * (320 - s.new)
            for s in plan
        )
        unused = 2 * 768**2 * rows
        counted = flops.count_products(jaxpr)
        assert counted / (64 * (padded + unused)) == pytest.approx(1, abs=0.003), name


def test_peaks_by_device_name():
    assert flops.peak_flops("NVIDIA H200") == flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("TPU v5 lite") == 197e12
    assert flops.peak_flops("TPU v5p") == flops.peak_flops("TPU v5") == 459e12
    assert flops.peak_flops("cpu") is None
