"""The autoencoder of latents, in sampling, training, exports and grids: what is refused, compared
and passed on.
"""

import hashlib
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from caches import SHA, write_cache
from filled import save_model
from small_autoencoder import NAME, registered, write_weights
from tiny import arrays_of, run, tiny_config

import djepa_jax
from djepa_jax.checkpoints.restore import check_same_model, find_model
from djepa_jax.config import experiment as configuration
from djepa_jax.config.experiment import ConfigError
from djepa_jax.data.latent_cache import LatentCache
from djepa_jax.data.records import DataError
from djepa_jax.data.sources import Unlabelled
from djepa_jax.evaluation.evaluate import identity
from djepa_jax.sampling.generator import Generator
from djepa_jax.training.loop import check_decoder, latents_made_by

LATENTS = (
    "--config.data.modality=image_latents",
    "--config.data.source=synthetic",
    "--config.evaluation.kind=none",
    "--config.data.channels=4",
    "--config.sample.num_ar_steps=2",
    f"--config.autoencoder.name={NAME}",
)


def sha256_of(path: str) -> str:
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def small():
    with registered():
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[str, str]:
    """Two autoencoders."""
    folder = tmp_path_factory.mktemp("weights")
    return write_weights(folder / "one.safetensors"), write_weights(
        folder / "other.safetensors", surplus=np.zeros(1, np.float32)
    )


@pytest.fixture(scope="module")
def latents(tmp_path_factory, weights) -> str:
    """The workdir of a model that learned latents of the first autoencoder."""
    return save_model(
        tmp_path_factory.mktemp("latents"),
        tiny_config(*LATENTS),
        autoencoder__sha256=sha256_of(weights[0]),
    )


@pytest.fixture
def no_work(monkeypatch):
    """Fails if anything is sampled."""
    monkeypatch.setattr(
        Generator, "_sample_batch", lambda *_: pytest.fail("this was to be refused before")
    )


