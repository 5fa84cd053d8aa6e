"""Whether a device computes what the CPU of its machine does: `--mode=benchmark --parts=parity`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import sharding
from djepa_jax.core.models.autoguidance import Guide
from djepa_jax.core.models.djepa import split_model
from djepa_jax.core.optimizer import make_optimizer
from djepa_jax.core.sampler import SampleInputs, make_sampler
from djepa_jax.core.train_step import TrainState, make_train_step
from djepa_jax.runtime.errors import UserError
from djepa_jax.training.benchmark_cases import random_batch

TOLERANCE = 1e-4  # of float32 products
LEAST = 1e-4  # arrays with smaller values are compared as if they reached this one


class CheckError(UserError, RuntimeError):
    """Something is computed wrongly; the message says what, and by how much."""


def check_parity(experiment: Experiment) -> dict:
    """One training step and a batch of samples in float32, on the first device and on the CPU."""
    experiment = experiment.updated({"compute_dtype": "float32"})
    device, host = jax.devices()[0], sharding.host_device()
    if host.platform != "cpu":
        raise ConfigError("--parts=parity compares with the CPU; add cpu to JAX_PLATFORMS.")
    program, arguments = make_program(experiment), make_arguments(experiment)
    ours, theirs = (program(*jax.device_put(arguments, place)) for place in (device, host))
    return judge(ours, theirs, TOLERANCE, f"{device.device_kind} and the CPU")


def make_program(experiment: Experiment) -> Callable:
    """The jitted function (params, batch, SampleInputs) -> metrics, gradient, samples."""
    config = experiment.train
    step, sampler = make_train_step(config), make_sampler(experiment.sampler)

    def run(params, batch, inputs):
        zero = jnp.zeros((), jnp.int32)
        opt_state = make_optimizer(config.optimizer).init(params)
        state, metrics = step(TrainState(zero, params, params, opt_state, zero, zero), batch)
        # After one step the first moment is the gradient, but for a factor.
        gradient = optax.tree.get(state.opt_state, "mu")
        return {"metrics": metrics, "gradient": gradient, "samples": sampler(params, inputs)}

    return jax.jit(run)


def make_arguments(experiment: Experiment) -> tuple:
    """Parameters of which none is zero, a batch of noise, and what to sample; on the host."""
    rng, sample = np.random.default_rng(experiment.seed), experiment.sample

    def fill(path, leaf):
        name = path[-1].key
        spread = leaf.shape[-2] ** -0.5 if name == "kernel" else 0.1
        return (name == "scale") + spread * rng.standard_normal(leaf.shape, np.float32)

    params = jax.tree_util.tree_map_with_path(fill, split_model(experiment.network)[1])
    batch = random_batch(experiment)
    conditions, ids = batch["condition"], np.arange(experiment.batch_size, dtype=np.int32)  # [B]
    how = sample.seed, experiment.cfg_scales, sample.temperature
    guide = Guide(params, sample.guide_scale) if experiment.sampler.autoguided else None
    inputs = SampleInputs(conditions, ids, *how, guide=guide)
    return params, batch, inputs


def judge(ours, theirs, tolerance: float, places: str) -> dict:
    """The errors of arrays, each the largest difference over the largest value.

    Raises:
        CheckError: one of them is more than rounding, or no number.
    """

    def error(x, y) -> float:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return float(np.nan_to_num(np.abs(x - y).max() / max(np.abs(y).max(), LEAST), nan=np.inf))

    errors = jax.tree.map(error, jax.device_get(ours), jax.device_get(theirs))
    named = {sharding.path_name(path): e for path, e in jax.tree.leaves_with_path(errors)}
    worst = max(named, key=named.get)
    found = f"{len(named)} arrays of {places} differ by at most {named[worst]:.1e} ({worst})"
    if named[worst] > tolerance:
        raise CheckError(f"{found}; {tolerance:.0e} is rounding, so one of them computes wrongly.")
    return {"found": found, "errors": named, "tolerance": tolerance}
