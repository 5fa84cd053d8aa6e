"""Files from strangers: nothing in them is run, and none takes more memory than it has a right to.

What belongs to one format is tested with that format: code in weights in
test_importing_refusals.py, arrays in test_loader.py, archives in test_tars.py, images in
test_images.py. Here is what holds for all of the source, and weights that claim too much.
"""

import ast
import json
import os
import pathlib
import struct
import zipfile

import pytest
import torch

from djepa_jax.checkpoints.convert.tensor_files import SourceError, open_tensors
from djepa_jax.config import class_names

ROOT = pathlib.Path(__file__).parents[2]

# the source: nothing that could run what is in a file

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
MODULES |= {"subprocess", "code", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load"}
CALLS |= {"yaml.unsafe_load"}
OPTIONS = {  # what may be called only with an option written out
    "np.load": ("allow_pickle", False),
    "np.lib.format.read_array": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}


def faults(source: str) -> list[str]:
    """What a piece of Python may not have here."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).replace("numpy.", "np.").replace("builtins.", "")
            if name in CALLS:
                found.append(name)
            wanted = OPTIONS.get(name)
            given = [(word.arg, getattr(word.value, "value", None)) for word in node.keywords]
            if wanted and wanted not in given:
                found.append(name)
    return found


def test_source_has_nothing_that_runs_what_is_in_a_file():
    folders = [ROOT / name for name in ("djepa_jax", "configs", "launch")]
    found = {
        path.name: faults(path.read_text("utf-8"))
        for folder in folders
        for path in folder.rglob("*.py")
    }
    assert len(found) > 40 and {name: line for name, line in found.items() if line} == {}


def test_the_test_above_finds_what_it_looks_for():
    for line in (
        "import pickle",
        "import os, dill.source",
        "from cloudpickle import loads",
        "builtins.exec(code)",
        "__import__('os')",
        "os.system('ls')",
        "np.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "np.load(path, None, flag)",
        "torch.load(path, weights_only=False)",
        "np.lib.format.read_array(file)",
    ):
        assert len(faults(line)) == 1, line
    allowed = "np.load(p, allow_pickle=False); torch.load(p, weights_only=True); re.compile(p)"
    assert faults(f"{allowed}; model.eval()") == []


# weights


def safetensors(header: dict | bytes, length: int | None = None, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def claim(shape: list[int], end: int, start: int = 0) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


BAD_SAFETENSORS = {
    "endless header": safetensors({}, length=2**64 - 1),
    "header of a terabyte": safetensors({}, length=2**40),
    "header longer than the file": safetensors({}, length=100_000),
    "tensor of a terabyte": safetensors({"a": claim([2**38], 2**40)}, data=bytes(16)),
    "shape beyond its bytes": safetensors({"a": claim([2**38], 16)}, data=bytes(16)),
    "shape that overflows": safetensors({"a": claim([2**33, 2**33], 16)}, data=bytes(16)),
    "two tensors in one place": safetensors(
        {"a": claim([4], 16), "b": claim([4], 16)}, data=bytes(16)
    ),
    "end before the start": safetensors({"a": claim([4], 0, 16)}, data=bytes(16)),
    "deep header": safetensors(b'{"a":' * 50_000),
}


def test_absurd_safetensors_are_refused(tmp_path):
    for case, content in BAD_SAFETENSORS.items():
        (tmp_path / "a.safetensors").write_bytes(content)
        try:
            open_tensors(tmp_path / "a.safetensors")
        except SourceError as error:
            assert "cannot be read" in str(error), case
        else:
            pytest.fail(case)


def test_pth_that_claims_or_unpacks_to_too_much_is_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(1).expand(2**38)}}, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 10_000
    with pytest.raises(SourceError, match="a is not a dense tensor"):
        open_tensors(tmp_path / "a.pth")
    torch.save({"model": {"a": torch.zeros(2**20)}}, tmp_path / "a.pth")
    assert open_tensors(tmp_path / "a.pth").weights["model"].shapes == {"a": (2**20,)}
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as whole,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    with pytest.raises(SourceError, match=r"cannot be read .*it would unpack to 4,19\d,\d+ bytes"):
        open_tensors(tmp_path / "b.pth")


# text


def test_file_of_names_is_not_read_without_limit(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"name\n" * 2)
    assert class_names.resolve(str(tmp_path / "names.txt"), 2) == ("name", "name")
    os.truncate(tmp_path / "names.txt", 2**40)  # takes no space
    with pytest.raises(ValueError, match="names.txt.* more than 16,777,216 bytes"):
        class_names.resolve(str(tmp_path / "names.txt"), 2)
