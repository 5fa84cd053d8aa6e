"""`--mode=import` of the authors' weights: every container, and the authors' numbers from what was
imported.
"""

import functools
import hashlib
import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import PARITY, VARIANTS, assert_close, load_parity
from flax import nnx
from official_files import (
    as_torch,
    assert_same,
    flags_of,
    has_checkpoint,
    read_workdir,
    renamed,
    run_import,
    training_file,
    without,
)
from safetensors.numpy import save_file
from test_parity_forward import FORWARD, replay

from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.checkpoints.convert.official import from_official
from djepa_jax.checkpoints.integrity import CheckpointError
from djepa_jax.checkpoints.restore import latest_model, placed_params
from djepa_jax.config import experiment as configuration
from djepa_jax.core import sharding
from djepa_jax.core.masking import to_order, to_raster
from djepa_jax.core.train_step import predict_features
from djepa_jax.main import parse

OLD_FORMAT = {"_use_new_zipfile_serialization": False}
# file -> how the tensors of a model are written into it
CONTAINERS = {
    "training.pth": lambda path, tensors: torch.save(
        training_file(as_torch(tensors), as_torch(tensors)), path
    ),
    "bare.pth": lambda path, tensors: torch.save(as_torch(tensors), path),
    "bare.safetensors": lambda path, tensors: save_file(tensors, path),
    "old.pt": lambda path, tensors: torch.save(
        training_file(as_torch(tensors), as_torch(tensors)), path, **OLD_FORMAT
    ),
    "old_bare.pth": lambda path, tensors: torch.save(as_torch(tensors), path, **OLD_FORMAT),
    "wrapped.pth": lambda path, tensors: torch.save(
        {"model": renamed(as_torch(tensors), "module.")}, path
    ),
    "compiled.pth": lambda path, tensors: torch.save(
        renamed(as_torch(tensors), "module._orig_mod."), path
    ),
    "wrapped.safetensors": lambda path, tensors: save_file(renamed(tensors, "module."), path),
}
CASES = [(v, c) for v in VARIANTS for c in list(CONTAINERS)[:3]] + [
    ("gauss", c) for c in list(CONTAINERS)[3:]
]
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}


@functools.cache
def forward_of(variant: str):
    """The networks on the recorded inputs: parameters -> (predictor's output, JEPA head's output)
    `[B, N, D]`.
    """
    parity = load_parity(variant)
    tokens, order, num_visible, labels = replay(parity)

    @jax.jit
    def forward(params):
        model = nnx.merge(parity.graph, params)
        cond = predict_features(
            model, to_order(tokens, order), order, labels, num_visible, parity.config.num_tokens
        )
        return to_raster(cond, order), to_raster(model.jepa_head(cond), order)

    return forward


def average_in(workdir, flags) -> dict:
    """The moving average as sampling loads it."""
    config = parse(["djepa_jax", f"--workdir={workdir}", *flags]).config
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    abstract = placed_params(configuration.build(config), mesh)
    return latest_model(config, workdir).restore(abstract)


@pytest.mark.parametrize(("variant", "container"), CASES)
def test_imported_weights_give_the_authors_numbers(variant, container, tmp_path, capsys):
    parity = load_parity(variant)
    CONTAINERS[container](tmp_path / container, parity.tensors)
    assert run_import(tmp_path / container, tmp_path / "run", flags_of(parity)) == 0
    assert "converted" not in capsys.readouterr().out, "float32 is taken as it is"
    params = average_in(tmp_path / "run", flags_of(parity))
    assert_same(params, parity.params)
    cond, head = forward_of(variant)(params)
    assert_close(cond, parity.forward["decoder_z"], FORWARD)
    assert_close(head, parity.forward["jepa_head"], FORWARD)


