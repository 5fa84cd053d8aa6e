"""The `--mode=evaluate` command, and the same at the end of training."""

import pathlib

import numpy as np

from djepa_jax import config as configuration
from djepa_jax import sharding
from djepa_jax.checkpoint import write_json
from djepa_jax.data.sources import open_source
from djepa_jax.evaluation.small_images import evaluate_images
from djepa_jax.generate import Generator, load_ema

FILE_NAME = "evaluation.json"


def evaluate(config, generator: Generator, params, source, step: int, workdir, progress: bool = False) -> dict:
    """Judge class-balanced samples of the given parameters, and write `evaluation.json` into the workdir."""
    settings, num_classes = config.evaluation, config.data.num_classes
    labels = np.arange(settings.count) % num_classes
    samples = generator.images(params, labels, settings.seed, progress)["images"]
    record = evaluate_images(samples, labels, source.images, source.labels)
    record |= {"step": step, "weights": "ema", "evaluation": settings.to_dict(), "sample": config.sample.to_dict()}
    write_json(pathlib.Path(workdir) / FILE_NAME, record)
    return record


def run_evaluate(config, workdir: str) -> dict:
    """Evaluate the latest checkpoint of a workdir.

    Raises:
        ConfigError: the config names no evaluation, or another model than the checkpoint's.
        CheckpointError: there is no usable checkpoint.
    """
    experiment = configuration.build(config)
    if config.evaluation.kind == "none":
        raise configuration.ConfigError('config.evaluation.kind is "none"; set it to "small_images" to evaluate.')
    source = open_source(config.data.source, config.data.path, experiment.modality, config.data.num_classes)
    mesh = sharding.make_mesh(config.mesh)
    params, step = load_ema(config, experiment, workdir, mesh)
    return evaluate(config, Generator(config, experiment, mesh), params, source, step, workdir, progress=True)
