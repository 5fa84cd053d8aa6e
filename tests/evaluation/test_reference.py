"""Statistics of pictures in a file: what they are of, and that samples are judged by them."""

import numpy as np
import pytest
from rows import DIGITS, PARAMS, drawing, firsts, network  # noqa: F401
from tiny import load_config, run, tiny_config

from djepa_jax.config.convert import ConfigError
from djepa_jax.data.arrays import ArraySource
from djepa_jax.evaluation import evaluate as evaluating
from djepa_jax.evaluation.evaluate import (
    evaluate,
    preset_caveats,
    read_evaluation,
    run_evaluate,
)
from djepa_jax.evaluation.judges import open_metric
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.metrics.moments import (
    Moments,
    frechet_distance,
    read_about,
    read_statistics,
    write_statistics,
)
from djepa_jax.evaluation.reference import choose, run_reference
from djepa_jax.runtime.errors import UserError

KIND = "--config.evaluation.kind=efficientnet_lite0"  # what `network` takes the place of


@pytest.fixture
def written(network, tmp_path) -> str:
    """The statistics of all digits."""
    return str(run_reference(tiny_config(KIND), str(tmp_path / "digits.npz")))


def rows_of(images: np.ndarray) -> Moments:
    return Moments(np.float32(images.mean((2, 3))))


def test_a_file_has_the_statistics_of_all_pictures_and_says_of_what(network, tmp_path, capsys):
    path = tmp_path / "new" / "digits.npz"
    assert run("--mode=reference", KIND, f"--out={path}") == 0
    assert f"wrote {path}" in capsys.readouterr().out
    (found,) = read_statistics(path).values()
    expected = rows_of(DIGITS.images)
    assert found.count == len(DIGITS) == network.seen
    np.testing.assert_allclose(found.mean, expected.mean)
    np.testing.assert_allclose(found.covariance, expected.covariance)
    about = read_about(path)
    assert about["network"] == "rows" and about["weights"] == network.sha256
    assert about["shape"] == [8, 8, 1] and about["source"] == DIGITS.digest()
    assert about["classes"] == 10 and about["per_class"] == [174, 183]
    assert run("--mode=reference", KIND, f"--out={path}") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("--mode=reference", KIND, f"--out={path}", "--overwrite") == 0


def test_some_pictures_are_drawn_from_the_classes_in_turn(network, tmp_path):
    experiment = tiny_config(KIND, "--config.evaluation.reference_count=25")
    path = run_reference(experiment, str(tmp_path / "some.npz"))
    assert read_about(path)["per_class"] == [2, 3]
    chosen = choose(DIGITS, 25)
    expected = rows_of(DIGITS.images[chosen])
    np.testing.assert_allclose(read_statistics(path)["pool"].mean, expected.mean)
    np.testing.assert_array_equal(choose(DIGITS, 0), np.arange(len(DIGITS)))
    rare = ArraySource(np.zeros((9, 8, 8, 1), np.uint8), np.array([0] * 8 + [1]))
    assert 8 in choose(rare, 2) and len(set(choose(rare, 5))) == 5


def test_samples_are_judged_by_a_file_and_neighbours_by_the_source(written, tmp_path):
    generator = drawing(firsts(), KIND, f"--config.evaluation.reference={written}")
    half = ArraySource(DIGITS.images[::2], DIGITS.labels[::2])
    record = evaluate(generator.experiment, generator, PARAMS, half, 3, tmp_path)
    samples, real = rows_of(firsts()[np.arange(70) % 10]), rows_of(DIGITS.images)
    expected = frechet_distance(samples.mean, samples.covariance, real.mean, real.covariance)
    assert record["metrics"]["fd_rows"] == pytest.approx(expected)
    assert "recall" in record["metrics"]
    about = record["judged_by"]
    assert about["reference"]["source"] == DIGITS.digest() != half.digest()
    alone = evaluate(generator.experiment, generator, PARAMS, None, 3, tmp_path)
    assert alone["metrics"]["fd_rows"] == record["metrics"]["fd_rows"]
    assert "recall" not in alone["metrics"]
    assert any("statistics alone" in caveat for caveat in alone["judged_by"]["caveats"])
    known = (generator.experiment, generator, PARAMS, None, 3, tmp_path)
    assert read_evaluation(*known) == alone
    write_statistics(written, {"pool": rows_of(DIGITS.images[:99])})
    assert read_evaluation(*known) is None, "the file has changed"


def test_statistics_of_other_pictures_are_told_apart(network, tmp_path):
    path = tmp_path / "large.npz"
    write_statistics(path, {"pool": rows_of(DIGITS.images)}, {"shape": [256, 256, 3]})
    generator = drawing(firsts(), KIND, f"--config.evaluation.reference={path}")
    record = evaluate(generator.experiment, generator, PARAMS, None, 3, tmp_path)
    caveats = str(record["judged_by"]["caveats"])
    assert "pictures of the reference are [256, 256, 3]" in caveats
    assert "does not tell which weights" in caveats


