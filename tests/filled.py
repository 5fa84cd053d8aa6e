"""Workdirs with models whose every parameter is filled, so that no output is constant."""

import pathlib

import jax
import numpy as np

from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.config import experiment as configuration
from djepa_jax.config.settings import Settings
from djepa_jax.core.models.djepa import split_model


def save_model(workdir: pathlib.Path, config, **changes) -> str:
    """A workdir with a model of a config; `changes` are of the stored configuration, with __ for
    the dot.
    """
    stored = Settings(configuration.resolved(config)).updated(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        mean, spread = {"scale": (1.0, 0.0), "bias": (0.0, 0.1), "kernel": (0.0, 0.25)}.get(
            path[-1].key, (0.0, 1.0)
        )
        return rng.normal(mean, spread, leaf.shape).astype(leaf.dtype)

    _, abstract = split_model(configuration.build(stored).train.model)
    filled = jax.tree_util.tree_map_with_path(fill, abstract)
    Checkpoints(workdir).save_imported({"ema_params": filled}, stored.to_dict(), step=7, examples=0)
    return str(workdir)
