"""The `--mode=evaluate` command, and the same at the end of training."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath

from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.checkpoints.restore import latest_model, placed_params
from djepa_jax.config.convert import flatten
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.presets import CFG_SCALES, PUBLISHED_SHAPE, preset_values
from djepa_jax.config.stored import LATER
from djepa_jax.core import sharding
from djepa_jax.core.optimizer import params_norm
from djepa_jax.data.captions import conditions_to_judge
from djepa_jax.data.records import digest_of
from djepa_jax.evaluation.features import FROM_FILE
from djepa_jax.evaluation.judges import open_metric, open_to_judge
from djepa_jax.evaluation.kept_images import KeptImages
from djepa_jax.evaluation.metrics.base import NotFiniteError
from djepa_jax.evaluation.metrics.several import figure_of, keeps_state, trend_of
from djepa_jax.runtime import distributed
from djepa_jax.runtime.progress import say
from djepa_jax.runtime.storage import as_path, write_json, write_npz
from djepa_jax.sampling.generator import Generator, count_of, never

FILE_NAME, PARTIAL_NAME = "evaluation.json", "evaluation_partial.npz"
SAVE_EVERY = 300.0  # seconds between what a killed evaluation goes on from
# Keys that records of earlier versions do not have
ADDED = ("loss", "compute_dtype", "data", "network")
ON_A_LINE = 3  # figures


def identity(params, experiment: Experiment, step: int, autoencoder: str = "") -> dict:
    """What a record or a grid is of: step, sampler settings, and a number that tells weights apart.

    Of latents, there is the autoencoder that decodes them, too, by its sha256.
    """
    norm = params_norm(params)
    decoder = {"autoencoder": autoencoder} if experiment.modality.needs_decoder else {}
    sample = dataclasses.asdict(experiment.sample).items()
    loss = dataclasses.asdict(experiment.token_loss)  # with options of its sampler
    loss.pop("guided_shares", None)  # which `sample` has
    settings = {
        # Keys that say nothing are not in records of earlier versions
        "sample": {key: value for key, value in sample if LATER["sample"].get(key) != value},
        "loss": loss,
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
            if key not in ("reference_count", "trend_count") and value not in ("", "none")
        },
        "data": "" if source is None else digest_of(source),
    }
    if generator.guide is not None:  # whose path alone would not tell its weights apart
        settings["guide_norm"] = params_norm(generator.guide.params)
    if not {*own.kind.split("+")}.isdisjoint(FROM_FILE):
        settings["network"] = file_sha256(own.weights)
    if own.captions:
        settings["captions"] = file_sha256(own.captions)
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
    kept: KeptImages | None = None,
) -> dict:
    """Judge samples of the given parameters, every condition in turn; write `evaluation.json`.

    All processes sample; process 0 judges and writes, and the others' record is empty. One that was
    killed goes on from what it wrote last, to the same figures. The pictures are written if they
    are to be kept.

    Raises:
        Stopped: `should_stop`, asked before every batch, said so; there is no new record.
    """
    metric = open_metric(experiment, source, workdir)
    of = subject(experiment, generator, params, source, step)
    conditions = conditions_to_judge(experiment, source, experiment.evaluation.count)
    _take_in_all(metric, experiment, generator, params, conditions, of, workdir, should_stop, kept)
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


def trend(
    experiment: Experiment,
    generator: Generator,
    params,
    source,
    workdir,
    should_stop: Callable[[], bool] = never,
) -> dict[str, float]:
    """A few figures of `evaluation.trend_count` samples, in process 0; they are in no record.

    Raises:
        Stopped: `should_stop` said so.
    """
    settings = experiment.evaluation
    metric = open_metric(experiment, source, workdir)
    count = min(settings.count, settings.trend_count)
    conditions = conditions_to_judge(experiment, source, count)
    for _ in _take_in(metric, experiment, generator, params, conditions, 0, should_stop):
        pass
    return trend_of(metric) if distributed.is_main_process() else {}


def _take_in(
    metric, experiment, generator, params, conditions, start: int, should_stop
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Give a metric samples from number `start` on: the first's number, and a batch of them."""
    seed = experiment.evaluation.seed
    for arrays in generator.batches(params, conditions, seed, start, should_stop):
        rows = slice(start, start + count_of(arrays))
        if len(bad := generator.not_finite):
            raise NotFiniteError(
                f"{len(bad)} of the samples {start} to {rows.stop - 1} are not finite, the first "
                f"is number {bad[0]}; look at config.sample and config.compute_dtype, or train "
                "with a lower config.optimizer.learning_rate."
            )
        arrays = as_pictures(experiment, arrays)
        metric.update(arrays, jax.tree.map(lambda leaf, rows=rows: leaf[rows], conditions))
        yield start, arrays
        start = rows.stop
    given = metric.given(count_of(conditions)) if hasattr(metric, "given") else ()
    for judge, known in given:
        how = generator.beside(known), params, conditions, 0, should_stop
        for _ in _take_in(judge, experiment, *how):
            pass


