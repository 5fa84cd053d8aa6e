"""`--mode=sample` and the autoencoder of latents: what is refused, what is compared, what goes on after a kill."""

import hashlib
import json
import os
import pathlib
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import SHA, write_cache
from filled import save_model
from small_autoencoder import NAME, registered, write_weights
from tiny import CONFIG, TINY, tiny_config

import djepa_jax
from djepa_jax import config as configuration
from djepa_jax import generate, sharding
from djepa_jax.config import ConfigError
from djepa_jax.data.latents import LatentCache
from djepa_jax.data.records import DataError
from djepa_jax.data.sources import Unlabelled
from djepa_jax.evaluation.runner import identity
from djepa_jax.generate import Generator, Stopped, check_same_model
from djepa_jax.main import main
from djepa_jax.models.djepa import init_params
from djepa_jax.parts import Parts
from djepa_jax.reporting import Reporter
from djepa_jax.stored import find_model
from djepa_jax.train import check_decoder, latents_made_by, train

LATENTS = (
    "--config.data.modality=image_latents",
    "--config.data.source=synthetic",
    "--config.evaluation.kind=none",
    "--config.data.channels=4",
    "--config.sample.num_ar_steps=2",
    f"--config.autoencoder.name={NAME}",
)


def run(*arguments: str) -> int:
    return main(["djepa_jax", f"--config={CONFIG}", *TINY, *arguments])


def sha256_of(path: str) -> str:
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def small():
    with registered():
        yield


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """Gets the first number of every batch that is drawn."""
    first, real = [], generate.jitted_sampler

    def sampler(spec, mesh):
        def call(params, wanted, ids, *rest):
            first.append(int(ids[0]))
            return real(spec, mesh)(params, wanted, ids, *rest)

        return call

    monkeypatch.setattr(generate, "jitted_sampler", sampler)
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
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz.unfinished"] and drawn == [0, 8]
    drawn.clear()
    return out


