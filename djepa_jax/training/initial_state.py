"""What a training begins with: a fresh state, or the one that its workdir holds."""

import dataclasses
import json
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from djepa_jax.checkpoints.checkpointer import Checkpoints, read_meta
from djepa_jax.checkpoints.restore import check_same_model, restore_state, warm_start
from djepa_jax.config.class_names import in_order
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.stored import COUNTED_AS_TEXT, FILE_NAME, differences, from_stored, to_stored
from djepa_jax.core import sharding
from djepa_jax.core.train_step import TrainState, begin_with, init_state, state_shapes
from djepa_jax.runtime import distributed
from djepa_jax.runtime.storage import as_path, write_json

INIT_NAME = "began_with.json"


def check_mesh(experiment: Experiment, mesh) -> None:
    """Raise ConfigError unless the mesh divides what it splits, and can do what is asked for."""
    experiment.check_attention(jax.default_backend())
    divisor = sharding.batch_divisor(mesh)
    if experiment.batch_size % divisor:
        raise ConfigError(
            f"config.batch_size is {experiment.batch_size}; it must be a multiple of {divisor}, "
            "the devices that share a batch."
        )
    shape = experiment.model.shape
    splits = [("fsdp", "second", "width"), ("fsdp", "second", "denoiser_width")]
    splits += [("tensor", "last", "num_heads"), ("tensor", "last", "denoiser_width")]
    for axis, entry, name in splits:
        if shape[name] % mesh.shape[axis]:
            raise ConfigError(
                f"config.mesh splits model.{name} {shape[name]} over {mesh.shape[axis]} devices "
                f"({axis}); its {entry} entry must divide {shape[name]}."
            )


def abstract_state(experiment: Experiment, mesh) -> TrainState:
    """Shapes, types and shardings of the state; allocates nothing."""
    shapes = state_shapes(experiment.train)
    places = sharding.state_shardings(shapes, mesh)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def restore_or_initialise(
    experiment: Experiment,
    abstract: TrainState,
    checkpoints: Checkpoints,
    say: Callable[[str], None],
    init_from: str = "",
    own_names: Sequence[str] | None = None,
) -> tuple[TrainState, int]:
    """A fresh state, perhaps with the weights of `init_from`, or that of the newest usable
    checkpoint, and the examples it has seen.

    `own_names` are those that the data have for their classes.

    Raises:
        CheckpointError: there are checkpoints, and none can be used; nothing was overwritten.
        ConfigError: the checkpoint is of another model, or no weights of `init_from` fit.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = distributed.run_on_main(lambda: checkpoints.step_to_resume(say))
    if step is None:
        state = init_state(experiment.train, shardings)
        record = checkpoints.workdir / INIT_NAME  # for the same workdir, before its first save
        if init_from or record.exists():
            init_from = str(as_path(init_from or json.loads(record.read_text())["init_from"]))
            state = warm_start(init_from, experiment, state, say)
            if distributed.is_main_process():
                write_json(record, {"init_from": init_from})
        write_config(experiment, checkpoints)
        return state, 0
    if init_from:
        say(f"--init_from is for the beginning; {checkpoints.directory} holds step {step} already")
    folder = checkpoints.folder(step)
    meta = read_meta(folder)
    stored = from_stored(meta.config)
    check_same_model(stored, experiment)
    if experiment.data.source == "folder":
        check_class_order(meta.config, own_names or ())
    for line in differences(stored, experiment):
        say(f"changed since the checkpoint: {line}")
    parts = restore_state(folder, abstract, meta)
    state = complete_state(experiment, parts, shardings, say)
    if step < experiment.num_steps:
        write_config(experiment, checkpoints)
        say(f"going on from step {step} of {experiment.num_steps} ({checkpoints.directory})")
    elif step > experiment.num_steps:
        say(f"the checkpoint has {step} steps, more than num_steps {experiment.num_steps}")
    return state, meta.examples


def check_class_order(config: dict, folders: Sequence[str]) -> None:
    """Raise ConfigError if a checkpoint's version counted these folders in another order."""
    as_text = sorted(folders)
    if config.get("format", 1) in COUNTED_AS_TEXT and in_order(as_text) != as_text:
        raise ConfigError(
            f"the checkpoint is of a version that counted the classes as {', '.join(as_text[:4])} "
            "and so on, they are counted as numbers now; rename their folders so that the order "
            "of text is right, as c0, c1, c10, or use another --workdir."
        )


def write_config(experiment: Experiment, checkpoints: Checkpoints) -> None:
    """Write the configuration into the workdir."""
    if distributed.is_main_process():
        write_json(checkpoints.workdir / FILE_NAME, to_stored(experiment))


def complete_state(
    experiment: Experiment, parts: dict, shardings: TrainState, say: Callable[[str], None]
) -> TrainState:
    """The state that a step holds; what an import left out starts afresh, parameters from EMA."""
    if parts.keys() == {field.name for field in dataclasses.fields(TrainState)}:
        return TrainState(**parts)
    say(f"the checkpoint was imported with {', '.join(parts)}; the rest starts afresh")

    def fill(parts):
        params = parts.get("params", jax.tree.map(jnp.copy, parts["ema_params"]))
        return dataclasses.replace(begin_with(experiment.train.optimizer, params), **parts)

    return jax.jit(fill, out_shardings=shardings)(parts)
