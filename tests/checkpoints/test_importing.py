"""`--mode=import` of the authors' weights: every container, every group in it, and what is told."""

import argparse
import collections
import datetime
import hashlib
import json
import pathlib
import shutil
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


SHADOW = {"decay": 0.9, "shadow_params": [torch.full((2,), 7.0)]}  # a list, as the model's order


def test_every_group_of_a_file_is_used_or_named(tmp_path):
    """Names of groups in a file, or others than tensors in it -> average, trained weights, names
    of what is not read.
    """
    table = (
        (("model", "model_ema", "args", "scaler"), {}, "model_ema", "model", {"args", "scaler"}),
        (("model", "ema"), {"opt": {}, "args": 1}, "ema", "model", {"opt", "args"}),
        (("state_dict", "state_dict_ema"), {}, "state_dict_ema", "state_dict", set()),
        (("model", "ema_state_dict"), {}, "ema_state_dict", "model", set()),
        (("params", "ema_params"), {}, "ema_params", "params", set()),
        (("model", "model_ema1", "model_ema2"), {}, "model_ema1", "model", {"model_ema2"}),
        (("net", "ema_0.9999"), {"step": 3}, "ema_0.9999", "net", {"step"}),
        (("model_state_dict", "EMA"), {}, "EMA", "model_state_dict", set()),
        (("state_dict",), {"ema": {"module": {"w": torch.ones(2)}}}, "ema.module", ..., set()),
        (("state_dict",), {"calls": {"EMA": {"w": torch.ones(2)}}}, "calls.EMA", ..., set()),
        (("model",), {"ema": SHADOW}, "ema.shadow_params", "model", set()),
        (("ema", "teacher"), {}, "ema", None, {"teacher"}),
        (("student", "teacher"), {}, "student", "student", {"teacher"}),
        (("state_dict", "hyper_parameters"), {}, "state_dict", ..., {"hyper_parameters"}),
        (
            ("model",),
            {"epoch": 3, "ema": None, "ema_decay": 0.9},
            "model",
            ...,
            {"ema", "ema_decay"},
        ),
    )
    for names, others, average, trained, unread in table:
        tensors = {name: {"w": torch.full((2,), float(n))} for n, name in enumerate(names)}
        torch.save(tensors | others, tmp_path / "a.pth")
        file, trained = open_tensors(tmp_path / "a.pth"), names[0] if trained is ... else trained
        assert (file.average, file.trained) == (average, trained)
        assert {name.split("'")[1] for name in file.unread} == unread
        for name in {average, trained} & {*names}:
            np.testing.assert_array_equal(file.groups[name]["w"], names.index(name))
        assert all(group.keys() == {"w"} for group in file.groups.values())
    for name, value in (("model_ema2", 2), ("model", 0)):  # another one, by its name
        chosen = {"model": 0, "model_ema1": 1, "model_ema2": 2}
        torch.save(
            {n: {"w": torch.tensor([float(v)])} for n, v in chosen.items()}, tmp_path / "b.pt"
        )
        file = open_tensors(tmp_path / f"b.pt@{name}")
        assert (file.average, file.trained) == (name, "model")
        np.testing.assert_array_equal(file.groups[name]["w"], [value])
    with pytest.raises(SourceError, match="called other; .*: model, model_ema1, model_ema2"):
        open_tensors(tmp_path / "b.pt@other")


def test_average_that_cannot_be_read_is_not_replaced_in_silence(tmp_path):
    content = {"model": {"w": torch.ones(2)}, "ema": argparse.Namespace(w=torch.zeros(2))}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(SourceError, match="'ema' as an object.*@model"):
        open_tensors(tmp_path / "a.pth")
    assert open_tensors(tmp_path / "a.pth@model").average == "model"


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_average_among_the_names_of_one_dict(suffix, tmp_path):
    """As Lightning writes one, whose names may all begin alike."""
    arrays = {"ema.net.a.w": 1, "ema.net.b": 2, "net.a.w": 3, "net.b": 4}
    arrays = {name: np.full(2, value, np.float32) for name, value in arrays.items()}
    path = tmp_path / f"a.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": as_torch(arrays), "optimizer_states": [{}]}, path)
    else:
        save_file(arrays, path)
    file = open_tensors(path)
    values = [{name: int(np.asarray(x)[0]) for name, x in g.items()} for g in file.groups.values()]
    assert values == [{"a.w": 1, "b": 2}, {"a.w": 3, "b": 4}]
    assert file.average.endswith("ema") and file.trained in ("weights", "state_dict")