OTHER = "--config.autoencoder.path=OTHER"
# what is asked for -> flags, and words of the error, where OURS and THEIRS stand for checksums
REFUSED = {
    "no autoencoder": (
        ["--out=x.png"],
        "config.autoencoder.path is empty, and this model makes latents: name the weights",
    ),
    "latents as a picture": (
        ["--latents_only", "--out=x.png"],
        '--out "x.png" with --latents_only: latents are no picture',
    ),
    "other weights": (
        [OTHER],
        "has sha256 THEIRS, but the latents are those of the autoencoder with sha256 OURS",
    ),
    "no such weights": (
        ["--config.autoencoder.path=/no/such"],
        '--config.autoencoder.path "/no/such" does not exist',
    ),
    "other latents": (
        ["--latents_only", "--config.autoencoder.sha256=THEIRS"],
        "sha256 OURS, the config (or the latent cache",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_latents_that_cannot_become_pictures_are_refused(
    latents, weights, tmp_path, monkeypatch, no_work, capsys, case
):
    def filled(text: str) -> str:
        text = text.replace("THEIRS", sha256_of(weights[1])).replace("OURS", sha256_of(weights[0]))
        return text.replace("OTHER", weights[1])

    monkeypatch.chdir(tmp_path)
    flags, words = REFUSED[case]
    assert (
        run("--mode=sample", f"--workdir={latents}", "--out=pics", *LATENTS, *map(filled, flags))
        == 2
    )
    assert filled(words) in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_latents_only_is_for_sampling_latents(trained, tmp_path, no_work, capsys):
    assert (
        run("--mode=sample", f"--workdir={trained}", f"--out={tmp_path}/x.npz", "--latents_only")
        == 2
    )
    assert "--latents_only is for models of latents" in capsys.readouterr().err
    assert run(f"--workdir={tmp_path}/new", "--latents_only") == 2
    assert "--latents_only is for --mode=sample" in capsys.readouterr().err and not list(
        tmp_path.iterdir()
    )


def test_latents_alone_are_written_when_asked_for(latents, tmp_path, capsys):
    assert (
        run(
            "--mode=sample",
            f"--workdir={latents}",
            *LATENTS,
            "--latents_only",
            f"--out={tmp_path}/x.npz",
        )
        == 0
    )
    assert f"wrote {tmp_path}/x.npz" in capsys.readouterr().out and [
        p.name for p in tmp_path.iterdir()
    ] == ["x.npz"]
    found = arrays_of(tmp_path / "x.npz")
    assert found.keys() == {"latents", "arr_1", "settings"} and found["latents"].shape == (
        10,
        8,
        8,
        4,
    )


def test_pictures_come_with_their_latents_and_the_name_of_their_autoencoder(
    latents, weights, tmp_path
):
    flags = (
        f"--config.autoencoder.path={weights[0]}",
        "--config.sample.batch_size=8",
        "--config.autoencoder.batch_size=8",
    )
    assert (
        run("--mode=sample", f"--workdir={latents}", *LATENTS, *flags, f"--out={tmp_path}/x") == 0
    )
    found = arrays_of(tmp_path / "x.npz")
    assert (
        found["arr_0"].shape == (10, 16, 16, 3)
        and found["arr_0"].dtype == np.uint8
        and found["latents"].shape == (10, 8, 8, 4)
    )
    assert (
        json.loads(str(found["settings"]))["autoencoder"] == sha256_of(weights[0])
        and (tmp_path / "x.png").exists()
    )
    images = djepa_jax.load(latents, autoencoder=weights[0]).sample(found["arr_1"])
    assert np.abs(images.astype(int) - found["arr_0"]).max() <= 1, (
        "the Python interface makes the same"
    )


def test_a_loaded_model_takes_only_its_own_autoencoder(latents, weights):
    with pytest.raises(
        ConfigError,
        match=f'other.safetensors" has sha256 {sha256_of(weights[1])}, .* {sha256_of(weights[0])}',
    ):
        djepa_jax.load(latents, autoencoder=weights[1])
    assert djepa_jax.load(latents).sample_arrays([3]).keys() == {"latents"}


@pytest.mark.parametrize("form", ["orbax", "official"])
def test_exports_and_imports_carry_the_autoencoder(latents, weights, tmp_path, form):
    sha256, export = sha256_of(weights[0]), tmp_path / "export"
    flags = ("--mode=export", f"--workdir={latents}", f"--out={export}", f"--format={form}")
    assert run(*flags, *LATENTS) == 0  # with a config that does not know it
    assert find_model(export).config.autoencoder.sha256 == sha256
    assert (
        f"the autoencoder with sha256 `{sha256}` has to turn them into pictures"
        in (export / "README.md").read_text()
    )
    assert (
        run("--mode=import", f"--source={export}", f"--workdir={tmp_path / 'again'}", *LATENTS) == 0
    )
    assert find_model(tmp_path / "again").config.autoencoder.sha256 == sha256


def test_training_takes_the_autoencoder_from_the_latent_cache(tmp_path):
    cache, config = LatentCache(str(write_cache(tmp_path / "cache"))), tiny_config(*LATENTS)
    for source in (cache, Unlabelled(cache)):
        assert latents_made_by(config, source) == SHA
    assert latents_made_by(config, ["latents from an npz file"]) == ""
    config.autoencoder.sha256 = "cd" * 32
    assert latents_made_by(config, ["latents from an npz file"]) == "cd" * 32, "the user may say it"
    with pytest.raises(
        DataError,
        match=f"config.autoencoder.sha256 is {'cd' * 32}, the latent cache was made with {SHA}",
    ):
        latents_made_by(config, cache)


def test_the_autoencoder_that_the_user_named_is_compared_before_training(weights):
    config = tiny_config(
        *LATENTS, f"--config.autoencoder.path={weights[0]}", f"--config.autoencoder.sha256={SHA}"
    )
    with pytest.raises(
        ConfigError, match=f"has sha256 {sha256_of(weights[0])}, but the latents .* {SHA}"
    ):
        check_decoder(config, ["latents from an npz file"])


def test_an_unconditional_model_has_its_autoencoder_compared_too(tmp_path, weights):
    cache = LatentCache(str(write_cache(tmp_path / "cache")))
    with pytest.raises(DataError, match=f"made with the autoencoder of sha256 {SHA}"):
        check_decoder(
            tiny_config(*LATENTS, f"--config.autoencoder.path={weights[0]}"), Unlabelled(cache)
        )


def test_training_does_not_go_on_with_latents_of_another_autoencoder():
    config = tiny_config(*LATENTS)
    stored = configuration.resolved(config)
    check_same_model(stored, config)
    stored["autoencoder"]["sha256"] = SHA
    check_same_model(stored, config)  # where the config does not know
    config.autoencoder.sha256 = "cd" * 32
    with pytest.raises(
        ConfigError,
        match=f"latents of the autoencoder with sha256 {SHA}, the config .* {'cd' * 32}",
    ):
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
    assert (
        f"Samples:  {grid}.png" in said
        and "--latents_only" not in said
        and "no pictures" not in said
    )
    made = grid.with_suffix(".npz").stat().st_mtime_ns
    assert json.loads(str(arrays_of(grid.with_suffix(".npz"))["settings"]))[
        "autoencoder"
    ] == sha256_of(weights[0])
    assert run(workdir, *LATENTS, f"--config.autoencoder.path={weights[0]}") == 0
    assert grid.with_suffix(".npz").stat().st_mtime_ns == made, (
        "a grid of this autoencoder is there"
    )


def test_a_grid_is_of_its_autoencoder():
    """Grids of pixels stay what they were before there was this entry, and are not made again."""
    params, latents, pixels = {"w": jnp.ones(3)}, tiny_config(*LATENTS), tiny_config()
    assert (
        len({identity(params, latents, 1, sha256)["autoencoder"] for sha256 in ("", "ab", "cd")})
        == 3
    )
    assert identity(params, pixels, 1).keys() == {"step", "weights", "ema_norm", "sample"}
