"""Pictures: labelled grids, PNG files."""

import io
import math
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from djepa_jax.runtime.storage import as_path, write_bytes

GRID_GAP = 2
MIN_TILE = 64
LABEL_HEIGHT = 14


def label_grid(images: np.ndarray, labels: list[str], columns: int | None = None) -> np.ndarray:
    """Pictures `[n, H, W, C]` uint8 in a grid, each with its label above: uint8 `[H', W', 3]`.

    Small pictures are enlarged without smoothing.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = max(1, math.ceil(MIN_TILE / images.shape[1]))
    height, width = images.shape[1] * scale, images.shape[2] * scale
    rows = math.ceil(len(images) / columns)
    size = (
        columns * (width + GRID_GAP) + GRID_GAP,
        rows * (height + LABEL_HEIGHT + GRID_GAP) + GRID_GAP,
    )
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(index, columns)
        x, y = (
            GRID_GAP + column * (width + GRID_GAP),
            GRID_GAP + row * (height + LABEL_HEIGHT + GRID_GAP),
        )
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
        info.add_text(name, text)
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    write_bytes(path, buffer.getvalue())
