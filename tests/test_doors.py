"""Six doors: each example of docs/extending.md, a file outside the package, trains and samples."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from tiny import TINY

from djepa_jax.core.losses import TOKEN_LOSSES
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.core.models.conditioning import CONDITIONERS
from djepa_jax.core.schedules import ORDERS
from djepa_jax.data.sources import SOURCES
from djepa_jax.evaluation.metrics import METRICS
from djepa_jax.main import main
from djepa_jax.training import compile_step

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "extending.md").read_text("utf-8")
TABLES = (TOKEN_LOSSES, MODALITIES, SOURCES, CONDITIONERS, ORDERS, METRICS)
EXAMPLES = {
    title.strip(): re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}


@pytest.fixture(autouse=True)
def restored_tables():
    """What an example puts into a table goes when its test is over."""
    before = [dict(table) for table in TABLES]
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


def count(state, batch, values):
    """In place of a training step: nothing is learned."""
    state = dataclasses.replace(state, step=state.step + 1)
    return state, {"loss": 0.0, "bad_streak": state.bad_streak}


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_trains_and_samples_through_its_table_alone(
    title, tmp_path, monkeypatch, capsys
):
    assert len(EXAMPLES) == len(TABLES)
    if title in ("A source", "An order", "A metric"):  # nothing that the training step sees
        monkeypatch.setattr(compile_step, "make_train_step", lambda config: count)
    sizes = [len(table) for table in TABLES]
    file, workdir = tmp_path / "example.py", tmp_path / "run"
    file.write_text(EXAMPLES[title], "utf-8")
    flags = [flag for flag in TINY if "evaluation.kind" not in flag]  # the example names its own
    flags += ["--config.num_steps=2"]
    flags += [] if "metric" in title else ["--config.evaluation.kind=none"]
    status = main(["djepa", f"--config={file}", f"--workdir={workdir}", *flags])
    assert status == 0, capsys.readouterr().err
    grown = [len(table) - size for table, size in zip(TABLES, sizes, strict=True)]
    assert sorted(grown) == [0, 0, 0, 0, 0, 1]
    with np.load(workdir / "samples" / "step_00000002.npz", allow_pickle=False) as samples:
        assert samples["arr_0"].shape == (10, 8, 8, 1) and samples["arr_0"].std() > 0
    if "metric" in title:
        record = json.loads((workdir / "evaluation.json").read_text())
        assert record["metrics"].keys() == {"ink", "ink_error"}
        assert "ink_error" in capsys.readouterr().out
