"""A sampler that takes no time to compile."""

from collections.abc import Callable

import jax
import numpy as np
from tiny import tiny_config

from djepa_jax.config.experiment import Experiment
from djepa_jax.core import sharding
from djepa_jax.core.sampler import SampleInputs
from djepa_jax.sampling.generator import Generator

PARAMS = {"w": np.arange(1.0, 4.0, dtype=np.float32)}


class DummySampler:
    """In place of `jitted_sampler`: tokens depend on the sample's number, condition, seed and
    guidance, and on the weights.

    Attributes:
        drawn: the first sample of every batch that was drawn.
        inputs: of the last batch.
        before: called with the numbers of a batch before it is drawn.
    """

    def __init__(self, before: Callable[[np.ndarray], None] = lambda ids: None):
        self.drawn: list[int] = []
        self.inputs: SampleInputs | None = None
        self.before = before

    def __call__(self, config, mesh):
        def draw(params, inputs: SampleInputs):
            ids = np.asarray(inputs.sample_ids)
            self.before(ids)
            self.drawn.append(int(ids[0]))
            self.inputs = inputs
            condition = np.asarray(jax.tree.leaves(inputs.conditions)[0])
            mark = ids + 7.0 * condition + 3.0 * inputs.seed + np.sum(inputs.cfg_scales)
            shape = (config.model.num_tokens, config.model.token_dim)
            places = np.arange(np.prod(shape)).reshape(shape)
            scale = np.mean(np.asarray(jax.tree.leaves(params)[0])) / 2  # 1 for `PARAMS`
            return np.cos(mark[:, None, None] + places) * scale

        return draw


def make_generator(
    sampler: DummySampler, *flags: str, experiment: Experiment | None = None, devices=None, **others
) -> Generator:
    """A generator of the tiny digits model that draws with a dummy."""
    experiment = experiment or tiny_config(*flags)
    mesh = sharding.make_mesh((-1, 1, 1), devices or jax.devices())
    return Generator(experiment, mesh, sampler=sampler, **others)
