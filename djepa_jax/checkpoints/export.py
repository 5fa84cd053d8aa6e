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
import optax
import orbax.checkpoint as ocp
from flax import traverse_util

from djepa_jax import __version__
from djepa_jax.checkpoints.autoencoder import stored_sha256, with_autoencoder
from djepa_jax.checkpoints.convert.official import to_official
from djepa_jax.checkpoints.convert.reading import LAYOUT
from djepa_jax.checkpoints.convert.tensor_files import save_tensors
from djepa_jax.checkpoints.integrity import CheckpointError, write_manifest
from djepa_jax.checkpoints.model_card import Provenance, model_card, read_provenance
from djepa_jax.checkpoints.restore import (
    CARD_NAME,
    CONFIG_NAME,
    EXPORT_FORMAT,
    KIND,
    OFFICIAL,
    ORBAX,
    PARAMS_NAME,
    SAFETENSORS,
    TENSORS_NAME,
    StoredModel,
    check_same_model,
    find_model,
    is_export,
    placed_params,
)
from djepa_jax.checkpoints.stablehlo import arguments, compile_sampler
from djepa_jax.config import experiment as configuration
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.settings import Settings
from djepa_jax.core import sharding
from djepa_jax.runtime.storage import check_local, check_writable, write_json

STABLEHLO = "stablehlo"
# Places on this machine are nobody's business.
PRIVATE = {"data.path": "", "data.staging": "", "prepare.path": "", "autoencoder.path": ""}
FORMATS = (ORBAX, SAFETENSORS, OFFICIAL, STABLEHLO)


@dataclasses.dataclass(frozen=True)
class Job:
    """What to export, and how."""

    model: StoredModel
    config: Settings
    experiment: Experiment
    params: dict
    licence: str


def run_export(
    config, workdir: str, out: str, form: str, overwrite: bool = False, licence: str = ""
) -> pathlib.Path:
    """Write an export folder; returns its path.

    Args:
        config: an ml-collections config; None for the one that is stored with the weights.
        workdir: a workdir, one of its steps, or another export.
        out: the folder to write.
        form: one of `FORMATS`.
        overwrite: replace a folder that an export wrote.
        licence: what the card says about the licence of the weights.

    Raises:
        CheckpointError: nothing to export, or `out` exists or cannot be written.
        ConfigError: the config is of another model.
    """
    model = find_model(workdir)
    if config is not None:
        check_same_model(model.config, config)
    config = Settings(configuration.resolved(config)) if config is not None else model.config
    config = with_autoencoder(config, stored_sha256(model.config))
    experiment = configuration.build(config)
    target = _check_target(out, overwrite)
    mesh = sharding.make_mesh((1, 1, 1), [sharding.host_device()])
    job = Job(model, config, experiment, model.restore(placed_params(experiment, mesh)), licence)
    unfinished = target.with_name(f"{target.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir()
        _write(job, form, unfinished)
        _check_target(out, overwrite)  # somebody may have put something there meanwhile
        _publish(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _check_target(out: str, overwrite: bool) -> pathlib.Path:
    """The folder to write, found to be free, or an export that may be replaced.

    Raises:
        CheckpointError: it may not be written.
    """
    check_local(out, "--out")
    target = pathlib.Path(
        os.path.expanduser(out)
    ).resolve()  # a link is kept, and what it names is written
    if target.exists() and not overwrite:
        raise CheckpointError(
            f'--out "{out}" exists; name another folder, or add --overwrite to replace an export.'
        )
    if target.exists() and not is_export(target):
        raise CheckpointError(
            f'--out "{out}" exists and is no export, so --overwrite does not replace it; name '
            "another folder."
        )
    check_writable(target.parent, "--out")
    return target


def _write(job: Job, form: str, folder: pathlib.Path) -> None:
    """The weights in their form, then what describes them, then the manifest of all of it."""
    WRITERS[form](job, folder)
    step, parameters = job.model.step, sum(leaf.size for leaf in jax.tree.leaves(job.params))
    provenance = read_provenance(job.model.path, step, float(optax.tree.norm(job.params)))
    provenance = dataclasses.replace(provenance, licence=job.licence or provenance.licence)
    card = model_card(
        job.model.config, job.config, job.experiment, step, parameters, form, provenance
    )
    (folder / CARD_NAME).write_text(card, "utf-8")
    write_json(folder / CONFIG_NAME, _record(job, form, provenance))
    write_manifest(folder)


def _record(job: Job, form: str, provenance: Provenance) -> dict:
    sampler = {
        "arguments": arguments(job.experiment.sample.guided),
        "batch_size": job.config.sample.batch_size,
    }
    return {
        "kind": KIND,
        "format": EXPORT_FORMAT,
        "djepa_jax": __version__,
        "weights": form,
        "step": job.model.step,
        "class_names": list(job.experiment.class_names),
        **({"sampler": sampler} if form == STABLEHLO else {}),
        "provenance": dataclasses.asdict(provenance),
        "config": job.config.updated(PRIVATE).to_dict(),
    }


def _publish(unfinished: pathlib.Path, target: pathlib.Path) -> None:
    """Give a finished folder its name; an export that is replaced goes only when the new one is
    there.
    """
    if not target.exists():
        unfinished.rename(target)
        return
    old = unfinished.with_name(unfinished.name + "-replaced")
    target.rename(old)
    try:
        unfinished.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _write_orbax(job: Job, folder: pathlib.Path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(folder / PARAMS_NAME, args=ocp.args.PyTreeSave(job.params))


def _write_safetensors(job: Job, folder: pathlib.Path) -> None:
    arrays = traverse_util.flatten_dict(job.params, sep="/")
    save_tensors(
        folder / TENSORS_NAME, {path: np.asarray(value) for path, value in arrays.items()}, LAYOUT
    )


def _write_official(job: Job, folder: pathlib.Path) -> None:
    save_tensors(folder / TENSORS_NAME, to_official(job.params), {"format": "pt"})


def _write_stablehlo(job: Job, folder: pathlib.Path) -> None:
    compile_sampler(folder, job.config, job.experiment, job.params)


WRITERS = {
    ORBAX: _write_orbax,
    SAFETENSORS: _write_safetensors,
    OFFICIAL: _write_official,
    STABLEHLO: _write_stablehlo,
}
