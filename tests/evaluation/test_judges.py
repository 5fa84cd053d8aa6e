"""Several judges of the same samples, what "auto" takes, trends, kept pictures, and the floor."""

import json

import numpy as np
import pytest
from dummy_sampler import DummySampler, make_generator
from PIL import Image
from rows import DIGITS, PARAMS, drawing, firsts, network  # noqa: F401
from tiny import tiny_config

from djepa_jax.config.convert import ConfigError
from djepa_jax.data.arrays import ArraySource
from djepa_jax.evaluation import evaluate as evaluating
from djepa_jax.evaluation.evaluate import PARTIAL_NAME, evaluate, trend
from djepa_jax.evaluation.judges import open_metric, settled
from djepa_jax.evaluation.kept_images import FOLDER_NAME, SETTINGS_NAME, KeptImages
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.metrics.feature_figures import FeatureFigures
from djepa_jax.evaluation.metrics.moments import Moments, frechet_distance
from djepa_jax.evaluation.metrics.several import Several
from djepa_jax.runtime.storage import PathError

BOTH = "--config.evaluation.kind=small_images+classifier"
SIXTEEN = "--config.sample.batch_size=16"


class Fixed:
    """A metric that always finds the same."""

    def __init__(self, **figures):
        self.figures = figures

    def result(self) -> dict:
        return self.figures


def judged(generator, folder, **options) -> dict:
    folder.mkdir(exist_ok=True)
    return evaluate(generator.experiment, generator, PARAMS, DIGITS, 3, folder, **options)


def test_figures_of_one_name_tell_their_judge_with_all_that_stands_beside_them():
    first = Fixed(accuracy=1.0, frechet_distance=2.0)
    second = Fixed(accuracy=0.5, accuracy_low=0.4, mind=1.0, mind_real=0.5)
    third = Fixed(mind=3.0, mind_real=2.0, ink_real=7.0)
    assert Several({"a": first, "b": second, "c": third}).result() == {
        "accuracy": 1.0,
        "frechet_distance": 2.0,
        "accuracy_b": 0.5,
        "accuracy_b_low": 0.4,
        "mind": 1.0,
        "mind_real": 0.5,
        "mind_c": 3.0,
        "mind_c_real": 2.0,
        "ink_real": 7.0,
    }


def test_several_judges_find_what_each_finds_alone(network, tmp_path):
    kinds = ("small_images", "classifier")
    alone = [
        judged(drawing(firsts(), f"--config.evaluation.kind={kind}"), tmp_path / kind)
        for kind in kinds
    ]
    both = judged(drawing(firsts(), BOTH), tmp_path / "both")
    assert both["evaluation"]["kind"] == "small_images+classifier"
    first, second = (record["metrics"] for record in alone)
    named = {name.replace("accuracy", "accuracy_classifier"): second[name] for name in second}
    assert both["metrics"] == first | named and "accuracy_classifier_low" in both["metrics"]
    caveats = alone[1]["judged_by"].pop("caveats")
    assert both["judged_by"] == {"classifier": alone[1]["judged_by"], "caveats": caveats}


class Killed(BaseException):
    """In place of a signal that ends the process."""


def dying_at(start: int) -> DummySampler:
    def before(ids: np.ndarray) -> None:
        if ids[0] == start:
            raise Killed

    return DummySampler(before)


@pytest.fixture
def killed(network, tmp_path, monkeypatch):
    """An evaluation by two judges, with the pictures, that was killed before sample 48."""
    monkeypatch.setattr(evaluating, "SAVE_EVERY", -1.0)
    generator = make_generator(dying_at(48), BOTH, SIXTEEN)
    with pytest.raises(Killed):
        judged(generator, tmp_path, kept=keeping(generator, tmp_path))
    return generator.experiment


def keeping(generator, folder, overwrite=False, step=3) -> KeptImages:
    of = evaluating.identity(PARAMS, generator.experiment, step)
    kept = KeptImages(generator, folder, of, np.arange(70) % 10)
    kept.open(overwrite)
    return kept