def as_pictures(experiment: Experiment, arrays: dict) -> dict:
    """Samples with `images`, what their modality shows of them, for judges of pictures."""
    pictures = experiment.modality.preview(arrays)
    return arrays if pictures is None else {"images": pictures} | arrays


def _take_in_all(
    metric, experiment, generator, params, conditions, of: dict, workdir, should_stop, kept
) -> None:
    """Give a metric all samples, from where one that was killed had come to."""
    is_main = distributed.is_main_process()
    partial, keeps = as_path(workdir) / PARTIAL_NAME, keeps_state(metric)
    state = _read_partial(partial, of) if keeps and is_main else {}
    if kept is not None and kept.missing_below(int(state.get("count", 0))):
        state = {}
    start = distributed.run_on_main(lambda: int(state.get("count", 0)))
    if start:
        metric.restore(state)
    saved = time.monotonic()
    batches = _take_in(metric, experiment, generator, params, conditions, start, should_stop)
    for first, arrays in batches:
        if kept is not None and is_main:
            kept.write(first, arrays["images"])
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
    """Figures for people, with intervals and figures of real examples where they have them."""
    shown = []
    for name, value in metrics.items():
        low, high, real = (metrics.get(f"{name}_{of}") for of in ("low", "high", "real"))
        beside = [] if low is None else [f"{low:.3f} to {high:.3f}"]
        beside += [] if real is None else [f"real {real:.3f}"]
        if figure_of(name, metrics) == name or name.endswith("_std"):
            shown.append(f"{name} {value:.3f}" + (f" ({'; '.join(beside)})" if beside else ""))
    lines = [", ".join(shown[at : at + ON_A_LINE]) for at in range(0, len(shown), ON_A_LINE)]
    return ",\n    ".join(lines)


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


def run_evaluate(
    experiment: Experiment, workdir: str, overwrite: bool = False, keep_images: bool = False
) -> tuple[dict, epath.Path, bool]:
    """Evaluate the latest checkpoint of a workdir: the record, where it is, whether it is new.

    A record of the same weights, settings and data is given back, unless `overwrite` is set. With
    `keep_images`, the pictures that are judged are in the workdir, too.

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
    record, kept = None if overwrite else read_evaluation(*arguments), None
    if keep_images:
        asked = conditions_to_judge(experiment, source, experiment.evaluation.count)
        kept = KeptImages(generator, workdir, subject(*arguments[:-1]), asked)
        if distributed.run_on_main(lambda: kept.open(overwrite)) < experiment.evaluation.count:
            record = None
    is_new = not distributed.run_on_main(lambda: int(record is not None))
    if is_new:
        record = evaluate(*arguments, kept=kept)
    return record, as_path(workdir) / FILE_NAME, is_new