def arrays_of(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def test_the_same_command_goes_on_after_a_kill(killed, trained, tmp_path, drawn, capsys):
    assert run(*TWENTY, f"--workdir={trained}", f"--out={killed}") == 0
    assert drawn == [8, 16] and "8 of 20 samples are in" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npz", "samples.png"]
    assert run(*TWENTY, f"--workdir={trained}", f"--out={tmp_path / 'whole'}") == 0
    found, whole = arrays_of(killed), arrays_of(tmp_path / "whole.npz")
    assert found.keys() == whole.keys() == {"arr_0", "arr_1", "settings"} and found["arr_0"].shape == (20, 8, 8, 1)
    for name, value in whole.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_another_batch_size_goes_on_too(killed, trained, drawn):
    assert run(*TWENTY[:2], "--config.sample.batch_size=16", f"--workdir={trained}", f"--out={killed}") == 0
    assert drawn == [8]


@pytest.mark.parametrize("change", ["--config.sample.seed=1", "--config.sample.labels=3", "other weights"])
def test_samples_of_other_settings_or_weights_start_anew(killed, trained, tmp_path, drawn, capsys, change):
    flags, workdir = (), save_model(tmp_path / "other", tiny_config()) if change == "other weights" else trained
    if workdir == trained:
        flags = (change,)
    assert run(*TWENTY, f"--workdir={workdir}", f"--out={killed}", *flags) == 0
    assert drawn == [0, 8, 16] and "holds samples of other settings or weights; starting anew" in capsys.readouterr().out


# batches


@pytest.fixture(scope="module")
def model() -> tuple:
    config = tiny_config("--config.sample.batch_size=16")
    experiment = configuration.build(config)
    return config, experiment, sharding.make_mesh((-1, 1, 1)), init_params(experiment.train.model, jax.random.key(0))


def test_after_running_out_of_memory_it_goes_on_with_the_batch_that_failed(model, drawn, monkeypatch):
    config, experiment, mesh, params = model
    labels = np.arange(40) % 10
    expected = Generator(config, experiment, mesh)(params, labels, seed=0)
    drawn.clear()
    counted = generate.jitted_sampler

    def short(spec, mesh):  # of memory, from the second batch on
        def call(params, wanted, ids, *rest):
            if len(wanted) > 8 and ids[0] > 0:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return counted(spec, mesh)(params, wanted, ids, *rest)

        return call

    monkeypatch.setattr(generate, "jitted_sampler", short)
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
        Generator(config, experiment, mesh).images(params, np.zeros(99, int), 0, should_stop=lambda: len(drawn) == 2)
    assert drawn == [0, 16]


# a request to stop


def test_a_signal_in_a_sample_grid_saves_at_once(tmp_path, drawn, monkeypatch, capsys):
    counted = generate.jitted_sampler

    def sampler(spec, mesh):
        os.kill(os.getpid(), signal.SIGTERM)
        return counted(spec, mesh)

    monkeypatch.setattr(generate, "jitted_sampler", sampler)
    flags = ("--config.sample_every=1", "--config.sample.count=99", "--config.sample.batch_size=8")
    result = train(tiny_config(*flags), str(tmp_path))
    assert (result.step, result.finished) == (1, False) and drawn == [0], "the first of many batches was the last"
    assert find_model(tmp_path).step == 1 and not (tmp_path / "samples").exists()
    assert "step 1: no sample grid, for the run was asked to stop" in capsys.readouterr().out


def test_an_evaluation_is_given_up_too(model, tmp_path, drawn, capsys):
    config, experiment, mesh, params = model
    report = Reporter(config, experiment, [], mesh, tmp_path)
    report.stop_requested = lambda step: True
    assert report.evaluate(3, types.SimpleNamespace(ema_params=params)) is None
    assert drawn == [] and "step 3: no evaluation" in capsys.readouterr().out and not list(tmp_path.iterdir())


# latents


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[str, str]:
    """Two autoencoders."""
    folder = tmp_path_factory.mktemp("weights")
    return write_weights(folder / "one.safetensors"), write_weights(folder / "other.safetensors", surplus=np.zeros(1, np.float32))


@pytest.fixture(scope="module")
def latents(tmp_path_factory, weights) -> str:
    """The workdir of a model that learned latents of the first autoencoder."""
    return save_model(tmp_path_factory.mktemp("latents"), tiny_config(*LATENTS), autoencoder__sha256=sha256_of(weights[0]))


@pytest.fixture
def no_work(monkeypatch):
    """Fails if anything is sampled."""
    monkeypatch.setattr(Generator, "_sample_batch", lambda *_: pytest.fail("this was to be refused before"))


OTHER = "--config.autoencoder.path=OTHER"
# what is asked for -> flags, and words of the error, where OURS and THEIRS stand for checksums
REFUSED = {
    "no autoencoder": (["--out=x.png"], "config.autoencoder.path is empty, and this model makes latents: name the weights"),
    "latents as a picture": (["--latents_only", "--out=x.png"], '--out "x.png" with --latents_only: latents are no picture'),
    "other weights": ([OTHER], "has sha256 THEIRS, but the latents are those of the autoencoder with sha256 OURS"),
    "no such weights": (["--config.autoencoder.path=/no/such"], '--config.autoencoder.path "/no/such" does not exist'),
    "other latents": (["--latents_only", "--config.autoencoder.sha256=THEIRS"], "sha256 OURS, the config (or the latent cache"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_latents_that_cannot_become_pictures_are_refused(latents, weights, tmp_path, monkeypatch, no_work, capsys, case):
    def filled(text: str) -> str:
        text = text.replace("THEIRS", sha256_of(weights[1])).replace("OURS", sha256_of(weights[0]))
        return text.replace("OTHER", weights[1])

    monkeypatch.chdir(tmp_path)
    flags, words = REFUSED[case]
    assert run("--mode=sample", f"--workdir={latents}", "--out=pics", *LATENTS, *map(filled, flags)) == 2
    assert filled(words) in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_latents_only_is_for_sampling_latents(trained, tmp_path, no_work, capsys):
    assert run("--mode=sample", f"--workdir={trained}", f"--out={tmp_path}/x.npz", "--latents_only") == 2
    assert "--latents_only is for models of latents" in capsys.readouterr().err
    assert run(f"--workdir={tmp_path}/new", "--latents_only") == 2
    assert "--latents_only is for --mode=sample" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_latents_alone_are_written_when_asked_for(latents, tmp_path, capsys):
    assert run("--mode=sample", f"--workdir={latents}", *LATENTS, "--latents_only", f"--out={tmp_path}/x.npz") == 0
    assert f"wrote {tmp_path}/x.npz" in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    found = arrays_of(tmp_path / "x.npz")
    assert found.keys() == {"latents", "arr_1", "settings"} and found["latents"].shape == (10, 8, 8, 4)


def test_pictures_come_with_their_latents_and_the_name_of_their_autoencoder(latents, weights, tmp_path):
    flags = (f"--config.autoencoder.path={weights[0]}", "--config.sample.batch_size=8", "--config.autoencoder.batch_size=8")
    assert run("--mode=sample", f"--workdir={latents}", *LATENTS, *flags, f"--out={tmp_path}/x") == 0
    found = arrays_of(tmp_path / "x.npz")
    assert (
        found["arr_0"].shape == (10, 16, 16, 3) and found["arr_0"].dtype == np.uint8 and found["latents"].shape == (10, 8, 8, 4)
    )
    assert json.loads(str(found["settings"]))["autoencoder"] == sha256_of(weights[0]) and (tmp_path / "x.png").exists()
    images = djepa_jax.load(latents, autoencoder=weights[0]).sample(found["arr_1"])
    assert np.abs(images.astype(int) - found["arr_0"]).max() <= 1, "the Python interface makes the same"


def test_a_loaded_model_takes_only_its_own_autoencoder(latents, weights):
    with pytest.raises(ConfigError, match=f'other.safetensors" has sha256 {sha256_of(weights[1])}, .* {sha256_of(weights[0])}'):
        djepa_jax.load(latents, autoencoder=weights[1])
    assert djepa_jax.load(latents).sample_arrays([3]).keys() == {"latents"}


@pytest.mark.parametrize("form", ["orbax", "official"])
def test_exports_and_imports_carry_the_autoencoder(latents, weights, tmp_path, form):
    sha256, export = sha256_of(weights[0]), tmp_path / "export"
    flags = ("--mode=export", f"--workdir={latents}", f"--out={export}", f"--format={form}")
    assert run(*flags, *LATENTS) == 0  # with a config that does not know it
    assert find_model(export).config.autoencoder.sha256 == sha256
    assert f"the autoencoder with sha256 `{sha256}` has to turn them into pictures" in (export / "README.md").read_text()
    assert run("--mode=import", f"--source={export}", f"--workdir={tmp_path / 'again'}", *LATENTS) == 0
    assert find_model(tmp_path / "again").config.autoencoder.sha256 == sha256


def test_training_takes_the_autoencoder_from_the_latent_cache(tmp_path):
    cache, config = LatentCache(str(write_cache(tmp_path / "cache"))), tiny_config(*LATENTS)
    for source in (cache, Unlabelled(cache)):
        assert latents_made_by(config, source) == SHA
    assert latents_made_by(config, ["latents from an npz file"]) == ""
    config.autoencoder.sha256 = "cd" * 32
    assert latents_made_by(config, ["latents from an npz file"]) == "cd" * 32, "the user may say it"
    with pytest.raises(DataError, match=f"config.autoencoder.sha256 is {'cd' * 32}, the latent cache was made with {SHA}"):
        latents_made_by(config, cache)


def test_the_autoencoder_that_the_user_named_is_compared_before_training(weights):
    config = tiny_config(*LATENTS, f"--config.autoencoder.path={weights[0]}", f"--config.autoencoder.sha256={SHA}")
    with pytest.raises(ConfigError, match=f"has sha256 {sha256_of(weights[0])}, but the latents .* {SHA}"):
        check_decoder(config, ["latents from an npz file"])


def test_an_unconditional_model_has_its_autoencoder_compared_too(tmp_path, weights):
    cache = LatentCache(str(write_cache(tmp_path / "cache")))
    with pytest.raises(DataError, match=f"made with the autoencoder of sha256 {SHA}"):
        check_decoder(tiny_config(*LATENTS, f"--config.autoencoder.path={weights[0]}"), Unlabelled(cache))


def test_training_does_not_go_on_with_latents_of_another_autoencoder():
    config = tiny_config(*LATENTS)
    stored = configuration.resolved(config)
    check_same_model(stored, config)
    stored["autoencoder"]["sha256"] = SHA
    check_same_model(stored, config)  # where the config does not know
    config.autoencoder.sha256 = "cd" * 32
    with pytest.raises(ConfigError, match=f"latents of the autoencoder with sha256 {SHA}, the config .* {'cd' * 32}"):
        check_same_model(stored, config)
    del stored["autoencoder"]  # of an older version
    check_same_model(stored, config)


def test_training_without_an_autoencoder_says_so_and_grids_come_with_one(weights, tmp_path, capsys):
    workdir, grid = f"--workdir={tmp_path}/run", tmp_path / "run" / "samples" / "step_00000003"
    assert run(workdir, *LATENTS) == 0
    said = capsys.readouterr().out
    assert said.count("sample grids will hold latents (.npz) and no pictures") == 1
    assert f"Samples:  {grid}.npz" in said and ".png" not in said
    assert said.count("--mode=sample --latents_only --out=") == 3
    assert run(workdir, *LATENTS, f"--config.autoencoder.path={weights[0]}") == 0
    said = capsys.readouterr().out
    assert f"Samples:  {grid}.png" in said and "--latents_only" not in said and "no pictures" not in said
    made = grid.with_suffix(".npz").stat().st_mtime_ns
    assert json.loads(str(arrays_of(grid.with_suffix(".npz"))["settings"]))["autoencoder"] == sha256_of(weights[0])
    assert run(workdir, *LATENTS, f"--config.autoencoder.path={weights[0]}") == 0
    assert grid.with_suffix(".npz").stat().st_mtime_ns == made, "a grid of this autoencoder is there"


def test_a_grid_is_of_its_autoencoder():
    """Grids of pixels stay what they were before there was this entry, and are not made again."""
    params, latents, pixels = {"w": jnp.ones(3)}, tiny_config(*LATENTS), tiny_config()
    assert len({identity(params, latents, 1, sha256)["autoencoder"] for sha256 in ("", "ab", "cd")}) == 3
    assert identity(params, pixels, 1).keys() == {"step", "weights", "ema_norm", "sample"}


WRONG = {
    "--config.sample.cfg_scale=1e39": "sample.cfg_scale is 1e+39; it must be a finite number, at least 0 and at most a million",
    "--config.sample.temperature=1e39": "config.sample.temperature is 1e+39; it must be",
    "--config.autoencoder.sha256=xyz": "config.autoencoder.sha256 is 'xyz'; it must be empty, or 64 hexadecimal digits",
}


@pytest.mark.parametrize("flag", WRONG)
def test_values_that_cannot_work_are_refused(flag):
    with pytest.raises(ConfigError) as caught:
        configuration.build(tiny_config(flag))
    assert WRONG[flag] in str(caught.value)
