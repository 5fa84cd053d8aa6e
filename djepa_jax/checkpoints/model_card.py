"""The model card of an export: what the weights are, where they come from, how good they were found
to be.
"""

import dataclasses
import json
import math
import pathlib

from djepa_jax.checkpoints.restore import is_export, read_record
from djepa_jax.checkpoints.stablehlo import ARRAYS_NAME, SAMPLER_NAME, arguments
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.settings import Settings

FIGURES = ("loss", "token_loss", "jepa_loss", "grad_norm")
REPOSITORY_LICENCE = "Apache-2.0"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What is known about weights; None, or nothing, where there is no record of these very
    ones.
    """

    imported: dict | None = None
    metrics: dict | None = None
    evaluation: dict | None = None
    licence: str = ""


def read_provenance(folder: pathlib.Path, step: int, ema_norm: float) -> Provenance:
    """Read the records of an export, or those of a workdir that belong to a step."""
    if is_export(folder):
        return Provenance(**read_record(folder)["provenance"])
    workdir = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    evaluation = _evaluation_of(workdir / "evaluation.json", step, ema_norm)
    return Provenance(
        _read_json(workdir / "imported.json"),
        _last_metrics(workdir / "metrics.jsonl", step),
        evaluation,
    )


def _evaluation_of(path: pathlib.Path, step: int, ema_norm: float) -> dict | None:
    """The evaluation in a file, if it can be read and is of these very weights."""
    record = _read_json(path)
    try:
        same = record["step"] == step and math.isclose(record["ema_norm"], ema_norm, rel_tol=1e-5)
    except (KeyError, TypeError):  # damaged
        return None
    return record if same else None


def _read_json(path: pathlib.Path) -> dict | None:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _last_metrics(path: pathlib.Path, step: int) -> dict | None:
    """The last line of training metrics up to a step."""
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return next(
            (line for line in reversed(lines) if line["step"] <= step and "loss" in line), None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def model_card(
    config: Settings,
    sampling: Settings,
    experiment: Experiment,
    step: int,
    parameters: int,
    weights: str,
    provenance: Provenance,
) -> str:
    """The card as Markdown; `config` is the one of the training, `sampling` the one of a compiled
    sampler.
    """
    model, data = experiment.train.model, config.data
    sections = {
        "Model": f"D-JEPA, {parameters:,} parameters (width {model.width}, "
        f"{model.encoder_depth} + {model.predictor_depth} blocks, "
        f"denoiser {model.denoiser_depth} x {model.denoiser_width}, {config.loss.name} loss, "
        f"{'with' if model.jepa_head else 'without'} JEPA loss). It generates {model.num_tokens} "
        f"tokens of {model.token_dim} "
        f"values; {data.modality} {data.image_size} x {data.image_size} x {data.channels}, patch "
        f"{data.patch_size}. These are "
        "the moving-average weights in float32.",
        "Use": _usage(weights, sampling, experiment),
        "Data": _data(config),
        "Training": _training(config, step, provenance),
        "Evaluation": _evaluation(provenance.evaluation),
        "Licence": _licence(provenance),
        "Limits": _limits(config, experiment),
        "Files": "`config.json` holds the complete configuration and the class names; "
        "`manifest.json` the size and sha256 of "
        "every file.",
    }
    return (
        "# D-JEPA model\n\n"
        + "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
        + "\n"
    )


def _usage(weights: str, config: Settings, experiment: Experiment) -> str:
    if weights == "stablehlo":
        names = arguments(experiment.sample.guided)
        floats = {
            name: f"np.float32({config.sample[name]})" for name in ("cfg_scale", "temperature")
        }
        scalars = {"seed": "0", **floats}
        call = ", ".join(scalars.get(name, name) for name in names)
        return (
            "Needs only jax, flatbuffers and numpy:\n\n```python\nimport jax, numpy as np\n"
            f'sampler = jax.export.deserialize(bytearray(open("{SAMPLER_NAME}", "rb").read()))\n'
            f'params = dict(np.load("{ARRAYS_NAME}"))\n'
            f"size = sampler.in_avals[-{len(names) - 1}].shape[0]  # the batch size is fixed\n"
            "labels, sample_ids = np.zeros(size, np.int32), np.arange(size, dtype=np.int32)\n"
            f"result = sampler.call({call})\nprint({{name: value.shape for name, value in "
            "result.items()})\n```"
        )
    return (
        '```python\nimport djepa_jax\nmodel = djepa_jax.load("PATH OF THIS FOLDER")\n'
        "images = model.sample(labels=[0, 1], seed=0)\n```\n\n"
        "or as the start of training: `python -m djepa_jax.main --mode=import --source=PATH "
        "--config=FILE --workdir=DIR`."
    )


def _data(config: Settings) -> str:
    place = f" ({pathlib.PurePath(config.data.path).name})" if config.data.path else ""
    return f"Source `{config.data.source}`{place}, {config.data.num_classes} classes."


def _training(config: Settings, step: int, provenance: Provenance) -> str:
    lines = []
    if provenance.imported:
        imported = provenance.imported
        lines.append(
            f"Weights imported at step {imported['step']} from `{imported['source']}` (sha256 "
            f"`{imported['sha256']}`) on "
            f"{imported['imported']}."
        )
    own = step - (provenance.imported or {"step": 0})["step"]
    if own:
        lines.append(
            f"{own:,} steps of {config.batch_size} examples here, peak learning rate "
            f"{config.optimizer.learning_rate}, "
            f"moving average {config.optimizer.ema_decay}, computed in {config.compute_dtype}, "
            f"seed {config.seed}."
        )
    if provenance.metrics:
        figures = ", ".join(
            f"{k} {provenance.metrics[k]:.4f}"
            for k in FIGURES
            if provenance.metrics.get(k) is not None
        )
        lines.append(f"At step {provenance.metrics['step']}: {figures}.")
    return "\n".join(lines) or "No training was recorded."


def _evaluation(evaluation: dict | None) -> str:
    if evaluation is None:
        return "No evaluation of these weights was recorded."
    return (
        f"Share of samples that show the class asked for: {evaluation['accuracy']:.3f} (judged by "
        "a classifier of the real "
        f"data); Frechet distance in raw pixels: {evaluation['frechet_distance']:.3f}. Both over "
        f"{evaluation['evaluation']['count']} samples; "
        f"settings:\n\n```json\n{json.dumps(evaluation['sample'], indent=1)}\n```"
    )


def _licence(provenance: Provenance) -> str:
    if provenance.licence:
        return f"Weights: {provenance.licence}. Code: {REPOSITORY_LICENCE}."
    owner = (
        "whoever made the imported file decides"
        if provenance.imported
        else "whoever trained the model decides"
    )
    return (
        f"Not stated for the weights: {owner}, within what the licence of the data allows. The "
        "code that made this export "
        f"is {REPOSITORY_LICENCE}; that says nothing about the weights."
    )


def _limits(config: Settings, experiment: Experiment) -> str:
    text = (
        f"It draws pictures of {len(experiment.class_names)} classes in the manner of its data, "
        "with that data's gaps and "
        "biases, and nothing else; it may reproduce training examples. It was not judged beyond "
        "what stands above."
    )
    if config.data.modality == "image_latents":
        which = (
            f"the autoencoder with sha256 `{config.autoencoder.sha256}`"
            if config.autoencoder.sha256
            else "an autoencoder"
        )
        text += (
            f" It makes latents (divided by {config.data.latent_scale}); {which} has to turn them "
            "into pictures."
        )
    return text
