"""A search over settings of sampling, with a stand-in that draws: what it measures and finds."""

import csv
import functools
import itertools
import json
import shutil
import sys

import numpy as np
import pytest
from dummy_sampler import DummySampler
from PIL import Image
from tiny import arrays_of, run, tiny_config

from djepa_jax.config.convert import ConfigError
from djepa_jax.evaluation import acceleration
from djepa_jax.evaluation import search as searching
from djepa_jax.evaluation.metrics import intervals, scores
from djepa_jax.evaluation.search import Search, grid_of
from djepa_jax.sampling.generator import Generator

GRID = ("--config.search.cfg_scale=1,2", "--config.search.num_denoise_steps=3,4")
COUNTS = ("--config.search.count=40", "--config.search.fine_count=80")
FINE = ("--config.search.fine_cells=1",)


class Recorder(DummySampler):
    """A dummy that keeps the programs it was asked for, and may be stopped at one of its draws.

    Guidance makes its samples paler.
    """

    def __init__(self, stop_at: int = -1):
        super().__init__(self._stop)
        self.programs, self.stop_at = [], stop_at

    def __call__(self, config, mesh):
        self.programs.append(config)
        draw = super().__call__(config, mesh)
        return lambda params, inputs: draw(params, inputs) / np.max(inputs.cfg_scales)

    def _stop(self, ids):
        if len(self.drawn) == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture
def search(trained, monkeypatch, tmp_path):
    """`search(*flags)` runs the command on a workdir: its status, its record, what it drew."""
    workdir = shutil.copytree(trained, tmp_path / "run")

    def command(*flags, stop_at: int = -1):
        sampler = Recorder(stop_at)
        for module in (searching, acceleration):
            monkeypatch.setattr(module, "Generator", functools.partial(Generator, sampler=sampler))
        status = run("--mode=search", f"--workdir={workdir}", *COUNTS, *flags)
        path = workdir / "search.json"
        return status, json.loads(path.read_text()) if path.exists() else None, sampler

    command.workdir = workdir
    return command


def figures(record: dict) -> dict:
    """What does not depend on the time that it took."""
    times = ("seconds", "ms_per_sample")
    cells = [{k: v for k, v in cell.items() if k not in times} for cell in record["cells"]]
    return record | {"cells": cells}


def test_a_search_measures_cells_in_pairs_and_the_best_of_them_finely(search, capsys):
    status, record, sampler = search(*GRID, *FINE)
    assert status == 0
    cells, best = record["cells"], record["best"]
    coarse = [cell for cell in cells if cell["pass"] == "coarse"]
    fine = [cell for cell in cells if cell["pass"] == "fine"]
    assert len(coarse) == 4 and {cell["count"] for cell in coarse} == {40}
    assert {cell["count"] for cell in fine} == {80}
    runs = [config for config, _ in itertools.groupby(sampler.programs[:8])]
    assert len(runs) == len(set(runs)) == 4, "each program is compiled once, with guidance or not"
    figure = best["distance"]["metric"]
    assert (figure, best["score"]["metric"]) == ("frechet_distance", "accuracy")
    by_settings = {tuple(cell["settings"].values()): cell["metrics"] for cell in coarse}
    for scale, temperature, steps, _, *rest in by_settings:  # the dummy knows no denoising steps
        pair = (by_settings[scale, temperature, steps, each, *rest] for each in (3, 4))
        assert next(pair) == next(pair)
    least = min(coarse, key=lambda cell: cell["metrics"][figure])["settings"]
    assert least in [cell["settings"] for cell in fine]
    assert best["distance"]["value"] == min(cell["metrics"][figure] for cell in fine)
    said = capsys.readouterr().out
    scale = best["distance"]["settings"]["cfg_scale"]
    assert f"--config.sample.cfg_scale={scale} --config.sample.temperature=" in said
    rows = list(csv.DictReader((search.workdir / "search.csv").open()))
    assert len(rows) == len(cells)
    for row, cell in zip(rows, cells, strict=True):
        flat = cell["settings"] | cell["metrics"] | {k: cell[k] for k in ("count", "ms_per_sample")}
        assert row["pass"] == cell["pass"] and {k: row[k] for k in flat} == {
            k: str(v) for k, v in flat.items()
        }


def test_whether_the_best_differs_from_the_next(search):
    coarse = "--config.search.fine_cells=0"
    _, record, _ = search("--config.search.cfg_scale=2", GRID[1], coarse)
    best = record["best"]["distance"]
    assert not best["differs"] and best["difference_low"] == best["difference_high"] == 0
    _, record, _ = search("--config.search.cfg_scale=1,2", coarse, "--overwrite")
    best = record["best"]["distance"]
    assert best["differs"] and best["difference_low"] < best["difference_high"] < 0
    assert record["caveats"] and len(record["cells"]) == 2


