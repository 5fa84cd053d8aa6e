"""Configurations as they are stored beside weights, of this and of earlier versions."""

import contextlib
from collections.abc import Mapping

from etils import epath

from djepa_jax.config.convert import ConfigError, flatten
from djepa_jax.config.experiment import Experiment
from djepa_jax.core.models.djepa import SIZES

# 1: without a number; the numbers of a size written out, a loss's options in `sample`. Up to 2:
# folders that are called by numbers were counted in the order of text, 0, 1, 10, 11, 2.
FORMAT = 3
COUNTED_AS_TEXT = (1, 2)
FILE_NAME = "config.json"  # in a workdir
MAX_LISTED = 8  # models that an error names
# Keys that older configurations of format 1 lack, with what was done then.
ADDED = {
    "data": {
        "class_names": "",
        "latent_shift": 0.0,
        "max_broken": 100,
        "unconditional": False,
        "device_resident": False,
        "num_threads": 2,
        "staging": "",
        "options": {},
    },
    "prepare": {
        "source": "folder",
        "path": "",
        "image_size": 256,
        "shard_size": 4096,
        "dtype": "bfloat16",
        "max_broken": 100,
    },
    "autoencoder": {
        "name": "kl16",
        "path": "",
        "sha256": "",
        "batch_size": 32,
        "dtype": "bfloat16",
    },
    "debug": {"nans": False, "log_compiles": False, "profile_steps": 0, "profile_start": 10},
    "model": {"condition": "classes", "condition_options": {}},
    "sample": {"order": "random"},
}
# The same for configurations of any format.
LATER = {
    "data": {"source_options": {}, "labels": "", "captions": "", "held_out": 0.0},
    "loss": {"mask_modes": "random"},
    "optimizer": {"parts": "all"},
    "model": {"attention": "auto"},
    "sample": {"reveal": "cosine", "cfg_start": 0.0, "cfg_stop": 1.0}
    | {"final_denoise_steps": 0, "mix": "", "prompt": "", "reuse_unconditional": 1}
    | {"guide": "", "guide_scale": 1.5, "cfg_denoise_start": 0.0, "cfg_denoise_stop": 1.0},
    "evaluation": {"weights": "", "reference": "", "reference_count": 0, "preset": "none"}
    | {"trend_count": 1000, "captions": ""},
    "search": {"cfg_scale": (1.0, 1.5, 2.0, 3.0, 4.0), "temperature": (0.94, 0.97, 1.0)}
    | {"num_ar_steps": (), "num_denoise_steps": (), "sampler": (), "preset": "grid"}
    | {"count": 1000, "fine_count": 5000, "fine_cells": 5, "guide_scale": ()}
    | {"cfg_denoise_start": ()},
}
OPTIONS = {"diffusion": "clip_x0", "flow_matching": "time_shift"}  # once keys of `sample`
# What fixes the meaning of parameters: it must agree between a config and a checkpoint.
MODEL_KEYS = {
    "model": ("mlp_ratio", "num_prefix_tokens", "qk_norm", "condition", "condition_options"),
    "data": ("modality", "image_size", "channels", "patch_size", "num_classes", "options")
    + ("latent_scale", "latent_shift"),
}


def to_stored(experiment: Experiment) -> dict:
    """The configuration as nested dicts for a file."""
    return {"format": FORMAT, **experiment.to_dict()}


def from_stored(values: Mapping) -> Experiment:
    """The configuration that this or an earlier version has stored.

    Raises:
        ConfigError: it is of a later version, or damaged.
    """
    return Experiment.from_dict(upgrade(values))


def upgrade(values: Mapping) -> dict:
    """Stored values, whatever their format, as `Experiment.from_dict` takes them."""
    values = {key: dict(v) if isinstance(v, Mapping) else v for key, v in values.items()}
    values.setdefault("search", {})
    values.setdefault("keep_every", 0)
    for group, keys in LATER.items():
        if isinstance(values.get(group), dict):
            values[group] = keys | values[group]
    number = values.pop("format", 1)
    if number in (2, FORMAT):
        return values
    if number != 1:
        raise ConfigError(
            f"the stored configuration has format {number}, this version reads {FORMAT}."
        )
    try:
        return _from_format_1(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the stored configuration is damaged ({error}).") from error


def _from_format_1(values: dict) -> dict:
    for group, keys in ADDED.items():
        values[group] = keys | values.get(group, {})
    values["grad_accumulation_steps"] = values.pop("microbatches", 1)
    model, loss, sample = values["model"], values["loss"], values["sample"]
    for key, value in SIZES.get(model["size"], {}).items():
        model[key] = 0 if model[key] == value else model[key]
    loss.pop("jepa_weight above 0", None)
    moved = {name: sample.pop(name) for name in OPTIONS.values()}
    option = OPTIONS[loss["name"]]
    loss["options"] = {option: moved[option]}
    return values


def differences(stored: Experiment, current: Experiment) -> list[str]:
    """Lines "key: stored -> current" for every key whose value differs."""
    return changes(flatten(stored.to_dict()), flatten(current.to_dict()))


def model_differences(stored: Experiment, current: Experiment) -> list[str]:
    """The same for what fixes the meaning of parameters."""
    return changes(_identity(stored), _identity(current))


def _identity(experiment: Experiment) -> dict:
    values = {f"model.{key}": value for key, value in experiment.model.shape.items()}
    for group, keys in MODEL_KEYS.items():
        values |= {f"{group}.{key}": getattr(getattr(experiment, group), key) for key in keys}
    values["loss.name"] = experiment.loss.name
    return values | {"loss.jepa_weight above 0": experiment.loss.jepa_weight > 0}


def changes(stored: dict, current: dict) -> list[str]:
    """The same for values by dotted name."""
    names = sorted(stored.keys() | current.keys())
    absent = "(absent)"
    return [
        f"{name}: {stored.get(name, absent)} -> {current.get(name, absent)}"
        for name in names
        if stored.get(name) != current.get(name)
    ]


def models_near(path: epath.Path) -> str:
    """Words that name workdirs and exports where there is none: around a path, or inside it."""
    with contextlib.suppress(OSError):  # a folder that must not be listed
        for places in ([path.parent], path.glob("*"), path.parent.glob("*")):
            found = sorted(str(p) for p in places if p != path and (p / FILE_NAME).exists())
            if found:
                return f"; near it are {', '.join(found[:MAX_LISTED])}"
    return ""
