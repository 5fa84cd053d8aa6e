"""The `--mode=evaluate` command, and the same at the end of training."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable

import jax
import numpy as np
import optax
from etils import epath

from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.checkpoints.restore import latest_model, placed_params
from djepa_jax.config.convert import ConfigError, flatten
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.presets import CFG_SCALES, PUBLISHED_SHAPE, preset_values
from djepa_jax.config.stored import LATER
from djepa_jax.core import sharding
from djepa_jax.data.records import Source, digest_of
from djepa_jax.data.sources import names_data, open_training_data
from djepa_jax.evaluation.features import FEATURES, FROM_FILE, INSTALLED, TRAINED
from djepa_jax.evaluation.metrics import METRICS, Metric
from djepa_jax.evaluation.metrics.pictures import Pictures
from djepa_jax.evaluation.previews import Previews
from djepa_jax.runtime import distributed
from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.progress import say
from djepa_jax.runtime.storage import as_path, write_json, write_npz
from djepa_jax.sampling.generator import Generator, count_of, never

FILE_NAME, PARTIAL_NAME = "evaluation.json", "evaluation_partial.npz"
SAVE_EVERY = 300.0  # seconds between what a killed evaluation goes on from
# Keys that records of earlier versions do not have
ADDED = ("loss", "compute_dtype", "data", "network")


def open_metric(experiment: Experiment, source, workdir="") -> Metric | None:
    """The metric that `evaluation.kind` names, empty; None for "none".

    Raises:
        ConfigError: there is none of that name.
        ValueError, MetricError: the data cannot be used for it, or weights are missing.
    """
    settings = experiment.evaluation
    if settings.kind == "none":
        return None
    if experiment.sample.mix:
        raise ConfigError(
            "config.sample.mix asks for several classes at once, and samples are judged one class "
            "at a time; leave it out, or add --config.evaluation.kind=none."
        )
    if settings.reference and settings.kind in (*METRICS, *TRAINED):
        raise ConfigError(
            f'config.evaluation.kind is "{settings.kind}", and config.evaluation.reference is of a '
            f"network whose weights stay as they are; use {', '.join((*INSTALLED, *FROM_FILE))}."
        )
    if settings.kind in METRICS:
        return METRICS[settings.kind].from_data(source)
    if settings.kind not in FEATURES:
        raise ConfigError(
            f'config.evaluation.kind is "{settings.kind}"; it must be one of none, '
            f"{', '.join([*METRICS, *FEATURES])}."
        )
    if settings.kind in TRAINED and experiment.data.num_classes < 2:
        raise ConfigError(
            f'config.evaluation.kind "{settings.kind}" learns to tell classes apart, and these '
            f"data have {experiment.data.num_classes}; use {', '.join(INSTALLED)}."
        )
    if settings.reference and experiment.lacks_decoder:
        raise ConfigError(
            "config.autoencoder.path is empty, and samples are latents, of which it makes the "
            "pictures to judge; name it."
        )
    turn = jax.tree.leaves(experiment.network.conditioner.in_turn(2))[0]
    labelled = bool(turn[0] != turn[1])
    reference = (settings.reference, experiment.picture_shape)
    modality = experiment.modality
    if source is not None and not modality.needs_decoder and modality.example_dtype != np.uint8:
        source = Previews(source, modality)
    return Pictures(settings.kind, source, settings.weights, workdir, labelled, *reference)


def identity(params, experiment: Experiment, step: int, autoencoder: str = "") -> dict:
    """What a record or a grid is of: step, sampler settings, and a number that tells weights apart.

    Of latents, there is the autoencoder that decodes them, too, by its sha256.
    """
    norm = float(jax.jit(optax.tree.norm)(params))
    decoder = {"autoencoder": autoencoder} if experiment.modality.needs_decoder else {}
    sample = dataclasses.asdict(experiment.sample).items()
    settings = {
        # Keys that say nothing are not in records of earlier versions
        "sample": {key: value for key, value in sample if LATER["sample"].get(key) != value},
        "loss": dataclasses.asdict(experiment.token_loss),  # with options of its sampler
        "compute_dtype": experiment.compute_dtype,
    }
    return {"step": step, "weights": "ema", "ema_norm": norm} | settings | decoder


def is_of(record: dict, expected: dict) -> bool:
    """Whether the record of an evaluation or a grid is of what `identity` gives."""
    expected = json.loads(json.dumps(expected))
    return {key: expected[key] for key in ADDED if key in expected} | record == expected


def subject(experiment: Experiment, generator: Generator, params, source, step: int) -> dict:
    """What an evaluation is of: the `identity`, its own settings, and a checksum of the data."""
    own = experiment.evaluation
    settings = {
        # Keys that say nothing are not in records of earlier versions
        "evaluation": {
            key: value
            for key, value in vars(own).items()
            if key != "reference_count" and value not in ("", "none")
        },
        "data": "" if source is None else digest_of(source),
    }
    if own.kind in FROM_FILE:
        settings["network"] = file_sha256(own.weights)
    if own.reference:
        settings["reference"] = file_sha256(own.reference)
    return identity(params, experiment, step, generator.autoencoder_sha256) | settings


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

    All processes sample; process 0 judges and writes, and the others' record is empty. One that was
    killed goes on from what it wrote last, to the same figures.

    Raises:
        Stopped: `should_stop`, asked before every batch, said so; there is no new record.
    """
    metric = open_metric(experiment, source, workdir)
    of = subject(experiment, generator, params, source, step)
    _take_in_samples(metric, experiment, generator, params, of, workdir, should_stop)
    if not distributed.is_main_process():
        return {}
    record = {"metrics": metric.result()} | of
    judged_by = metric.details() if hasattr(metric, "details") else {}
    if caveats := preset_caveats(experiment):
        judged_by["caveats"] = [*judged_by.get("caveats", []), *caveats]
    record |= {"judged_by": judged_by} if judged_by else {}
    write_json(as_path(workdir) / FILE_NAME, record)
    (as_path(workdir) / PARTIAL_NAME).unlink(missing_ok=True)
    return record