def test_a_killed_search_goes_on_to_the_same_figures_and_a_wider_one_keeps_them(search):
    flags = (GRID[0], *FINE)
    _, whole, sampler = search(*flags)
    status, part, _ = search(*flags, "--overwrite", stop_at=5)
    assert status == 130 and 0 < len(part["cells"]) < len(whole["cells"])
    status, resumed, rest = search(*flags)
    assert status == 0 and json.dumps(figures(resumed)) == json.dumps(figures(whole))
    assert 0 < len(rest.drawn) < len(sampler.drawn)
    status, wider, _ = search("--config.search.cfg_scale=2,1,4", *FINE)
    assert status == 0 and wider["cells"][: len(whole["cells"])] == resumed["cells"]
    assert {cell["settings"]["cfg_scale"] for cell in wider["cells"]} > {1.0, 2.0, 4.0}


def test_a_search_of_something_else_is_refused_until_it_may_be_replaced(search, capsys):
    one = ("--config.search.cfg_scale=2", "--config.search.fine_cells=0")
    search(*one)
    for flag, said in (
        ("--config.evaluation.seed=7", "evaluation.seed: 1 -> 7"),
        ("--config.sample.order=raster", "sample.order: random -> raster"),
    ):
        assert search(*one, flag)[0] == 2
        error = capsys.readouterr().err
        assert said in error and "--overwrite" in error and error.count("\n") == 1
    path = search.workdir / "search.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"of": record["of"] | {"ema_norm": 1.0}}))
    assert search(*one)[0] == 2 and "ema_norm: 1.0 ->" in capsys.readouterr().err
    path.write_text(json.dumps(record | {"cells": [1]}))
    assert search(*one)[0] == 2 and "damaged" in capsys.readouterr().err
    path.write_text("[]")
    assert search(*one)[0] == 2 and "something else" in capsys.readouterr().err
    status, again, _ = search(*one, "--overwrite")
    assert status == 0 and again["cells"][0]["metrics"] == record["cells"][0]["metrics"]


PRESET = ("--config.search.preset=acceleration", "--config.sample.num_ar_steps=4")
PRESET += ("--config.sample.cfg_scale=3", "--config.sample.cfg_schedule=constant")


def test_ways_that_cost_less_stand_beside_the_papers(search, capsys):
    """The dummy's samples depend on the scales of guidance, one for each step, alone."""
    status, _, sampler = search(*PRESET)
    assert status == 0
    said = capsys.readouterr().out
    path = search.workdir / "acceleration.json"
    record = json.loads(path.read_text())
    first, *rows = record["table"]
    assert first["changed"] == {} and first["ms_alone_ratio"] == first["ms_per_sample_ratio"] == 1
    assert record["cells"][0]["settings"]["num_denoise_steps"] == 100
    assert {"order": "halton"} in [row["changed"] for row in rows if row["exact"]]
    for row in rows:
        same = not row["changed"].keys() & {"num_ar_steps", "cfg_start"}
        assert not same or (row["no_worse"] and row["frechet_distance_difference"] == [0, 0])
        assert row["exact"] or row["changed"].keys() - {"order", "reveal", "num_ar_steps"}
        assert row["ms_per_sample"] * row["ms_per_sample_ratio"] == pytest.approx(
            first["ms_per_sample"]
        )
    fit = [row for row in record["table"] if row["no_worse"]]
    fastest = min(fit, key=lambda row: row["ms_per_sample"])
    assert record["recommended"] == fastest and "recommended: " in said
    assert not (search.workdir / "search.json").exists()
    drawn = len(sampler.drawn)
    _, _, sampler = search(*PRESET)
    assert drawn and not sampler.drawn, "nothing is measured twice"
    assert json.loads(path.read_text()) == record
    arrays = arrays_of(path.with_suffix(".npz"))  # an earlier version knew no reuse_unconditional
    cells = [c for c in record["cells"] if c["settings"].pop("reuse_unconditional") == 1]
    path.write_text(json.dumps(record | {"cells": cells}))
    known = {k.replace(" 1/", "/"): rows for k, rows in arrays.items() if " 1/" in k}
    np.savez(path.with_suffix(".npz"), **known)
    _, _, sampler = search(*PRESET)
    assert {config.reuse_unconditional for config in sampler.programs} == {2, 4}
    assert len(json.loads(path.read_text())["table"]) == len(record["table"])


def test_a_judge_that_ranks_nothing_is_refused_before_anything_is_drawn(
    search, monkeypatch, capsys
):
    monkeypatch.setattr(searching, "open_metric", lambda *what: object())
    status, record, sampler = search(*GRID)
    assert (status, record) == (2, None) and not sampler.drawn
    assert "ranks nothing" in capsys.readouterr().err


