"""The `--mode=evaluate` command, and the same at the end of training."""

import dataclasses
import json
from collections.abc import Callable

import jax
import optax
from etils import epath
from tqdm import tqdm

from djepa_jax.checkpoints.restore import latest_model, placed_params
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import sharding
from djepa_jax.data.sources import open_training_data
from djepa_jax.evaluation.metrics import METRICS, Metric
from djepa_jax.runtime import distributed
from djepa_jax.runtime.storage import as_path, write_json
from djepa_jax.sampling.generator import Generator, count_of, never

FILE_NAME = "evaluation.json"


def open_metric(experiment: Experiment, source) -> Metric | None:
    """The metric that `evaluation.kind` names, empty; None for "none".

    Raises:
        ConfigError: there is none of that name.
        ValueError: the data cannot be used for it.
    """
    kind = experiment.evaluation.kind
    if kind == "none":
        return None
    if kind not in METRICS:
        raise ConfigError(
            f'config.evaluation.kind is "{kind}"; it must be one of none, {", ".join(METRICS)}.'
        )
    return METRICS[kind].from_data(source)


def identity(params, experiment: Experiment, step: int, autoencoder: str = "") -> dict:
    """What a record or a grid is of: step, sampler settings, and a number that tells weights apart.

    Of latents, there is the autoencoder that decodes them, too, by its sha256.
    """
    norm = float(jax.jit(optax.tree.norm)(params))
    decoder = {"autoencoder": autoencoder} if experiment.modality.needs_decoder else {}
    sample = dataclasses.asdict(experiment.sample)
    return {"step": step, "weights": "ema", "ema_norm": norm, "sample": sample} | decoder


def evaluate(
    experiment: Experiment,
    generator: Generator,
    params,
    source,
    step: int,
    workdir,
    should_stop: Callable[[], bool] = never,
) -> dict:
    """Judge samples of the given parameters, every condition in turn; write `evaluation.json`.

    All processes sample; process 0 judges and writes, and the others' record is empty.

    Raises:
        Stopped: `should_stop`, asked before every batch, said so; nothing was written.
    """
    settings, metric = experiment.evaluation, open_metric(experiment, source)
    conditions = experiment.network.conditioner.in_turn(settings.count)
    start = 0
    batches = generator.batches(params, conditions, settings.seed, should_stop=should_stop)
    with tqdm(total=settings.count, desc="evaluation", unit="sample", disable=None) as bar:
        for arrays in batches:
            stop = start + count_of(arrays)
            rows = slice(start, stop)
            metric.update(arrays, jax.tree.map(lambda leaf, rows=rows: leaf[rows], conditions))
            bar.update(stop - start)
            start = stop
    of = identity(params, experiment, step) | {"evaluation": dataclasses.asdict(settings)}
    if not distributed.is_main_process():
        return {}
    record = {"metrics": metric.result()} | of
    write_json(as_path(workdir) / FILE_NAME, record)
    return record


def describe(metrics: dict[str, float]) -> str:
    """Figures on a line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


def read_evaluation(experiment: Experiment, params, step: int, workdir) -> dict | None:
    """The workdir's record, if it can be read and is of these very weights and settings."""
    settings = {"evaluation": dataclasses.asdict(experiment.evaluation)}
    expected = json.loads(json.dumps(identity(params, experiment, step) | settings))
    try:
        record = json.loads((as_path(workdir) / FILE_NAME).read_text())
        return record if record == {"metrics": record["metrics"]} | expected else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_evaluate(experiment: Experiment, workdir: str) -> tuple[dict, epath.Path]:
    """Evaluate the latest checkpoint of a workdir: the record, and where it is.

    Raises:
        ConfigError: no evaluation is configured, or another model than the checkpoint's.
        CheckpointError: there is no usable checkpoint.
    """
    if experiment.evaluation.kind == "none":
        raise ConfigError(
            f'config.evaluation.kind is "none"; set it to one of {", ".join(METRICS)} to evaluate.'
        )
    source, experiment = open_training_data(experiment)
    open_metric(experiment, source)
    mesh = sharding.make_mesh(experiment.mesh)
    model = latest_model(experiment, workdir)
    params = model.restore(placed_params(experiment, mesh))
    generator = Generator(experiment, mesh)
    record = evaluate(experiment, generator, params, source, model.step, workdir)
    return record, as_path(workdir) / FILE_NAME
