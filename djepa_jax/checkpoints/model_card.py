"""The model card of an export: what the weights are, where they come from, how good they are."""

import dataclasses
import io
import json
import math
import pathlib
import string
from collections.abc import Callable

import jax
import numpy as np
from PIL import Image

from djepa_jax.checkpoints.restore import StoredModel, is_export, read_record
from djepa_jax.checkpoints.stablehlo import ARRAYS_NAME, SAMPLER_NAME, STABLEHLO, arguments
from djepa_jax.config.experiment import Experiment
from djepa_jax.core.modalities import made_by
from djepa_jax.core.models.conditioning import Classes, Sum
from djepa_jax.core.models.djepa import split_model
from djepa_jax.core.models.text import Text

FIGURES = ("loss", "token_loss", "jepa_loss", "grad_norm")
MAX_NAMES = 12  # of classes
OUT = {"sound": "samples.wav", "pairs": "samples/"}  # where samples go that are not pictures
NO_CLASSES = " \\\n        --config.data.num_classes=0 --config.data.class_names="
ASSETS = pathlib.Path(__file__).with_name("assets")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What is known about weights; None or nothing where no record is of these very ones."""

    imported: dict | None = None
    metrics: dict | None = None
    evaluation: dict | None = None
    licence: str = ""


def read_provenance(folder: pathlib.Path, step: int, ema_norm: float) -> Provenance:
    """Read the records of an export, or those of a workdir that belong to a step."""
    if is_export(folder):
        return Provenance(**read_record(folder)["provenance"])
    workdir = _workdir(folder)

    def last_metrics(text: str) -> dict:
        lines = map(json.loads, text.splitlines())
        return [line for line in lines if "loss" in line and line["step"] <= step][-1]

    def evaluation(text: str) -> dict | None:
        record = json.loads(text)
        same = math.isclose(record["ema_norm"], ema_norm, rel_tol=1e-5) and record["step"] == step
        return record if same else None

    def read(name: str, parse: Callable[[str], dict | None]) -> dict | None:
        try:
            return parse((workdir / name).read_text("utf-8"))
        except (OSError, ValueError, LookupError, TypeError):  # missing, or damaged
            return None

    return Provenance(
        read("imported.json", json.loads),
        read("metrics.jsonl", last_metrics),
        read("evaluation.json", evaluation),
    )


def _workdir(folder: pathlib.Path) -> pathlib.Path:
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def copy_grid(model: StoredModel, folder: pathlib.Path) -> str:
    """Copy a model's newest grid without the command in it, which names paths; its name, or ""."""
    place = model.path if is_export(model.path) else _workdir(model.path) / "samples"
    for path in sorted(place.glob("step_*.png"), reverse=True):
        try:
            step, pixels = int(path.stem[5:]), np.asarray(Image.open(io.BytesIO(path.read_bytes())))
        except Exception:  # called otherwise, or damaged in one of many ways; the weights are whole
            continue
        if step <= model.step:
            Image.fromarray(pixels).save(folder / path.name)
            return path.name
    return ""


def model_card(
    model: StoredModel,
    experiment: Experiment,
    form: str,
    provenance: Provenance,
    grid: str,
    push: str,
) -> str:
    """The card as Markdown; `experiment` says how a compiled sampler draws, `model` the rest.

    `grid` is the name of a picture beside the card, `push` where the export is on the Hub, if any.
    """
    trained = model.config
    imported, metrics = provenance.imported, provenance.metrics
    sha256, scale = trained.autoencoder.sha256, trained.data.latent_scale
    decoder = f" The autoencoder that turns its latents, divided by {scale}, into pictures: "
    decoder += f"sha256 `{sha256}`." if sha256 else "not known."
    _, abstract = split_model(experiment.network)
    names, size = arguments(experiment.sampler.guided), experiment.sample.batch_size
    leaves = jax.tree.leaves(experiment.network.conditioner.in_turn(size))
    labels = ", ".join(f"np.zeros({leaf.shape}, np.{leaf.dtype})" for leaf in leaves)
    told = isinstance(trained.network.conditioner, Classes | Sum)
    literals = {name: f"np.float32({getattr(experiment.sample, name)})" for name in names[4:]}
    literals["seed"] = "0"
    values = {
        **vars(trained),
        **vars(trained.data),
        **vars(trained.optimizer),
        **vars(experiment.network),
        **_commands(trained, push, told),
        "num_tokens": experiment.network.num_tokens,
        "modality": trained.modality,
        "classes": f" of {trained.data.num_classes} classes" if told else "",
        "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(abstract)):,}",
        "loss": trained.loss.name,
        "data": _describe_data(trained, told),
        "grid": f"![Samples of step {int(grid[5:-4])}]({grid})\n\n" if grid else "",
        "step": model.step,
        "own_steps": model.step - (imported["step"] if imported else 0),
        "imported": "nothing",
        "metrics": "not recorded",
        "evaluation": "None of these weights was recorded.",
        "licence": provenance.licence or "not stated",
        "autoencoder": decoder if trained.modality.needs_decoder else "",
        "size": size,
        "labels": labels if len(leaves) == 1 else f"({labels})",
        "sampler": SAMPLER_NAME,
        "arrays": ARRAYS_NAME,
        "call": ", ".join(literals.get(name, name) for name in names),
    }
    values["use"] = _fill("use_sampler" if form == STABLEHLO else "use_model", values)
    if imported:
        text = "`{source}` at step {step}, sha256 `{sha256}`, on {imported}"
        values["imported"] = text.format(**imported)
    if metrics:
        figures = [f"{k} {metrics[k]:.4f}" for k in FIGURES if metrics.get(k) is not None]
        values["metrics"] = f"{', '.join(figures)} at step {metrics['step']}"
    if provenance.evaluation:
        values["evaluation"] = f"```json\n{json.dumps(provenance.evaluation, indent=1)}\n```"
    return _fill("model_card", values)


def _describe_data(trained: Experiment, told: bool) -> str:
    """Source, the last part of its paths, and the classes, of many the first."""
    data, names = trained.data, trained.class_names
    places = [
        place.partition("@")[0] if data.source == "tfds" else place
        for place in data.places.values()
    ]
    where = " ".join(f"`{pathlib.PurePath(x).name}`" for x in (data.source, *places) if x)
    if not told:
        return f"Source {where}."
    shown = ", ".join(f"`{name}`" for name in names[:MAX_NAMES])
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"Source {where}, {len(names)} classes: {shown}{rest}."


def _commands(trained: Experiment, push: str, told: bool) -> dict:
    """What the ways of using an export are filled with."""
    place, decoder = "PATH OF THIS FOLDER", "WEIGHTS OF ITS AUTOENCODER"
    latents = trained.modality.needs_decoder
    asked = f"labels={list(trained.class_names[:2]) if told else [None, None]}"
    if isinstance(trained.network.conditioner, Text):
        asked = 'prompts=["a red circle"]'
    made = made_by(trained.modality)
    return {
        "made": made,
        "out": OUT.get(made, "samples.png"),
        "asked": asked,
        "data_flags": " ".join(f"--config.{key}=PATH" for key in trained.data.places),
        "no_classes": NO_CLASSES if told else "",
        "address": f"hf://{push}" if push else place,
        "download": f"hf download {push} --local-dir export\n" if push else "",
        "folder": "export" if push else f'"{place}"',
        "decoded": f', autoencoder="{decoder}"' if latents else "",
        "decoder": f' --config.autoencoder.path="{decoder}"' if latents else "",
    }


def _fill(name: str, values: dict) -> str:
    return string.Template((ASSETS / f"{name}.md").read_text("utf-8")).substitute(values)