def test_a_way_that_is_worse_is_not_recommended(search):
    experiment = tiny_config(*PRESET)
    settings = [dict(row) for row in acceleration.ways(experiment)[:3]]
    rng = np.random.default_rng(0)
    measured = object.__new__(acceleration.Acceleration)
    cells = [
        {"settings": own, "count": 400, "ms_per_sample": 9.0 - i, "ms_alone": 9.0}
        | {"metrics": {"frechet_distance": distance, "accuracy": 0.9}}
        for i, (own, distance) in enumerate(zip(settings, (1.0, 1.01, 3.0), strict=True))
    ]
    noise = rng.normal(0, 0.5, (3, 400))
    names = [searching.name_of(own, 400) for own in settings]
    measured.moved = {
        name: {"frechet_distance": row, "accuracy": np.zeros(400)}
        for name, row in zip(names, noise, strict=True)
    }
    assert [row["no_worse"] for row in measured.compared(cells)] == [True, True, False]


def test_pictures_of_a_search_show_something(search, monkeypatch, capsys):
    flags = ("--config.search.fine_cells=0", "--config.search.cfg_scale=1,2,4")
    search(*flags)
    for name in ("frechet_distance", "accuracy"):
        path = search.workdir / f"search_{name}.png"
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[0] > 100 and pixels.std() > 5
        path.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert search(*flags)[0] == 0 and "djepa_jax[plots]" in capsys.readouterr().out
    assert not list(search.workdir.glob("search_*.png"))


def test_maps_of_guidance_and_temperature(tmp_path):
    pytest.importorskip("matplotlib")
    from djepa_jax.evaluation.search_plots import write_plots

    grid = grid_of(tiny_config(variant="diffusion"))
    cells = [
        {"settings": own, "count": 5, "metrics": {"fid": own["cfg_scale"] * own["temperature"]}}
        for own in grid
    ]
    settings = grid[0] | {"temperature": 0.955}
    (path,) = write_plots(tmp_path, cells, {"distance": {"metric": "fid", "settings": settings}})
    red = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert ((red[..., 0] > 200) & (red[..., 1:].max(-1) < 60)).sum() > 50, "the best is marked"


def test_grids_have_only_what_can_be_sampled_and_tell_apart():
    grid = grid_of(tiny_config(variant="diffusion"))
    assert len(grid) == 15 and len({tuple(each.values()) for each in grid}) == 15
    flow = grid_of(tiny_config("--config.search.sampler=euler,heun"))
    assert len(flow) == 10, "temperature plays no part"
    late = grid_of(tiny_config(*GRID[:1], "--config.search.cfg_denoise_start=0,0.5"))
    found = [(own["cfg_scale"], own["cfg_denoise_start"]) for own in late]
    assert found == [(1, 0), (2, 0), (2, 0.5)], "guidance of 1 has no beginning"
    for flag, said in (
        ("cfg_scale=-1,2", "config.search.cfg_scale is -1.0; it must be from 0"),
        ("cfg_scale=nan", "config.search.cfg_scale is nan"),
        ("cfg_scale=1,,2", 'config.search.cfg_scale is ""; it must be a number'),
        ("num_ar_steps=2.5", 'config.search.num_ar_steps is "2.5"; it must be a whole'),
        ("num_ar_steps=900", "config.search.num_ar_steps"),
        ("num_denoise_steps=1", "config.search.num_denoise_steps is 1"),
        ("guide_scale=1.2,1.5", "config.search.guide_scale needs .*config.sample.guide"),
        ("cfg_denoise_start=0,1", "config.search.cfg_denoise_start is 1.0; it must be below"),
        ("sampler=euler,ddim", "config.search.sampler is 'ddim'.*euler, heun"),
        ("count=1", "config.search.count is 1; it must be at least 2"),
        ("fine_count=9", "config.search.fine_count is 9"),
        (f"cfg_scale={','.join(map(str, range(2001)))}", "6,003 combinations"),
    ):
        with pytest.raises(ConfigError, match=said):
            grid_of(tiny_config(f"--config.search.{flag}"))


def test_the_fine_pass_looks_beside_the_best():
    cells = [
        {
            "settings": {"cfg_scale": scale, "temperature": temperature, "sampler": "ddpm"},
            "metrics": {"fid": abs(scale - 2) + abs(temperature - 0.97), "accuracy": scale},
        }
        for scale in (1.0, 2.0, 4.0)
        for temperature in (0.94, 0.97)
    ]
    search = object.__new__(Search)  # without weights and data
    search.moved = {"": {"fid": None, "accuracy": None}}
    found = [(s["cfg_scale"], s["temperature"]) for s in search.finer(cells, 1)]
    assert found == [(2, 0.97), (4, 0.94), (1.5, 0.97), (3, 0.97), (2, 0.955)]


def test_samples_that_move_an_inception_score():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4000, 6))
    moved, score = scores.inception_moved(logits), scores.inception_scores_adm(logits)[0]
    assert moved.mean() == pytest.approx(0, abs=1e-9)
    without = scores.inception_scores_adm(logits[1:])[0]
    assert (score - without) * 4000 == pytest.approx(moved[0], abs=0.01)
    low, high = intervals.first_order(score, moved, 4000)
    parts = [scores.inception_scores_adm(part)[0] for part in np.split(logits, 40)]
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(parts) / 40**0.5, rel=0.35)
