"""The `--mode=edit` command: examples and masks from files, and the results into files."""

import dataclasses
import json
from collections import Counter

import numpy as np
from etils import epath

from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.checkpoints.restore import latest_model, placed_params
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.flags import command_line
from djepa_jax.config.places import EditError, check_editable, places_of, places_shape
from djepa_jax.core import sharding
from djepa_jax.core.sampler import Known
from djepa_jax.data.images import BrokenImage
from djepa_jax.data.records import DataError, cut_file
from djepa_jax.data.sounds import fit, of_length, read_wav, resampled
from djepa_jax.data.sources import open_data
from djepa_jax.runtime.storage import as_path, check_writable, write_npz
from djepa_jax.sampling.edit import edit, named
from djepa_jax.sampling.generator import Generator, count_of
from djepa_jax.sampling.grids import (
    MAX_GRID,
    MEMBERS,
    SOUND,
    label_grid,
    npz_members,
    output_paths,
    save_png,
)
from djepa_jax.sampling.sample_to_npz import (
    check_pictures,
    check_target,
    describe_network,
    numbered,
)

GREY = 128  # where a grid shows what is hidden
REAL = "real:"


def read_mask(path: str, size: tuple[int, int], side: int) -> np.ndarray:
    """Places `[side, side]` that are lighter than half in a picture of `size` (width, height).

    It is cut as the picture that it is the mask of.

    Raises:
        EditError: it is not of that size.
    """
    pixels, found = _read_image(path, "--mask", (side, side, 1))
    if found != size:
        raise EditError(
            f'--mask "{path}" has {found[0]} x {found[1]} pixels, and --source '
            f"{size[0]} x {size[1]}; make them of the same size, white where it is to change."
        )
    return pixels[..., 0] > 127


def _read_image(path: str, flag: str, shape: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, int]]:
    try:
        return cut_file(as_path(path).read_bytes(), shape)
    except (OSError, BrokenImage) as error:
        reason = getattr(error, "strerror", None) or error
        raise EditError(f'{flag} "{path}" cannot be read: {reason}.') from error


def read_source(source: str, experiment: Experiment) -> tuple[np.ndarray, tuple[int, int]]:
    """What is to be edited, as `Model.edit` takes it, and a picture's width and height as given.

    Args:
        source: a picture or an animation, cut and resized as training pictures are, of which the
            first T frames are taken; a wav file, of which the first S samples are; or real:INDEX,
            that example of `config.data`.
        experiment: the configuration.

    Raises:
        EditError: it cannot be read, or there are too few frames or examples.
    """
    if source.startswith(REAL):
        given = _real_example(source, experiment)
        return given, given.shape[-2:-4:-1]
    if hasattr(experiment.modality, "rate"):
        return _read_sound(source, experiment.modality, resampled), (0, 0)
    return _read_image(source, "--source", experiment.picture_shape)


def _read_sound(source: str, modality, prepare) -> np.ndarray:
    try:
        rate, values = read_wav(as_path(source))
    except DataError as error:
        raise EditError(
            f'--source "{source}" is no wav file that can be read; name one.'
        ) from error
    # `resampled` leaves silence and so times as they are, `fit` makes what is learnt from
    wave = prepare(rate, values, modality.rate, Counter())
    return of_length(wave, *modality.example_shape)


def _read_part(source: str, modality, mask: str, keep: float) -> np.ndarray:
    """A pair of which a file is one part; the other, which is to be made, is blank."""
    kind = "sound" if source.lower().endswith(SOUND) else "images"
    other = dict(zip(modality.names, ("second", "first"), strict=True))
    if mask != other.get(kind) or keep:
        raise EditError(
            f'--source "{source}" is one part of a pair of {" and ".join(modality.names)}; name '
            "one with --mask=first or second for the other part, without --keep, or real:INDEX."
        )
    parts = dict(zip(modality.names, modality.parts, strict=True))
    pair = {name: np.zeros(p.example_shape, p.example_dtype) for name, p in parts.items()}
    if kind == "sound":
        pair[kind] = _read_sound(source, parts[kind], fit)
    else:
        pair[kind], _ = _read_image(source, "--source", parts[kind].example_shape)
    return modality.join(*pair.values())


