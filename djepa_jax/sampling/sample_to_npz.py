"""The `--mode=sample` command: samples of the latest checkpoint into an npz file, and a grid.

Every batch is written when it is drawn, into a folder `NAME.npz.unfinished`, so that memory does
not grow with the number of samples, and a command that was killed goes on with its next batch. At
the end the parts are joined.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import zipfile
import zlib

import fsspec
import jax
import numpy as np
from etils import epath

from djepa_jax import __version__
from djepa_jax.checkpoints.checkpointer import CheckpointError
from djepa_jax.checkpoints.restore import latest_model, placed_params
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import sharding
from djepa_jax.core.optimizer import params_norm
from djepa_jax.runtime import distributed
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.storage import (
    as_path,
    check_local,
    check_writable,
    is_remote,
    user_cache,
    write_json,
    write_npz,
)
from djepa_jax.sampling.generator import Generator, count_of
from djepa_jax.sampling.grids import (
    ENDINGS,
    MAX_GRID,
    MEMBERS,
    SOUND,
    npz_members,
    output_paths,
    save_grid,
    stored_settings,
)

MAX_TITLE = 60  # letters in the name of a file, which may take four bytes each
IDENTITY_NAME = "identity.json"  # what the parts are samples of


def run_sample(
    experiment: Experiment, workdir: str, out: str, latents_only=False, overwrite=False
) -> list[epath.Path]:
    """Sample the moving average of the latest checkpoint into files; their paths, in process 0.

    Args:
        experiment: the configuration.
        workdir: of the checkpoint.
        out: the npz or png file to write (of sounds also wav, one after the other), or a folder
            (it ends in "/") for a file per sample; empty for a place in the workdir.
        latents_only: write latents and no pictures.
        overwrite: replace files of that name that were not made by sampling, too.

    Raises:
        ConfigError: another model, or an autoencoder that is missing or not that of the latents.
        CheckpointError: there is nothing to sample, or `out` is a folder or somebody's file.
        PathError: `out` cannot be written, or another process does so.
    """
    check_pictures(experiment, out, latents_only)
    model = latest_model(experiment, workdir)
    experiment = experiment.completed_by(model.config)
    target = check_target(out, workdir, overwrite)
    mesh = sharding.make_mesh(experiment.mesh)
    generator = Generator(experiment, mesh, decode=not latents_only, progress=True)
    settings = {
        "step": model.step,
        "model": describe_network(experiment),
        "sample": dataclasses.asdict(experiment.sample),
    }
    if generator.decodes:
        settings["autoencoder"] = generator.autoencoder.sha256  # read before the work
    params = model.restore(placed_params(experiment, mesh))
    distributed.run_on_main(lambda: check_writable(target.parent, "--out"))
    each = target.parent if out.endswith("/") else None
    return write_samples(target, generator, params, settings, each)


def describe_network(experiment: Experiment) -> dict:
    """The shape of the networks, for a file."""
    fields = dataclasses.asdict(experiment.network)
    return fields | {"conditioner": repr(experiment.network.conditioner)}


def check_pictures(experiment: Experiment, out: str, latents_only: bool) -> None:
    """Raise ConfigError unless what is asked for can be made."""
    if latents_only and not experiment.modality.needs_decoder:
        raise ConfigError(
            "--latents_only is for models of latents, and this one makes none; leave it out."
        )
    if latents_only and out.lower().endswith(".png"):
        raise ConfigError(
            f'--out "{out}" with --latents_only: latents are no picture; let the name end in .npz.'
        )
    if out.lower().endswith(SOUND) and not hasattr(experiment.modality, "rate"):
        raise ConfigError(f'--out "{out}": this model makes no sound alone; end it in .png or /.')
    if experiment.lacks_decoder and not latents_only:
        raise ConfigError(
            "config.autoencoder.path is empty, and this model makes latents: name the weights that "
            "decode them (--config.autoencoder.path=kl16.ckpt), or add --latents_only."
        )


def check_target(out: str, workdir: str, overwrite: bool) -> epath.Path:
    """Where the samples go; raises CheckpointError if there is a folder, or a file of others."""
    target, numbered = as_path(out or as_path(workdir) / "samples" / "sample.png"), []
    if out.endswith("/"):
        check_local(out, "--out", "name one for a file per sample")
        target, numbered = target / "samples.npz", sorted(target.glob(f"{'[0-9]' * 6}_*"))
    elif target.suffix.lower() == SOUND:
        check_local(out, "--out", "name a local file for sounds")
        numbered = [target]
    elif target.suffix.lower() not in ("", *ENDINGS):
        raise CheckpointError(
            f'--out "{out}" ends in {target.suffix}; write {" or ".join(ENDINGS)}, or neither, '
            "for a grid and its arrays, or a folder with / at its end."
        )
    if any(path.is_dir() for path in (target, *output_paths(target))):
        raise CheckpointError(
            f'--out "{out}" is a folder; name a file in it, such as {target / "sample.png"}, or '
            f'write "{out}/" for a file per sample.'
        )
    found = [path for path in (*output_paths(target), *numbered) if path.exists()]
    if found and not overwrite and stored_settings(output_paths(target)[1]) is None:
        raise CheckpointError(
            f'--out "{out}" would replace {found[0]}, which --mode=sample did not make; name '
            "another, or add --overwrite."
        )
    return target


def write_samples(
    target: epath.Path,
    generator: Generator,
    params,
    settings: dict,
    each: epath.Path | None = None,
) -> list[epath.Path]:
    """Draw the samples that an experiment asks for, those that are not there yet, into files."""
    experiment, is_main = generator.experiment, distributed.is_main_process()
    conditions, seed = experiment.sample_conditions, experiment.sample.seed
    png, npz = output_paths(target)
    folder = parts_folder(npz)
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
    with distributed.held_by_main(lock_workdir(folder, what=f'--out "{npz}"')):
        # Of all processes, for it sums over all shards.
        wanted = parts_identity(generator, params, settings)
        first = distributed.run_on_main(lambda: find_parts(folder, wanted))
        batches = generator.batches(params, conditions, seed, first)
        for arrays in batches:
            if is_main:
                write_npz(folder / f"{first:08d}.npz", arrays)
            first += count_of(arrays)
        if not is_main:
            return []
        parts = sorted(folder.glob("*.npz"))
        join(parts, npz, count_of(conditions), npz_members(conditions, settings))
        shown = first_rows(parts, MAX_GRID)
        grid = save_grid(png, experiment, shown, conditions, settings)
        written = [npz] if grid is None else [png, npz]
        if target.suffix.lower() == SOUND:
            joined = {"sound": shown["sound"].reshape(1, -1)}
            experiment.modality.save(joined, 0, target.with_suffix(""))
            written.append(target)
        if each is not None:
            written += save_each(experiment, parts, conditions, each)
        shutil.rmtree(folder)
    return written


def parts_identity(generator: Generator, params, settings: dict) -> dict:
    """Everything that samples depend on: equal values mean equal samples, up to rounding."""
    experiment, sample = generator.experiment, dict(settings["sample"])
    del sample["batch_size"]  # changes no sample
    conditions = jax.tree.leaves(experiment.sample_conditions)
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in conditions))
    decoded = experiment.autoencoder.dtype if generator.decodes else ""
    of = {"sample": sample, "conditions": digest.hexdigest(), "decoded": decoded}
    of |= {"modality": repr(experiment.modality), "djepa_jax": __version__}
    of["loss"] = repr(experiment.token_loss)  # with the options that sampling takes
    of["ema_norm"] = params_norm(params)
    return json.loads(json.dumps(settings | of))


def parts_folder(npz: epath.Path) -> pathlib.Path:
    """Where the parts of an npz file are; the same place every time, on a local disk."""
    if not is_remote(npz):
        return pathlib.Path(npz).with_name(f"{npz.name}.unfinished")
    name = hashlib.sha256(os.fspath(npz).encode()).hexdigest()[:16]
    return (user_cache("samples") or pathlib.Path(tempfile.gettempdir())) / name


def find_parts(folder: pathlib.Path, wanted: dict) -> int:
    """How many samples are there already; other parts are removed.

    Those are parts of other settings or weights, and what follows on a gap or on a damaged part.
    """
    path, found = folder / IDENTITY_NAME, None
    parts = sorted(folder.glob("*.npz"))
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text("utf-8"))
    if found != wanted:
        if parts:
            print(f"{folder} holds samples of other settings or weights; starting anew", flush=True)
        for part in parts:
            part.unlink()
        write_json(path, wanted)
        return 0
    done = 0
    for part in parts:
        with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
            if part.stem == f"{done:08d}":
                done += count_of(first_rows([part], 2**31))
                continue
        part.unlink()
    if done:
        print(f"{done:,} samples are in {folder}; going on from there", flush=True)
    return done


def first_rows(parts: list[pathlib.Path], count: int) -> dict[str, np.ndarray]:
    """The first rows of all arrays in some parts."""
    rows: dict[str, list] = {}
    have = 0
    for part in parts:
        with np.load(part, allow_pickle=False) as arrays:
            for name in arrays.files:
                rows.setdefault(name, []).append(arrays[name][: count - have])
        have += len(rows[name][-1])
        if have >= count:
            break
    return {name: np.concatenate(pieces) for name, pieces in rows.items()}


def join(parts: list[pathlib.Path], npz: epath.Path, count: int, further: dict) -> None:
    """Put parts into one npz file, one part in memory at a time; it appears when it is whole."""
    local = parts[0].with_name("joined.tmp")
    with zipfile.ZipFile(local, "w") as archive:
        for name, first in first_rows(parts[:1], 1).items():
            with archive.open(f"{MEMBERS.get(name, name)}.npy", "w", force_zip64=True) as file:
                header = {
                    "descr": np.lib.format.dtype_to_descr(first.dtype),
                    "fortran_order": False,
                    "shape": (count, *first.shape[1:]),
                }
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    with np.load(part, allow_pickle=False) as arrays:
                        file.write(np.ascontiguousarray(arrays[name]).data)
        for name, array in further.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    if is_remote(npz):
        fsspec.filesystem("gcs").put_file(os.fspath(local), os.fspath(npz))
    else:
        local.replace(npz)


def save_each(experiment: Experiment, parts, conditions, folder: epath.Path) -> list[epath.Path]:
    """Write every sample into a file of its own, called by its number and title."""
    titles, start = experiment.titles(conditions), 0
    for part in parts:
        arrays = first_rows([part], 2**31)
        for index in range(count_of(arrays)):
            stem = numbered(start + index, titles[start + index])
            experiment.modality.save(arrays, index, folder / stem)
        start += count_of(arrays)
    return [folder]


def numbered(index: int, title: str) -> str:
    """The name of a sample's own file, without its ending."""
    title = title[:MAX_TITLE]
    return f"{index:06d}_{''.join(c if c.isalnum() else '_' for c in title)}"
