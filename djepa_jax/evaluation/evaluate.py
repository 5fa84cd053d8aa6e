"""The `--mode=evaluate` command, and the same at the end of training."""

import json
from collections.abc import Callable

import jax
import numpy as np
import optax

from djepa_jax.checkpoints.autoencoder import makes_latents
from djepa_jax.checkpoints.restore import latest_model, placed_params
from djepa_jax.config import experiment as configuration
from djepa_jax.core import sharding
from djepa_jax.data.sources import open_data
from djepa_jax.evaluation.metrics.small_images import check_judgeable, evaluate_images
from djepa_jax.runtime import distributed
from djepa_jax.runtime.storage import as_path, write_json
from djepa_jax.sampling.generator import Generator, never

FILE_NAME = "evaluation.json"


def identity(params, config, step: int, autoencoder: str = "") -> dict:
    """What a record or a grid is of: step, sampler settings and a number that other weights would
    not have.

    Of latents, there is the autoencoder, too, that makes pictures of them, by its sha256; empty
    where there is none.
    """
    norm = float(jax.jit(optax.tree.norm)(params))
    decoder = {"autoencoder": autoencoder} if makes_latents(config) else {}
    return {
        "step": step,
        "weights": "ema",
        "ema_norm": norm,
        "sample": config.sample.to_dict(),
    } | decoder


def evaluate(
    config,
    generator: Generator,
    params,
    source,
    step: int,
    workdir,
    should_stop: Callable[[], bool] = never,
) -> dict:
    """Judge class-balanced samples of the given parameters, and write `evaluation.json` into the
    workdir.

    All processes sample; process 0 judges and writes, and the others' record is empty.

    Raises:
        Stopped: `should_stop`, asked before every batch of samples, said so; nothing was written.
    """
    settings, num_classes = config.evaluation, config.data.num_classes
    labels = np.arange(settings.count) % num_classes
    samples = generator.images(
        params, labels, settings.seed, progress=True, should_stop=should_stop
    )["images"]
    of = identity(params, config, step) | {"evaluation": settings.to_dict()}
    if not distributed.is_main():
        return {}
    record = evaluate_images(samples, labels, source.images, source.labels) | of
    write_json(as_path(workdir) / FILE_NAME, record)
    return record


def read_evaluation(config, params, step: int, workdir) -> dict | None:
    """The workdir's record, if it can be read and is of these very weights and settings."""
    try:
        expected = identity(params, config, step) | {"evaluation": config.evaluation.to_dict()}
        record = json.loads((as_path(workdir) / FILE_NAME).read_text())
        figures = {name: record[name] for name in ("accuracy", "frechet_distance")}
        return record if record == figures | expected else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_evaluate(config, workdir: str) -> dict:
    """Evaluate the latest checkpoint of a workdir.

    Raises:
        ConfigError: the config names no evaluation, or another model than the checkpoint's.
        CheckpointError: there is no usable checkpoint.
    """
    experiment = configuration.build(config)
    if config.evaluation.kind == "none":
        raise configuration.ConfigError(
            'config.evaluation.kind is "none"; set it to "small_images" to evaluate.'
        )
    source = open_data(config, experiment.modality)
    check_judgeable(source)
    mesh = sharding.make_mesh(config.mesh)
    model = latest_model(config, workdir)
    params = model.restore(placed_params(experiment, mesh))
    generator = Generator(config, experiment, mesh)
    return evaluate(config, generator, params, source, model.step, workdir)
