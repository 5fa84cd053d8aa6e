"""The `--mode=import` command: weights from elsewhere become a checkpoint to go on from."""

import dataclasses
import datetime
import json
import pathlib

import jax
import numpy as np
import optax
from etils import epath
from flax import traverse_util

from djepa_jax.checkpoints import hub, restore
from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.checkpoints.convert import official, tensor_files
from djepa_jax.checkpoints.convert.mismatch import check_shapes
from djepa_jax.checkpoints.convert.tensor_files import MOMENTS, SourceError, SourceFile, Tensors
from djepa_jax.checkpoints.integrity import MANIFEST_NAME, CheckpointError, file_sha256
from djepa_jax.config.convert import flatten
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.stored import FILE_NAME, to_stored
from djepa_jax.core import sharding
from djepa_jax.core.models.djepa import ModelConfig, split_model
from djepa_jax.core.optimizer import decay_mask
from djepa_jax.core.train_step import state_shapes
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.storage import as_path, check_writable, write_json

RECORD_NAME = "imported.json"
LAYOUT = {"layout": "djepa_jax"}  # metadata of safetensors files with our names and shapes
ROLES = {"ema_params": "moving average", "params": "trained parameters"}
STANDS_IN = "moving average: none by name, so in its place"
NO_MOMENTS = "optimiser: none; training starts it afresh, from step 0 with warm-up"


@dataclasses.dataclass(frozen=True)
class ImportSource:
    """What an import takes: parts of a training state, their step, and lines that say so."""

    files: tuple[pathlib.Path, ...]  # whose sha256 identifies it
    parts: dict
    report: list[str]
    step: int = 0
    metadata: dict = dataclasses.field(default_factory=dict)


def run_import(experiment: Experiment, workdir: str, source: str) -> list[str]:
    """Write a checkpoint of the weights in a file, or in an export, into a new workdir; returns
    lines that say what was read and written.

    Raises:
        ConfigError, MismatchError: the configuration describes another model.
        SourceError: the file cannot be read, or holds what it should not.
        CheckpointError: the workdir cannot be used, or holds checkpoints already.
    """
    path = pathlib.Path(hub.local(source))
    model = restore.find_model(path) if restore.is_export(path) else None
    if model:
        restore.check_same_model(model.config, experiment)
        experiment = experiment.completed_by(model.config)
    folder, stored = as_path(workdir), to_stored(experiment)
    _check_unused(folder, stored)
    if model:
        mesh = sharding.make_mesh((1, 1, 1), [sharding.host_device()])
        params = model.restore(restore.placed_params(experiment, mesh))
        report = [f"moving average: from {path}", NO_MOMENTS]
        found = ImportSource((path / MANIFEST_NAME,), {"ema_params": params}, report)
    else:
        found = _read_file(path, experiment)
    record = {
        "source": path.resolve().name,
        "sha256": " ".join(map(file_sha256, found.files)),
        "bytes": sum(file.stat().st_size for file in found.files),
        "imported": datetime.date.today().isoformat(),
        "step": found.step,
        "metadata": found.metadata,
        "contents": found.report,
    }
    check_writable(workdir)
    with lock_workdir(workdir):
        _check_unused(folder, stored)
        write_json(folder / FILE_NAME, stored)
        examples = found.step * experiment.batch_size
        saved = Checkpoints(workdir).save_imported(found.parts, stored, found.step, examples)
        write_json(folder / RECORD_NAME, record)
    return [*found.report, f"wrote {saved}"]


def _check_unused(workdir: epath.Path, config: dict) -> None:
    """Raise CheckpointError if a workdir holds more than the beginning of the same import."""
    step = Checkpoints(workdir).step_to_resume()
    written = workdir / FILE_NAME
    same = not written.exists() or written.read_text("utf-8") == json.dumps(config, indent=2) + "\n"
    if step is not None or not same:
        held = written.name if step is None else f"checkpoint {step}"
        raise CheckpointError(
            f'--workdir "{workdir}" already holds {held}; import into another folder.'
        )


