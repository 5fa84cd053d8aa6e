"""What `--mode=import` refuses: damaged, absurd and unfit files, and files with code in them."""

import argparse
import functools
import json
import os
import pathlib
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
import torch
from conftest import PARITY, load_parity
from official_files import as_torch, flags_of, training_file
from safetensors.numpy import save_file

from djepa_jax import main as cli
from djepa_jax.checkpoints.convert import tensor_files
from djepa_jax.checkpoints.convert.import_weights import read_tensors
from djepa_jax.checkpoints.convert.tensor_files import SourceError, open_tensors

GOOD = PARITY / "model_gauss.safetensors"
FORMS = {"zip": {}, "old": {"_use_new_zipfile_serialization": False}}


def read(path: pathlib.Path) -> dict:
    """Everything that an import does with a file of weights."""
    file = open_tensors(path)
    tensors, abstract = file.groups[file.average], load_parity("gauss").abstract
    return read_tensors(tensors, file.metadata, abstract, f'--source "{path}"')


def refusal(path: pathlib.Path) -> str:
    """The error when a file is read: one line that names it, without advice to run its code."""
    with pytest.raises(SourceError) as caught:
        read(path)
    error = str(caught.value)
    assert str(path) in error and "\n" not in error and "weights_only" not in error
    return error


def changed(name: str, value) -> dict:
    """The authors' tensors with another one in the place of one."""
    return {"model": as_torch(load_parity("gauss").tensors) | {name: value}}


CUT = "damaged, cut short or of another kind than"
BYTES = {  # name of a file, what is in it, words of the refusal
    "unknown.h5": (b"x", "unknown kind"),
    "none": (b"x", "unknown kind"),
    "empty.pth": (b"", "0 bytes"),
    "empty.safetensors": (b"", "0 bytes"),
    "text.pth": (b"not a model\n" * 50, CUT),
    "text.safetensors": (b"not a model\n" * 50, CUT),
    "zip.pth": (b"PK\x05\x06" + bytes(18), CUT),
    "pickle.pth": (pickle.dumps({"model": {}}, protocol=2), CUT),
    "new_pickle.pth": (pickle.dumps({"model": {}}, protocol=4), CUT),
    "safetensors.pth": (GOOD.read_bytes(), CUT),
}
CONTENTS = {  # words of the refusal -> what is saved by PyTorch
    "'buffer' of type int64": lambda: changed("buffer", torch.zeros(1, 4, 48, dtype=torch.int64)),
    "'buffer' of type complex64": lambda: changed("buffer", torch.zeros(3, dtype=torch.complex64)),
    "not finite": lambda: changed("fake_latent", torch.full((1, 48), torch.inf)),
    "'fake_latent' of type torch.sparse": lambda: changed(
        "fake_latent", torch.zeros(1, 48).to_sparse()
    ),
    "'a' of type .* on meta": lambda: changed("a", torch.zeros(3, device="meta")),
    "'b' of type": lambda: changed("b", torch.zeros(1).expand(2**38)),  # 1 TB
    "no group .* are: none": lambda: {"model": {"b": torch.zeros(1).expand(2**38)}},
    "no group of dense": lambda: {"model": {}},
    "no group of dense float": lambda: {"epoch": 3, "notes": "x", "rng": torch.zeros(3).byte()},
    "no group .*: none": lambda: torch.zeros(3),
    "no group": lambda: argparse.Namespace(model={"w": torch.zeros(3)}),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bad_files_are_one_clear_error(tmp_path):
    for name, (content, words) in BYTES.items():
        (tmp_path / name).write_bytes(content)
        assert words in refusal(tmp_path / name)
    for words, content in CONTENTS.items():
        torch.save(content(), tmp_path / "odd.pth")
        assert re.search(words, refusal(tmp_path / "odd.pth"))
    tensors = load_parity("gauss").tensors
    for value, words in (
        (np.zeros(3, np.int32), "type I32"),
        (np.full((1, 48), np.nan, "f4"), "finite"),
    ):
        save_file(tensors | {"fake_latent": value}, tmp_path / "odd.safetensors")
        assert words in refusal(tmp_path / "odd.safetensors")
    assert "does not exist" in refusal(tmp_path / "no.pth")
    assert "is a folder" in refusal(tmp_path)


def test_file_cut_short_anywhere_is_refused(tmp_path):
    tensors = {n: v for n, v in load_parity("gauss").tensors.items() if v.ndim == 1}
    save_file(tensors, tmp_path / "whole.safetensors")
    for form, options in FORMS.items():
        content = training_file(as_torch(tensors), as_torch(tensors))
        torch.save(content, tmp_path / f"{form}.pth", **options)
    for path in tmp_path.iterdir():
        assert open_tensors(path).groups, "the whole file is good"
        content, size = path.read_bytes(), path.stat().st_size
        places = (
            1,
            8,
            64,
            1000,
            size // 3,
            size // 2,
            size - 4096,
            size - 200,
            size - 22,
            size - 1,
        )
        for cut in places:
            path.write_bytes(content[:cut])
            assert f"has {cut:,} bytes and is damaged, cut short" in refusal(path)


def test_absurd_safetensors_are_refused(tmp_path):
    def claim(shape: list[int], end: int, start: int = 0) -> dict:
        return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}

    headers = (  # what a header says, and the length that it claims for itself
        ({}, 2**64 - 1),
        ({}, 2**40),
        ({}, 100_000),
        ({"a": claim([2**38], 2**40)}, None),
        ({"a": claim([2**38], 16)}, None),
        ({"a": claim([2**33, 2**33], 16)}, None),
        ({"a": claim([4], 16), "b": claim([4], 16)}, None),
        ({"a": claim([4], 0, 16)}, None),
        (b'{"a":' * 50_000, None),
    )
    for header, length in headers:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = struct.pack("<Q", length or len(text))
        (tmp_path / "a.safetensors").write_bytes(size + text + bytes(16))
        assert "cannot be read" in refusal(tmp_path / "a.safetensors")