def test_a_killed_evaluation_goes_on_with_all_judges_and_pictures(killed, tmp_path):
    expected = judged(make_generator(DummySampler(), experiment=killed), tmp_path / "whole")
    folder = tmp_path / FOLDER_NAME
    assert len(list(folder.glob("*.png"))) == 48
    (folder / "notes.txt").write_text("mine")
    sampler = DummySampler()
    generator = make_generator(sampler, experiment=killed)
    assert judged(generator, tmp_path, kept=keeping(generator, tmp_path)) == expected
    assert sampler.drawn == [48, 64] and (folder / "notes.txt").read_text() == "mine"
    names = sorted(path.name for path in folder.glob("*.png"))
    assert len(names) == 70 and names[13] == "000013_3.png"
    images = generator.images(PARAMS, np.arange(70) % 10, killed.evaluation.seed)["images"]
    for index in (0, 47, 48, 69):
        found = np.asarray(Image.open(folder / names[index]))
        np.testing.assert_array_equal(found, images[index, ..., 0])


def test_pictures_that_are_missing_are_drawn_again(killed, tmp_path):
    (tmp_path / FOLDER_NAME / "000005_5.png").unlink()
    sampler = DummySampler()
    generator = make_generator(sampler, experiment=killed)
    assert (tmp_path / PARTIAL_NAME).exists()
    judged(generator, tmp_path, kept=keeping(generator, tmp_path))
    assert sampler.drawn[0] == 0 and (tmp_path / FOLDER_NAME / "000005_5.png").exists()


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path):
    generator, folder = make_generator(DummySampler(), SIXTEEN), tmp_path / FOLDER_NAME
    folder.mkdir()
    (folder / "000000_0.png").write_text("mine")
    for text in (None, "[1]", "{}"):
        if text:
            (folder / SETTINGS_NAME).write_text(text)
        with pytest.raises(PathError, match="something else; move it away"):
            keeping(generator, tmp_path, overwrite=True)
    (folder / SETTINGS_NAME).unlink()
    (folder / "000000_0.png").rename(tmp_path / "mine.png")
    keeping(generator, tmp_path).write(0, firsts())
    with pytest.raises(PathError, match="another evaluation, of step 3; move it away"):
        keeping(generator, tmp_path, step=4)
    before = (folder / "000001_1.png").read_bytes()
    keeping(generator, tmp_path).write(1, firsts())
    assert (folder / "000001_1.png").read_bytes() == before, "what is there is not written again"
    keeping(generator, tmp_path, overwrite=True).write(1, firsts())
    assert (folder / "000001_1.png").read_bytes() != before


def test_what_makes_no_pictures_keeps_none(tmp_path):
    flags = ("--config.data.modality=image_latents", "--config.evaluation.kind=none")
    with pytest.raises(ConfigError, match="--keep_images .* latents; leave it out"):
        keeping(make_generator(DummySampler(), *flags), tmp_path)


def test_a_record_without_its_pictures_is_made_again(trained, tmp_path, monkeypatch, capsys):
    import functools
    import shutil

    from tiny import run

    from djepa_jax.sampling.generator import Generator

    workdir, sampler = shutil.copytree(trained, tmp_path / "run"), DummySampler()
    dummy = functools.partial(Generator, sampler=sampler)
    monkeypatch.setattr(evaluating, "Generator", dummy)
    command = ("--mode=evaluate", f"--workdir={workdir}", "--keep_images")
    for drawn in ([0, 40], [0, 40]):
        assert run(*command) == 0 and sampler.drawn == drawn
    assert len(list((workdir / FOLDER_NAME).glob("*.png"))) == 70
    assert run(*command, "--config.evaluation.seed=5") == 2
    assert "another evaluation" in capsys.readouterr().err and sampler.drawn == [0, 40]


def test_a_trend_is_of_fewer_samples_and_figures_and_in_no_record(network, tmp_path):
    generator = drawing(firsts(), BOTH, "--config.evaluation.trend_count=20")
    of = (generator.experiment, generator, PARAMS, DIGITS, tmp_path)
    figures = trend(*of)
    assert {"fd_rows", "mind", "accuracy", "accuracy_classifier", "frechet_distance"} <= {*figures}
    assert "precision" not in figures and "fd_rows_real" not in figures
    assert network.seen == len(DIGITS) + 20 and not list(tmp_path.iterdir())
    few = generator.experiment.updated({"evaluation.count": 10})
    trend(few, *of[1:])
    assert network.seen == len(DIGITS) + 30


