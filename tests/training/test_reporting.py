"""Grids and evaluations of a run: given up when it is asked to stop, and not made twice.

Dummies stand for the sampler and for the training step.
"""

import functools
import json
import os
import re
import signal

import numpy as np
import pytest
from dummy_sampler import DummySampler
from event_files import shown
from processes import simple_step
from tiny import arrays_of, tiny_config

from djepa_jax.checkpoints.restore import find_model
from djepa_jax.runtime.metric_writer import METRICS_NAME
from djepa_jax.sampling.generator import Generator
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
    lines = (tmp_path / METRICS_NAME).read_text().splitlines()
    assert shown(tmp_path)["loss"] == [1, 2, 3, 4, 5, 6] == [json.loads(li)["step"] for li in lines]
    assert all(json.loads(line)["images_per_second"] > 0 for line in lines)


def test_grids_appear_while_training_goes_on(sampler, tmp_path):
    flags = ("--config.sample_every=2", "--config.evaluation.kind=none")
    result = train(tiny_config(*flags, "--config.num_steps=4"), str(tmp_path))
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    steps = ("step_00000002", "step_00000004")
    assert names == [f"{step}{ending}" for step in steps for ending in (".npz", ".png")]
    assert result.grid.name == "step_00000004.png"
    found = [arrays_of(tmp_path / "samples" / f"{step}.npz")["arr_0"] for step in steps]
    assert found[0].shape == (10, 8, 8, 1) and np.any(found[0] != found[1])
