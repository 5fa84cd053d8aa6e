"""Models of latents and the autoencoder that makes pictures of them: what is refused, compared and
passed on.
"""

import functools
import json

import numpy as np
import pytest
from caches import SHA, write_cache
from dummy_sampler import DummySampler
from filled import save_model
from processes import simple_step
from small_autoencoder import NAME, registered, write_weights
from tiny import arrays_of, run, tiny_config

import djepa_jax
from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.checkpoints.restore import check_same_model, find_model
from djepa_jax.config.convert import ConfigError
from djepa_jax.data.latent_cache import LatentCache, latents_made_by
from djepa_jax.data.sources import SingleClass
from djepa_jax.evaluation.evaluate import identity, is_of
from djepa_jax.sampling import sample_to_npz
from djepa_jax.sampling.generator import Generator
from djepa_jax.training import compile_step, reporting

LATENTS = (
    "--config.data.modality=image_latents",
    "--config.data.source=synthetic",
    "--config.evaluation.kind=none",
    "--config.data.channels=4",
    "--config.sample.num_ar_steps=2",
    f"--config.autoencoder.name={NAME}",
    "--config.autoencoder.batch_size=8",
)


@pytest.fixture(scope="module", autouse=True)
def small():
    with registered():
        yield


@pytest.fixture(autouse=True)
def sampler(monkeypatch) -> DummySampler:
    """In the command line, too."""
    sampler = DummySampler()
    with_dummy = functools.partial(Generator, sampler=sampler)
    for module in (sample_to_npz, reporting):
        monkeypatch.setattr(module, "Generator", with_dummy)
    return sampler


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[str, str]:
    """Two autoencoders."""
    folder, surplus = tmp_path_factory.mktemp("weights"), np.zeros(1, np.float32)
    one = write_weights(folder / "one.safetensors")
    return one, write_weights(folder / "other.safetensors", surplus=surplus)


@pytest.fixture(scope="module")
def ours(weights) -> str:
    return file_sha256(weights[0])


@pytest.fixture(scope="module")
def latents(tmp_path_factory, ours) -> str:
    """The workdir of a model that learned latents of the first autoencoder."""
    folder = tmp_path_factory.mktemp("latents")
    return save_model(folder, tiny_config(*LATENTS), autoencoder__sha256=ours)


