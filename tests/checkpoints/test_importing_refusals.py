"""What `--mode=import` refuses: damaged and unfit files, files with code in them, workdirs in
use.
"""

import argparse
import os
import pathlib
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import PARITY, load_parity
from official_files import as_torch, flags_of, has_checkpoint, run_import, training_file
from safetensors.numpy import save_file

from djepa_jax.checkpoints.convert.tensor_files import SourceError, open_tensors

GOOD = PARITY / "model_gauss.safetensors"
NEW_AND_OLD = {"zip": {}, "old": {"_use_new_zipfile_serialization": False}}


def _tensors() -> dict[str, np.ndarray]:
    return dict(load_parity("gauss").tensors)


def _bytes(name: str, content: bytes):
    def make(folder: pathlib.Path) -> pathlib.Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _folder(folder: pathlib.Path) -> pathlib.Path:
    for name in ("b.safetensors", "a.pth", "notes.txt"):
        (folder / name).touch()
    return folder


def _empty_folder(folder: pathlib.Path) -> pathlib.Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def _safetensors(**changes: np.ndarray):
    def make(folder: pathlib.Path) -> pathlib.Path:
        save_file(_tensors() | changes, folder / "odd.safetensors")
        return folder / "odd.safetensors"

    return make


def _pth(content):
    def make(folder: pathlib.Path) -> pathlib.Path:
        torch.save(content() if callable(content) else content, folder / "odd.pth")
        return folder / "odd.pth"

    return make


def _with(**changes: torch.Tensor):
    return _pth(lambda: {"model": as_torch(_tensors()) | changes})


NAN = np.full((1, 48), np.nan, np.float32)
# what is given as --source -> (how it is made in a folder, words that the one-line error must
# contain)
BAD_SOURCES = {
    "missing file": (lambda folder: folder / "no.pth", ["no.pth", "does not exist"]),
    "folder of files": (_folder, ["is a folder", "a.pth, b.safetensors."]),
    "empty folder": (_empty_folder, ["is a folder", "name a .pth or .safetensors file"]),
    "unknown suffix": (_bytes("model.h5", b"x"), ["model.h5", "unknown kind", ".safetensors"]),
    "no suffix": (_bytes("model", b"x"), ["unknown kind"]),
    "empty .pth": (_bytes("a.pth", b""), ["a.pth", "0 bytes", "download it again"]),
    "empty .safetensors": (
        _bytes("a.safetensors", b""),
        ["a.safetensors", "0 bytes", "download it again"],
    ),
    "text as .pth": (
        _bytes("a.pth", b"not a model\n" * 50),
        ["a.pth", "cannot be read", "another kind than .pth"],
    ),
    "text as .safetensors": (
        _bytes("a.safetensors", b"not a model\n" * 50),
        ["cannot be read", "another kind"],
    ),
    "zip of nothing": (_bytes("a.pth", b"PK\x05\x06" + bytes(18)), ["cannot be read"]),
    "plain pickle": (_bytes("a.pth", pickle.dumps({"model": {}}, protocol=2)), ["cannot be read"]),
    "new pickle": (
        _bytes("a.pth", pickle.dumps({"model": {}}, protocol=4)),
        ["cannot be read", "another kind than .pth"],
    ),
    "safetensors as .pth": (
        _bytes("a.pth", GOOD.read_bytes()),
        ["cannot be read", "another kind than .pth"],
    ),
    "integers": (
        _safetensors(buffer=np.zeros((1, 4, 48), np.int32)),
        ["not floating-point", "buffer (int32)"],
    ),
    "integers in a .pth": (
        _with(buffer=torch.zeros(1, 4, 48, dtype=torch.int64)),
        ["not floating-point", "buffer (int64)"],
    ),
    "complex numbers": (
        _with(buffer=torch.zeros(1, 4, 48, dtype=torch.complex64)),
        ["buffer (complex64)"],
    ),
    "NaN": (_safetensors(fake_latent=NAN), ["odd.safetensors", "not finite"]),
    "infinity in a .pth": (
        _with(fake_latent=torch.full((1, 48), torch.inf)),
        ["odd.pth", "not finite"],
    ),
    "sparse tensor": (
        _with(fake_latent=torch.zeros(1, 48).to_sparse()),
        ["fake_latent", "not a dense tensor"],
    ),
    "tensor without data": (
        _with(fake_latent=torch.zeros(1, 48, device="meta")),
        ["fake_latent", "not a dense tensor"],
    ),
    "numbers as names": (_pth({"model": {0: torch.zeros(1)}}), ["not a checkpoint"]),
    "no tensors": (_pth({"model": {}}), ["not a checkpoint", "empty"]),
    "something else in a dict": (_pth({"epoch": 3, "notes": "x"}), ["not a checkpoint", "epoch"]),
    "a single tensor": (_pth(torch.zeros(3)), ["holds a Tensor", "a dict of tensors is needed"]),
    "a list": (_pth([torch.zeros(3)]), ["holds a list"]),
}