@pytest.mark.parametrize(
    ("count", "classes", "shape", "dtype", "kind"),
    [
        (40, 2, (8, 8, 1), np.uint8, "classifier"),
        (39, 2, (8, 8, 1), np.uint8, "none"),
        (40, 1, (8, 8, 1), np.uint8, "none"),
        (40, 2, (8, 8, 4), np.float32, "none"),
    ],
)
def test_what_auto_takes(count, classes, shape, dtype, kind, capsys):
    source = ArraySource(np.zeros((count, *shape), dtype), np.arange(count) % classes)
    flags = ("--config.evaluation.kind=auto", f"--config.data.num_classes={classes}")
    flags += ("--config.sample.labels=0", "--config.data.class_names=")
    experiment = settled(tiny_config(*flags), source)
    assert experiment.evaluation.kind == kind
    assert f'"auto" is {kind}: ' in capsys.readouterr().out
    assert settled(experiment, source) is experiment


def test_the_floor_is_of_as_many_real_examples_against_the_others():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((300, 4)).astype(np.float32)
    found = {}
    for count in (60, 400):
        figures = FeatureFigures("x", {"pool": real})
        figures.update({"pool": rng.standard_normal((count, 4)).astype(np.float32)})
        found[count] = figures.result()
        said = "of 150 real examples" in " ".join(figures.caveats())
        assert said == (count == 400)
    for count, taken in ((60, 60), (400, 150)):
        order = np.random.default_rng(0).permutation(300)
        a, b = Moments(real[order[:taken]]), Moments(real[order[taken:]])
        expected = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
        assert found[count]["fd_x_real"] == pytest.approx(expected)
    assert found[60]["mind_real"] > found[400]["mind_real"] > 0
    alone = FeatureFigures("x", {}, {"pool": Moments(real)})
    alone.update({"pool": real[:60]})
    assert not {name for name in alone.result() if name.endswith("_real")}


def test_samples_that_are_not_finite_are_counted(network, tmp_path):
    sampler = DummySampler()

    def broken(config, mesh):
        def draw(params, inputs):
            tokens = np.array(sampler(config, mesh)(params, inputs))
            tokens[np.isin(inputs.sample_ids, (20, 25, 75))] = np.nan  # 75 is padding
            return tokens

        return draw

    generator = make_generator(broken, BOTH, SIXTEEN)
    with pytest.raises(MetricError, match="2 of the samples 16 to 31 .* first is number 20"):
        judged(generator, tmp_path)


@pytest.mark.parametrize(
    ("kind", "weights", "words"),
    [
        ("small_images+smell", "", "small_images\\+smell.*several, joined by"),
        ("classifier+classifier", "", "one or several"),
        ("none+classifier", "", "one or several"),
        ("inception+dinov2", "some.pth", "one file; judge by inception and dinov2 one after"),
        ("small_images+inception", "", "weights.*name the file"),
        ("small_images+classifier", "some.pth", "some.pth.*leave it out"),
    ],
)
def test_kinds_that_cannot_be_joined(kind, weights, words, network):
    experiment = tiny_config().updated({"evaluation.kind": kind, "evaluation.weights": weights})
    with pytest.raises((ConfigError, MetricError), match=words):
        open_metric(experiment, DIGITS)


def test_the_weights_of_one_judge_are_not_the_others(network, monkeypatch, tmp_path):
    from djepa_jax.evaluation import features

    monkeypatch.setitem(features.FROM_FILE, "inception", lambda path: network)
    flags = ("--config.evaluation.kind=classifier+inception", "--config.evaluation.weights=")
    (tmp_path / "w").write_bytes(b"weights")
    record = judged(drawing(firsts(), flags[0], flags[1] + str(tmp_path / "w")), tmp_path / "run")
    assert record["network"] and json.dumps(record["judged_by"]).count("sha256") == 2
