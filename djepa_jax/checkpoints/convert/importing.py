"""The `--mode=import` command: weights from elsewhere become a checkpoint that trains, samples and
evaluates.
"""

import dataclasses
import datetime
import itertools
import json
import os
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import optax
from etils import epath

from djepa_jax.checkpoints.autoencoder import stored_sha256, with_autoencoder
from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.checkpoints.convert.official import from_official, to_official
from djepa_jax.checkpoints.convert.reading import WeightSet, fit
from djepa_jax.checkpoints.convert.tensor_files import (
    BARE,
    AdamMoments,
    SourceError,
    SourceFile,
    Tensors,
    open_tensors,
)
from djepa_jax.checkpoints.integrity import (
    MANIFEST_NAME,
    CheckpointError,
    check_manifest,
    file_sha256,
)
from djepa_jax.checkpoints.restore import (
    CARD_NAME,
    ORBAX,
    TENSORS_NAME,
    check_same_model,
    find_model,
    is_export,
    placed_params,
    read_record,
)
from djepa_jax.config import experiment as configuration
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import sharding
from djepa_jax.core.models.djepa import split_model
from djepa_jax.core.optimizer import decay_mask
from djepa_jax.core.train_step import init_state
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.storage import as_path, check_writable, write_json

RECORD_NAME = "imported.json"
NO_MOMENTS = "optimiser: none; training starts it afresh, from step 0 with warm-up"


@dataclasses.dataclass(frozen=True)
class Found:
    """Something to import, checked but not yet read: parts of a training state, their step, and
    what they are.
    """

    path: pathlib.Path
    read: Callable[
        [], tuple[dict, int, list[str]]
    ]  # -> parts by name, step, lines that say what was taken
    metadata: dict


def run_import(config, workdir: str, source: str) -> list[str]:
    """Read weights from a file, or an export folder, and write a checkpoint of them into a new
    workdir.

    Returns:
        lines that say what was read and written.

    Raises:
        ConfigError: the config cannot work, or describes another model.
        SourceError: the file cannot be read, or holds what it should not.
        MismatchError: its tensors are not those of the config's model; the message is a table of
            all of them.
        CheckpointError: the workdir cannot be used, or holds checkpoints already.
    """
    experiment = configuration.build(config)
    path = pathlib.Path(os.path.expanduser(source))
    found = _find(config, experiment, path)
    if is_export(path):
        config = with_autoencoder(config, stored_sha256(find_model(path).config))
    check_writable(workdir)
    folder = as_path(workdir)
    with lock_workdir(workdir):
        _check_unused(folder, configuration.resolved(config))
        parts, step, lines = found.read()
        record = _record(found, step, lines)
        write_json(folder / configuration.FILE_NAME, configuration.resolved(config))
        saved = Checkpoints(workdir).save_imported(
            parts, configuration.resolved(config), step, step * config.batch_size
        )
        write_json(folder / RECORD_NAME, record)
    return [*lines, f"wrote {saved}"]


def _check_unused(workdir: epath.Path, config: dict) -> None:
    """Raise CheckpointError if a workdir holds anything that an import would write over, but for
    its own beginning.
    """
    written = workdir / configuration.FILE_NAME
    if written.exists() and written.read_text("utf-8") != json.dumps(config, indent=2) + "\n":
        raise CheckpointError(
            f'--workdir "{workdir}" already holds {written.name}; import into another folder.'
        )
    step = Checkpoints(workdir).step_to_resume()
    if step is not None:
        raise CheckpointError(
            f'--workdir "{workdir}" already holds checkpoint {step}; import into another folder.'
        )


def _find(config, experiment: Experiment, path: pathlib.Path) -> Found:
    """Open what `path` names, and check that it fits the model; reads no weights yet."""
    if is_export(path):
        check_manifest(path, but=CARD_NAME)
        model = find_model(path)
        check_same_model(model.config, config)
    if is_export(path) and read_record(path)["weights"] == ORBAX:
        mesh = sharding.make_mesh((1, 1, 1), [sharding.host_device()])

        def read():
            return (
                {"ema_params": model.restore(placed_params(experiment, mesh))},
                0,
                [f"moving average: from {path}", NO_MOMENTS],
            )

        return Found(path / MANIFEST_NAME, read, {})
    file = open_tensors(path / TENSORS_NAME if is_export(path) else path)
    _, abstract = split_model(experiment.train.model)
    where = f'--source "{file.path}"'
    sets = {
        name: fit(tensors, file.metadata, abstract, where, experiment.train.model)
        for name, tensors in file.weights.items()
    }
    return Found(file.path, lambda: _read_parts(file, sets, experiment), file.metadata)


