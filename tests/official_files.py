"""Files as the authors' program writes them, the command line that imports them, and what a workdir
then holds.
"""

import argparse
import pathlib

import jax
import numpy as np
import torch
from conftest import Parity
from tiny import CONFIGS

from djepa_jax import main as cli
from djepa_jax.checkpoints.checkpointer import Checkpoints, read_meta
from djepa_jax.checkpoints.restore import restore_state
from djepa_jax.config import experiment as configuration
from djepa_jax.core import sharding
from djepa_jax.core.train_step import init_state


def flags_of(parity: Parity, *extra: str) -> list[str]:
    """The flags of a config that describes the authors' model of a fixture."""
    c = parity.official
    values = {
        "data.modality": "image_latents",
        "data.image_size": c["img_size"] // c["vae_stride"],
        "data.channels": c["vae_embed_dim"],
        "data.patch_size": c["patch_size"],
        "data.num_classes": c["class_num"],
        "model.width": c["encoder_embed_dim"],
        "model.encoder_depth": c["encoder_depth"],
        "model.predictor_depth": c["decoder_depth"],
        "model.num_heads": c["encoder_num_heads"],
        "model.denoiser_depth": c["diffloss_d"],
        "model.denoiser_width": c["diffloss_w"],
        "model.num_prefix_tokens": c["buffer_size"],
        "evaluation.kind": "none",
    }
    variant = {"gauss": "diffusion", "flow": "flow"}[c["diffloss"]]
    return [
        f"--config={CONFIGS / 'digits.py'}:{variant}",
        *(f"--config.{k}={v}" for k, v in values.items()),
        *extra,
    ]


def run_import(source, workdir, flags: list[str]) -> int:
    """The exit code of an import by the command line."""
    return cli.main(
        ["djepa_jax", "--mode=import", f"--source={source}", f"--workdir={workdir}", *flags]
    )


def as_torch(
    tensors: dict[str, np.ndarray], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A state dict."""
    return {name: torch.from_numpy(value.copy()).to(dtype) for name, value in tensors.items()}


def training_file(model: dict, average: dict, **more) -> dict:
    """What the authors' training program saves: plain containers, and the options as a
    Namespace.
    """
    options = argparse.Namespace(lr=8e-4, output_dir="runs/a", resume=None, betas=(0.9, 0.95))
    return {"model": model, "model_ema": average, "epoch": 7, "args": options, **more}


def renamed(tensors: dict, prefix: str) -> dict:
    """The same tensors with a prefix before each name."""
    return {prefix + name: value for name, value in tensors.items()}


def without(tensors: dict, *parts: str) -> dict:
    """The tensors whose names have none of the given parts."""
    return {
        name: value for name, value in tensors.items() if not any(part in name for part in parts)
    }


def read_workdir(workdir, flags: list[str], step: int | None = None) -> tuple[dict, int]:
    """The parts of the training state in a workdir's checkpoint (the latest), by name, and its
    step.
    """
    experiment = configuration.build(
        cli.parse(["djepa_jax", f"--workdir={workdir}", *flags]).config
    )
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    abstract = jax.eval_shape(lambda: init_state(experiment.train))
    shardings = sharding.state_shardings(abstract, mesh)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    checkpoints = Checkpoints(workdir)
    folder = checkpoints.latest_folder() if step is None else checkpoints.folder(step)
    meta = read_meta(folder)
    return restore_state(folder, placed, meta), meta.step


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Whether a workdir holds a finished step."""
    return workdir.exists() and Checkpoints(workdir).latest_step() is not None


def assert_same(actual: dict, expected: dict) -> None:
    """Nested dicts of arrays that agree bit by bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
