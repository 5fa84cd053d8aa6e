"""What a training begins with: a fresh state, or the one that its workdir holds."""

import dataclasses
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import traverse_util

from djepa_jax.checkpoints.checkpointer import Checkpoints, read_meta
from djepa_jax.checkpoints.restore import (
    check_same_model,
    find_model,
    placed_params,
    restore_state,
)
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.stored import (
    FILE_NAME,
    differences,
    from_stored,
    model_differences,
    to_stored,
)
from djepa_jax.core import sharding
from djepa_jax.core.train_step import TrainState, init_state
from djepa_jax.runtime import distributed
from djepa_jax.runtime.storage import as_path, write_json

INIT_NAME = "began_with.json"
LEAST_SHARE = 0.01  # of the parameters that must fit; a few biases always do


def check_mesh(experiment: Experiment, mesh) -> None:
    """Raise ConfigError unless the axes of the mesh divide what they split."""
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
    shapes = jax.eval_shape(lambda: init_state(experiment.train))
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
) -> tuple[TrainState, int]:
    """A fresh state, perhaps with the weights of `init_from`, or that of the newest usable
    checkpoint, and the examples it has seen.

    Raises:
        CheckpointError: there are checkpoints, and none can be used; nothing was overwritten.
        ConfigError: the checkpoint is of another model, or no weights of `init_from` fit.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = distributed.run_on_main(lambda: checkpoints.step_to_resume(say))
    if step is None:
        state = jax.jit(lambda: init_state(experiment.train), out_shardings=shardings)()
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


def warm_start(
    init_from: str, experiment: Experiment, state: TrainState, say: Callable[[str], None]
) -> TrainState:
    """A fresh state that begins with a model's average, as far as paths and shapes agree.

    Of stacked layers, as many are taken as both have.
    """
    model = find_model(init_from)
    fresh = traverse_util.flatten_dict(state.params, sep="/")
    abstract = placed_params(model.config, jax.tree.leaves(state.params)[0].sharding.mesh)
    stored = traverse_util.flatten_dict(abstract, sep="/")
    counts, others = {}, set()  # how much of the first axis to take, by path; parts that differ
    for path in fresh.keys() | stored.keys():
        ours, theirs = (tree[path].shape if path in tree else () for tree in (fresh, stored))
        if ours and theirs and ours[1:] == theirs[1:] and ("/blocks/" in path or ours == theirs):
            counts[path] = min(ours[0], theirs[0])
        if ours != theirs:
            layers = f"[{counts[path]}:]" if path in counts else ""
            others.add("/".join(path.split("/")[:2]) + layers)
    taken = sum(fresh[path].size * n // len(fresh[path]) for path, n in counts.items())
    share = taken / sum(x.size for x in fresh.values())
    changed = ", ".join(model_differences(model.config, experiment)) or "nothing"
    if share < LEAST_SHARE:
        raise ConfigError(
            f'--init_from "{init_from}" has no weights that fit the config (stored -> config: '
            f"{changed}); use its sizes, or leave out --init_from."
        )
    found = traverse_util.flatten_dict(model.restore(abstract), sep="/")

    for path, count in counts.items():
        x = fresh[path]
        same = x.shape == found[path].shape
        fresh[path] = found[path] if same else x.at[:count].set(found[path][:count])
    params = traverse_util.unflatten_dict(fresh, sep="/")
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    copies = jax.jit(lambda x: (x, jax.tree.map(jnp.copy, x)), out_shardings=(shardings, shardings))
    params, average = copies(params)
    say(
        f"begins with the weights of {model.path}, {share:.1%} of the parameters; changed: "
        f"{changed}; left out or afresh: {', '.join(sorted(others)) or 'nothing'}"
    )
    return dataclasses.replace(state, params=params, ema_params=average)


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
        fresh = dataclasses.replace(init_state(experiment.train), **parts)
        params = parts.get("params", jax.tree.map(jnp.copy, parts["ema_params"]))
        return dataclasses.replace(fresh, params=params)

    return jax.jit(fill, out_shardings=shardings)(parts)
