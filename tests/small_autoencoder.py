"""Autoencoders filled by a rule, and a tiny one beside the real ones: its weight files and the
caches made with it.
"""

import contextlib
import functools
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from flax import traverse_util
from photos import write_folder
from safetensors.numpy import save_file
from tiny import load_config

from djepa_jax.checkpoints import autoencoder
from djepa_jax.checkpoints.convert.autoencoder_kl import LATENT_DIFFUSION, names_of
from djepa_jax.core.models.autoencoder_kl import AUTOENCODERS, AutoencoderConfig, split_autoencoder

NAME = "small"  # as which tests register it
SMALL = AutoencoderConfig(
    channels=32, multipliers=(1, 2), num_blocks=1, encoder_attention=(1,), latent_channels=4
)
PIXELS, LATENTS = 16, 8  # sides of an image and of its latent map
FLAGS = (
    "--config.data.num_classes=2",
    "--config.data.class_names=",
    f"--config.data.image_size={LATENTS}",
    "--config.data.channels=4",
    "--config.sample.num_ar_steps=4",
    f"--config.prepare.image_size={PIXELS}",
    f"--config.autoencoder.name={NAME}",
    "--config.autoencoder.batch_size=8",
)


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of PyTorch's shape whose values depend on its name alone; the reference numbers were
    made with these.
    """
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) >= 2:
        return (values * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
    return (1 + 0.1 * values if name.endswith("weight") else 0.1 * values).astype(np.float32)


@functools.cache
def shapes_of(
    config: AutoencoderConfig, layout: str = LATENT_DIFFUSION
) -> dict[str, tuple[int, ...]]:
    """Names in a layout, and the shapes that PyTorch gives these tensors."""
    _, abstract = split_autoencoder(config)
    leaves, names = traverse_util.flatten_dict(abstract, sep="/"), names_of(config, layout)
    shapes = {names[path]: leaf.shape for path, leaf in leaves.items()}
    return {
        name: (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape
        for name, shape in shapes.items()
    }


def tensors(config: AutoencoderConfig = SMALL) -> dict[str, np.ndarray]:
    """An autoencoder in latent-diffusion layout."""
    return {name: fill(name, shape) for name, shape in shapes_of(config).items()}


def write_weights(path: pathlib.Path, **changes: np.ndarray) -> str:
    """The weight file of the small autoencoder."""
    save_file(tensors() | changes, path)
    return str(path)


def cache_config(weights: str, path: str, *flags: str, source: str = "folder"):
    """Settings to make a latent cache with the small autoencoder."""
    places = (
        f"--config.autoencoder.path={weights}",
        f"--config.prepare.source={source}",
        f"--config.prepare.path={path}",
    )
    with registered():  # the name is checked at once
        return load_config("default", *FLAGS, *places, *flags)


def folder_config(root: pathlib.Path):
    """Settings for a cache of twelve images in three shards, and what it is made of, below
    `root`.
    """
    images, weights = write_folder(root / "images"), write_weights(root / "small.safetensors")
    return cache_config(
        weights, images, "--config.prepare.shard_size=5", "--config.prepare.dtype=float32"
    )


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """With the small autoencoder beside the real ones, and functions that are compiled once for all
    caches.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AUTOENCODERS, NAME, SMALL)
        for name in ("make_encoder", "make_decoder"):
            patch.setattr(autoencoder, name, functools.cache(getattr(autoencoder, name)))
        yield


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    """All files of a cache but the locks."""
    found = {
        str(path.relative_to(folder)): path
        for path in folder.rglob("*")
        if path.is_file() and path.name[0] != "."
    }
    return {name: path.read_bytes() for name, path in sorted(found.items())}
