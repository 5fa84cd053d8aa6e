"""Models in a workdir, in a step of one or in an export: found, restored, and what fits."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from etils import epath

from djepa_jax.checkpoints import hub, integrity
from djepa_jax.checkpoints.arrays import by_path, check_arrays, restore_arrays
from djepa_jax.checkpoints.checkpointer import (
    STEPS_NAME,
    Checkpoints,
    Meta,
    check_step,
    read_meta,
)
from djepa_jax.checkpoints.integrity import CheckpointError
from djepa_jax.config.class_names import listed, misplaced
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.stored import from_stored, model_differences, models_near
from djepa_jax.core import sharding
from djepa_jax.core.models.djepa import split_model
from djepa_jax.core.sharding import path_name
from djepa_jax.core.train_step import TrainState
from djepa_jax.runtime.storage import as_path, write_json

NOTE_NAME = "restored_from.json"
LEAST_SHARE = 0.01  # of the parameters, that a warm start takes; a few biases always fit
KIND, EXPORT_FORMAT = "djepa_jax export", 1
CONFIG_NAME, PARAMS_NAME, TENSORS_NAME = "config.json", "params", "model.safetensors"
CARD_NAME = "README.md"  # for people to edit: loading does not check it
# What to do about a model of another kind
TRAINING = (
    "Use its config and data, or begin another --workdir with these weights (--init_from=PATH)."
)
GUIDE = 'Name one of the same kind, such as an earlier step of the training, or "" for none.'
OUTPUT = "denoiser/out/"  # the layer that gives what a loss predicts
# What `weights` of an export may be, besides a compiled sampler.
ORBAX, SAFETENSORS, OFFICIAL = "orbax", "safetensors", "official"


def restore_state(folder: epath.Path, abstract: TrainState, meta: Meta) -> dict:
    """The parts of a training state in a step that was checked, by name."""
    return restore_arrays(folder / "state", _parts(abstract, meta))


def _parts(abstract: TrainState, meta: Meta) -> dict:
    return {name: getattr(abstract, name) for name in meta.parts}


def placed_params(experiment: Experiment, mesh) -> dict:
    """Shapes, dtypes and shardings of the parameters on a mesh."""
    _, abstract = split_model(experiment.network)
    shardings = sharding.state_shardings(abstract, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """The moving average of a model's parameters on disk, and its configuration."""

    path: epath.Path  # of the step, or of the export
    config: Experiment
    step: int
    restore: Callable[[dict], dict]  # checks all files; abstract parameters with shardings -> real


def find_model(path: str | os.PathLike) -> StoredModel:
    """Find out what `path` is and read its configuration; no array is read yet."""
    path = as_path(hub.local(path))
    if "@" in path.name and not path.exists():
        return _step(_step_folder(os.fspath(path)))
    if is_export(path):
        return _export(path)
    if (path / "meta").is_dir() and (path / "state").is_dir():
        return _step(path)
    checkpoints = Checkpoints(path.parent if path.name == STEPS_NAME else path)
    if checkpoints.directory.is_dir():
        return _step(checkpoints.latest_folder())
    found = "is no model" if path.exists() else "does not exist"
    raise CheckpointError(
        f'"{path}" {found}; name a workdir (with checkpoints/), one of its steps, or an '
        f"export{models_near(path)}."
    )


def latest_model(experiment: Experiment, workdir: str | os.PathLike) -> StoredModel:
    """The model of the latest checkpoint, found to be the one that is configured."""
    model = _step(Checkpoints(workdir).latest_folder())
    check_same_model(model.config, experiment)
    return model


def guide_params(experiment: Experiment, mesh) -> dict:
    """The moving average of `sample.guide`, read once, on a mesh.

    Raises:
        ConfigError: there is no model, or it is of another kind.
    """
    try:
        model = find_model(experiment.sample.guide)
        check_same_model(model.config, experiment, GUIDE)
        return _guide_params(str(model.path), mesh)
    except (CheckpointError, ConfigError) as error:
        raise ConfigError(f"config.sample.guide: {error}") from error


@functools.lru_cache(maxsize=1)
def _guide_params(path: str, mesh) -> dict:
    model = find_model(path)
    return model.restore(placed_params(model.config, mesh))


def check_same_model(stored: Experiment, experiment: Experiment, remedy: str = TRAINING) -> None:
    """Raise ConfigError, with every difference, unless a checkpoint's model is the configured."""
    theirs, ours = stored.autoencoder.sha256, experiment.autoencoder.sha256
    if experiment.modality.needs_decoder and theirs and ours and theirs != ours:
        raise ConfigError(
            f"the checkpoint's model learned latents of the autoencoder with sha256 {theirs}, the "
            f"config (or the latent cache it names) is for the one with sha256 {ours}; name the "
            "cache of that autoencoder, or another --workdir."
        )
    experiment = experiment.completed_by(stored)
    changed = model_differences(stored, experiment)
    if changed:
        names = experiment.class_names
        new = [index for index, name in enumerate(names) if name not in stored.class_names]
        changed += [f"new classes: {listed(new, names)}"] if new else []
        raise ConfigError(
            f"the checkpoint is of another model (stored -> config): {', '.join(changed)}. {remedy}"
        )
    if stored.data.class_names and experiment.data.class_names:
        name = misplaced(experiment.class_names, stored.class_names)
        if name:
            raise ConfigError(
                f'"{name}" is another class in the checkpoint, where the classes are '
                f"{listed(range(len(stored.class_names)), stored.class_names)}; use the data that "
                "it was trained on, or another --workdir."
            )


