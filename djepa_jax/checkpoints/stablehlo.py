"""The sampler, compiled ahead into a file that runs on JAX alone (StableHLO, by `jax.export`)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from djepa_jax.config.experiment import Experiment
from djepa_jax.core.sampler import SampleInputs, make_sampler

STABLEHLO = "stablehlo"  # as which an export has it
PLATFORMS = ("cpu", "cuda", "tpu")
SAMPLER_NAME, ARRAYS_NAME = "sampler.stablehlo", "params.npz"


def arguments(guided: bool) -> tuple[str, ...]:
    """What the stored function takes, in order."""
    scale = ("cfg_scale",) if guided else ()
    return ("params", "labels", "sample_ids", "seed", *scale, "temperature")


def make_standalone(experiment: Experiment):
    """The sampler as a function of plain arrays; see `arguments`.

    `params` is a dict from path to array, `labels` (a pair where the model takes pairs) and
    `sample_ids` are int32 `[B]`, the rest are scalars. It gives `tokens` `[B, N, C]` float32, and
    what the modality makes of them.
    """
    generate = make_sampler(experiment.sampler)
    modality = experiment.modality
    # of the guidance above 1, every step gets the share that it gets at scale 2
    share = experiment.sampler.guidance(2.0, experiment.sample.cfg_schedule) - 1  # [T]

    def draw(params, labels, sample_ids, seed, *scalars):
        *scale, temperature = scalars  # none where the sampler is not guided
        scales = 1 + (scale[0] - 1) * share if scale else jnp.ones_like(share)
        params = traverse_util.unflatten_dict(params, sep="/")
        inputs = SampleInputs(labels, sample_ids, seed, scales, temperature)
        tokens = generate(params, inputs)
        return {"tokens": tokens, **modality.export(tokens)}

    return draw


def compile_sampler(folder: pathlib.Path, experiment: Experiment, params: dict) -> None:
    """Write `sampler.stablehlo`, for CPU, CUDA and TPU and a fixed batch size, and `params.npz`."""
    arrays = jax.tree.map(np.asarray, traverse_util.flatten_dict(params, sep="/"))
    batch = np.zeros(experiment.sample.batch_size, np.int32)
    labels = experiment.network.conditioner.in_turn(len(batch))
    values = {"params": arrays, "labels": labels, "sample_ids": batch, "seed": np.int32(0)}
    names = arguments(experiment.sampler.guided)
    inputs = [values.get(name, np.float32(1)) for name in names]  # their shapes and types count
    sampler = jax.jit(make_standalone(experiment))
    exported = export.export(sampler, platforms=PLATFORMS)(*inputs)
    (folder / SAMPLER_NAME).write_bytes(exported.serialize())
    np.savez(folder / ARRAYS_NAME, **arrays)


def open_sampler(folder: pathlib.Path) -> dict:
    """The parameters of a compiled sampler, whose program was found to be readable."""
    export.deserialize(bytearray((folder / SAMPLER_NAME).read_bytes()))
    with np.load(folder / ARRAYS_NAME, allow_pickle=False) as arrays:
        return traverse_util.unflatten_dict(dict(arrays), sep="/")