def _read_parts(
    file: SourceFile, sets: dict[str, WeightSet], experiment: Experiment
) -> tuple[dict, int, list[str]]:
    average = next(name for name in ("model_ema", "model", BARE) if name in sets)
    parts = {"ema_params": sets[average].read()}
    count = sum(leaf.size for leaf in jax.tree.leaves(parts))
    lines = [f"moving average: {count:,} parameters from {average} of {file.path}"]
    if average == "model_ema" and "model" in sets:
        parts["params"] = sets["model"].read()
        lines.append("trained parameters: from model")
    for name, weights in sets.items():
        lines += [
            f"{name}: {n} tensors converted from {dtype} to float32"
            for dtype, n in weights.tensors.converted.items()
        ]
    if file.moments is None or "model" not in sets:
        return parts, 0, [*lines, NO_MOMENTS]
    try:
        opt_state = _opt_state(file, sets["model"].tensors, experiment)
    except SourceError as error:
        return parts, 0, [*lines, f"{NO_MOMENTS} ({error})"]
    zero = np.zeros((), np.int32)
    counters = {
        "step": np.int32(file.moments.step),
        "skipped_steps": zero,
        "bad_streak": zero,
        "opt_state": opt_state,
    }
    parts = {"params": parts["ema_params"]} | parts | counters
    return (
        parts,
        file.moments.step,
        [*lines, f"optimiser: its moments, from step {file.moments.step}, where training goes on"],
    )


def _opt_state(file: SourceFile, model: Tensors, experiment: Experiment):
    """Our optimiser's state with the moments of a PyTorch Adam.

    Raises:
        SourceError: the moments cannot be matched to the parameters.
    """
    abstract, moments = jax.eval_shape(lambda: init_state(experiment.train)), file.moments
    numbers = _parameter_numbers(moments, model, abstract.params)

    def read(moment: str) -> dict:
        tensors = moments.tensors.renamed(
            {name: f"{number}/{moment}" for name, number in numbers.items()}
        )
        weights = WeightSet(
            tensors, lambda t, place: from_official(t, abstract.params, place), f'"{file.path}"'
        )
        return weights.read()

    def fill(node):
        if isinstance(node, optax.ScaleByAdamState):
            return node._replace(
                count=np.int32(moments.step), mu=read("exp_avg"), nu=read("exp_avg_sq")
            )
        return np.full(
            node.shape, moments.step, node.dtype
        )  # the only other leaves are counters of schedules

    return jax.tree.map(
        fill, abstract.opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState)
    )


def _parameter_numbers(moments: AdamMoments, model: Tensors, abstract: dict) -> dict[str, int]:
    """Number of every parameter in the optimiser: groups keep the model's order, decayed parameters
    may be apart.

    Raises:
        SourceError: no such arrangement fits the numbers and shapes of the moments.
    """
    flags = jax.tree.map(
        lambda flag, leaf: np.broadcast_to(flag, leaf.shape), decay_mask(abstract), abstract
    )
    decayed = {name for name, flag in to_official(flags).items() if flag.flat[0]}
    apart = (
        [name for name in model if name in decayed],
        [name for name in model if name not in decayed],
    )
    for grouping in ([list(model)], apart, apart[::-1]):
        if [len(group) for group in grouping] != [len(group) for group in moments.groups]:
            continue
        numbers = dict(
            zip(itertools.chain(*grouping), itertools.chain(*moments.groups), strict=True)
        )
        shapes = moments.tensors.shapes
        if all(
            shapes.get(f"{n}/{m}") == model.shapes[name]
            for name, n in numbers.items()
            for m in ("exp_avg", "exp_avg_sq")
        ):
            return numbers
    raise SourceError("its parameters are numbered in an unknown way")


def _record(found: Found, step: int, lines: list[str]) -> dict:
    """Where the weights of a workdir come from."""
    return {
        "source": found.path.name,
        "sha256": file_sha256(found.path),
        "bytes": found.path.stat().st_size,
        "imported": datetime.date.today().isoformat(),
        "step": step,
        "metadata": found.metadata,
        "contents": lines,
    }
