"""Quality figures against known answers, and the evaluation of samples that a stand-in draws."""

import functools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from dummy_sampler import DummySampler
from PIL import Image
from tiny import run, tiny_config

from djepa_jax.config.convert import ConfigError
from djepa_jax.core import sharding
from djepa_jax.data.arrays import ArraySource, load_digits
from djepa_jax.data.sources import SingleClass, open_data
from djepa_jax.evaluation import evaluate as evaluating
from djepa_jax.evaluation.evaluate import evaluate, read_evaluation, run_evaluate
from djepa_jax.evaluation.judges import open_metric
from djepa_jax.evaluation.metrics import METRICS
from djepa_jax.evaluation.metrics.small_images import SmallImages, judge_of
from djepa_jax.sampling.generator import Generator, Stopped

PARAMS = {"w": jnp.arange(3.0)}


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def judged(digits, images, labels) -> dict[str, float]:
    """Figures of samples that two accumulators took in, in parts, and one has merged."""
    assert METRICS["small_images"] is SmallImages
    metrics = [SmallImages.from_data(digits), SmallImages.from_data(digits)]
    for start in range(0, len(images), 400):
        part = {"images": images[start : start + 400]}
        metrics[start // 400 % 2].update(part, labels[start : start + 400])
    metrics[0].merge(metrics[1])
    return metrics[0].result()


def test_the_judge_learns_once_and_nothing_where_nothing_is_asked_for(digits):
    images, labels = np.zeros((30, 8, 8, 1), np.uint8), np.arange(30) % 10
    judge_of.cache_clear()
    assert judged(digits, images, labels) == judged(digits, images, labels)
    assert judge_of.cache_info().misses == 1
    assert judged(digits, images, 0 * labels).keys() == {"frechet_distance"}
    assert judge_of(digits, False)[1] is None


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
    path = tmp_path / "evaluation.json"

    def read(source=digits, params=PARAMS, step=3, **changes) -> dict | None:
        experiment = generator.experiment.updated(changes)
        return read_evaluation(experiment, generator, params, source, step, tmp_path)

    assert read() is None
    record = evaluate(generator.experiment, generator, PARAMS, digits, 3, tmp_path)
    assert record["metrics"]["accuracy"] == 1 and record["metrics"]["frechet_distance"] < 10
    assert (record["step"], record["evaluation"]["count"]) == (3, 70)
    assert json.loads(path.read_text()) == record == read() == read(SingleClass(digits))
    assert read(step=4) is read(params={"w": jnp.arange(3.0) + 1}) is None
    assert read(ArraySource(digits.images, digits.labels[::-1])) is None
    for change in ("sample.cfg_scale", "evaluation.seed", "loss.options.time_shift"):
        assert read(**{change: 2}) is None, change
    assert read(**{"sample.cfg_denoise_start": 0.5}) is None
    assert "guided_shares" not in record["loss"], "`sample` has it, and earlier records nothing"
    before = {k: v for k, v in record.items() if k not in ("loss", "compute_dtype", "data")}
    path.write_text(json.dumps(before))
    assert read() == before, "a record of an earlier version counts"
    for text in ("{", "[]", "{}", '{"metrics": {}}'):
        path.write_text(text)
        assert read() is None


def test_evaluating_again_shows_what_there_is_unless_asked_to_replace_it(
    trained, monkeypatch, tmp_path, capsys
):
    workdir, sampler = shutil.copytree(trained, tmp_path / "run"), DummySampler()
    dummy = functools.partial(Generator, sampler=sampler)
    monkeypatch.setattr(evaluating, "Generator", dummy)
    record = (workdir / "evaluation.json").read_bytes()
    figures = evaluating.describe(json.loads(record)["metrics"])
    command = ("--mode=evaluate", f"--workdir={workdir}")
    assert run(*command) == 0
    assert (workdir / "evaluation.json").read_bytes() == record and not sampler.drawn
    said = capsys.readouterr().out
    assert figures in said and "--overwrite" in said
    assert run(*command, "--overwrite") == 0
    made = (workdir / "evaluation.json").read_bytes()
    assert made != record and sampler.drawn == [0, 40]
    assert run(*command) == 0 and sampler.drawn == [0, 40]
    assert run(*command, "--config.sample.temperature=0.5") == 0
    assert sampler.drawn == [0, 40, 0, 40]


def test_small_pictures_in_a_folder_are_judged_as_those_in_memory(digits, tmp_path):
    count = 60
    for index in range(count):
        folder = tmp_path / str(digits.labels[index])
        folder.mkdir(exist_ok=True)
        Image.fromarray(digits.images[index, ..., 0]).save(folder / f"{index}.png")
    changes = {"data.source": "folder", "data.path": str(tmp_path)}
    source = open_data(tiny_config().updated(changes))
    few = ArraySource(digits.images[:count], digits.labels[:count])
    samples = digits.images[100:200], digits.labels[100:200]
    assert judged(source, *samples) == pytest.approx(judged(few, *samples))
    alone = judged(SingleClass(source), *samples)
    assert alone == pytest.approx({"frechet_distance": judged(few, *samples)["frechet_distance"]})
    untold = judged(source, samples[0], np.zeros(100, np.int32))  # no class was asked for
    assert untold.keys() == {"frechet_distance"}


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


def test_data_that_cannot_be_judged_by_and_unknown_metrics_are_refused(digits):
    experiment = tiny_config()
    for images, words in (
        (digits.images.astype(np.float32), "float32"),
        (np.zeros((4, 64, 64, 3), np.uint8), "12288"),
    ):
        with pytest.raises(ValueError, match=words):
            open_metric(experiment, ArraySource(images, np.arange(len(images))))
    with pytest.raises(ConfigError, match="smell.*none, auto,.* small_images"):
        open_metric(experiment.updated({"evaluation.kind": "smell"}), digits)
    none = experiment.updated({"evaluation.kind": "none"})
    assert open_metric(none, digits) is None


def test_what_evaluate_advises_can_be_followed(tmp_path):
    """One message for data without a metric: none names a setting that leads to another one."""
    none = tiny_config("--config.evaluation.kind=none")
    advice = '"none"; add --config.evaluation.kind=classifier'
    with pytest.raises(ConfigError, match=advice):
        run_evaluate(none, str(tmp_path))
    np.savez(tmp_path / "big.npz", images=np.zeros((9, 64, 64), np.uint8), labels=np.arange(9))
    big = {"data.source": "npz", "data.path": str(tmp_path / "big.npz"), "data.image_size": 64}
    for kind, said in (("none", advice), ("small_images", "use classifier")):
        experiment = none.updated({**big, "data.patch_size": 8, "evaluation.kind": kind})
        with pytest.raises(ValueError, match=said):
            run_evaluate(experiment, str(tmp_path))
    one_class = {**big, "data.patch_size": 8, "data.unconditional": True, "data.num_classes": 1}
    for kind, said in (("none", "efficientnet_lite0|--mode=sample"), ("classifier", "efficient")):
        with pytest.raises(ConfigError, match=said):
            run_evaluate(none.updated({**one_class, "evaluation.kind": kind}), str(tmp_path))
