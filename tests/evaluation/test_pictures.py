"""Samples judged by a feature network: what is compared, what is told, what is refused."""

import functools
import json

import numpy as np
import pytest
from dummy_sampler import DummySampler, make_generator
from rows import DIGITS, PARAMS, drawing, firsts, network  # noqa: F401
from tiny import tiny_config

from djepa_jax.data.arrays import ArraySource
from djepa_jax.evaluation import evaluate as evaluating
from djepa_jax.evaluation import features
from djepa_jax.evaluation.evaluate import PARTIAL_NAME, evaluate, read_evaluation
from djepa_jax.evaluation.judges import open_metric
from djepa_jax.evaluation.metrics import pictures
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.metrics.feature_figures import FeatureFigures


@pytest.mark.parametrize("kind", ["classifier", "efficientnet_lite0"])
def test_samples_stand_beside_all_pictures_of_the_source(kind, network, tmp_path):
    generator = drawing(firsts(), f"--config.evaluation.kind={kind}")
    record = evaluate(generator.experiment, generator, PARAMS, DIGITS, 3, tmp_path)
    assert network.seen == len(DIGITS) + 70
    figures, about = record["metrics"], record["judged_by"]
    assert figures["fd_rows"] > 0 and figures["precision"] == 1 and figures["nearest_real_copies"]
    assert ("accuracy" in figures) == (kind == "classifier")
    assert figures.get("accuracy", 1) == 1, "every digit is of the class that was asked for"
    assert about["network"] == "rows" and about["sha256"] == "0" * 64
    assert any("trend" in caveat for caveat in about["caveats"])
    assert json.loads((tmp_path / "evaluation.json").read_text()) == record
    known = read_evaluation(generator.experiment, generator, PARAMS, DIGITS, 3, tmp_path)
    assert known == record
    evaluate(generator.experiment, generator, PARAMS, DIGITS, 4, tmp_path)
    assert network.seen == len(DIGITS) + 140, "real pictures are looked at once"


def test_without_classes_there_is_no_accuracy(network, tmp_path):
    changes = "--config.evaluation.kind=classifier", "--config.model.condition=nothing"
    generator = drawing(firsts(), *changes)
    record = evaluate(generator.experiment, generator, PARAMS, DIGITS, 3, tmp_path)
    assert "fd_rows" in record["metrics"] and "accuracy" not in record["metrics"]


@pytest.mark.parametrize(
    ("kind", "weights", "words"),
    [
        ("inception", "", ["evaluation.weights", "inception", "name the file"]),
        ("inception", "absent.pth", ["absent.pth"]),
        ("classifier", "some.pth", ["some.pth", "classifier", "leave it out"]),
    ],
)
def test_weights_are_named_where_they_are_read(kind, weights, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"evaluation.kind": kind, "evaluation.weights": weights}
    with pytest.raises(Exception, match=".") as refused:
        open_metric(tiny_config().updated(changes), DIGITS)
    assert all(word in str(refused.value) for word in words)


def test_pictures_alone_are_judged(network):
    experiment = tiny_config("--config.evaluation.kind=classifier")
    for shape, dtype in (((8, 8, 1), np.float32), ((8, 8, 4), np.uint8), ((64,), np.uint8)):
        with pytest.raises(MetricError, match="uint8 pictures with 1 or 3 channels"):
            open_metric(experiment, ArraySource(np.zeros((5, *shape), dtype), np.arange(5)))


def test_a_search_sees_before_the_first_sample_that_networks_rank(network):
    metric = open_metric(tiny_config("--config.evaluation.kind=classifier"), DIGITS)
    assert metric.moved == {}


def test_a_record_is_of_the_weights_that_judged(network, tmp_path, monkeypatch):
    monkeypatch.setitem(features.FROM_FILE, "inception", lambda path: network)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"first")
    flags = ("--config.evaluation.kind=inception", f"--config.evaluation.weights={weights}")
    generator = drawing(firsts(), *flags)
    of = (generator.experiment, generator, PARAMS, DIGITS, 3, tmp_path)
    record = evaluate(*of)
    assert read_evaluation(*of) == record
    without = {key: value for key, value in record.items() if key != "network"}
    (tmp_path / "evaluation.json").write_text(json.dumps(without))
    assert read_evaluation(*of) is not None, "earlier versions did not write it"
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    weights.write_bytes(b"second")
    assert read_evaluation(*of) is None


class Killed(BaseException):
    """In place of a signal that ends the process."""


def die_at(start: int):
    def before(ids: np.ndarray) -> None:
        if ids[0] == start:
            raise Killed

    return before


@pytest.fixture
def killed(network, tmp_path, monkeypatch):
    """An evaluation that wrote its state after every batch and was killed before sample 48."""
    monkeypatch.setattr(evaluating, "SAVE_EVERY", -1.0)
    flags = ("--config.evaluation.kind=classifier", "--config.sample.batch_size=16")
    generator = make_generator(DummySampler(die_at(48)), *flags)
    with pytest.raises(Killed):
        evaluate(generator.experiment, generator, PARAMS, DIGITS, 3, tmp_path)
    assert (tmp_path / PARTIAL_NAME).exists() and not (tmp_path / "evaluation.json").exists()
    return generator.experiment


@pytest.mark.parametrize("large", [True, False])
def test_a_killed_evaluation_goes_on_to_the_same_figures(large, network, tmp_path, monkeypatch):
    if not large:
        few = functools.partial(FeatureFigures, max_rows=20)
        monkeypatch.setattr(pictures, "FeatureFigures", few)
    expected, found = tmp_path / "whole", tmp_path / "killed"
    expected.mkdir()
    found.mkdir()
    monkeypatch.setattr(evaluating, "SAVE_EVERY", -1.0)
    flags = ("--config.evaluation.kind=classifier", "--config.sample.batch_size=16")
    whole = make_generator(DummySampler(), *flags)
    record = evaluate(whole.experiment, whole, PARAMS, DIGITS, 3, expected)
    for start in (32, 48):
        dying = make_generator(DummySampler(die_at(start)), *flags)
        with pytest.raises(Killed):
            evaluate(whole.experiment, dying, PARAMS, DIGITS, 3, found)
    sampler = DummySampler()
    generator = make_generator(sampler, *flags)
    assert evaluate(whole.experiment, generator, PARAMS, DIGITS, 3, found) == record
    assert sampler.drawn == [48, 64]
    assert {path.name for path in found.iterdir()} == {"evaluation.json"}


@pytest.mark.parametrize("change", ["seed", "weights", "step", "damage"])
def test_another_evaluation_begins_anew(change, killed, tmp_path, capsys):
    experiment = killed.updated({"evaluation.seed": 2}) if change == "seed" else killed
    params = {"w": 2 * PARAMS["w"]} if change == "weights" else PARAMS
    if change == "damage":
        (tmp_path / PARTIAL_NAME).write_bytes(b"PK\x03\x04 no more")
    sampler = DummySampler()
    generator = make_generator(sampler, experiment=experiment)
    evaluate(experiment, generator, params, DIGITS, 4 if change == "step" else 3, tmp_path)
    assert sampler.drawn[0] == 0 and not (tmp_path / PARTIAL_NAME).exists()
    assert ("begins anew" in capsys.readouterr().out) == (change == "damage")