def refused(source, tmp_path: pathlib.Path, capsys) -> str:
    """Import, which must fail with one line and leave no checkpoint; the line."""
    workdir = tmp_path / "run"
    assert run_import(source, workdir, flags_of(load_parity("gauss"))) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1, captured.err
    assert "weights_only" not in captured.err, (
        "torch's advice to load it all the same must not be passed on"
    )
    assert not captured.out and not has_checkpoint(workdir)
    return captured.err


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_source_is_one_clear_error(case, tmp_path, capsys):
    make, words = BAD_SOURCES[case]
    error = refused(make(tmp_path), tmp_path, capsys)
    for word in words:
        assert word in error, error
    seen_before_reading = "not finite" not in error
    assert (tmp_path / "run").exists() != seen_before_reading, (
        "a refused command must not touch the workdir"
    )


@pytest.fixture(scope="module", params=["new.pth", "old.pth", "model.safetensors"])
def whole_file(request, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("whole") / request.param
    content = as_torch({name: value for name, value in _tensors().items() if value.ndim == 1})
    if path.suffix == ".safetensors":
        save_file({name: value.numpy() for name, value in content.items()}, path)
    else:
        torch.save(
            training_file(content, content),
            path,
            **NEW_AND_OLD["old" if path.stem == "old" else "zip"],
        )
    return path


def test_file_cut_short_anywhere_is_refused(whole_file, tmp_path, capsys):
    content = whole_file.read_bytes()
    assert open_tensors(whole_file).weights, "the whole file is good"
    size = len(content)
    for cut in (
        1,
        3,
        8,
        64,
        1000,
        size // 3,
        size // 2,
        size - 4096,
        size - 200,
        size - 22,
        size - 1,
    ):
        short = tmp_path / whole_file.name
        short.write_bytes(content[:cut])
        error = refused(short, tmp_path, capsys)
        assert (
            f"has {cut:,} bytes and is damaged, cut short" in error
            and not (tmp_path / "run").exists()
        )


def test_wrong_size_of_model_is_a_table(gauss, tmp_path, capsys):
    """More than a line: every tensor, and the flags that would fit."""
    flags = flags_of(gauss, "--config.model.width=96", "--config.model.encoder_depth=3")
    assert run_import(GOOD, tmp_path / "run", flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("does not fit the config; nothing was written.")
    assert (
        lines[1]
        == "The file is of a model with --config.model.width=48 --config.model.encoder_depth=2"
    )
    assert any(
        re.match(r"  encoder_blocks\.2\.mlp\.fc1\.weight +missing +- +\(384, 96\)$", line)
        for line in lines
    )
    assert any(
        re.match(r"  encoder_blocks\.\{0\.\.1\}\.mlp\.fc1\.bias +shape +\(192,\) +\(384,\)$", line)
        for line in lines
    )
    assert not (tmp_path / "run").exists()


def test_source_must_be_given(gauss, tmp_path, capsys):
    assert run_import("", tmp_path / "run", flags_of(gauss)) == 2
    assert (
        capsys.readouterr().err.startswith("error: --source is missing.")
        and not (tmp_path / "run").exists()
    )


def test_workdir_in_use_is_left_alone(gauss, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run_import(GOOD, workdir, flags_of(gauss)) == 0
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run_import(GOOD, workdir, flags_of(gauss)) == 2
    error = capsys.readouterr().err
    assert (
        "already holds checkpoint 0; import into another folder" in error
        and len(error.splitlines()) == 1
    )
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


class _RunsACommand:
    """Unpickled with its code, it would create a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class _CallsAFunction(_RunsACommand):
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class _Evaluates(_RunsACommand):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


# a class of objects -> the name that the refusal must give
CODE = {_RunsACommand: "posix.system", _CallsAFunction: "posix.mkdir", _Evaluates: "eval"}
PLACES = {
    "alone": lambda thing: thing,
    "among the tensors": lambda thing: {
        "model": {"z_proj.weight": torch.zeros(48, 4), "z_proj.bias": thing}
    },
    "beside the tensors": lambda thing: training_file(
        as_torch(_tensors()), as_torch(_tensors()), optimizer=thing
    ),
}


@pytest.mark.parametrize("form", NEW_AND_OLD)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", CODE)
def test_code_in_a_file_is_never_run(kind, place, form, tmp_path, capsys):
    trace = tmp_path / "trace"
    torch.save(PLACES[place](kind(trace)), tmp_path / "bad.pth", **NEW_AND_OLD[form])
    error = refused(tmp_path / "bad.pth", tmp_path, capsys)
    assert f"asks for {CODE[kind]}," in error and "nothing in it was run" in error
    assert not trace.exists() and not (tmp_path / "run").exists()


def test_such_a_file_would_run_its_code_elsewhere(tmp_path):
    """The files of the test above are dangerous indeed."""
    torch.save(_CallsAFunction(tmp_path / "trace"), tmp_path / "bad.pth")
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "trace").exists()


class Options:
    """A harmless class, but not one that a file of tensors needs."""


@pytest.mark.parametrize(
    "options", [Options(), argparse.Namespace(inner=Options()), torch.nn.Linear(2, 2)]
)
def test_objects_of_other_classes_are_refused(options, tmp_path, capsys):
    torch.save({"model": as_torch(_tensors()), "args": options}, tmp_path / "own.pth")
    named = "Linear" if isinstance(options, torch.nn.Module) else "test_importing_refusals.Options"
    assert re.search(
        rf"asks for [\w.]*{named}, which", refused(tmp_path / "own.pth", tmp_path, capsys)
    )


@pytest.mark.parametrize("content", ['{"kind": "djepa_jax export"}\n', "somebody's notes"])
def test_a_file_that_an_import_would_write_over_is_kept(content, gauss, tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(content)
    assert run_import(GOOD, workdir, flags_of(gauss)) == 2
    assert "already holds config.json" in capsys.readouterr().err
    assert (workdir / "config.json").read_text() == content and not (
        workdir / "checkpoints"
    ).exists()


def test_pytorch_with_an_unsafe_loader_is_refused(tmp_path, monkeypatch):
    torch.save(as_torch(_tensors()), tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(
        SourceError, match=r"loader of PyTorch 2.5.1\+cpu can be made to run code .*\"torch>=2.6\""
    ):
        open_tensors(tmp_path / "a.pth")


ODD_MOMENTS = {
    "endless step": {"step": torch.tensor(float("inf"))},
    "step too large": {"step": torch.tensor(2.0**40)},
    "negative step": {"step": torch.tensor(-5.0)},
    "sparse": {"exp_avg": torch.zeros(3).to_sparse()},
    "complex": {"exp_avg_sq": torch.zeros(3, dtype=torch.complex64)},
}


@pytest.mark.parametrize("case", ODD_MOMENTS)
def test_odd_moments_count_as_none(case, tmp_path):
    state = {
        "step": torch.tensor(3.0),
        "exp_avg": torch.zeros(3),
        "exp_avg_sq": torch.zeros(3),
    } | ODD_MOMENTS[case]
    content = {
        "model": {"w": torch.zeros(3)},
        "optimizer": {"state": {0: state}, "param_groups": [{"params": [0]}]},
    }
    torch.save(content, tmp_path / "a.pth")
    assert open_tensors(tmp_path / "a.pth").moments is None
