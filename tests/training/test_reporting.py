"""Grids and evaluations of a run: given up when it is asked to stop, and not made twice.

Dummies stand for the sampler and for the training step.
"""

import functools
import json
import os
import re
import signal
import sys

import numpy as np
import pytest
from dummy_sampler import DummySampler
from event_files import shown
from fake_wandb import FakeWandb
from PIL import Image
from processes import simple_step
from tiny import arrays_of, run, tiny_config

from djepa_jax.checkpoints.restore import find_model
from djepa_jax.data.sources import open_data
from djepa_jax.evaluation.metrics.base import NotFiniteError
from djepa_jax.runtime.metric_writer import METRICS_NAME, STARTS_NAME, read_lines
from djepa_jax.sampling.generator import Generator
from djepa_jax.sampling.grids import label_grid
from djepa_jax.training import compile_step, reporting
from djepa_jax.training.loop import train


@pytest.fixture
def sampler(monkeypatch) -> DummySampler:
    sampler = DummySampler()
    monkeypatch.setattr(reporting, "Generator", functools.partial(Generator, sampler=sampler))
    monkeypatch.setattr(compile_step, "make_train_step", lambda config: simple_step)
    return sampler


def ask_to_stop(ids) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_a_sample_grid_saves_at_once(sampler, tmp_path):
    sampler.before = ask_to_stop
    flags = ("--config.sample_every=1", "--config.sample.count=99", "--config.sample.batch_size=8")
    result = train(tiny_config(*flags), str(tmp_path))
    assert (result.step, result.finished) == (1, False)
    assert sampler.drawn == [0], "the first of many batches was the last"
    assert find_model(tmp_path).step == 1 and not (tmp_path / "samples").exists()


def test_an_evaluation_is_given_up_too_and_made_the_next_time(sampler, tmp_path):
    def before(ids):
        if ids[0] == 0 and len(sampler.drawn) == 1:  # the grid is drawn
            ask_to_stop(ids)

    sampler.before = before
    experiment = tiny_config("--config.sample.batch_size=16")
    result = train(experiment, str(tmp_path))
    assert (result.step, result.finished) == (3, False) and sampler.drawn == [0, 0]
    assert not (tmp_path / "evaluation.json").exists() and find_model(tmp_path).step == 3
    sampler.before = lambda ids: None
    result = train(experiment, str(tmp_path))
    assert result.finished and sampler.drawn == [0, 0, 0, 16, 32, 48, 64]
    assert result.evaluation["step"] == 3 and (tmp_path / "evaluation.json").exists()
    assert train(experiment, str(tmp_path)) == result, "nothing is made twice"
    assert sampler.drawn == [0, 0, 0, 16, 32, 48, 64]


def test_a_trend_is_logged_in_no_record_and_samples_that_are_not_finite_end_no_training(
    sampler, tmp_path, monkeypatch, capsys
):
    flags = ("--config.evaluate_every=1", "--config.evaluation.trend_count=20")
    seen, original = [], reporting.trend

    def trend(*arguments, **options):
        seen.append((tmp_path / "evaluation.json").exists())
        if len(seen) == 2:
            raise NotFiniteError("2 of the samples")
        return original(*arguments, **options)

    monkeypatch.setattr(reporting, "trend", trend)
    experiment = tiny_config(*flags, "--config.sample_every=0", "--config.sample.batch_size=40")
    result = train(experiment, str(tmp_path))
    assert result.finished and seen == [False, False]
    assert sampler.drawn == [0, 0, 40], "20 samples of a trend, 70 in the end"
    assert shown(tmp_path)["evaluation/accuracy"] == [1, 3]
    assert "WARNING: step 2: no evaluation; 2 of the samples" in capsys.readouterr().out
    assert result.evaluation["evaluation"]["count"] == 70


def test_no_grid_is_made_where_there_are_to_be_none(sampler, tmp_path, capsys):
    experiment = tiny_config("--config.sample_every=0", "--config.evaluation.kind=none")
    result = train(experiment, str(tmp_path))
    assert result.finished and result.grid is None and not sampler.drawn
    assert not (tmp_path / "samples").exists()
    reporting.summarise(result, experiment, str(tmp_path))
    said = capsys.readouterr().out
    assert "samples/" not in said and "--mode=sample" in said


def test_going_back_shows_every_step_once(sampler, tmp_path, capsys):
    """Rates are possible ones: saving, which happens between the steps, is no part of their time.
    The terminal keeps the losses; the table of parameters lies in a file.
    """
    flags = ("--config.checkpoint_every=2", "--config.log_every=1", "--config.num_steps=6")
    experiment = tiny_config(*flags, "--config.evaluation.kind=none")
    train(experiment, str(tmp_path))
    said, table = capsys.readouterr().out, (tmp_path / "parameters.txt").read_text()
    assert "step 1/6  loss" in said and "step 6/6  loss" in said
    total = re.search(r"Total: ([\d,]+)", table)[1]
    assert f"{total} parameters" in said and "context_encoder" not in said
    train(experiment, str(tmp_path), restore_from=f"{tmp_path}@4")
    starts, broken = read_lines(tmp_path / STARTS_NAME)
    assert [start["step"] for start in starts] == [0, 4] and not broken
    assert starts[1]["versions"]["jax"] and "x cpu" in starts[1]["devices"]
    lines = (tmp_path / METRICS_NAME).read_text().splitlines()
    assert shown(tmp_path)["loss"] == [1, 2, 3, 4, 5, 6] == [json.loads(li)["step"] for li in lines]
    assert all(json.loads(line)["images_per_second"] > 0 for line in lines)


