"""`--mode=sample`: what goes on after a kill, what batches may be, what is stopped and what is
refused.
"""

import os
import pathlib
import signal
import types

import jax
import numpy as np
import pytest
from filled import save_model
from tiny import arrays_of, run, tiny_config

from djepa_jax.checkpoints.restore import find_model
from djepa_jax.config import experiment as configuration
from djepa_jax.config.experiment import ConfigError
from djepa_jax.core import sharding
from djepa_jax.core.models.djepa import init_params
from djepa_jax.sampling import generator
from djepa_jax.sampling.generator import Generator, Stopped
from djepa_jax.sampling.parts import Parts
from djepa_jax.training.loop import train
from djepa_jax.training.reporting import Reporter


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """Gets the first number of every batch that is drawn."""
    first, real = [], generator.jitted_sampler

    def sampler(spec, mesh):
        def call(params, wanted, ids, *rest):
            first.append(int(ids[0]))
            return real(spec, mesh)(params, wanted, ids, *rest)

        return call

    monkeypatch.setattr(generator, "jitted_sampler", sampler)
    return first


# going on after a kill


TWENTY = ("--mode=sample", "--config.sample.count=20", "--config.sample.batch_size=8")


@pytest.fixture
def killed(trained, tmp_path, monkeypatch, drawn) -> pathlib.Path:
    """What a command was to write that was interrupted in its second batch of three."""
    out, add, added = tmp_path / "samples.npz", Parts.add, []

    def add_once(parts, arrays):
        if added:
            raise KeyboardInterrupt
        added.append(add(parts, arrays))

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "add", add_once)
        assert run(*TWENTY, f"--workdir={trained}", f"--out={out}") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz.unfinished"] and drawn == [
        0,
        8,
    ]
    drawn.clear()
    return out


def test_the_same_command_goes_on_after_a_kill(killed, trained, tmp_path, drawn, capsys):
    assert run(*TWENTY, f"--workdir={trained}", f"--out={killed}") == 0
    assert drawn == [8, 16] and "8 of 20 samples are in" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npz", "samples.png"]
    assert run(*TWENTY, f"--workdir={trained}", f"--out={tmp_path / 'whole'}") == 0
    found, whole = arrays_of(killed), arrays_of(tmp_path / "whole.npz")
    assert found.keys() == whole.keys() == {"arr_0", "arr_1", "settings"} and found[
        "arr_0"
    ].shape == (20, 8, 8, 1)
    for name, value in whole.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_another_batch_size_goes_on_too(killed, trained, drawn):
    assert (
        run(*TWENTY[:2], "--config.sample.batch_size=16", f"--workdir={trained}", f"--out={killed}")
        == 0
    )
    assert drawn == [8]


@pytest.mark.parametrize(
    "change", ["--config.sample.seed=1", "--config.sample.labels=3", "other weights"]
)
def test_samples_of_other_settings_or_weights_start_anew(
    killed, trained, tmp_path, drawn, capsys, change
):
    flags, workdir = (
        (),
        save_model(tmp_path / "other", tiny_config()) if change == "other weights" else trained,
    )
    if workdir == trained:
        flags = (change,)
    assert run(*TWENTY, f"--workdir={workdir}", f"--out={killed}", *flags) == 0
    assert (
        drawn == [0, 8, 16]
        and "holds samples of other settings or weights; starting anew" in capsys.readouterr().out
    )


# batches


@pytest.fixture(scope="module")
def model() -> tuple:
    config = tiny_config("--config.sample.batch_size=16")
    experiment = configuration.build(config)
    return (
        config,
        experiment,
        sharding.make_mesh((-1, 1, 1)),
        init_params(experiment.train.model, jax.random.key(0)),
    )


def test_after_running_out_of_memory_it_goes_on_with_the_batch_that_failed(
    model, drawn, monkeypatch
):
    config, experiment, mesh, params = model
    labels = np.arange(40) % 10
    expected = Generator(config, experiment, mesh)(params, labels, seed=0)
    drawn.clear()
    counted = generator.jitted_sampler

    def short(spec, mesh):  # of memory, from the second batch on
        def call(params, wanted, ids, *rest):
            if len(wanted) > 8 and ids[0] > 0:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return counted(spec, mesh)(params, wanted, ids, *rest)

        return call

    monkeypatch.setattr(generator, "jitted_sampler", short)
    found = Generator(config, experiment, mesh)(params, labels, seed=0)
    assert drawn == [0, 16, 24, 32]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_batches_begin_anywhere_and_make_the_same_pictures(model, drawn):
    config, experiment, mesh, params = model
    generator, labels = Generator(config, experiment, mesh), np.arange(20) % 10
    whole = generator.images(params, labels, seed=3)["images"]
    rest = [batch["images"] for batch in generator.batches(params, labels, 3, first=7)]
    assert [len(batch) for batch in rest] == [13] and drawn == [0, 16, 7]
    np.testing.assert_allclose(np.concatenate(rest).astype(int), whole[7:], atol=1)


def test_sampling_stops_between_batches(model, drawn):
    config, experiment, mesh, params = model
    with pytest.raises(Stopped):
        Generator(config, experiment, mesh).images(
            params, np.zeros(99, int), 0, should_stop=lambda: len(drawn) == 2
        )
    assert drawn == [0, 16]


# a request to stop


def test_a_signal_in_a_sample_grid_saves_at_once(tmp_path, drawn, monkeypatch, capsys):
    counted = generator.jitted_sampler

    def sampler(spec, mesh):
        os.kill(os.getpid(), signal.SIGTERM)
        return counted(spec, mesh)

    monkeypatch.setattr(generator, "jitted_sampler", sampler)
    flags = ("--config.sample_every=1", "--config.sample.count=99", "--config.sample.batch_size=8")
    result = train(tiny_config(*flags), str(tmp_path))
    assert (result.step, result.finished) == (1, False) and drawn == [0], (
        "the first of many batches was the last"
    )
    assert find_model(tmp_path).step == 1 and not (tmp_path / "samples").exists()
    assert "step 1: no sample grid, for the run was asked to stop" in capsys.readouterr().out


def test_an_evaluation_is_given_up_too(model, tmp_path, drawn, capsys):
    config, experiment, mesh, params = model
    report = Reporter(config, experiment, [], mesh, tmp_path)
    report.stop_requested = lambda step: True
    assert report.evaluate(3, types.SimpleNamespace(ema_params=params)) is None
    assert (
        drawn == []
        and "step 3: no evaluation" in capsys.readouterr().out
        and not list(tmp_path.iterdir())
    )


# settings


WRONG = {
    "--config.sample.cfg_scale=1e39": "sample.cfg_scale is 1e+39; it must be a finite number, at "
    "least 0 and at most a million",
    "--config.sample.temperature=1e39": "config.sample.temperature is 1e+39; it must be",
    "--config.autoencoder.sha256=xyz": "config.autoencoder.sha256 is 'xyz'; it must be empty, or "
    "64 hexadecimal digits",
}


@pytest.mark.parametrize("flag", WRONG)
def test_values_that_cannot_work_are_refused(flag):
    with pytest.raises(ConfigError) as caught:
        configuration.build(tiny_config(flag))
    assert WRONG[flag] in str(caught.value)