def _take_in_samples(metric, experiment, generator, params, of: dict, workdir, should_stop) -> None:
    """Give a metric all samples, from where one that was killed had come to."""
    settings, is_main = experiment.evaluation, distributed.is_main_process()
    conditions = experiment.network.conditioner.in_turn(settings.count)
    partial, keeps = as_path(workdir) / PARTIAL_NAME, hasattr(metric, "restore")
    state = _read_partial(partial, of) if keeps and is_main else {}
    start = distributed.run_on_main(lambda: int(state.get("count", 0)))
    if start:
        metric.restore(state)
    saved = time.monotonic()
    for arrays in generator.batches(params, conditions, settings.seed, start, should_stop):
        rows = slice(start, start + count_of(arrays))
        if (pictures := experiment.modality.preview(arrays)) is not None:
            arrays["images"] = pictures
        metric.update(arrays, jax.tree.map(lambda leaf, rows=rows: leaf[rows], conditions))
        start = rows.stop
        if keeps and is_main and time.monotonic() > saved + SAVE_EVERY:
            _write_partial(partial, of, metric.state())
            saved = time.monotonic()


def _write_partial(path: epath.Path, of: dict, state: dict[str, np.ndarray]) -> None:
    """Keep what a metric has taken in; where it cannot be kept, sampling goes on all the same."""
    try:
        write_npz(path, state | {"of": np.asarray(json.dumps(of))})
    except OSError as error:
        say(f"WARNING: {path} cannot be written ({error}); if killed, it would begin anew")