def _read_file(path: pathlib.Path, experiment: Experiment) -> ImportSource:
    file = tensor_files.open_tensors(path)
    where = f'--source "{path}"'
    _, abstract = split_model(experiment.network)
    parts: dict = {}
    report: list[str] = []
    for name, tensors in file.groups.items():
        part = "ema_params" if name == file.average else "params"
        group = f"{where}, {name}," if len(file.groups) > 1 else where
        parts[part] = read_tensors(tensors, file.metadata, abstract, group, experiment.network)
        dtypes = " and ".join(sorted({tensor.dtype for tensor in tensors.values()}))
        role = STANDS_IN if name == file.average == file.trained else ROLES[part]
        report.append(f"{role}: {name} of {path}, {len(tensors)} tensors in {dtypes}")
    if file.unread:
        report.append(f"not read: {', '.join(file.unread)}")
    report.append(_untold(experiment))
    try:
        opt_state = _opt_state(file, abstract, experiment, where)
    except SourceError as error:
        report.append(f"{NO_MOMENTS} ({error})")
        return ImportSource(file.files, parts, report, 0, file.metadata)
    zero = np.int32(0)
    parts |= {"step": np.int32(file.step), "skipped_steps": zero, "bad_streak": zero}
    parts = {"params": parts["ema_params"]} | parts | {"opt_state": opt_state}
    report.append(f"optimiser: its moments, from step {file.step}, where training goes on")
    return ImportSource(file.files, parts, report, file.step, file.metadata)


def _untold(experiment: Experiment) -> str:
    """Keys, with their values, in which models with the same shapes of tensors may differ."""
    keys = ["loss.name", "data.modality", "data.image_size", "data.channels", "data.patch_size"]
    if experiment.modality.needs_decoder:
        keys += ["data.latent_scale", "data.latent_shift"]
    values = flatten(experiment.to_dict())
    told = [f"{key}={values[key]}" for key in keys]
    if not experiment.model.qk_norm:  # whose tensors have the width of a head
        told.append(f"model.num_heads={experiment.network.num_heads}")
    return f"not told by shapes, and taken from the config: {', '.join(told)}"


def read_tensors(
    tensors: Tensors, metadata: dict, abstract: dict, where: str, model: ModelConfig | None = None
) -> dict:
    """Parameters of the shapes in `abstract`, as JAX arrays in the host's memory, from tensors.

    The metadata of their file, which `where` names, say whether names and shapes are ours or the
    authors'. With `model`, the table of what does not fit names the config keys that would.
    """

    def place(value) -> jax.Array:
        value = np.asarray(value)
        if not np.isfinite(value).all():
            raise SourceError(
                f"{where} holds values that are not finite: it is of a run that failed, or "
                "damaged; name another file."
            )
        return jax.block_until_ready(jax.device_put(value, sharding.host_device()))

    found = {name: tensor.shape for name, tensor in tensors.items()}
    if not LAYOUT.items() <= metadata.items():
        check_shapes(found, official.official_shapes(abstract), where, model)
        return official.from_official(tensors, abstract, place)
    leaves = traverse_util.flatten_dict(abstract, sep="/")
    check_shapes(found, {path: leaf.shape for path, leaf in leaves.items()}, where)
    arrays = {path: place(tensor) for path, tensor in tensors.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


def read_params(path: pathlib.Path, abstract: dict) -> dict:
    """The parameters in a safetensors file, placed as `abstract` says."""
    file = tensor_files.open_tensors(path, "the file")
    params = read_tensors(file.groups[file.average], file.metadata, abstract, f'"{path}"')
    return jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), params, abstract)


def _opt_state(file: SourceFile, abstract: dict, experiment: Experiment, where: str):
    """Our optimiser's state with the moments of a PyTorch Adam, which numbers the parameters."""
    if file.moments is None:
        raise SourceError("the file has no state of Adam for its model")
    flags = jax.tree.map(
        lambda flag, leaf: np.broadcast_to(flag, leaf.shape), decay_mask(abstract), abstract
    )
    decays = {name: bool(flag.flat[0]) for name, flag in official.to_official(flags).items()}
    model = file.groups[file.trained]
    moments = file.moments
    found = {name: tensor.shape for name, tensor in moments.items()}
    for last in (None, True, False):  # as in the model, or with those that decay apart: last, first
        order = sorted(model, key=lambda name, last=last: decays[name] is last)
        shapes = {f"{n}/{m}": model[name].shape for n, name in enumerate(order) for m in MOMENTS}
        if shapes == found:
            break
    else:
        raise SourceError("its parameters are numbered in an unknown way")

    def read(moment: str) -> dict:
        tensors = {name: moments[f"{n}/{moment}"] for n, name in enumerate(order)}
        return read_tensors(tensors, file.metadata, abstract, where)

    def fill(node):
        if not isinstance(node, optax.ScaleByAdamState):
            return np.full(node.shape, file.step, node.dtype)  # a counter of a schedule
        return node._replace(count=np.int32(file.step), mu=read(MOMENTS[0]), nu=read(MOMENTS[1]))

    state = state_shapes(experiment.train).opt_state
    return jax.tree.map(fill, state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState))
