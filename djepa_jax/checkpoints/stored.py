"""Trained models on disk, in each of the forms they may have: a workdir, one step of it, an export
folder.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable

from etils import epath

from djepa_jax.checkpoints.checkpointer import STEPS_NAME, Checkpoints
from djepa_jax.checkpoints.integrity import (
    MANIFEST_NAME,
    ManifestError,
    check_manifest,
    read_manifest,
)
from djepa_jax.checkpoints.orbax_io import (
    FORMAT,
    CheckpointError,
    read_meta,
    restore_arrays,
    restore_ema,
)
from djepa_jax.config.experiment import upgraded
from djepa_jax.config.settings import Settings
from djepa_jax.runtime.storage import as_path

CONFIG_NAME = "config.json"
PARAMS_NAME, TENSORS_NAME = "params", "model.safetensors"
ORBAX, SAFETENSORS, OFFICIAL = (
    "orbax",
    "safetensors",
    "official",
)  # what `weights` of an export may be
CARD_NAME = "README.md"  # for people to edit: loading does not check it
KIND = "djepa_jax export"


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """The moving average of a model's parameters on disk, and the configuration it was trained
    with.
    """

    path: epath.Path
    config: Settings
    step: int
    restore: Callable[[dict], dict]  # abstract parameters with shardings -> parameters


def find_model(path: str | os.PathLike) -> StoredModel:
    """Find out what `path` is and read its configuration; no array is read yet.

    Raises:
        CheckpointError: there is no model at `path`, or it cannot be used.
    """
    path = as_path(path)
    if is_export(path):
        return _export(path)
    if (path / "meta").is_dir() and (path / "state").is_dir():
        return _step(path)
    checkpoints = Checkpoints(path.parent if path.name == STEPS_NAME else path)
    if checkpoints.directory.is_dir():
        step = checkpoints.latest_step()
        if step is not None:
            return _step(checkpoints.folder(step))
        raise CheckpointError(f"{checkpoints.directory} holds no finished checkpoint yet.")
    if (path / MANIFEST_NAME).exists():
        check_files(path, [CONFIG_NAME])  # for it may be an export whose record is damaged
    found = (
        "does not exist"
        if not path.exists()
        else "is another folder"
        if path.is_dir()
        else "is a file"
    )
    raise CheckpointError(
        f'"{path}" {found}; name a workdir (with checkpoints/), one of its steps, or an export.'
    )


def _step(folder: epath.Path) -> StoredModel:
    meta = read_meta(folder)
    return StoredModel(
        folder,
        Settings(upgraded(meta.config)),
        meta.step,
        lambda abstract: restore_ema(folder, abstract, meta),
    )


def is_export(path: epath.Path) -> bool:
    """Whether a folder was written by `--mode=export`."""
    try:
        return read_record(path).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def weights_of(folder: os.PathLike) -> str:
    """In which form an export holds its weights."""
    return read_record(folder)["weights"]


def read_record(folder: epath.Path) -> dict:
    """What an export says about itself."""
    return json.loads((folder / CONFIG_NAME).read_text("utf-8"))


def tensor_file(folder: os.PathLike) -> pathlib.Path:
    """The safetensors file of an export folder."""
    return folder / TENSORS_NAME


def _export(folder: os.PathLike) -> StoredModel:
    record = read_record(folder)
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} has format {record.get('format')}, this version reads "
            f"{FORMAT}."
        )
    check_files(folder, [CONFIG_NAME])
    if record["weights"] not in READERS:
        raise CheckpointError(
            f'"{folder}" holds a compiled sampler ({record["weights"]}), not a model to load; its '
            "README.md shows how to call it."
        )

    def restore(abstract: dict) -> dict:
        check_export(folder)
        return READERS[record["weights"]](folder, abstract)

    return StoredModel(folder, Settings(upgraded(record["config"])), record["step"], restore)


def _read_orbax(folder: os.PathLike, abstract: dict) -> dict:
    return restore_arrays(folder / PARAMS_NAME, abstract)


def _read_tensors(folder: os.PathLike, abstract: dict) -> dict:
    from djepa_jax.checkpoints.convert.import_weights import read_params

    try:
        return read_params(tensor_file(folder), abstract)
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{tensor_file(folder)} needs the package {error.name}: pip install {error.name}."
        ) from error


READERS = {ORBAX: _read_orbax, SAFETENSORS: _read_tensors, OFFICIAL: _read_tensors}


def check_export(folder: os.PathLike) -> None:
    """Compare everything in an export but its card with the manifest; raises CheckpointError."""
    check_files(folder)


def check_files(folder: os.PathLike, names: Iterable[str] | None = None) -> None:
    """Compare files of an export with its manifest: some of them by name, or all but the card.

    Raises:
        CheckpointError: a file is missing or differs, or there is no manifest.
    """
    try:
        check_manifest(
            folder,
            [name for name in read_manifest(folder) if name != CARD_NAME]
            if names is None
            else names,
        )
    except ManifestError as error:
        remedy = (
            "export the model again" if "cannot be read" in str(error) else "copy the export again"
        )
        raise CheckpointError(f"{error}; {remedy}.") from error