def test_grids_appear_while_training_goes_on(sampler, tmp_path):
    flags = ("--config.sample_every=2", "--config.evaluation.kind=none")
    result = train(tiny_config(*flags, "--config.num_steps=4"), str(tmp_path))
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    steps = ("step_00000002", "step_00000004")
    grids = [f"{step}{ending}" for step in steps for ending in (".npz", ".png")]
    assert names == ["real.png", *grids]
    assert result.grid.name == "step_00000004.png"
    found = [arrays_of(tmp_path / "samples" / f"{step}.npz")["arr_0"] for step in steps]
    assert found[0].shape == (10, 8, 8, 1) and np.any(found[0] != found[1])


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_scalars_and_grids_go_to_wandb_and_a_resumed_run_goes_on_there(sampler, wandb, tmp_path):
    flags = ("--config.sample_every=2", "--config.evaluate_every=2", "--config.checkpoint_every=3")
    experiment = tiny_config(*flags, "--config.num_steps=5")
    train(experiment, str(tmp_path), should_stop=lambda step: step == 4, wandb="digits")
    go_back = f"{tmp_path}@3"  # the steps after it are made again, and are there already
    result = train(experiment, str(tmp_path), restore_from=go_back, wandb="digits")
    assert result.finished and all(run.finished for run in wandb.runs)
    ((identity, sent),) = wandb.sent.items()
    assert json.loads((tmp_path / "wandb_runs.json").read_text()) == {"digits": identity}
    assert wandb.runs[0].settings["project"] == "digits"
    assert [step for step, name, _ in sent if name == "loss"] == [1, 2, 3, 4, 5]
    grids = [(step, value.shape[-1]) for step, name, value in sent if name == "samples"]
    assert grids == [(2, 3), (4, 3), (5, 3)]
    assert {step for step, name, _ in sent if name == "evaluation/accuracy"} == {2, 4, 5}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    local = {(line["step"], name) for line in lines for name in line if name != "step"}
    assert {(step, name) for step, name, _ in sent if name not in ("samples", "real")} == local
    train(experiment, str(tmp_path), wandb="other")
    assert len(wandb.sent) == 2


def test_wandb_that_fails_stops_no_training(sampler, wandb, tmp_path, monkeypatch, caplog):
    def init(**_):
        run = FakeWandb.init(wandb, **_)
        run.log = lambda values, step: 1 / 0
        return run

    monkeypatch.setattr(wandb, "init", init)
    experiment = tiny_config("--config.sample_every=0", "--config.evaluation.kind=none")
    assert train(experiment, str(tmp_path), wandb="digits").finished
    assert "did not take step 3" in caplog.text


def test_without_wandb_or_a_login_nothing_is_touched(wandb, tmp_path, monkeypatch, capsys):
    command = (f"--workdir={tmp_path / 'run'}", "--wandb=digits")
    wandb.logged_in = False
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert "No API key" in error and "WANDB_MODE=offline" in error and error.count("\n") == 1
    for module in (None, type(sys)("wandb")):  # no package; a folder that has its name
        monkeypatch.setitem(sys.modules, "wandb", module)
        assert run(*command) == 2
        assert "[wandb]" in capsys.readouterr().err
    assert run(*command, "--mode=sample") == 2
    assert "--mode=train" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_real_examples_of_the_same_classes_lie_beside_the_first_grid(sampler, tmp_path):
    flags = ("--config.sample_every=1", "--config.evaluation.kind=none", "--config.num_steps=2")
    experiment = tiny_config(*flags, "--config.sample.labels=3,3,7")
    train(experiment, str(tmp_path))
    source, conditions = open_data(experiment), np.resize([3, 3, 7], 10)
    indices = reporting.real_examples(source, conditions)
    assert len(set(indices)) == 10 and np.all(source.labels[indices] == conditions)
    pictures, titles = source.images[indices], experiment.titles(conditions)
    with Image.open(tmp_path / "samples" / "real.png") as grid:
        np.testing.assert_array_equal(grid, label_grid(pictures, titles))
    (events,) = tmp_path.glob("events*")
    assert events.read_bytes().count(b"\n\x04real") == 1, "the tag of one image for TensorBoard"


def test_real_examples_are_any_where_their_labels_are_not_known():
    class Unknown:
        labels = None

        def __len__(self):
            return 5

    conditions = np.zeros(7, np.int32)
    indices = reporting.real_examples(Unknown(), conditions)
    assert sorted(indices[:5]) == [0, 1, 2, 3, 4] and len(indices) == 7
    known = Unknown()
    known.labels = np.array([1, 1, 1, 1, 2])  # none of class 0, one of class 2
    indices = reporting.real_examples(known, np.array([0, 1, 2, 2], np.int32))
    assert indices[0] < 5 and indices[1] < 4 and indices[2] == indices[3] == 4
