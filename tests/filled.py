"""Workdirs with models whose every parameter is filled, so that no output is constant."""

import pathlib

import jax
import numpy as np

from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.stored import to_stored
from djepa_jax.core.models.djepa import ModelConfig, split_model


def filled_params(network: ModelConfig, seed: int = 1) -> dict:
    """Parameters of a model, with every one filled."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        mean, spread = {"scale": (1.0, 0.0), "bias": (0.0, 0.1), "kernel": (0.0, 0.25)}.get(
            path[-1].key, (0.0, 1.0)
        )
        return rng.normal(mean, spread, leaf.shape).astype(leaf.dtype)

    _, abstract = split_model(network)
    return jax.tree_util.tree_map_with_path(fill, abstract)


def save_model(
    workdir: pathlib.Path, experiment: Experiment, seed: int = 1, step: int = 7, **changes
) -> str:
    """A workdir with a model of a config; `changes` are of the stored configuration, with __ for
    the dot.
    """
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    stored = experiment.updated(changes)
    parts = {"ema_params": filled_params(stored.network, seed)}
    Checkpoints(workdir).save_imported(parts, to_stored(stored), step=step, examples=0)
    return str(workdir)