def _step(folder: epath.Path) -> StoredModel:
    meta = read_meta(folder)

    def restore(abstract: dict) -> dict:
        check_step(folder)
        return restore_arrays(folder / "state", {"ema_params": abstract})["ema_params"]

    return StoredModel(folder, from_stored(meta.config), meta.step, restore)


def _export(folder: epath.Path) -> StoredModel:
    record = read_record(folder)
    if record.get("format") != EXPORT_FORMAT:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} has format {record.get('format')}, this version reads "
            f"{EXPORT_FORMAT}; use the version that wrote it."
        )
    integrity.check_manifest(folder, below=CONFIG_NAME)
    if record["weights"] not in (ORBAX, SAFETENSORS, OFFICIAL):
        raise CheckpointError(
            f'"{folder}" holds a compiled sampler ({record["weights"]}), not a model to load; its '
            "README.md shows how to call it."
        )

    def restore(abstract: dict) -> dict:
        integrity.check_manifest(folder, but=CARD_NAME)
        if record["weights"] == ORBAX:
            return restore_arrays(folder / PARAMS_NAME, abstract)
        from djepa_jax.checkpoints.convert.import_weights import read_params

        return read_params(folder / TENSORS_NAME, abstract)

    return StoredModel(folder, from_stored(record["config"]), record["step"], restore)


def is_export(path: epath.Path) -> bool:
    """Whether a folder was written by `--mode=export`."""
    try:
        return read_record(path).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def read_record(folder: epath.Path) -> dict:
    """What an export says about itself."""
    return json.loads((folder / CONFIG_NAME).read_text("utf-8"))


def go_back(
    checkpoints: Checkpoints,
    restore_from: str,
    abstract: TrainState,
    experiment: Experiment,
    say: Callable[[str], None] = print,
) -> None:
    """Make a step, perhaps of another workdir, the newest of a workdir whose lock is held.

    A note says that it was done: the same command, run again, goes on from where it was.

    Raises:
        CheckpointError, ConfigError: training cannot go on from it; nothing was changed.
    """
    note = checkpoints.workdir / NOTE_NAME
    if note.exists() and json.dumps(restore_from) in note.read_text() and checkpoints.steps():
        say(f"--restore_from={restore_from} was done before; going on (if not, remove {note})")
        return
    folder = _step_folder(restore_from)
    meta = read_meta(folder)
    try:
        check_same_model(from_stored(meta.config), experiment)
    except ConfigError as error:
        raise ConfigError(f'--restore_from "{restore_from}": {error}') from error
    check_step(folder)
    check_arrays(folder / "state", _parts(abstract, meta))
    checkpoints.adopt(folder, say)
    write_json(note, {"restored_from": restore_from})


def _step_folder(restore_from: str) -> epath.Path:
    path, at, number = restore_from.rpartition("@")
    source = Checkpoints(path if at else restore_from)
    steps = [str(step) for step in source.steps()]
    name = number if at else str(source.latest_step())
    if name not in steps:
        raise CheckpointError(
            f'"{restore_from}" names no step: {source.directory} holds '
            f"{', '.join(steps) or 'none'}; write PATH@STEP with one that is there."
        )
    return source.folder(int(name))


def warm_start(
    init_from: str, experiment: Experiment, state: TrainState, say: Callable[[str], None] = print
) -> TrainState:
    """A fresh state that begins with a model's average, as far as paths and shapes agree.

    Of stacked layers, as many are taken as both have; the denoiser's last layer only if it gives
    the same for both losses. ConfigError where next to nothing fits.
    """
    model = find_model(init_from)
    is_same_output = model.config.token_loss.predicts == experiment.token_loss.predicts
    fresh = by_path(state.params)
    abstract = placed_params(model.config, next(iter(fresh.values())).sharding.mesh)
    stored = by_path(abstract)
    counts, others = {}, set()  # how much of the first axis to take, by path; parts that differ
    for path in fresh.keys() | stored.keys():
        ours, theirs = (tree[path].shape if path in tree else () for tree in (fresh, stored))
        is_other = ours != theirs or (path.startswith(OUTPUT) and not is_same_output)
        if ours and theirs and ours[1:] == theirs[1:] and ("/blocks/" in path or not is_other):
            counts[path] = min(ours[0], theirs[0])
        if is_other:
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
    found = by_path(model.restore(abstract))

    def begin(path, x):
        if (path := path_name(path)) not in counts:
            return x
        if x.shape == found[path].shape:
            return found[path]
        n = counts[path]
        return jax.device_put(x.at[:n].set(found[path][:n]), x.sharding)

    params = jax.tree_util.tree_map_with_path(begin, state.params)
    say(
        f"begins with the weights of {model.path}, {share:.1%} of the parameters; changed: "
        f"{changed}; left out or afresh: {', '.join(sorted(others)) or 'nothing'}"
    )
    return dataclasses.replace(state, params=params, ema_params=jax.tree.map(jnp.copy, params))
