"""Trained models on disk, in each of the forms they may have: a workdir, one step of it, an export folder."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

from djepa_jax.checkpoint import FORMAT, CheckpointError, Checkpoints, read_meta, restore_arrays, restore_ema
from djepa_jax.config import upgraded
from djepa_jax.digest import file_sha256
from djepa_jax.settings import Settings

CONFIG_NAME, MANIFEST_NAME = "config.json", "manifest.json"
PARAMS_NAME, TENSORS_NAME = "params", "model.safetensors"
ORBAX, SAFETENSORS, OFFICIAL = "orbax", "safetensors", "official"  # what `weights` of an export may be
CARD_NAME = "README.md"  # for people to edit: loading does not check it
KIND = "djepa_jax export"


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """The moving average of a model's parameters on disk, and the configuration it was trained with."""

    path: pathlib.Path
    config: Settings
    step: int
    restore: Callable[[dict], dict]  # abstract parameters with shardings -> parameters


def find_model(path: str | os.PathLike) -> StoredModel:
    """Find out what `path` is and read its configuration; no array is read yet.

    Raises:
        CheckpointError: there is no model at `path`, or it cannot be used.
    """
    path = pathlib.Path(os.path.expanduser(path)).absolute()
    if is_export(path):
        return _export(path)
    if (path / "meta").is_dir() and (path / "state").is_dir():
        return _step(path)
    workdir = path.parent if path.name == "checkpoints" else path
    if (workdir / "checkpoints").is_dir():
        checkpoints = Checkpoints(workdir)
        try:
            step = checkpoints.latest_step()
        finally:
            checkpoints.close()
        if step is not None:
            return _step(checkpoints.directory / str(step))
        raise CheckpointError(f"{workdir / 'checkpoints'} holds no finished checkpoint yet.")
    if (path / MANIFEST_NAME).is_file():
        check_manifest(path, [CONFIG_NAME])  # for it may be an export whose record is damaged
    found = "does not exist" if not path.exists() else "is a file" if path.is_file() else "is another folder"
    raise CheckpointError(f'"{path}" {found}; name a workdir (with checkpoints/), one of its steps, or an export.')


def _step(folder: pathlib.Path) -> StoredModel:
    meta = read_meta(folder)
    return StoredModel(folder, Settings(upgraded(meta.config)), meta.step, lambda abstract: restore_ema(folder, abstract))


def is_export(path: pathlib.Path) -> bool:
    """Whether a folder was written by `--mode=export`."""
    try:
        return read_record(path).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def weights_of(folder: pathlib.Path) -> str:
    """In which form an export holds its weights."""
    return read_record(folder)["weights"]


def read_record(folder: pathlib.Path) -> dict:
    """What an export says about itself."""
    return json.loads((folder / CONFIG_NAME).read_text("utf-8"))


def tensor_file(folder: pathlib.Path) -> pathlib.Path:
    """The safetensors file of an export folder."""
    return folder / TENSORS_NAME


def _export(folder: pathlib.Path) -> StoredModel:
    record = read_record(folder)
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{folder / CONFIG_NAME} has format {record.get('format')}, this version reads {FORMAT}.")
    check_manifest(folder, [CONFIG_NAME])
    if record["weights"] not in READERS:
        raise CheckpointError(
            f'"{folder}" holds a compiled sampler ({record["weights"]}), not a model to load; its README.md shows how to call it.'
        )

    def restore(abstract: dict) -> dict:
        check_export(folder)
        return READERS[record["weights"]](folder, abstract)

    return StoredModel(folder, Settings(upgraded(record["config"])), record["step"], restore)


def _read_orbax(folder: pathlib.Path, abstract: dict) -> dict:
    return restore_arrays(folder / PARAMS_NAME, abstract)


def _read_tensors(folder: pathlib.Path, abstract: dict) -> dict:
    from djepa_jax.interop.reading import read_params

    try:
        return read_params(tensor_file(folder), abstract)
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{tensor_file(folder)} needs the package {error.name}: pip install {error.name}.") from error


READERS = {ORBAX: _read_orbax, SAFETENSORS: _read_tensors, OFFICIAL: _read_tensors}


def files_below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Every file of an export but the manifest, in a fixed order."""
    yield from sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME)


def manifest_of(folder: pathlib.Path) -> dict[str, dict]:
    """Bytes and sha256 of every file, by its name relative to the folder."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files_below(folder)
    }


def check_export(folder: pathlib.Path) -> None:
    """Compare everything in an export but its card with the manifest; raises CheckpointError."""
    check_manifest(folder, [name for name in _manifest(folder) if name != CARD_NAME])


def check_manifest(folder: pathlib.Path, names: Iterable[str] | None = None) -> None:
    """Compare the files of an export with its manifest: some of them by name, or all.

    Raises:
        CheckpointError: a file is missing or differs, or there is no manifest.
    """
    entries = _manifest(folder)
    try:
        expected = {name: entries[name] for name in names or entries}
    except KeyError as error:
        raise CheckpointError(
            f"{folder / MANIFEST_NAME} cannot be read: it does not list {error}; export the model again."
        ) from error
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the export again.")
        if path.stat().st_size != size or file_sha256(path) != digest:
            raise CheckpointError(f"{path} differs from its checksum in {MANIFEST_NAME}; copy the export again.")


def _manifest(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 by file name."""
    try:
        entries = json.loads((folder / MANIFEST_NAME).read_text("utf-8"))["files"]
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST_NAME} cannot be read ({error}); export the model again.") from error