def test_latents_that_cannot_become_pictures_are_refused_before_the_work(
    latents, weights, ours, sampler, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    theirs = file_sha256(weights[1])
    other, named = f"--config.autoencoder.path={weights[1]}", "--config.autoencoder.path=/no/such"
    for flags, words in (
        (["--out=x.png"], ["config.autoencoder.path is empty"]),
        (["--latents_only", "--out=x.png"], ['--out "x.png"', "--latents_only"]),
        ([other], ["other.safetensors", theirs, ours]),
        ([named], ["--config.autoencoder.path", "/no/such"]),
        (["--latents_only", f"--config.autoencoder.sha256={theirs}"], [ours, theirs]),
    ):
        command = ("--mode=sample", f"--workdir={latents}", "--out=pics", *LATENTS, *flags)
        assert run(*command) == 2, flags
        error = capsys.readouterr().err
        assert all(word in error for word in words), error
    assert sampler.drawn == [] and not list(tmp_path.iterdir())


def test_latents_alone_and_pictures_with_them(latents, weights, ours, tmp_path):
    command = ("--mode=sample", f"--workdir={latents}", *LATENTS)
    assert run(*command, "--latents_only", f"--out={tmp_path}/x.npz") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    alone = arrays_of(tmp_path / "x.npz")
    assert alone.keys() == {"latents", "arr_1", "settings"}
    assert alone["latents"].shape == (10, 8, 8, 4)
    assert "autoencoder" not in json.loads(str(alone["settings"]))
    decoder = f"--config.autoencoder.path={weights[0]}"
    assert run(*command, decoder, "--config.sample.batch_size=8", f"--out={tmp_path}/y") == 0
    found = arrays_of(tmp_path / "y.npz")
    assert found["arr_0"].shape == (10, 16, 16, 3) and found["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(found["latents"], alone["latents"])
    assert json.loads(str(found["settings"]))["autoencoder"] == ours
    assert (tmp_path / "y.png").exists()


def test_a_loaded_model_takes_only_its_own_autoencoder(latents, weights, ours):
    with pytest.raises(ConfigError, match=f"{file_sha256(weights[1])}, .* {ours}"):
        djepa_jax.load(latents, autoencoder=weights[1])
    assert djepa_jax.load(latents, autoencoder=weights[0]).config.has_decoder


def test_exports_and_imports_carry_the_autoencoder(latents, ours, tmp_path):
    for form in ("orbax", "official"):
        export, again = tmp_path / form, tmp_path / f"{form} again"
        flags = ("--mode=export", f"--workdir={latents}", f"--out={export}", f"--format={form}")
        assert run(*flags, *LATENTS) == 0  # with a config that does not know it
        assert find_model(export).config.autoencoder.sha256 == ours
        assert ours in (export / "README.md").read_text()
        assert run("--mode=import", f"--source={export}", f"--workdir={again}", *LATENTS) == 0
        assert find_model(again).config.autoencoder.sha256 == ours


def test_an_unconditional_model_has_its_autoencoder_compared_too(tmp_path):
    source = SingleClass(LatentCache(write_cache(tmp_path / "cache")))
    assert latents_made_by(source, tiny_config(*LATENTS).autoencoder, "") == SHA


def test_training_does_not_go_on_with_latents_of_another_autoencoder():
    config, other = tiny_config(*LATENTS), "cd" * 32
    for stored, current in (("", ""), (SHA, ""), ("", SHA), (SHA, SHA)):
        check_same_model(config.decoded_by(stored), config.decoded_by(current))
    with pytest.raises(ConfigError, match=f"{SHA}, .* {other}"):
        check_same_model(config.decoded_by(SHA), config.decoded_by(other))


def test_training_without_an_autoencoder_says_so_and_grids_come_with_one(
    weights, ours, sampler, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compile_step, "make_train_step", lambda config: simple_step)
    workdir, grid = f"--workdir={tmp_path}/run", tmp_path / "run" / "samples" / "step_00000003.npz"
    assert run(workdir, *LATENTS) == 0
    said = capsys.readouterr().out
    assert said.count("WARNING: sample grids will hold latents") == 1
    assert str(grid) in said and ".png" not in said
    assert said.count("--mode=sample --latents_only --out=") == 3
    decoder = f"--config.autoencoder.path={weights[0]}"
    assert run(workdir, *LATENTS, decoder) == 0
    said = capsys.readouterr().out
    assert str(grid.with_suffix(".png")) in said
    assert "--latents_only" not in said and "WARNING: sample grids" not in said
    assert json.loads(str(arrays_of(grid)["settings"]))["autoencoder"] == ours
    assert sampler.drawn == [0, 0], "once without and once with the autoencoder"
    assert run(workdir, *LATENTS, decoder) == 0
    assert sampler.drawn == [0, 0], "a grid of this autoencoder is there"


def test_a_grid_is_of_its_autoencoder():
    """Grids of pixels have no such entry; those of earlier versions are not made again."""
    params, pixels = {"w": np.ones(3, np.float32)}, tiny_config()
    made_by = {identity(params, tiny_config(*LATENTS), 1, x)["autoencoder"] for x in ("", SHA)}
    assert made_by == {"", SHA}
    of = identity(params, pixels, 1)
    before = {key: of[key] for key in ("step", "weights", "ema_norm", "sample")}
    assert "autoencoder" not in of and is_of(before, of)
    assert not is_of(before, identity(params, pixels, 2)) and not is_of({}, of)