def test_compressed_pth_is_not_unpacked(tmp_path):
    torch.save({"model": {"a": torch.zeros(2**20)}}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as whole,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    assert (tmp_path / "b.pth").stat().st_size < 10_000
    assert "it is compressed" in refusal(tmp_path / "b.pth")


def test_containers_in_containers_have_an_end(tmp_path, monkeypatch):
    """A small file may describe more entries than anyone can count."""
    monkeypatch.setattr(tensor_files, "MAX_ENTRIES", 1000)
    entries = functools.reduce(lambda inner, _: [inner] * 100, range(5), 0)
    torch.save({"model": {"w": torch.ones(2)}, "log": entries}, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 10_000
    assert "more than 1,000 entries" in refusal(tmp_path / "a.pth")


class RunsACommand:
    """Unpickled with its code, it would create a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class CallsAFunction(RunsACommand):
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Evaluates(RunsACommand):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


CODE = {RunsACommand: "posix.system", CallsAFunction: "posix.mkdir", Evaluates: "eval"}


def test_code_in_a_file_is_never_run(tmp_path):
    trace, bad, tensors = tmp_path / "trace", tmp_path / "bad.pth", as_torch({"w": np.zeros(3)})
    for kind, name in CODE.items():
        thing = kind(trace)
        for content in (
            thing,
            {"model": tensors | {"b": thing}},
            {"model": tensors, "args": thing},
        ):
            for options in FORMS.values():
                torch.save(content, bad, **options)
                error = refusal(bad)
                assert f"asks for {name}," in error and "nothing in it was run" in error
                assert not trace.exists()
    torch.save(CallsAFunction(trace), bad)
    torch.load(bad, weights_only=False)
    assert trace.exists(), "these files are dangerous indeed"


class Options:
    """A harmless class, but not one that a file of tensors needs."""


def test_objects_of_other_classes_are_refused(tmp_path):
    for options in (Options(), argparse.Namespace(inner=Options()), torch.nn.Linear(2, 2)):
        torch.save({"model": {"w": torch.zeros(1)}, "args": options}, tmp_path / "own.pth")
        assert re.search(r"asks for [\w.]*(Options|Linear), which", refusal(tmp_path / "own.pth"))


def test_pytorch_with_an_unsafe_loader_is_refused(tmp_path, monkeypatch):
    torch.save({"w": torch.zeros(1)}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    assert "torch>=2.6" in refusal(tmp_path / "a.pth")


def test_odd_moments_count_as_none(tmp_path):
    state = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    for change, read in (
        ({}, True),
        ({"step": torch.tensor(float("inf"))}, False),
        ({"step": torch.tensor(2.0**40)}, False),
        ({"step": torch.tensor(-5.0)}, False),
        ({"exp_avg": torch.zeros(3).to_sparse()}, False),
        ({"exp_avg_sq": torch.zeros(3, dtype=torch.complex64)}, False),
        ({"exp_avg_sq": None}, False),
    ):
        optimizer = {"state": {0: state | change}, "param_groups": [{"params": [0]}]}
        torch.save({"model": {"w": torch.zeros(3)}, "opt": optimizer}, tmp_path / "a.pth")
        file = open_tensors(tmp_path / "a.pth")
        assert (file.moments is not None, file.unread) == (read, () if read else ("'opt'",))


def test_refusals_of_the_command_leave_the_workdir_alone(gauss, tmp_path, capsys):
    """One line, but for a file of another model: a table, and the flags that would fit."""
    workdir = tmp_path / "run"

    def refused(source, *changes: str) -> list[str]:
        flags = [f"--source={source}", f"--workdir={workdir}", *flags_of(gauss, *changes)]
        assert cli.main(["djepa_jax", "--mode=import", *flags]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and not captured.out and not workdir.exists()
        return captured.err.splitlines()

    assert "--source is missing" in refused("")[0]
    (line,) = refused(tmp_path / "no.pth")
    assert "no.pth" in line
    lines = refused(GOOD, "--config.model.width=96", "--config.model.encoder_depth=3")
    assert lines[0].endswith("does not fit the config; nothing was written.")
    assert lines[1].endswith(" --config.model.width=48 --config.model.encoder_depth=2")
    rows = [line.split() for line in lines]
    assert ["encoder_blocks.2.mlp.fc1.weight", "missing", "-", "(384,", "96)"] in rows
    assert ["encoder_blocks.{0..1}.mlp.fc1.bias", "shape", "(192,)", "(384,)"] in rows