def _read_partial(path: epath.Path, of: dict) -> dict[str, np.ndarray]:
    """What a killed evaluation of the very same thing has kept; empty if there is none."""
    if not path.exists():
        return {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            state = dict(arrays)
        return state if str(state.pop("of")) == json.dumps(of) else {}
    except Exception as error:  # damaged files make numpy fail in ways that nobody has listed
        say(f"WARNING: {path} cannot be read ({error}); the evaluation begins anew")
        return {}


def preset_caveats(experiment: Experiment) -> list[str]:
    """Why figures are not those that `evaluation.preset` promises."""
    settings, own = experiment.evaluation, flatten(experiment.to_dict())
    name = settings.preset
    found = [
        f"preset {name} has {key} {value}, here it is {own[key]}"
        for key, value in preset_values(name, experiment.model.size).items()
        if own[key] != value
    ]
    if name in ("none", "trend"):
        return found
    if name == "paper_cfg" and experiment.model.size not in CFG_SCALES:
        found.append(f"the paper has no guidance for size {experiment.model.size}")
    if (shape := experiment.picture_shape) != PUBLISHED_SHAPE:
        found.append(
            f"not comparable with published figures: pictures are {shape}, not {PUBLISHED_SHAPE}"
        )
    if not settings.reference:
        found.append("no evaluation.reference: published figures take ADM's statistics")
    return found


def describe(metrics: dict[str, float]) -> str:
    """Figures on a line, with their intervals where they have one."""
    shown = []
    for name, value in metrics.items():
        if f"{name}_low" in metrics:
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            shown.append(f"{name} {value:.3f} ({low:.3f} to {high:.3f})")
        elif not name.endswith(("_low", "_high")):
            shown.append(f"{name} {value:.3f}")
    return ", ".join(shown)


def read_evaluation(
    experiment: Experiment, generator: Generator, params, source, step: int, workdir
) -> dict | None:
    """The workdir's record, if it can be read and is of these very weights, settings and data."""
    expected = subject(experiment, generator, params, source, step)
    try:
        record = json.loads((as_path(workdir) / FILE_NAME).read_text())
        found = {key: record[key] for key in ("metrics", "judged_by") if key in record}
        return record if found and is_of(record, found | expected) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_to_judge(experiment: Experiment, workdir: str) -> tuple[Experiment, Source | None]:
    """The experiment, completed, and the data to judge by, None if it is by a file alone.

    ConfigError tells of an evaluation that is not configured, or not of these data.
    """
    if experiment.evaluation.reference and not names_data(experiment.data):
        stored = latest_model(experiment, workdir).config
        source, experiment = None, experiment.completed_by(stored)
    else:
        source, experiment = open_training_data(experiment)
    if open_metric(experiment, source) is None:
        remedy = "there is no metric for these data: look at samples (--mode=sample)"
        for name in (*INSTALLED, *METRICS, *TRAINED):  # the last that can is the best
            with contextlib.suppress(ValueError, UserError):  # it cannot judge them
                open_metric(experiment.updated({"evaluation.kind": name}), source)
                remedy = f"add --config.evaluation.kind={name}"
        raise ConfigError(f'config.evaluation.kind is "none"; {remedy}.')
    return experiment, source


def run_evaluate(
    experiment: Experiment, workdir: str, overwrite: bool = False
) -> tuple[dict, epath.Path, bool]:
    """Evaluate the latest checkpoint of a workdir: the record, where it is, whether it is new.

    A record of the same weights, settings and data is given back, unless `overwrite` is set.

    With `evaluation.reference`, and without a `data.path` where the source needs one, no data are
    read.

    Raises:
        ConfigError: no evaluation is configured, or another model than the checkpoint's.
        CheckpointError: there is no usable checkpoint.
    """
    experiment, source = open_to_judge(experiment, workdir)
    mesh = sharding.make_mesh(experiment.mesh)
    model = latest_model(experiment, workdir)
    params = model.restore(placed_params(experiment, mesh))
    generator = Generator(experiment, mesh, progress=True)
    arguments = (experiment, generator, params, source, model.step, workdir)
    record = None if overwrite else read_evaluation(*arguments)
    is_new = not distributed.run_on_main(lambda: int(record is not None))
    if is_new:
        record = evaluate(*arguments)
    return record, as_path(workdir) / FILE_NAME, is_new