def test_fixture_file_is_imported_as_it_is(gauss, tmp_path, capsys):
    """Also with metadata of its own, which the record of the import keeps."""
    source, workdir = PARITY / "model_gauss.safetensors", tmp_path / "run"
    assert run_import(source, workdir, flags_of(gauss)) == 0
    record = json.loads((workdir / "imported.json").read_text())
    assert record["source"] == source.name and record["step"] == 0
    assert record["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert json.loads(record["metadata"]["config"]) == gauss.official
    lines = capsys.readouterr().out.splitlines()
    assert (
        record["contents"] == lines[:-1] and lines[-1] == f"wrote {workdir / 'checkpoints' / '0'}"
    )
    assert lines[1].startswith("optimiser: none; training starts it afresh")


def test_trained_parameters_and_their_average_are_kept_apart(gauss, tmp_path):
    trained = {name: value + 1 for name, value in gauss.tensors.items()}
    torch.save(training_file(as_torch(trained), as_torch(gauss.tensors)), tmp_path / "both.pth")
    assert run_import(tmp_path / "both.pth", tmp_path / "run", flags_of(gauss)) == 0
    parts, step = read_workdir(tmp_path / "run", flags_of(gauss))
    assert step == 0 and parts.keys() == {"params", "ema_params"}
    assert_same(parts["ema_params"], gauss.params)
    assert_same(parts["params"], from_official(trained, gauss.abstract))


@pytest.mark.parametrize("container", ["pth", "safetensors"])
@pytest.mark.parametrize("dtype", TYPES)
def test_other_number_types_are_converted_and_named(gauss, dtype, container, tmp_path, capsys):
    stored = {name: value.astype(TYPES[dtype]) for name, value in gauss.tensors.items()}
    source = tmp_path / f"model.{container}"
    if container == "pth":
        torch.save(as_torch(gauss.tensors, getattr(torch, dtype)), source)
    else:
        save_file(stored, source)
    assert run_import(source, tmp_path / "run", flags_of(gauss)) == 0
    assert (
        f"weights: {len(stored)} tensors converted from {dtype} to float32"
        in capsys.readouterr().out
    )
    expected = from_official(
        {name: value.astype(np.float32) for name, value in stored.items()}, gauss.abstract
    )
    assert_same(average_in(tmp_path / "run", flags_of(gauss)), expected)


# what the model goes without -> (parts of the tensors' names, flag of a config that fits, flag that
# the file asks for)
WITHOUT = {
    "QK norm": (
        ("q_norm", "k_norm"),
        "--config.model.qk_norm=False",
        "--config.model.qk_norm=False",
    ),
    "JEPA head": (("jepaloss.",), "--config.loss.jepa_weight=0", "--config.loss.jepa_weight=0.0"),
}


@pytest.mark.parametrize("what", WITHOUT)
def test_models_without_a_part(gauss, what, tmp_path, capsys):
    parts, flag, hint = WITHOUT[what]
    tensors, source, workdir = (
        without(gauss.tensors, *parts),
        tmp_path / "less.safetensors",
        tmp_path / "run",
    )
    save_file(tensors, source)
    assert run_import(source, workdir, flags_of(gauss)) == 2
    error = capsys.readouterr().err
    assert f"The file is of a model with {hint}\n" in error and not workdir.exists()
    for name in gauss.tensors.keys() - tensors.keys():
        assert name.replace(".0.", ".{0..1}.").replace(".1.", ".{0..1}.") in error, (
            "every missing tensor is named"
        )
    assert run_import(source, workdir, flags_of(gauss, flag)) == 0
    imported = average_in(workdir, flags_of(gauss, flag))
    leaves = {
        jax.tree_util.keystr(path): value for path, value in jax.tree.leaves_with_path(gauss.params)
    }
    for path, value in jax.tree.leaves_with_path(imported):
        np.testing.assert_array_equal(value, leaves[jax.tree_util.keystr(path)])
    assert sum(leaf.size for leaf in jax.tree.leaves(imported)) == sum(
        value.size for value in tensors.values()
    )


@pytest.mark.parametrize("what", WITHOUT)
def test_surplus_tensors_are_refused(gauss, what, tmp_path, capsys):
    """The config has no place for them, and nothing is dropped in silence."""
    _, flag, _ = WITHOUT[what]
    assert (
        run_import(PARITY / "model_gauss.safetensors", tmp_path / "run", flags_of(gauss, flag)) == 2
    )
    error = capsys.readouterr().err
    hint = {"QK norm": "--config.model.qk_norm=True", "JEPA head": "--config.loss.jepa_weight=1.0"}[
        what
    ]
    assert "surplus" in error and f"with {hint}\n" in error and not (tmp_path / "run").exists()


def test_without_torch_safetensors_is_still_imported(gauss, tmp_path, capsys, monkeypatch):
    torch.save(as_torch(gauss.tensors), tmp_path / "model.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run_import(tmp_path / "model.pth", tmp_path / "run", flags_of(gauss)) == 2
    error = capsys.readouterr().err
    assert (
        len(error.splitlines()) == 1
        and 'pip install -e ".[import]"' in error
        and ".safetensors" in error
    )
    assert run_import(PARITY / "model_gauss.safetensors", tmp_path / "run", flags_of(gauss)) == 0


def test_half_an_import_does_not_stand_in_the_way_of_the_next(gauss, tmp_path, monkeypatch):
    """What a killed process leaves: a config, a folder without steps, an unfinished step."""
    workdir, arguments = (
        tmp_path / "run",
        (PARITY / "model_gauss.safetensors", tmp_path / "run", flags_of(gauss)),
    )

    def killed(checkpoints, *_):
        unfinished = checkpoints.directory / "0.orbax-checkpoint-tmp"
        (unfinished / "state").mkdir(parents=True)
        raise CheckpointError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save_imported", killed)
        assert run_import(*arguments) == 2
    assert (workdir / "config.json").exists() and not has_checkpoint(workdir)
    assert run_import(*arguments) == 0
    assert_same(average_in(workdir, flags_of(gauss)), gauss.params)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["0"]
