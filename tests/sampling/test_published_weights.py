"""The notebook of the docs, cell by cell, on a tiny run and on weights in the authors' format."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from tiny import TINY, run

NOTEBOOK = pathlib.Path(__file__).parents[2] / "docs" / "published_weights.ipynb"


def cells() -> list[str]:
    """The code of the notebook; the first cell has the settings."""
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.mark.parametrize("imported", [False, True])
def test_every_cell_runs(trained, tmp_path, imported):
    settings, *rest = cells()
    trained = shutil.copytree(trained, tmp_path / "trained")
    names = {}
    exec(compile(settings, str(NOTEBOOK), "exec"), names)
    assert names["WEIGHTS"] == "" and names["WORKDIR"] == "runs/digits"
    names |= {"WORKDIR": str(trained), "MEASURE": ["--overwrite"]}
    if imported:
        weights = tmp_path / "official"
        export = ("--mode=export", f"--workdir={trained}", f"--out={weights}", "--format=official")
        assert run(*export) == 0
        names |= {"WEIGHTS": str(weights), "WORKDIR": str(tmp_path / "run")}
        names |= {"CONFIG": "digits", "FLAGS": list(TINY)}
    for cell in rest:
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
    assert names["steps"][-1].shape == names["guided"].shape == (4, 8, 8, 1)
    np.testing.assert_array_equal(names["steps"][-1], names["guided"])
    np.testing.assert_array_equal(
        names["edited"][:, :, 4:], names["guided"][:1, :, 4:].repeat(4, 0)
    )
    assert (names["edited"] != names["guided"][:1]).any()
    workdir = pathlib.Path(names["WORKDIR"])
    assert (workdir / "evaluation.json").exists()
