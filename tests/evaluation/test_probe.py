"""What features know: that labels cannot reach them, known answers, and the command as a whole."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny import run, tiny_config

from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.config.stored import to_stored
from djepa_jax.core import sharding
from djepa_jax.core.models.djepa import init_params
from djepa_jax.data.arrays import ArraySource, load_digits
from djepa_jax.data.sources import with_classes_of
from djepa_jax.evaluation import probe as probing
from djepa_jax.evaluation.probe import (
    effective_rank,
    embed,
    make_features,
    probe,
    signs_of_collapse,
)
from djepa_jax.sampling.model import load

DIGITS = load_digits()
TWO_LAYERS = "--config.model.encoder_depth=2"


@pytest.fixture(scope="module")
def trained():
    """A configuration with two layers, and parameters that say what they are told."""
    experiment = with_classes_of(DIGITS, tiny_config(TWO_LAYERS))
    params = jax.jit(lambda: init_params(experiment.network, jax.random.key(3)))()
    rng = np.random.default_rng(4)
    filled = jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), jax.device_get(params)
    )
    return experiment, filled


@pytest.fixture
def workdir(trained, tmp_path):
    experiment, params = trained
    average = jax.tree.map(lambda x: 0.9 * x, params)
    parts = {"params": params, "ema_params": average}
    Checkpoints(tmp_path).save_imported(parts, to_stored(experiment), 7, 0)
    return tmp_path


def changed(params: dict, name: str) -> dict:
    """The parameters with other class vectors, or another one for no class."""
    vectors = params["class_embedding"]
    return params | {"class_embedding": vectors | {name: -vectors[name]}}


def test_labels_cannot_reach_the_features(trained):
    experiment, params = trained
    params, network = params["context_encoder"], experiment.network
    encode = make_features(network, experiment.modality, False)
    rows, mesh = np.arange(70), sharding.make_mesh((-1, 1, 1))

    def features(labels, params=params):
        source = ArraySource(DIGITS.images, labels)
        networks = {"x": lambda examples: encode(params, examples)}
        found, told = embed(source, rows, networks, mesh)
        assert (told == labels[:70]).all()
        return found["x"]

    expected = features(DIGITS.labels)
    np.testing.assert_array_equal(features((DIGITS.labels + 1) % 10), expected)
    np.testing.assert_array_equal(features(DIGITS.labels, changed(params, "table")), expected)
    null = features(DIGITS.labels, changed(params, "null"))
    assert np.abs(null - expected).max() > 1e-3, "the condition must matter where it is told"


def test_features_of_a_layer_do_not_see_the_next(trained):
    experiment, params = trained
    params, images = params["context_encoder"], DIGITS.images[:16]
    double = np.array([1, 2], np.float32)  # the second layer
    blocks = jax.tree.map(lambda x: (x.T * double).T, params["stack"]["blocks"])
    other = params | {"stack": params["stack"] | {"blocks": blocks}}
    for depth in (1, 2):
        network = dataclasses.replace(experiment.network, encoder_depth=depth)
        encode = make_features(network, experiment.modality, False)
        same = np.allclose(encode(params, images), encode(other, images), atol=1e-5)
        assert same == (depth == 1)


def test_what_can_be_told_apart_is_and_what_cannot_is_not():
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 4
    noise = rng.normal(size=(400, 8)).astype(np.float32)
    figures = probe(np.eye(8, dtype=np.float32)[labels] * 20 + noise, labels)
    assert figures["linear"] == figures["knn"] == figures["linear_low"] == 1
    figures = probe(noise, labels)
    assert figures["linear"] < 0.45 and figures["knn"] < 0.45  # chance is 0.25
    assert figures["linear_low"] < figures["linear"] < figures["linear_high"]


def test_test_pictures_choose_nothing_and_teach_nothing(monkeypatch):
    """Whatever features they have, the choices and what is learnt stay as they are."""
    rng = np.random.default_rng(0)
    labels, seen = np.arange(200) % 4, []
    hits = probing.hits

    def watched(model, features, labels, fitted, judged):
        seen.append((set(fitted.tolist()), set(judged.tolist())))
        return hits(model, features, labels, fitted, judged)

    monkeypatch.setattr(probing, "hits", watched)
    probe(rng.normal(size=(200, 4)).astype(np.float32), labels)
    test = max((judged for _, judged in seen), key=len)
    finals = [pair for pair in seen if pair[1] == test]
    assert len(finals) == 2 and len(test) == 40
    assert sorted(np.bincount(labels[list(test)])) == [10] * 4
    for fitted, judged in seen:
        assert not fitted & (judged | test)


@pytest.mark.parametrize("variances, expected", [([1, 1, 1, 1], 4), ([1], 1), ([3, 1], 1.7548)])
def test_effective_rank_of_known_covariances(variances, expected):
    axes = np.diag(np.sqrt(np.array([*variances, *[0] * (6 - len(variances))], np.float32)))
    features = np.concatenate([axes, -axes]) + 5
    assert effective_rank(features) == pytest.approx(expected, rel=1e-3)
    ratio = sum(variances) ** 2 / sum(v * v for v in variances)
    signs = signs_of_collapse(features)
    assert signs["participation_ratio"] == pytest.approx(ratio, rel=1e-3)
    assert signs["std"] == pytest.approx(np.sqrt(np.array(variances) / 6).sum() / 6, rel=1e-3)


def test_the_command_writes_what_it_shows(workdir, monkeypatch, capsys):
    monkeypatch.setattr(probing, "MAX_PICTURES", 300)
    monkeypatch.setattr(probing, "own_classifier", lambda source, folder: {})
    figures = {"linear": 0.5, "linear_low": 0.25, "linear_high": 0.75}
    monkeypatch.setattr(probing, "probe", lambda x, labels: figures)
    bins, asked = [{"from": 0.0, "to": 1.0, "loss": 2.5}], []
    monkeypatch.setattr(probing, "loss_per_noise_level", lambda *of: asked.extend(of) or bins)
    features = []
    monkeypatch.setattr(probing, "signs_of_collapse", lambda x: features.append(x) or {})
    status = run(TWO_LAYERS, "--mode=probe", f"--workdir={workdir}")
    output = capsys.readouterr()
    assert status == 0, output.err
    record = json.loads((workdir / "probe.json").read_text())
    assert record["step"] == 7 and record["pictures"] == {"all": 1797, "train": 240, "test": 60}
    (step, source, params, _), model = asked, load(workdir)
    assert record["loss_per_noise_level"] == bins and step.model == model.config.network
    assert source[3]["condition"] == DIGITS.labels[3]
    jax.tree.map(np.testing.assert_array_equal, params, model.params)  # the moving average
    for name in ("inputs", "context_encoder, layer 2", "target_encoder, layer 2", "untrained"):
        assert name in output.out and any(key.startswith(name) for key in record["figures"])
    assert "0.500 (0.250 to 0.750)" in output.out and "300 of 1,797" in output.out
    rows = np.sort(np.random.default_rng(0).permutation(1797)[:300])
    assert np.array_equal(features[0], DIGITS.images[rows].reshape(300, -1))
    expected = model.encode(DIGITS.images[rows]).mean(1)  # of the average, told no class
    np.testing.assert_allclose(features[2], expected, atol=1e-5)
    assert not np.allclose(features[1], features[2]) and not np.allclose(features[2], features[3])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--layers=3"], ["--layers", '"3"', "1 to 2"]),
        (["--layers=x"], ["--layers", '"x"']),
        (
            ["--config.data.source=npz", "--config.data.path={one}"],
            ["these data have 1", "two classes"],
        ),
        (["--config.data.source=npz", "--config.data.path={few}"], ["50 pictures", "10 classes"]),
    ],
)
def test_what_cannot_be_probed_is_one_error(flags, words, workdir, tmp_path, capsys):
    one, few = tmp_path / "one.npz", tmp_path / "few.npz"
    np.savez(one, images=DIGITS.images[:50], labels=np.zeros(50, int))
    np.savez(few, images=DIGITS.images[:50], labels=np.arange(50) % 10)
    flags = [flag.format(one=one, few=few) for flag in flags]
    assert run(TWO_LAYERS, "--mode=probe", f"--workdir={workdir}", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (workdir / "probe.json").exists()


def test_a_workdir_without_a_checkpoint_is_one_error(tmp_path, capsys):
    assert run("--mode=probe", f"--workdir={tmp_path}/none") == 2
    assert "no checkpoint" in capsys.readouterr().err and not (tmp_path / "none").exists()
