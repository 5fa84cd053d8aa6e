"""Quality figures against known answers, and the evaluation of samples that a stand-in draws."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from djepa_jax.config.convert import ConfigError
from djepa_jax.core import sharding
from djepa_jax.data.arrays import load_digits
from djepa_jax.evaluation.evaluate import evaluate, open_metric, read_evaluation, run_evaluate
from djepa_jax.evaluation.metrics import METRICS
from djepa_jax.evaluation.metrics.small_images import SmallImages, frechet_distance
from djepa_jax.sampling.generator import Generator, Stopped

PARAMS = {"w": jnp.arange(3.0)}


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_frechet_distance_of_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((200_000, 3))
    base = (base - base.mean(0)) @ np.linalg.inv(
        np.linalg.cholesky(np.cov(base.T)).T
    )  # unit covariance exactly
    other = base * np.array([1.0, 2.0, 3.0]) + np.array([3.0, 0.0, 4.0])
    expected = 25 + 0 + 1 + 4  # |mean|^2 + sum (s1 - s2)^2
    assert frechet_distance(base, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(base, base) == pytest.approx(0, abs=1e-9)


def judged(digits, images, labels) -> dict[str, float]:
    """Figures of samples that two accumulators took in, in parts, and one has merged."""
    assert METRICS["small_images"] is SmallImages
    metrics = [SmallImages.from_data(digits), SmallImages.from_data(digits)]
    for start in range(0, len(images), 400):
        part = {"images": images[start : start + 400]}
        metrics[start // 400 % 2].update(part, labels[start : start + 400])
    metrics[0].merge(metrics[1])
    return metrics[0].result()


def test_yardsticks(digits):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1000, 8, 8, 1)).astype(np.uint8)
    figures = judged(digits, noise, np.arange(1000) % 10)
    assert figures["frechet_distance"] == pytest.approx(10.0, abs=0.6)
    assert figures["accuracy"] < 0.2
    chosen = rng.permutation(len(digits))[:500]
    figures = judged(digits, digits.images[chosen], digits.labels[chosen])
    assert figures["frechet_distance"] < 0.1 and figures["accuracy"] > 0.99
    figures = judged(digits, digits.images, (digits.labels + 1) % 10)
    # Pixels that are always empty leave eigenvalues of 1e-17 instead of 0, whose roots are 3e-9
    # each.
    assert figures["accuracy"] < 0.01 and figures["frechet_distance"] == pytest.approx(0, abs=1e-6)


@pytest.fixture
def generator(digits) -> Generator:
    """One that draws, in batches of 16, the real digit of the class that is asked for."""
    experiment = tiny_config("--config.sample.batch_size=16")
    first = np.stack([digits.images[np.argmax(digits.labels == label)] for label in range(10)])
    tokens = np.asarray(experiment.modality.tokenize(first))

    def sampler(config, mesh):
        return lambda params, inputs: tokens[np.asarray(inputs.conditions)]

    return Generator(experiment, sharding.make_mesh((-1, 1, 1)), sampler=sampler)


def test_samples_are_judged_batch_by_batch_and_the_record_is_known_again(
    generator, digits, tmp_path
):
    experiment = generator.experiment
    assert read_evaluation(experiment, PARAMS, 3, tmp_path) is None
    record = evaluate(experiment, generator, PARAMS, digits, 3, tmp_path)
    assert record["metrics"]["accuracy"] == 1 and record["metrics"]["frechet_distance"] < 10
    assert (record["step"], record["evaluation"]["count"]) == (3, 70)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == record
    assert read_evaluation(experiment, PARAMS, 3, tmp_path) == record
    changed = experiment.updated({"sample.cfg_scale": 2.0})
    for other in (
        (experiment, PARAMS, 4),
        (experiment, {"w": jnp.arange(3.0) + 1}, 3),
        (changed, PARAMS, 3),
    ):
        assert read_evaluation(*other, tmp_path) is None
    for text in ("{", "[]", "{}"):
        (tmp_path / "evaluation.json").write_text(text)
        assert read_evaluation(experiment, PARAMS, 3, tmp_path) is None


def test_an_evaluation_that_is_stopped_writes_nothing(generator, digits, tmp_path):
    asked = []
    with pytest.raises(Stopped):
        evaluate(
            generator.experiment,
            generator,
            PARAMS,
            digits,
            3,
            tmp_path,
            lambda: asked.append(1) or len(asked) == 3,
        )
    assert len(asked) == 3 and not list(tmp_path.iterdir())


class Examples:
    """A source of pictures in memory."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels


def test_data_that_cannot_be_judged_by_and_unknown_metrics_are_refused(digits, tmp_path):
    experiment = tiny_config()
    for source, words in (
        ([], "digits"),
        (Examples(digits.images.astype(np.float32), digits.labels), "float32"),
        (Examples(np.zeros((4, 64, 64, 3), np.uint8), np.arange(4)), "12288"),
        (Examples(digits.images, np.zeros(len(digits.labels))), "two classes"),
    ):
        with pytest.raises(ValueError, match=words):
            open_metric(experiment, source)
    with pytest.raises(ConfigError, match="smell.*none, small_images"):
        open_metric(experiment.updated({"evaluation.kind": "smell"}), digits)
    none = experiment.updated({"evaluation.kind": "none"})
    assert open_metric(none, []) is None
    with pytest.raises(ConfigError, match="small_images"):
        run_evaluate(none, str(tmp_path))
