"""The sampler as one compiled-ahead file that needs nothing but JAX to run (StableHLO, by
`jax.export`).
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from djepa_jax.config import experiment as configuration
from djepa_jax.config.experiment import Experiment
from djepa_jax.core.sampler import make_sampler

PLATFORMS = ("cpu", "cuda", "tpu")
SAMPLER_NAME, ARRAYS_NAME = "sampler.stablehlo", "params.npz"


def arguments(guided: bool) -> tuple[str, ...]:
    """What the stored function takes, in order."""
    return (
        "params",
        "labels",
        "sample_ids",
        "seed",
        *(("cfg_scale",) if guided else ()),
        "temperature",
    )


def make_standalone(config, experiment: Experiment):
    """The sampler as a function of plain arrays; see `arguments`.

    `params` is a dict from path to array, `labels` and `sample_ids` are int32 `[B]`, the rest are
    scalars. The result is a dict: `tokens` `[B, N, C]` float32, and what the modality makes of
    them.
    """
    generate, modality = make_sampler(experiment.sample), experiment.modality
    guided = experiment.sample.guided
    steps = configuration.step_scales(
        config.updated({"sample.cfg_scale": 2.0}), modality.num_tokens
    )
    share = steps - 1  # of the guidance that every step gets

    def sample(params, labels, sample_ids, seed, *scalars):
        cfg_scale, temperature = scalars if guided else (jnp.ones(()), *scalars)
        scales = 1 + (cfg_scale - 1) * share
        params = traverse_util.unflatten_dict(params, sep="/")
        tokens = generate(params, labels, sample_ids, seed, scales, temperature)
        return {"tokens": tokens, **modality.export(tokens)}

    return sample


def compile_sampler(folder: pathlib.Path, config, experiment: Experiment, params: dict) -> None:
    """Write `sampler.stablehlo`, for CPU, CUDA and TPU and a batch of `config.sample.batch_size`,
    and `params.npz`.
    """
    arrays = {
        path: np.asarray(value)
        for path, value in traverse_util.flatten_dict(params, sep="/").items()
    }
    batch = jax.ShapeDtypeStruct((config.sample.batch_size,), jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    abstract = {
        path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in arrays.items()
    }
    shapes = {
        "params": abstract,
        "labels": batch,
        "sample_ids": batch,
        "seed": jax.ShapeDtypeStruct((), jnp.int32),
    }
    inputs = [shapes.get(name, scalar) for name in arguments(experiment.sample.guided)]
    exported = export.export(jax.jit(make_standalone(config, experiment)), platforms=PLATFORMS)(
        *inputs
    )
    (folder / SAMPLER_NAME).write_bytes(exported.serialize())
    np.savez(folder / ARRAYS_NAME, **arrays)