def test_the_report_says_what_stands_in_for_an_average(gauss, tmp_path):
    """And what shapes of tensors do not tell, the number of heads without QK norm among it."""
    tensors, flag = without(gauss.tensors, "q_norm", "k_norm"), "--config.model.qk_norm=False"
    torch.save({"model": as_torch(tensors), "args": argparse.Namespace()}, tmp_path / "a.pth.tar")
    config = config_of(gauss, flag)
    report = run_import(config, str(tmp_path / "run"), str(tmp_path / "a.pth.tar"))
    assert report[0].startswith("moving average: none by name") and "model of" in report[0]
    (untold,) = [line for line in report if "data.patch_size=" in line]
    assert f"model.num_heads={gauss.config.num_heads}" in untold and "data.latent_scale" in untold
    parts, _ = read_workdir(tmp_path / "run", config)
    assert parts.keys() == {"ema_params"}
    report = run_import(config_of(gauss), str(tmp_path / "other"), str(GOOD))
    assert not any("num_heads" in line for line in report)


VALUES = {
    "numpy": (np.float64(0.5), np.arange(3), np.array(["a", None], object), np.dtype("int64")),
    "paths": [pathlib.PosixPath("/a/b"), pathlib.PurePosixPath("c")],
    "options": argparse.Namespace(lr=np.float32(1e-4), out=pathlib.PosixPath("x"), when=None),
    "counts": collections.OrderedDict(a=collections.Counter("aab"), b=collections.defaultdict(int)),
    "times": (datetime.datetime(2024, 1, 2), datetime.timedelta(3), frozenset([1]), {2}, slice(4)),
    "versions": (torch.__version__, torch.Size([1]), torch.device("cpu"), 2**70, 1j),
}


@pytest.mark.parametrize("form", [{}, {"_use_new_zipfile_serialization": False}])
def test_plain_values_may_lie_beside_the_tensors(form, tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, **VALUES}, tmp_path / "a.pth", **form)
    file = open_tensors(tmp_path / "a.pth")
    np.testing.assert_array_equal(file.groups["model"]["w"], 1)
    assert {name.strip("'") for name in file.unread} == VALUES.keys()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_files(gauss, suffix, tmp_path):
    """By the index, or by the folder of one."""
    names, index = sorted(gauss.tensors), tmp_path / f"model.{suffix}.INDEX.json"
    places = {name: f"model-{n % 2}.{suffix}" for n, name in enumerate(names)}
    for place in set(places.values()):
        part = {name: gauss.tensors[name] for name in names if places[name] == place}
        if suffix == "bin":
            torch.save(as_torch(part), tmp_path / place)
        else:
            save_file(part, tmp_path / place)
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in (index, tmp_path):
        assert_same(read(path, gauss), gauss.params)
    run_import(config_of(gauss), str(tmp_path / "run"), str(tmp_path))
    record = json.loads((tmp_path / "run" / "imported.json").read_text())
    shards = sorted({tmp_path / place for place in places.values()})
    assert record["sha256"].split() == [hashlib.sha256(p.read_bytes()).hexdigest() for p in shards]
    assert record["bytes"] == sum(path.stat().st_size for path in shards)
    shards[0].unlink()
    with pytest.raises(SourceError, match=f"needs {shards[0].name} beside it"):
        open_tensors(index)


def test_endings_in_any_case(gauss, tmp_path):
    shutil.copy(GOOD, tmp_path / "A.SAFETENSORS")
    torch.save(as_torch(gauss.tensors), tmp_path / "a.PTH.TAR")
    for name in ("A.SAFETENSORS", "a.PTH.TAR"):
        assert open_tensors(tmp_path / name).groups["weights"].keys() == gauss.tensors.keys()
    with pytest.raises(SourceError, match=r"folder with A.SAFETENSORS, a.PTH.TAR in it; name"):
        open_tensors(tmp_path)


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
