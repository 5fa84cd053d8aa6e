"""`--mode=import` of the authors' weights: every container, every group in it, and what is told."""

import hashlib
import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import PARITY, VARIANTS, load_parity
from flax import traverse_util
from official_files import (
    as_torch,
    assert_same,
    config_of,
    flags_of,
    read_workdir,
    renamed,
    training_file,
    without,
)
from safetensors.numpy import save_file

from djepa_jax import main as cli
from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.checkpoints.convert.import_weights import read_tensors, run_import
from djepa_jax.checkpoints.convert.mismatch import MismatchError
from djepa_jax.checkpoints.convert.official import from_official
from djepa_jax.checkpoints.convert.tensor_files import SourceError, open_tensors
from djepa_jax.checkpoints.integrity import CheckpointError
from djepa_jax.core.models.djepa import split_model

GOOD = PARITY / "model_gauss.safetensors"


def read(path, parity, *flags: str) -> dict:
    """The parameters that a file gives to a model."""
    file = open_tensors(path)
    abstract = split_model(config_of(parity, *flags).network)[1]
    return read_tensors(file.groups[file.average], file.metadata, abstract, f'"{path}"')


@pytest.mark.parametrize("variant", VARIANTS)
def test_command_makes_a_checkpoint_of_the_authors_file(variant, tmp_path, capsys):
    """The record of the import also keeps the file's own metadata."""
    parity, source = load_parity(variant), PARITY / f"model_{variant}.safetensors"
    flags = (f"--source={source}", f"--workdir={tmp_path / 'run'}", *flags_of(parity))
    assert cli.main(["djepa_jax", "--mode=import", *flags]) == 0
    parts, step = read_workdir(tmp_path / "run", config_of(parity))
    assert step == 0 and parts.keys() == {"ema_params"}
    assert_same(parts["ema_params"], parity.params)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"wrote {tmp_path / 'run' / 'checkpoints' / '0'}"
    record = json.loads((tmp_path / "run" / "imported.json").read_text())
    assert record["contents"] == lines[:-1] and record["step"] == 0
    assert record["source"] == source.name
    assert record["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert json.loads(record["metadata"]["config"]) == parity.official
    assert f"{len(parity.tensors)} tensors in float32" in lines[0] and str(source) in lines[0]


OLD_FORMAT = {"_use_new_zipfile_serialization": False}
CONTAINERS = {
    "training.pth": lambda path, tensors: torch.save(training_file(tensors, tensors), path),
    "bare.pth": lambda path, tensors: torch.save(tensors, path),
    "old.pt": lambda path, tensors: torch.save(training_file(tensors, tensors), path, **OLD_FORMAT),
    "old_bare.pth": lambda path, tensors: torch.save(tensors, path, **OLD_FORMAT),
    "wrapped.pth": lambda path, tensors: torch.save({"model": renamed(tensors, "module.")}, path),
    "compiled.ckpt": lambda path, tensors: torch.save(
        {"state_dict": renamed(tensors, "module._orig_mod.")}, path
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_parameters(gauss, container, tmp_path):
    CONTAINERS[container](tmp_path / container, as_torch(gauss.tensors))
    assert_same(read(tmp_path / container, gauss), gauss.params)


def test_every_group_of_a_file_is_used_or_named(tmp_path):
    """Names of groups in a file -> average, trained weights, what is not read."""
    table = (
        (("model", "model_ema", "args", "scaler"), "model_ema", "model", ("'args'", "'scaler'")),
        (("model", "ema", "opt", "args"), "ema", "model", ("'opt'", "'args'")),
        (("state_dict", "state_dict_ema"), "state_dict_ema", "state_dict", ()),
        (("ema", "model_ema", "model"), "model_ema", "model", ("'ema'",)),
        (("ema", "teacher"), "ema", None, ("'teacher'",)),
        (("state_dict", "hyper_parameters"), "state_dict", "state_dict", ("'hyper_parameters'",)),
        (("model", "epoch"), "model", "model", ()),
    )
    for names, average, trained, unread in table:
        tensors = {name: {"w": torch.full((2,), float(n))} for n, name in enumerate(names)}
        torch.save(tensors | ({"epoch": 3} if "epoch" in names else {}), tmp_path / "a.pth")
        file = open_tensors(tmp_path / "a.pth")
        assert (file.average, file.trained, file.unread) == (average, trained, unread)
        for name in {average, trained} - {None}:
            np.testing.assert_array_equal(file.groups[name]["w"], names.index(name))


def test_average_and_trained_weights_are_kept_apart(gauss, tmp_path):
    """As other programs name them."""
    trained = {name: value + 1 for name, value in gauss.tensors.items()}
    content = {"model": as_torch(trained), "ema": as_torch(gauss.tensors), "scaler": {"scale": 1.0}}
    torch.save(content, tmp_path / "both.pth")
    report = run_import(config_of(gauss), str(tmp_path / "run"), str(tmp_path / "both.pth"))
    assert report[0].startswith("moving average: ema of") and "not read: 'scaler'" in report
    assert report[1].startswith("trained parameters: model of")
    parts, step = read_workdir(tmp_path / "run", config_of(gauss))
    assert step == 0 and parts.keys() == {"params", "ema_params"}
    assert_same(parts["ema_params"], gauss.params)
    assert_same(parts["params"], from_official(trained, gauss.abstract))


def test_every_type_and_shape_is_read_as_it_was_written(tmp_path):
    rng, arrays = np.random.default_rng(0), {}
    for dtype in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16):
        for name, shape in (("scalar", ()), ("empty", (0, 3)), ("cube", (2, 3, 4))):
            arrays[f"{name}_{np.dtype(dtype).name}"] = rng.standard_normal(shape).astype(dtype)
    save_file(arrays, tmp_path / "a.safetensors")
    content = {
        name: torch.tensor(value.astype(np.float64)).to(getattr(torch, value.dtype.name))
        for name, value in arrays.items()
    }
    content["turned_float32"] = content["cube_float32"].permute(2, 0, 1)  # not contiguous
    torch.save(content, tmp_path / "a.pth")
    for suffix in (".safetensors", ".pth"):
        found = open_tensors(tmp_path / f"a{suffix}").groups["weights"]
        assert {tensor.dtype for tensor in found.values()} == {
            *("float16", "bfloat16", "float32", "float64")
        }
        for name, value in arrays.items():
            assert found[name].shape == value.shape and np.asarray(found[name]).dtype == np.float32
            np.testing.assert_array_equal(found[name], value.astype(np.float32))
    turned = np.transpose(arrays["cube_float32"], (2, 0, 1))
    np.testing.assert_array_equal(found["turned_float32"], turned)


# what a model goes without -> parts of the tensors' names, the key without it, and with it
WITHOUT = {
    "QK norm": (("q_norm", "k_norm"), "model.qk_norm=False", "model.qk_norm=True"),
    "JEPA head": (("jepaloss.",), "loss.jepa_weight=0.0", "loss.jepa_weight=1.0"),
}


@pytest.mark.parametrize("what", WITHOUT)
def test_models_without_a_part(gauss, what, tmp_path):
    """No tensor is missing or dropped in silence."""
    parts, flag, other = WITHOUT[what]
    tensors, workdir = without(gauss.tensors, *parts), tmp_path / "run"
    save_file(tensors, tmp_path / "less.safetensors")
    for source, keys, hint in (("less", (), flag), ("whole", (f"--config.{flag}",), other)):
        path = GOOD if source == "whole" else tmp_path / "less.safetensors"
        with pytest.raises(MismatchError) as caught:
            run_import(config_of(gauss, *keys), str(workdir), str(path))
        assert f"The file is of a model with --config.{hint}\n" in str(caught.value)
        for name in gauss.tensors.keys() - tensors.keys():
            grouped = name.replace(".0.", ".{0..1}.").replace(".1.", ".{0..1}.")
            assert grouped in str(caught.value)
    assert not workdir.exists()
    config = config_of(gauss, f"--config.{flag}")
    run_import(config, str(workdir), str(tmp_path / "less.safetensors"))
    found = read_workdir(workdir, config)[0]["ema_params"]
    whole = traverse_util.flatten_dict(gauss.params)
    for path, value in traverse_util.flatten_dict(found).items():
        np.testing.assert_array_equal(value, whole[path])
    assert sum(x.size for x in jax.tree.leaves(found)) == sum(x.size for x in tensors.values())


def test_without_torch_safetensors_is_still_imported(gauss, tmp_path, monkeypatch):
    torch.save(as_torch(gauss.tensors), tmp_path / "model.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SourceError, match=r'pip install "torch>=2.6".*\.safetensors'):
        open_tensors(tmp_path / "model.pth")
    assert_same(read(GOOD, gauss), gauss.params)


def test_half_an_import_does_not_stand_in_the_way_of_the_next(gauss, tmp_path, monkeypatch):
    """What a killed process leaves: a config, a folder without steps, an unfinished step."""
    workdir, arguments = tmp_path / "run", (config_of(gauss), str(tmp_path / "run"), str(GOOD))

    def killed(checkpoints, *_):
        (checkpoints.directory / "0.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
        raise CheckpointError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save_imported", killed)
        with pytest.raises(CheckpointError, match="killed"):
            run_import(*arguments)
    assert (workdir / "config.json").exists() and Checkpoints(workdir).latest_step() is None
    run_import(*arguments)
    assert_same(read_workdir(workdir, config_of(gauss))[0]["ema_params"], gauss.params)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["0"]


def test_workdir_in_use_is_left_alone(gauss, tmp_path):
    used, noted = tmp_path / "used", tmp_path / "noted"
    run_import(config_of(gauss), str(used), str(GOOD))
    noted.mkdir()
    (noted / "config.json").write_text("somebody's notes")
    for workdir, held in ((used, "checkpoint 0"), (noted, "config.json")):
        before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
        with pytest.raises(CheckpointError, match=f"already holds {held}; .* another folder"):
            run_import(config_of(gauss), str(workdir), str(GOOD))
        after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
        assert after == before
