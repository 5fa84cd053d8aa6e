"""The notebook: clean, true to the code, and running from top to bottom."""

import ast
import base64
import dataclasses
import importlib
import inspect
import io
import os
import pathlib
import re

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image
from waiting import LIMIT

import djepa_jax
from djepa_jax.config.settings import SampleSettings

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
SETTINGS = {field.name for field in dataclasses.fields(SampleSettings)}


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def tree(notebook) -> ast.Module:
    return ast.parse("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"))


@pytest.fixture(scope="module")
def prose(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def execute(notebook, folder: pathlib.Path, cache: pathlib.Path):
    """A copy of the notebook, run in `folder`."""
    client = NotebookClient(
        nbformat.from_dict(notebook),
        timeout=LIMIT,
        startup_timeout=LIMIT,
        kernel_name="python3",
        resources={"metadata": {"path": folder}},
    )
    added = {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(cache),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return client.execute(env=os.environ | added)


def text_of(cell) -> str:
    return "".join(
        output.text
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )


def pictures_of(cell) -> list[np.ndarray]:
    data = [
        output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in data]


def test_it_is_stored_without_results(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert 8 <= len(notebook.cells) <= 12 and len(NOTEBOOK.read_bytes()) < 20_000
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.execution_count is None and not cell.outputs)
        assert set(cell.metadata) == set()


def test_it_imports_what_everybody_has_and_every_name_in_the_code_exists(tree):
    roots = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    roots |= {
        node.module.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    assert roots <= {"djepa_jax", "jax", "numpy", "PIL", "pathlib"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(
                hasattr(importlib.import_module(node.module), alias.name) for alias in node.names
            )
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("djepa_jax", "model")
        ):
            assert_exists(f"{node.value.id}.{node.attr}")
    settings = {
        keyword.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in keywords_of_model(node)
    }
    assert {"cfg_scale", "num_ar_steps"} <= settings <= {"labels", *SETTINGS}


def keywords_of_model(call: ast.Call) -> list[ast.keyword]:
    return call.keywords if ast.unparse(call.func) in ("model.sample", "model.stream") else []


def assert_exists(name: str):
    """`djepa_jax.x`, or `model.x` with x a method or a documented attribute of a model."""
    root, attribute = name.split(".")[:2]
    if root == "djepa_jax":
        assert hasattr(djepa_jax, attribute), name
    else:
        assert hasattr(djepa_jax.Model, attribute) or f" {attribute}: " in inspect.getdoc(
            djepa_jax.Model
        ), name


def test_every_name_in_the_text_exists(prose):
    spans = re.findall(r"`([^`\n]+)`", prose.replace("```", ""))
    names = [span for span in spans if re.fullmatch(r"(djepa_jax|model)\.\w+", span)]
    assert len(names) >= 4
    for name in names:
        assert_exists(name)
    settings = [span for span in spans if re.fullmatch(r"[a-z]+_[a-z_]+", span)]
    assert settings and SETTINGS.issuperset(settings)
    for path in re.findall(r"\b(?:docs|launch)/[\w.]+|\bREADME\.md", prose):
        assert (ROOT / path).is_file(), path
    assert (
        "bash launch/local.sh" in prose
        and "--workdir=runs/digits" in (ROOT / "launch" / "local.sh").read_text()
    )


def test_it_runs_from_top_to_bottom(notebook, trained, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(trained)
    cells = [
        cell
        for cell in execute(notebook, tmp_path / "docs", tmp_path / "cache").cells
        if cell.cell_type == "code"
    ]
    assert "step 3" in text_of(cells[0]) and "classes: 0, 1, 2" in text_of(cells[0])
    for cell in cells[1:]:
        (picture,) = pictures_of(cell)
        assert min(picture.shape[:2]) > 64 and len(np.unique(picture)) > 10, (
            "a grid with something in it"
        )
    assert all(output.get("name") != "stderr" for cell in cells for output in cell.outputs), (
        "no warnings"
    )


def test_without_a_model_it_says_how_to_make_one(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="make one with: bash launch/local.sh"):
        exec(notebook.cells[1].source, {})
