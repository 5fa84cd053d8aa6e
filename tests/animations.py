"""Animations and folders of them."""

import io
import pathlib

import numpy as np
from PIL import Image

FRAMES = np.random.default_rng(0).integers(0, 256, (4, 6, 12, 20, 3), np.uint8)  # four animations


def animation(frames: np.ndarray, kind: str = "WEBP") -> bytes:
    """Frames `[T, H, W, C]` as a file without loss."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    file, lossless = io.BytesIO(), {"lossless": True} if kind == "WEBP" else {}
    first.save(file, kind, save_all=True, append_images=others, **lossless)
    return file.getvalue()


def write(root: pathlib.Path, **others: bytes) -> pathlib.Path:
    """Two classes of two clips each, and further files."""
    files = {f"{'ab'[i // 2]}/{i}.webp": animation(clip) for i, clip in enumerate(FRAMES)}
    for name, data in (files | others).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root
