"""The smallest useful run of the digits configuration, as command line flags and as a config."""

import pathlib

import numpy as np

from djepa_jax.config.experiment import Experiment
from djepa_jax.config.flags import read_config
from djepa_jax.main import main

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
CONFIG = str(CONFIGS / "digits.py")
TINY = (
    "--config.num_steps=3",
    "--config.batch_size=16",
    "--config.log_every=1",
    "--config.sample_every=1000",
    "--config.checkpoint_every=100",
    "--config.model.width=16",
    "--config.model.encoder_depth=1",
    "--config.model.predictor_depth=1",
    "--config.model.num_heads=2",
    "--config.model.denoiser_depth=1",
    "--config.model.denoiser_width=16",
    "--config.model.scan_unroll=1",
    "--config.optimizer.warmup_steps=2",
    "--config.sample.count=10",
    "--config.sample.batch_size=40",
    "--config.sample.num_ar_steps=3",
    "--config.sample.num_denoise_steps=3",
    "--config.sample.num_segments=1",
    "--config.evaluation.kind=small_images",
    "--config.evaluation.count=70",
)


def load_config(name: str, *extra: str) -> Experiment:
    """A shipped config by name, perhaps with :variant, with further flags."""
    return read_config(name, None, extra)


def tiny_config(*extra: str, variant: str = "flow") -> Experiment:
    """The tiny digits config with further flags."""
    return load_config(f"digits:{variant}", *TINY, *extra)


def run(*arguments: str) -> int:
    """The command line with the tiny digits config and further flags; its exit status."""
    return main(["djepa_jax", f"--config={CONFIG}", *TINY, *arguments])


def arrays_of(path: pathlib.Path) -> dict[str, np.ndarray]:
    """What an npz file holds."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
