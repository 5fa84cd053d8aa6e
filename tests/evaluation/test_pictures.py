"""Samples judged by a feature network: what is compared, what is told, what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from djepa_jax.core import sharding
from djepa_jax.data.arrays import ArraySource, load_digits
from djepa_jax.evaluation import features
from djepa_jax.evaluation.evaluate import evaluate, open_metric, read_evaluation
from djepa_jax.evaluation.metrics import pictures
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.sampling.generator import Generator

PARAMS = {"w": jnp.arange(3.0)}
DIGITS = load_digits()


class Rows:
    """The mean of every row of pixels as features, and a logit for the class of known pictures."""

    name, sha256, held_out_accuracy = "rows", "0" * 64, 0.5

    def __init__(self):
        self.seen = 0

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.seen += len(images)
        pool = np.float32(images.mean((2, 3)))  # [n, 8]
        return {"pool": pool, "logits": np.eye(10, dtype=np.float32)[self.classes(images)]}

    def classes(self, images: np.ndarray) -> np.ndarray:
        """The labels of digits that are known, of others 0."""
        known = {image.tobytes(): label for image, label in zip(*self.data, strict=True)}
        return np.array([known.get(image.tobytes(), 0) for image in images])

    data = DIGITS.images, DIGITS.labels


@pytest.fixture
def network(monkeypatch) -> Rows:
    rows = Rows()
    monkeypatch.setitem(features.TRAINED, "classifier", lambda images, labels, folder: rows)
    monkeypatch.setitem(features.INSTALLED, "efficientnet_lite0", lambda: rows)
    pictures._open.cache_clear()
    pictures._judge.cache_clear()
    yield rows
    pictures._open.cache_clear()
    pictures._judge.cache_clear()


def drawing(images: np.ndarray, *changes: str) -> Generator:
    """One that draws these pictures, in batches of 16, for the classes that are asked for."""
    experiment = tiny_config("--config.sample.batch_size=16", *changes)
    tokens = np.asarray(experiment.modality.tokenize(images))

    def sampler(config, mesh):
        return lambda params, inputs: tokens[np.asarray(inputs.conditions)]

    return Generator(experiment, sharding.make_mesh((-1, 1, 1)), sampler=sampler)


def firsts() -> np.ndarray:
    """A real digit of each class."""
    return np.stack([DIGITS.images[np.argmax(DIGITS.labels == label)] for label in range(10)])


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
