"""Samples in files that people look at: labelled grids as PNG, arrays as npz."""

import io
import json
import math
import os
import zipfile
import zlib

import jax
import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from djepa_jax.config.experiment import Experiment
from djepa_jax.config.flags import command_line
from djepa_jax.runtime.storage import as_path, write_bytes, write_npz

ENDINGS = (".png", ".npz")
SOUND = ".wav"
MAX_GRID = 100  # pictures in a grid
GRID_GAP = 2
MIN_TILE = 64
LABEL_HEIGHT = 14
MEMBERS = {"images": "arr_0"}  # of an npz file, as ADM's evaluation wants them


def label_grid(images: np.ndarray, labels: list[str], columns: int | None = None) -> np.ndarray:
    """Pictures `[n, H, W, C]` uint8 in a grid, each with its label above: uint8 `[H', W', 3]`.

    Small pictures are enlarged without smoothing.
    """
    _, tall, wide, _ = images.shape
    columns = columns or math.ceil(math.sqrt(len(images) * tall / wide))
    rows = math.ceil(len(images) / columns)
    scale = max(1, math.ceil(MIN_TILE / images.shape[1]))
    height, width = images.shape[1] * scale, images.shape[2] * scale
    step_x, step_y = width + GRID_GAP, height + LABEL_HEIGHT + GRID_GAP
    size = (columns * step_x + GRID_GAP, rows * step_y + GRID_GAP)
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(index, columns)
        x, y = GRID_GAP + column * step_x, GRID_GAP + row * step_y
        draw.text((x + 1, y), _fitted(label, font, width), fill="black", font=font)
        tile = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB")
        canvas.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x, y + LABEL_HEIGHT))
    return np.asarray(canvas)


def _fitted(text: str, font, width: int) -> str:
    """The text, or as much of its beginning as is no wider than `width` pixels."""
    while font.getlength(text) > width:
        text = text[:-2] + "\u2026" if len(text) > 1 else ""
    return text


def save_png(path: os.PathLike, image: np.ndarray, texts: dict[str, str]) -> None:
    """Write a picture with text entries (the command that made it, its settings)."""
    path, buffer = as_path(path), io.BytesIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text.encode(errors="backslashreplace").decode())  # any path
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    write_bytes(path, buffer.getvalue())


def save_grid(
    png: epath.Path, experiment: Experiment, arrays: dict, conditions, settings: dict
) -> np.ndarray | None:
    """Write the first samples, each under its title: uint8 `[H', W', 3]`; None if unseen."""
    first = {name: array[:MAX_GRID] for name, array in arrays.items()}
    pictures = experiment.modality.preview(first)
    if pictures is None:
        return None
    grid = label_grid(pictures, experiment.titles(conditions)[: len(pictures)])
    save_png(png, grid, {"command": command_line(), "settings": json.dumps(settings)})
    return grid


def output_paths(out: epath.Path) -> tuple[epath.Path, epath.Path]:
    """The grid's and the arrays' file for a name given with an ending that is known, or none."""
    ending = out.suffix.lower()
    base = out.with_suffix("") if ending in (*ENDINGS, SOUND) else out
    return tuple(out if ending == e else base.with_name(base.name + e) for e in ENDINGS)


def npz_members(conditions, settings: dict) -> dict[str, np.ndarray]:
    """What goes into an npz file beside the samples: `arr_1` the conditions, as in ADM's files."""
    leaves = jax.tree.leaves(conditions)
    further = {f"condition_{i + 1}": np.asarray(leaf) for i, leaf in enumerate(leaves[1:])}
    return {"arr_1": np.asarray(leaves[0]), "settings": np.asarray(json.dumps(settings))} | further


def save_samples(
    out: epath.Path, experiment: Experiment, arrays: dict, conditions, settings: dict
) -> np.ndarray | None:
    """Write `OUT.npz` and a grid `OUT.png`; the grid, None if there is nothing to see."""
    out.parent.mkdir(parents=True, exist_ok=True)
    png, npz = output_paths(out)
    named = {MEMBERS.get(name, name): array for name, array in arrays.items()}
    write_npz(npz, named | npz_members(conditions, settings))
    return save_grid(png, experiment, arrays, conditions, settings)


def stored_settings(npz: epath.Path) -> dict | None:
    """The settings in a file that `save_samples` wrote; None if it cannot be read."""
    try:
        with npz.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            settings = json.loads(str(arrays["settings"]))
            return settings if isinstance(settings, dict) else None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error):
        return None
