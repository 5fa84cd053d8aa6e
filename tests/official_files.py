"""Files as the authors' program writes them, a config that fits them, and what an import leaves."""

import argparse

import jax
import numpy as np
import torch
from conftest import Parity
from tiny import CONFIGS

from djepa_jax import main as cli
from djepa_jax.checkpoints.checkpointer import Checkpoints, read_meta
from djepa_jax.checkpoints.restore import restore_state
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import sharding
from djepa_jax.training.initial_state import abstract_state


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


def config_of(parity: Parity, *extra: str) -> Experiment:
    """That config."""
    return cli.parse(["djepa_jax", "--workdir=unused", *flags_of(parity, *extra)])[1]


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


def read_workdir(workdir, experiment: Experiment, step: int | None = None) -> tuple[dict, int]:
    """The parts of the training state in a workdir's checkpoint (the latest), by name, and its
    step.
    """
    abstract = abstract_state(experiment, sharding.make_mesh((1, 1, 1), jax.devices()[:1]))
    checkpoints = Checkpoints(workdir)
    folder = checkpoints.folder(checkpoints.latest_step() if step is None else step)
    meta = read_meta(folder)
    return restore_state(folder, abstract, meta), meta.step


def assert_same(actual: dict, expected: dict) -> None:
    """Nested dicts of arrays that agree bit by bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
