"""The `--mode=export` command: a trained model as a folder that can be taken anywhere.

Every export holds the moving average only, `config.json`, a model card (`README.md`) and
`manifest.json` with the sha256 of every file. The folder appears under its name when it is
complete, never before.
"""

import dataclasses
import os
import pathlib
import shutil

import jax
import numpy as np
from flax import traverse_util

from djepa_jax import __version__
from djepa_jax.checkpoints import hub, restore, stablehlo
from djepa_jax.checkpoints.arrays import save_arrays
from djepa_jax.checkpoints.convert.import_weights import LAYOUT
from djepa_jax.checkpoints.convert.official import to_official
from djepa_jax.checkpoints.convert.tensor_files import save_tensors
from djepa_jax.checkpoints.integrity import CheckpointError, check_storable, write_manifest
from djepa_jax.checkpoints.model_card import Provenance, copy_grid, model_card, read_provenance
from djepa_jax.checkpoints.restore import OFFICIAL, ORBAX, SAFETENSORS, StoredModel
from djepa_jax.checkpoints.stablehlo import STABLEHLO
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.settings import PATHS
from djepa_jax.config.stored import to_stored
from djepa_jax.core import sharding
from djepa_jax.core.optimizer import params_norm
from djepa_jax.runtime.storage import as_path, check_local, check_writable, write_json

# Places on this machine are nobody's business.
PRIVATE = {key: "" for key in PATHS if key != "data.class_names"}
# What the networks of the authors' code give, with the losses that it has
AUTHORS_PREDICT = ("noise", "velocity")


def run_export(
    experiment: Experiment | None,
    workdir: str,
    out: str,
    form: str,
    overwrite: bool = False,
    licence: str = "",
    push: str = "",
) -> pathlib.Path:
    """Write a model into the folder `out`.

    Args:
        experiment: None for the configuration that is stored with the weights.
        workdir: a workdir, one of its steps, or another export.
        out: the folder to write.
        form: as `--format` has it.
        overwrite: replace a folder that an export wrote.
        licence: of the weights, for the card.
        push: USER/NAME on the Hugging Face Hub, where to put the export, too.

    Raises:
        CheckpointError: nothing to export, or not in this format, or `out` exists or cannot be
            written.
        ConfigError: the configuration is of another model.
    """
    model = restore.find_model(workdir)
    if experiment is None:
        experiment = model.config
    else:
        restore.check_same_model(model.config, experiment)
        experiment = experiment.completed_by(model.config)
    _check_form(form, experiment)
    experiment = experiment.updated({"sample.guide": ""})  # a path of this machine
    target = _check_target(out, form, overwrite)
    if push:
        hub.check_push(push, overwrite)
    mesh = sharding.make_mesh((1, 1, 1), [sharding.host_device()])
    abstract = restore.placed_params(experiment, mesh)
    params = model.restore(abstract)
    provenance = read_provenance(model.path, model.step, params_norm(params))
    provenance = dataclasses.replace(provenance, licence=licence or provenance.licence)
    unfinished = target.with_name(f"{target.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir()
        _write_weights(unfinished, experiment, params, form)
        _describe(unfinished, model, experiment, form, provenance, push)
        _check_readable(unfinished, abstract, params, form)
        _check_target(out, form, overwrite)  # somebody may have put something there meanwhile
        _publish(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if push:
        hub.push(target, push)
    return target


def _check_form(form: str, experiment: Experiment) -> None:
    """Raise CheckpointError unless a model can be exported in this form."""
    if form == OFFICIAL and experiment.token_loss.predicts not in AUTHORS_PREDICT:
        raise CheckpointError(
            f"--format={form} is for the authors' code, which has no loss like \""
            f'{experiment.loss.name}", and would draw noise; use --format={SAFETENSORS}.'
        )
    if form == STABLEHLO and experiment.sampler.autoguided:
        raise CheckpointError(
            "a compiled sampler takes the parameters of one model, and config.sample.guide is "
            f'"{experiment.sample.guide}"; leave that out ("").'
        )


def _check_target(out: str, form: str, overwrite: bool) -> pathlib.Path:
    """The folder to write, found to be free, or an export that may be replaced."""
    check_local(out, "--out")
    target = pathlib.Path(as_path(out)).resolve()  # what a link names, not the link
    if form == ORBAX:
        check_storable(target)
    if target.exists() and not (overwrite and restore.is_export(target)):
        found = "exists and is no export" if overwrite else "exists"
        raise CheckpointError(
            f'--out "{out}" {found}; name another folder, or add --overwrite to replace an export.'
        )
    check_writable(target.parent, "--out")
    return target


def _write_weights(folder: pathlib.Path, experiment: Experiment, params: dict, form: str) -> None:
    if form == ORBAX:
        save_arrays(folder / restore.PARAMS_NAME, params)
    elif form == SAFETENSORS:
        arrays = traverse_util.flatten_dict(params, sep="/")
        save_tensors(folder / restore.TENSORS_NAME, arrays, LAYOUT)
    elif form == OFFICIAL:
        save_tensors(folder / restore.TENSORS_NAME, to_official(params), {"format": "pt"})
    elif form == STABLEHLO:
        stablehlo.compile_sampler(folder, experiment, params)
    else:
        raise CheckpointError(f"--format={form} is none of the formats of --mode=export.")


def _describe(
    folder: pathlib.Path,
    model: StoredModel,
    experiment: Experiment,
    form: str,
    provenance: Provenance,
    push: str,
) -> None:
    """Write the grid, the card and the record, then the manifest of everything."""
    grid = copy_grid(model, folder)
    card = model_card(model, experiment, form, provenance, grid, push)
    (folder / restore.CARD_NAME).write_text(card, "utf-8", "backslashreplace")
    sampler = {
        "arguments": stablehlo.arguments(experiment.sampler.guided),
        "batch_size": experiment.sample.batch_size,
    }
    private = PRIVATE | dict.fromkeys(experiment.data.places, "")
    private["data.captions"] = pathlib.PurePath(experiment.data.captions).name
    record = {
        "kind": restore.KIND,
        "format": restore.EXPORT_FORMAT,
        "djepa_jax": __version__,
        "weights": form,
        "step": model.step,
        "class_names": list(experiment.class_names),
        **({"sampler": sampler} if form == STABLEHLO else {}),
        "provenance": dataclasses.asdict(provenance),
        "config": to_stored(experiment.updated(private)),
    }
    write_json(folder / restore.CONFIG_NAME, record)
    write_manifest(folder)


def _check_readable(folder: pathlib.Path, abstract: dict, params: dict, form: str) -> None:
    """Open a finished export as its reader will, and compare every array with the one in memory."""
    if form == STABLEHLO:
        found = stablehlo.open_sampler(folder)
    else:
        found = restore.find_model(folder).restore(abstract)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), found, params)
    if not jax.tree.all(same):
        raise CheckpointError(f"{folder} does not read back as written; check the disk.")


def _publish(unfinished: pathlib.Path, target: pathlib.Path) -> None:
    """Give a finished folder its name; the export that it replaces goes when that is done."""
    old = unfinished.with_name(f"{unfinished.name}-replaced")
    if target.exists():
        target.rename(old)
    try:
        unfinished.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
