"""Files from strangers: nothing in them is run, and none takes more memory than it has a right to.

What belongs to one format is tested with that format: code in weights in
test_importing_refusals.py, arrays in test_loader.py, archives in test_tars.py, images in
test_images.py. Here is what holds for all of the source, and weights that claim too much.
"""

import ast
import os
import pathlib

import pytest

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
    # It runs this program and its tests, by words that are written there
    assert found.pop("benchmark_suite.py") == ["import subprocess"]
    # Its unpickler hands out two functions and two types that run nothing (test_legacy_torch.py)
    assert found.pop("legacy_torch.py") == ["import pickle"]
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


# text


def test_file_of_names_is_not_read_without_limit(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"name\n" * 2)
    assert class_names.resolve(str(tmp_path / "names.txt"), 2) == ("name", "name")
    os.truncate(tmp_path / "names.txt", 2**40)  # takes no space
    with pytest.raises(ValueError, match="names.txt.* more than 16,777,216 bytes"):
        class_names.resolve(str(tmp_path / "names.txt"), 2)
