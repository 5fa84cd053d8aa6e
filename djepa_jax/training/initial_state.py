"""What a training begins with: a fresh state, or the one that its workdir holds."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from djepa_jax.checkpoints.checkpointer import Checkpoints, read_meta
from djepa_jax.checkpoints.restore import check_same_model, restore_state
from djepa_jax.config import experiment as configuration
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import sharding
from djepa_jax.core.train_step import TrainState, init_state
from djepa_jax.runtime import distributed
from djepa_jax.runtime.storage import write_json


class Start:
    """The way to the first state of a training.

    Attributes:
        abstract: shapes and types of the state.
        shardings: where its arrays live on the mesh.
    """

    def __init__(
        self,
        config,
        experiment: Experiment,
        mesh,
        checkpoints: Checkpoints,
        say: Callable[[str], None],
    ):
        self._config, self._experiment, self._checkpoints, self._say = (
            config,
            experiment,
            checkpoints,
            say,
        )
        self.abstract = jax.eval_shape(lambda: init_state(experiment.train))
        self.shardings = sharding.state_shardings(self.abstract, mesh)

    def state(self) -> tuple[TrainState, int]:
        """A fresh state, or that of the newest usable checkpoint, and the examples it has seen.

        Raises:
            CheckpointError: there are checkpoints, and none can be used; nothing was overwritten.
            ConfigError: the checkpoint is of another model.
        """
        config, step = (
            self._config,
            distributed.on_main(lambda: self._checkpoints.step_to_resume(self._say)),
        )
        if step is None:
            self._write_config()
            make = jax.jit(lambda: init_state(self._experiment.train), out_shardings=self.shardings)
            return make(), 0
        folder = self._checkpoints.folder(step)
        meta = read_meta(folder)
        check_same_model(meta.config, config)
        for line in configuration.differences(
            configuration.upgraded(meta.config), configuration.resolved(config)
        ):
            self._say(f"changed since the checkpoint: {line}")
        if step > config.num_steps:
            self._say(
                f"the checkpoint already has {step} steps, more than num_steps {config.num_steps}"
            )
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.abstract,
            self.shardings,
        )
        state = self._complete(restore_state(folder, abstract, meta))
        if step < config.num_steps:
            self._write_config()
            self._say(
                f"going on from step {step} of {config.num_steps} ({self._checkpoints.directory})"
            )
        return state, meta.examples

    def _write_config(self) -> None:
        if distributed.is_main():
            write_json(
                self._checkpoints.workdir / configuration.FILE_NAME,
                configuration.resolved(self._config),
            )

    def _complete(self, parts: dict) -> TrainState:
        """The state that a step holds; what an import left out starts afresh, the parameters from
        their average.
        """
        if parts.keys() == {field.name for field in dataclasses.fields(TrainState)}:
            return TrainState(**parts)
        self._say(
            f"the checkpoint was imported with {', '.join(parts)}; the rest of the training state "
            "starts afresh"
        )

        def fill(parts):
            fresh = dataclasses.replace(init_state(self._experiment.train), **parts)
            return dataclasses.replace(
                fresh, params=parts.get("params", jax.tree.map(jnp.copy, parts["ema_params"]))
            )

        return jax.jit(fill, out_shardings=self.shardings)(parts)
