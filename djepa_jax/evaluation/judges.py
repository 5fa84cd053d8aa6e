"""Which metric judges samples: by the name in `config.evaluation.kind`, and what the data allow."""

import contextlib

import jax
import numpy as np

from djepa_jax.checkpoints.restore import latest_model
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.core.models.text import Reader
from djepa_jax.data.records import Source
from djepa_jax.data.sources import names_data, open_training_data
from djepa_jax.evaluation.features import FEATURES, FROM_FILE, INSTALLED, TRAINED
from djepa_jax.evaluation.metrics import METRICS, Metric
from djepa_jax.evaluation.metrics.pictures import MAX_REAL, Pictures, is_picture
from djepa_jax.evaluation.metrics.several import Several
from djepa_jax.evaluation.previews import Previews
from djepa_jax.runtime import distributed
from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.progress import say

BY_CLASS = ("small_images", "spoken_digits", "moving_digits", *TRAINED)
MIN_PER_CLASS = 20  # pictures that a classifier is to learn from, for "auto" to take it


def settled(experiment: Experiment, source) -> Experiment:
    """One whose `evaluation.kind`, where that is "auto", is what the data can be judged by."""
    if experiment.evaluation.kind != "auto":
        return experiment
    kind, classes = "none", experiment.data.num_classes
    count = 0 if source is None else len(source)
    if not hasattr(source, "images"):
        count = min(count, MAX_REAL)
    if not count or not is_picture(source[0]["example"]):
        why = "the data are no pictures"
    elif isinstance(experiment.network.conditioner, Reader):
        why = 'the model is told texts; "captions" judges these'
    elif classes < 2:
        why = "there is one class"
    elif count < MIN_PER_CLASS * classes:
        why = f"{classes} classes take {MIN_PER_CLASS * classes:,} pictures, these are {count:,}"
    else:
        kind, why = "classifier", f"{count:,} pictures of {classes} classes"
    if distributed.is_main_process():
        say(f'config.evaluation.kind "auto" is {kind}: {why}')
    return experiment.updated({"evaluation.kind": kind})


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
    kinds = settings.kind.split("+")
    if len(set(kinds)) < len(kinds) or not {*kinds} <= {*METRICS, *FEATURES}:
        raise ConfigError(
            f'config.evaluation.kind is "{settings.kind}"; it must be none, auto, or one or '
            f"several, joined by +, of {', '.join([*METRICS, *FEATURES])}."
        )
    if settings.weights and len({*kinds} & {*FROM_FILE}) > 1:
        raise ConfigError(
            f'config.evaluation.kind is "{settings.kind}", and config.evaluation.weights names '
            f"one file; judge by {' and '.join(FROM_FILE)} one after the other."
        )
    metrics = {kind: _open_one(kind, experiment, source, workdir) for kind in kinds}
    return Several(metrics) if len(metrics) > 1 else metrics[settings.kind]


def _open_one(kind: str, experiment: Experiment, source, workdir) -> Metric:
    settings = experiment.evaluation
    if settings.reference and kind in (*METRICS, *TRAINED):
        raise ConfigError(
            f'config.evaluation.kind is "{settings.kind}", and config.evaluation.reference is of a '
            f"network whose weights stay as they are; use {', '.join((*INSTALLED, *FROM_FILE))}."
        )
    if isinstance(experiment.network.conditioner, Reader) and kind in BY_CLASS:
        raise ConfigError(
            f'config.evaluation.kind "{kind}" judges by classes, and this model is told texts; use '
            "captions, speech (of recordings), or none."
        )
    if kind in METRICS and hasattr(METRICS[kind], "from_settings"):
        return METRICS[kind].from_settings(source, settings, workdir)
    if kind in METRICS:
        return METRICS[kind].from_data(source)
    if kind in TRAINED and experiment.data.num_classes < 2:
        raise ConfigError(
            f'config.evaluation.kind "{kind}" learns to tell classes apart, and these '
            f"data have {experiment.data.num_classes}; use {', '.join(INSTALLED)}."
        )
    if settings.reference and experiment.lacks_decoder:
        raise ConfigError(
            "config.autoencoder.path is empty, and samples are latents, of which it makes the "
            "pictures to judge; name it."
        )
    turn = jax.tree.leaves(experiment.network.conditioner.in_turn(2))[0]
    labelled = bool(np.any(turn[0] != turn[1]))
    reference = (settings.reference, experiment.picture_shape)
    modality = experiment.modality
    if source is not None and not modality.needs_decoder and modality.example_dtype != np.uint8:
        source = Previews(source, modality)
    beside = kind not in FROM_FILE and not {*settings.kind.split("+")}.isdisjoint(FROM_FILE)
    weights = "" if beside else settings.weights  # which are another network's
    return Pictures(kind, source, weights, workdir, labelled, *reference)


def open_to_judge(experiment: Experiment, workdir: str) -> tuple[Experiment, Source | None]:
    """The experiment, completed, and the data to judge by, None if it is by a file alone.

    ConfigError tells of an evaluation that is not configured, or not of these data.
    """
    if experiment.evaluation.reference and not names_data(experiment.data):
        stored = latest_model(experiment, workdir).config
        source, experiment = None, experiment.completed_by(stored)
    else:
        source, experiment = open_training_data(experiment)
    experiment = settled(experiment, source)
    if open_metric(experiment, source) is None:
        remedy = "there is no metric for these data: look at samples (--mode=sample)"
        for name in (*INSTALLED, *METRICS, *TRAINED):  # the last that can is the best
            with contextlib.suppress(ValueError, UserError):  # it cannot judge them
                open_metric(experiment.updated({"evaluation.kind": name}), source)
                remedy = f"add --config.evaluation.kind={name}"
        raise ConfigError(f'config.evaluation.kind is "none"; {remedy}.')
    return experiment, source
