"""Editing: tokens that stay are given to the sampler, and the others are drawn anew.

1. The mask says which places of a picture are to be made anew; tokens that show any of them are
   hidden, but for a share (`keep`) that stays, drawn at random.
2. The sampler begins with the tokens that are not hidden (`core.sampler.Known`).
3. Places outside the mask are put back as they were, to the bit.

Shape letters: n pictures, H, W, C as usual, N tokens.
"""

import dataclasses
import json
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from PIL import Image

from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.checkpoints.restore import latest_model, placed_params
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.flags import command_line
from djepa_jax.core import sharding
from djepa_jax.core.sampler import Known
from djepa_jax.data.images import BrokenImage, center_crop, decode_image
from djepa_jax.data.records import MAX_PIXELS
from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.storage import as_path, check_writable, write_npz
from djepa_jax.sampling.generator import Generator, count_of
from djepa_jax.sampling.grids import (
    MAX_GRID,
    MEMBERS,
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
WORDS = "left, right, top, bottom, centre, all, random:SHARE"


class EditError(UserError, ValueError):
    """A picture or a mask that cannot be edited."""


def mask_of(word: str, shape: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Places `[H, W]` to be made anew (True), and the share of their tokens that stays.

    Args:
        word: left, right, top, bottom, centre (halves, and the middle quarter of the area), all, or
            random:SHARE, which makes that share of all tokens anew.
        shape: height and width of the picture.

    Raises:
        EditError: another word.
    """
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    words = {
        "left": columns < width / 2,
        "right": columns >= width / 2,
        "top": rows < height / 2,
        "bottom": rows >= height / 2,
        "centre": (abs(2 * rows + 1 - height) < height / 2)
        & (abs(2 * columns + 1 - width) < width / 2),
        "all": np.ones(shape, bool),
    }
    name, _, number = word.partition(":")
    if name == "random" and number:
        try:
            share = float(number)
        except ValueError:
            share = np.nan
        if not 0 <= share <= 1:
            raise EditError(f'--mask "{word}": the share must be a number from 0 to 1.')
        return words["all"], 1 - share
    if word not in words:
        raise EditError(f'--mask "{word}" is neither a picture that is there nor one of {WORDS}.')
    return words[word], 0.0


def read_mask(path: str, size: tuple[int, int], side: int) -> np.ndarray:
    """Places `[side, side]` that are lighter than half in a picture of `size` (width, height).

    It is cut as the picture that it is the mask of.

    Raises:
        EditError: it is not of that size.
    """
    image = _read_image(path, "--mask")
    if image.size != size:
        raise EditError(
            f'--mask "{path}" has {image.width} x {image.height} pixels, and --source '
            f"{size[0]} x {size[1]}; make them of the same size, white where it is to change."
        )
    return center_crop(image, side, 1)[..., 0] > 127


def _read_image(path: str, flag: str) -> Image.Image:
    try:
        return decode_image(as_path(path).read_bytes(), MAX_PIXELS)
    except (OSError, BrokenImage) as error:
        reason = getattr(error, "strerror", None) or error
        raise EditError(f'{flag} "{path}" cannot be read: {reason}.') from error


def hidden_tokens(modality, mask: np.ndarray, keep: float, seed: int) -> np.ndarray:
    """Which tokens `[n, N]` are drawn anew, given places `[n, H, W]`: of each row the same number.

    Which of them stay depends on the seed and the number of the row alone.

    Raises:
        EditError: `keep` is no share, or the rows hide different numbers of tokens.
    """
    if not 0 <= keep <= 1:
        raise EditError(f"keep is {keep}; it must be a share from 0 to 1.")
    hidden = modality.tokens_at(mask)  # [n, N]
    for index, row in enumerate(hidden):
        places = np.flatnonzero(row)
        stay = np.random.default_rng((seed, index)).permutation(places)
        row[stay[: round(keep * len(places))]] = False
    counts = hidden.sum(axis=1)
    if len(set(counts.tolist())) > 1:
        raise EditError(
            f"the masks hide from {counts.min()} to {counts.max()} tokens; edit pictures whose "
            "masks hide different numbers one after the other."
        )
    return hidden


def edit(
    experiment: Experiment,
    make_generator: Callable[[Known], Generator],
    params,
    examples: np.ndarray,
    mask: np.ndarray,
    conditions,
    seed: int,
    keep: float = 0.0,
    autoencoder: Autoencoder | None = None,
) -> np.ndarray:
    """Pictures with the places of a mask made anew; picture i depends on (seed, i) alone.

    Args:
        experiment: the model's configuration.
        make_generator: of tokens that are given.
        params: the model's parameters, on the mesh.
        examples: uint8 `[n, H, W, C]`.
        mask: bool `[H, W]` or `[n, H, W]`, True where anew.
        conditions: raw, one for each picture.
        seed: of everything random.
        keep: share of the hidden tokens that stays.
        autoencoder: for models of latents.

    Returns:
        uint8 `[n, H, W, C]`; equal to `examples` outside the mask.
    """
    modality = experiment.modality
    mask = np.broadcast_to(np.asarray(mask, bool), examples.shape[:-1])
    hidden = hidden_tokens(modality, mask, keep, seed)
    if not hidden[0].any():
        return examples.copy()
    inputs = examples if autoencoder is None else autoencoder.encode(examples)[:, 0]
    tokens = np.asarray(jax.jit(modality.tokenize)(inputs))  # [n, N, C]
    generator = make_generator(Known(tokens, ~hidden))
    images = generator.images(params, conditions, seed)["images"]
    return np.where(mask[..., None], images, examples)


def run_edit(
    experiment: Experiment,
    workdir: str,
    source: str,
    mask: str,
    out: str,
    keep: float = 0.0,
    overwrite: bool = False,
) -> list[epath.Path]:
    """Edit a picture with the latest checkpoint, once per label that is asked for; paths written.

    Args:
        experiment: the configuration; `sample.labels` and `sample.count` say what is drawn.
        workdir: of the checkpoint.
        source: the picture, cut and resized as training pictures are.
        mask: a picture of the same size, white where it is to change, or a word (`mask_of`).
        out: the png or npz file to write, or a folder (it ends in "/") for a file per result.
        keep: share of the tokens under the mask that stays.
        overwrite: replace files that were not made by sampling, too.

    Raises:
        EditError: a picture or a mask that cannot be edited.
        ConfigError, CheckpointError, PathError: as `run_sample`.
    """
    check_pictures(experiment, out, latents_only=False)
    picture = _read_image(source, "--source")
    model = latest_model(experiment, workdir)
    experiment = experiment.completed_by(model.config)
    side, _, channels = experiment.picture_shape
    if as_path(mask).exists():
        places = read_mask(mask, picture.size, side)
    else:
        places, stays = mask_of(mask, (side, side))
        keep = 1 - (1 - stays) * (1 - keep)
    out = out or f"{workdir}/samples/edit.png"
    target = check_target(out, workdir, overwrite)
    check_writable(target.parent, "--out")
    mesh = sharding.make_mesh(experiment.mesh)
    needs_decoder = experiment.modality.needs_decoder
    decoder = Autoencoder(experiment.autoencoder, mesh) if needs_decoder else None
    params = model.restore(placed_params(experiment, mesh))
    conditions, seed = experiment.sample_conditions, experiment.sample.seed
    given = center_crop(picture, side, channels)  # [H, W, C]
    examples = np.repeat(given[None], count_of(conditions), axis=0)

    def make_generator(known: Known) -> Generator:
        return Generator(experiment, mesh, decoder, progress=True, known=known)

    images = edit(
        experiment, make_generator, params, examples, places, conditions, seed, keep, decoder
    )
    settings = {
        "step": model.step,
        "model": describe_network(experiment),
        "sample": dataclasses.asdict(experiment.sample),
        "edit": {"source": source, "mask": mask, "keep": keep},
    }
    return _write(target, out, experiment, given, places, images, conditions, settings)


def _write(target: epath.Path, out: str, experiment, given, places, images, conditions, settings):
    """Write an npz file and a grid, with a file of each result where `out` is a folder."""
    png, npz = output_paths(target)
    write_npz(npz, {MEMBERS["images"]: images} | npz_members(conditions, settings))
    hidden = np.where(places[..., None], np.uint8(GREY), given)
    titles = experiment.titles(conditions)
    shown = np.concatenate([given[None], hidden[None], images])[:MAX_GRID]
    grid = label_grid(shown, ["given", "hidden", *titles][: len(shown)])
    save_png(png, grid, {"command": command_line(), "settings": json.dumps(settings)})
    if not out.endswith("/"):
        return [png, npz]
    for number, title in enumerate(titles):
        stem = target.parent / numbered(number, title)
        experiment.modality.save({"images": images}, number, stem)
    return [png, npz, target.parent]
