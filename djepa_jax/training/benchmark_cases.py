"""What `benchmark.py` times: jitted functions and their arguments, random, on the devices."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from djepa_jax.checkpoints.autoencoder import make_decoder
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import flops, sharding
from djepa_jax.core.models.autoencoder_kl import AUTOENCODERS, split_autoencoder
from djepa_jax.core.models.autoguidance import Guide
from djepa_jax.core.models.denoiser import LoopDenoiser
from djepa_jax.core.models.djepa import cast_linear, init_params, split_model
from djepa_jax.core.sampler import (
    SampleInputs,
    SamplerConfig,
    make_sampler,
)
from djepa_jax.core.segments import plan_segments
from djepa_jax.core.train_step import TrainStepConfig, init_state
from djepa_jax.training.compile_step import StepProgram
from djepa_jax.training.initial_state import abstract_state


@dataclasses.dataclass(frozen=True)
class BenchmarkCase:
    """Something to measure: a jitted function and its arguments on the device."""

    unit: str
    function: Callable
    arguments: tuple
    batch_size: int
    flops: dict[str, float]  # of one call: ideal, padded; empty where nobody has counted them
    calls: int = 1  # of the function in one repeat
    # (arguments, result) -> the next call's arguments
    following: Callable = lambda arguments, _: arguments
    inside: int = 1  # units of one call: what the function does several times in a loop


def prepare_training(experiment: Experiment, mesh, steps: int, size: int) -> BenchmarkCase:
    """The donated training step, a fresh state and one random batch."""
    config = experiment.train
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(experiment, mesh))
    state = init_state(config, shardings)
    batch = jax.device_put(random_batch(experiment), sharding.batch_sharding(mesh))
    program = StepProgram(config, shardings)
    values, step = program.values(state), program.jitted(donate=True)
    return BenchmarkCase(
        "step",
        step,
        (state, batch, values),
        size,
        train_flops(config),
        steps,
        following=lambda _, result: (result[0], batch, values),
    )


def prepare_sampling(experiment: Experiment, mesh, _: int, size: int) -> BenchmarkCase:
    """The whole sampler, fresh parameters and one batch."""
    config, sample = experiment.sampler, experiment.sample
    conditions = config.model.conditioner.in_turn(size)
    ids = np.arange(size, dtype=np.int32)  # [B]
    conditions, ids = jax.device_put((conditions, ids), sharding.batch_sharding(mesh))
    scales = experiment.cfg_scales  # [T]
    params = fresh_params(experiment, mesh)
    how = sample.seed, scales, sample.temperature
    guide = Guide(params, sample.guide_scale) if config.autoguided else None
    inputs = SampleInputs(conditions, ids, *how, guide=guide)
    sampler = jax.jit(make_sampler(config), out_shardings=sharding.replicated(mesh))
    return BenchmarkCase("batch", sampler, (params, inputs), size, sample_flops(config, size))


def prepare_denoiser(experiment: Experiment, mesh, steps: int, size: int) -> BenchmarkCase:
    """Calls of the denoiser as the sampler makes them, at the largest number of new tokens."""
    config, model = experiment.sampler, experiment.network
    halves, new = config.halves, max(s.new for s in plan_segments(config))
    rng = np.random.default_rng(experiment.seed)
    xt = rng.standard_normal((size, new, model.token_dim), np.float32)  # [B, K, C]
    condition = rng.standard_normal((halves, size, new, model.denoiser_width), np.float32)
    arrays = jax.device_put((xt, condition[0, 0, 0], condition), sharding.replicated(mesh))
    graph, _ = split_model(model)

    def calls(params, xt, time, condition):
        """`steps` of them in a loop, each from the result of the one before."""
        denoiser = LoopDenoiser(nnx.merge(graph, cast_linear(params, model.dtype)).denoiser)

        def call(xt, _):
            return denoiser(xt, time, condition)[0, ..., : model.token_dim], None

        return jax.lax.scan(call, xt, length=steps)[0]

    products = halves * size * new * flops.denoiser_row(model)["rest"]
    counts = {"ideal": products, "padded": products}
    arguments = fresh_params(experiment, mesh), *arrays
    return BenchmarkCase("call", jax.jit(calls), arguments, size, counts, inside=steps)


def prepare_decoding(experiment: Experiment, mesh, _: int, size: int) -> BenchmarkCase:
    """The autoencoder's decoder with random weights, latents to uint8 pictures."""
    settings, side = experiment.autoencoder, experiment.data.image_size
    config, rng = AUTOENCODERS[settings.name], np.random.default_rng(experiment.seed)
    shapes = split_autoencoder(config)[1]
    params = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), shapes)
    latents = rng.standard_normal((size, side, side, config.latent_channels), np.float32)
    places = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    arguments = jax.device_put((params, latents), places)
    decoder = jax.jit(make_decoder(settings.name, settings.dtype))
    return BenchmarkCase("batch", decoder, arguments, size, flops={})


def fresh_params(experiment: Experiment, mesh) -> dict:
    """Parameters that have learned nothing, where sampling has them."""
    network = experiment.network
    places = sharding.state_shardings(split_model(network)[1], mesh)
    init = jax.jit(init_params, static_argnums=0, out_shardings=places)
    return init(network, jax.random.key(experiment.seed))


def random_batch(experiment: Experiment) -> dict:
    """A batch of noise in the form that the modality's source has."""
    rng, size = np.random.default_rng(experiment.seed), experiment.batch_size
    modality = experiment.modality
    shape = (size, *modality.example_shape)
    if modality.example_dtype.kind == "f":
        examples = rng.standard_normal(shape, np.float32)  # [B, ...]
    else:
        examples = rng.integers(0, 256, shape, modality.example_dtype)  # [B, ...]
    conditions = experiment.network.conditioner.in_turn(size)
    return {"example": examples, "condition": conditions}


def train_flops(config: TrainStepConfig) -> dict[str, float]:
    """Ideal and padded FLOPs of one training step."""
    counts, loss, masking = {}, config.token_loss, config.masking
    for name, padded in (("ideal", False), ("padded", True)):
        how = padded, flops.time_rows(loss, masking, padded)
        further = flops.further_work(config.model, masking, loss, padded)
        image = flops.train_image(config.model, masking, loss.noise_multiplicity, *how, further)
        counts[name] = image * masking.batch_size
    return counts


def sample_flops(config: SamplerConfig, batch_size: int) -> dict[str, float]:
    """Ideal (exact shapes) and padded (segments) FLOPs of one batch of samples."""
    of_each_step = dataclasses.replace(config, num_segments=config.num_ar_steps)
    exact, padded = (
        flops.padded_sample_image(config.model, plan_segments(each))
        for each in (of_each_step, config)
    )
    return {"ideal": exact * batch_size, "padded": padded * batch_size}
