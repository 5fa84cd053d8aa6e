"""A modality of small pictures and sounds, files of both, and the shipped configuration on them."""

import pathlib

import numpy as np
from tiny import TINY, load_config

from djepa_jax.config.experiment import Experiment
from djepa_jax.core.modalities.audio import AudioMel
from djepa_jax.core.modalities.image import ImagePixels
from djepa_jax.core.modalities.joint import Joint

PAIRS = Joint(ImagePixels(8, 1, 4), AudioMel(mels=8, frames=8, patch_mels=4, patch_frames=4))
COUNT = 60  # of pictures and of sounds, of three classes


def write_files(folder: pathlib.Path) -> dict[str, str]:
    """Pictures of 6 x 6 whose brightness is their number, and sounds as loud as theirs."""
    labels = np.arange(COUNT) * 7 % 3
    images = np.tile(np.arange(1, COUNT + 1, dtype=np.uint8)[:, None, None], (1, 6, 6))
    samples = np.repeat(100 * np.arange(1, COUNT + 1), 700).astype(np.int16)
    offsets = 700 * np.arange(COUNT + 1)
    np.savez(folder / "pictures.npz", images=images, labels=labels)
    sounds = {"samples": samples, "offsets": offsets, "digit": labels}
    np.savez(folder / "sounds.npz", **sounds)
    return {name: str(folder / f"{name}.npz") for name in ("pictures", "sounds")}


def pairs_flags(files: dict[str, str], *extra: str) -> list[str]:
    """Flags that make the shipped configuration small, and let it read such files."""
    options = {"second.mels": 8, "second.frames": 8, "second.patch_mels": 4}
    options |= {"second.patch_frames": 4, "second.hop": 64, "first.modality": "image_lapped"}
    flags = [f"--config.data.options.{name}={value}" for name, value in options.items()]
    flags += [f"--config.data.source_options.{name}={path}" for name, path in files.items()]
    sizes = ["--config.data.image_size=8", "--config.data.patch_size=4"]
    return [*TINY, *flags, *sizes, "--config.evaluation.kind=none", *extra]


def pairs_config(files: dict[str, str], *extra: str) -> Experiment:
    """The shipped configuration, small."""
    return load_config("say_and_draw", *pairs_flags(files, *extra))