def test_what_a_file_says_of_itself_is_damaged(tmp_path):
    for text in ("{", "3"):
        np.savez(tmp_path / "a.npz", about=np.asarray(text))
        with pytest.raises(MetricError, match='"about" is damaged'):
            read_about(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("statistics", "about", "words"),
    [
        ({"pool": np.zeros((9, 5))}, {}, ["5 values of pool", "rows has 8"]),
        ({"pool": np.eye(8), "spatial": np.eye(4)}, {}, ["4 values of spatial", "rows has 0"]),
        ({"pool": np.eye(8)}, {"network": "inception"}, ["network inception", "these are rows"]),
        ({"pool": np.eye(8)}, {"weights": "1" * 64}, ["weights 111", "these are 000"]),
        ({"pool": np.full((9, 8), np.nan)}, {}, ["finite"]),
        ({"pool": np.zeros((9, 0))}, {}, ["make the file again"]),
    ],
)
def test_other_statistics_are_refused_before_sampling(statistics, about, words, network, tmp_path):
    path = tmp_path / "other.npz"
    write_statistics(path, {tap: Moments(rows) for tap, rows in statistics.items()}, about)
    experiment = tiny_config(KIND, f"--config.evaluation.reference={path}")
    with pytest.raises(MetricError) as refused:
        open_metric(experiment, DIGITS)
    assert all(word in str(refused.value) for word in ["other.npz", *words])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.evaluation.kind=classifier"], ["classifier", "efficientnet_lite0"]),
        ([KIND, "--config.evaluation.reference_count=2000"], ["2000", "1797"]),
        ([KIND, "--config.data.modality=image_latents"], ["prepare.path"]),
    ],
)
def test_what_no_statistics_can_be_made_of_is_refused(flags, words, network, tmp_path):
    with pytest.raises(UserError) as refused:
        run_reference(tiny_config(*flags), str(tmp_path / "a.npz"))
    assert all(word in str(refused.value) for word in words) and not list(tmp_path.iterdir())


def test_networks_that_learn_and_latents_take_no_reference(written):
    reference = f"--config.evaluation.reference={written}"
    for kind in ("classifier", "small_images"):
        with pytest.raises(ConfigError, match="weights stay as they are"):
            open_metric(tiny_config(f"--config.evaluation.kind={kind}", reference), DIGITS)
    latents = tiny_config(KIND, reference, "--config.data.modality=image_latents")
    with pytest.raises(ConfigError, match=r"autoencoder\.path is empty"):
        open_metric(latents, DIGITS)


def test_without_a_path_no_data_are_read(trained, written, tmp_path, monkeypatch):
    changes = (KIND, f"--config.evaluation.reference={written}", "--config.data.source=npz")
    monkeypatch.setattr(evaluating, "evaluate", lambda *arguments, **kept: {"source": arguments[3]})
    record, *_ = run_evaluate(tiny_config(*changes), trained, overwrite=True)
    assert record == {"source": None}


def test_a_preset_is_what_a_command_line_does_not_say_itself():
    paper = load_config("djepa_h", "--config.evaluation.preset=paper_cfg")
    sample = paper.sample
    assert (paper.evaluation.kind, paper.evaluation.count) == ("inception", 50_000)
    assert (sample.cfg_scale, sample.cfg_schedule, sample.temperature) == (3.9, "linear", 0.98)
    assert (sample.num_ar_steps, sample.num_denoise_steps) == (64, 100)
    own = ("--config.sample.temperature=0.9", "--config.evaluation.preset=paper_no_cfg")
    changed = load_config("djepa_l", *own)
    assert (changed.sample.temperature, changed.sample.cfg_scale) == (0.9, 1.0)
    told = "preset paper_no_cfg has sample.temperature 0.94, here it is 0.9"
    assert told in preset_caveats(changed)
    with pytest.raises(ConfigError, match="preset"):
        tiny_config("--config.evaluation.preset=best")
    with pytest.raises(ConfigError, match="num_ar_steps is 64.*preset paper_cfg sets it"):
        load_config("digits", "--config.evaluation.preset=paper_cfg")


def test_a_preset_is_compared_with_what_is_published_where_it_can_be():
    flags = ("--config.evaluation.preset=paper_cfg", "--config.evaluation.reference=adm.npz")
    assert preset_caveats(load_config("djepa_l", *flags)) == []
    (no_reference,) = preset_caveats(load_config("djepa_l", flags[0]))
    assert "evaluation.reference" in no_reference
    told = preset_caveats(tiny_config(*flags))
    assert any("not comparable with published figures" in line for line in told)
    assert any("no guidance for size custom" in line for line in told)
    assert preset_caveats(tiny_config()) == []


def test_a_preset_and_its_caveats_are_in_the_record(written, tmp_path):
    flags = (KIND, "--config.evaluation.preset=adm", "--config.evaluation.count=20")
    generator = drawing(firsts(), *flags, f"--config.evaluation.reference={written}")
    record = evaluate(generator.experiment, generator, PARAMS, None, 3, tmp_path)
    assert record["evaluation"]["preset"] == "adm"
    caveats = record["judged_by"]["caveats"]
    assert any("evaluation.count 50000, here it is 20" in line for line in caveats)
    assert any("not comparable" in line for line in caveats)