def _real_example(source: str, experiment: Experiment) -> np.ndarray:
    if experiment.modality.needs_decoder:
        raise EditError(f'--source "{source}": these data are latents; name a picture.')
    data, number = open_data(experiment), source.removeprefix(REAL)
    if not (number.isascii() and number.isdigit() and int(number) < len(data)):
        raise EditError(f'--source "{source}": the data have examples from 0 to {len(data) - 1}.')
    return data[int(number)]["example"]


def run_edit(
    experiment: Experiment,
    workdir: str,
    source: str,
    mask: str,
    out: str,
    keep: float = 0.0,
    overwrite: bool = False,
) -> list[epath.Path]:
    """Edit an example with the latest checkpoint, once per label asked for; paths written.

    Args:
        experiment: the configuration; `sample.labels` and `sample.count` say what is drawn.
        workdir: of the checkpoint.
        source: what is edited (`read_source`).
        mask: a picture of the same size, white where it is to change, or a word (`mask_of`).
        out: the png or npz file to write (of sounds also wav, one after the other), or a folder (it
            ends in "/") for a file per result.
        keep: share of the tokens under the mask that stays.
        overwrite: replace files that were not made by sampling, too.

    Raises:
        EditError: a picture or a mask that cannot be edited.
        ConfigError, CheckpointError, PathError: as `run_sample`.
    """
    check_editable(experiment)
    check_pictures(experiment, out, latents_only=False)
    model = latest_model(experiment, workdir)
    experiment = experiment.completed_by(model.config)
    if hasattr(experiment.modality, "parts") and not source.startswith(REAL):
        given, size = _read_part(source, experiment.modality, mask, keep), ()
    else:
        given, size = read_source(source, experiment)
    if as_path(mask).exists() and len(places_shape(experiment)) > 1:
        places = read_mask(mask, size, given.shape[-2])
    else:
        places, keep = places_of(experiment, mask, keep)
    out = out or f"{workdir}/samples/edit.png"
    target = check_target(out, workdir, overwrite)
    check_writable(target.parent, "--out")
    mesh = sharding.make_mesh(experiment.mesh)
    needs_decoder = experiment.modality.needs_decoder
    decoder = Autoencoder(experiment.autoencoder, mesh) if needs_decoder else None
    params = model.restore(placed_params(experiment, mesh))
    conditions, seed = experiment.sample_conditions, experiment.sample.seed
    examples = np.repeat(given[None], count_of(conditions), axis=0)

    def make_generator(known: Known) -> Generator:
        return Generator(experiment, mesh, decoder, progress=True, known=known)

    results = edit(
        experiment, make_generator, params, examples, places, conditions, seed, keep, decoder
    )
    settings = {
        "step": model.step,
        "model": describe_network(experiment),
        "sample": dataclasses.asdict(experiment.sample),
        "edit": {"source": source, "mask": mask, "keep": keep},
    }
    return _write(target, out, experiment, given, places, results, conditions, settings)


def _write(target: epath.Path, out: str, experiment, given, places, results, conditions, settings):
    """Write an npz file and a grid, with a file of each result where `out` is a folder."""
    (png, npz), modality = output_paths(target), experiment.modality
    arrays = named(modality, results)
    members = {MEMBERS.get(name, name): array for name, array in arrays.items()}
    write_npz(npz, members | npz_members(conditions, settings))
    blank = {k: np.full_like(v[:1], 0 if k == "sound" else GREY) for k, v in arrays.items()}
    hidden = modality.put_back(given[None], blank, places[None])
    titles = experiment.titles(conditions)
    shown = np.concatenate([given[None], hidden.astype(given.dtype), results])[:MAX_GRID]
    pictures = modality.preview(named(modality, shown))
    grid = label_grid(pictures, ["given", "hidden", *titles][: len(shown)])
    save_png(png, grid, {"command": command_line(), "settings": json.dumps(settings)})
    if target.suffix.lower() == SOUND:
        modality.save({"sound": results.reshape(1, -1)}, 0, target.with_suffix(""))
        return [png, npz, target]
    if not out.endswith("/"):
        return [png, npz]
    for number, title in enumerate(titles):
        stem = target.parent / numbered(number, title)
        modality.save(arrays, number, stem)
    return [png, npz, target.parent]
