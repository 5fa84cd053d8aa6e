"""Figures of features against closed forms, plain numpy, and what torch-fidelity says."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from djepa_jax.evaluation.metrics import feature_figures, intervals, neighbours, scores
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.metrics.feature_figures import FeatureFigures
from djepa_jax.evaluation.metrics.moments import (
    Moments,
    Statistics,
    frechet_distance,
    read_statistics,
    write_statistics,
)
from djepa_jax.evaluation.metrics.reservoir import Reservoir

RNG = np.random.default_rng(0)
SAMPLES = RNG.normal(0.3, 1.2, (600, 6)).astype(np.float32)
REAL = RNG.normal(0, 1, (500, 6)).astype(np.float32)


def distance(a, b) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distances `[n, m]` without any expansion of squares."""
    return np.linalg.norm(a.astype(np.float64)[:, None] - b.astype(np.float64), axis=-1)


@pytest.fixture(scope="module")
def fidelity() -> dict[str, np.ndarray]:
    """Features, logits, and the figures of torch-fidelity 0.4.0 for them."""
    arrays = dict(np.load(Path(__file__).parents[1] / "fixtures/figures.npz"))
    return {k: v / 100 if v.ndim else float(v) for k, v in arrays.items()}


@pytest.fixture
def small_kid(monkeypatch):
    monkeypatch.setattr(scores, "KID_SUBSET_SIZE", 100)
    monkeypatch.setattr(scores, "KID_SUBSETS", 10)


@pytest.mark.parametrize("offset", [0, 1e6])
def test_moments_of_any_split_are_those_of_numpy(offset):
    rows = SAMPLES.astype(np.float64) + offset  # sums of squares would lose all digits
    for bounds in ([], [1], [1, 2, 300], range(7, 600, 7)):
        parts = [Moments(part) for part in np.split(rows, bounds)]
        merged = Moments(rows[:0])
        for part in reversed(parts):
            merged.merge(part)
        merged.merge(Moments())
        assert merged.count == 600
        np.testing.assert_allclose(merged.mean, rows.mean(0), rtol=1e-13)
        np.testing.assert_allclose(merged.covariance, np.cov(rows.T), rtol=1e-10, atol=1e-10)
    with pytest.raises(MetricError, match="at least 2 samples, there are 1"):
        _ = Moments(rows[:1]).covariance


def test_merging_leaves_what_was_merged_as_it_was():
    part, whole = Moments(REAL), Moments()
    whole.merge(part)
    whole.update(SAMPLES)
    np.testing.assert_allclose(part.covariance, np.cov(REAL.T), rtol=1e-5)


def test_frechet_distance_in_closed_form():
    eye = np.eye(3)
    shift = np.array([3.0, 0, 4])
    assert frechet_distance(np.zeros(3), eye, shift, eye) == pytest.approx(25)
    scaled = np.diag([1.0, 4, 9])
    assert frechet_distance(np.zeros(3), eye, shift, scaled) == pytest.approx(25 + 0 + 1 + 4)
    real = Moments(REAL)
    assert distance(real, real) == pytest.approx(0, abs=1e-10)
    few = Moments(SAMPLES[:4])  # a covariance of rank 3
    products = np.linalg.eigvals(few.covariance @ real.covariance)
    expected = np.square(few.mean - real.mean).sum() + np.trace(few.covariance + real.covariance)
    expected -= 2 * np.sqrt(products.astype(complex)).real.sum()
    assert distance(few, real) == pytest.approx(expected) == pytest.approx(distance(real, few))


def test_statistics_are_read_as_they_were_written_and_under_other_names(tmp_path):
    pool, spatial = Moments(REAL), Moments(REAL[:, :2])
    write_statistics(tmp_path / "a.npz", {"pool": pool, "spatial": spatial})
    read = read_statistics(tmp_path / "a.npz")
    assert read.keys() == {"pool", "spatial"} and read["pool"].count == 500
    np.testing.assert_array_equal(read["spatial"].covariance, spatial.covariance)
    assert set(np.load(tmp_path / "a.npz")) == {"mu", "sigma", "mu_s", "sigma_s", "count"}
    np.savez(tmp_path / "b.npz", ref_mu=pool.mean, ref_sigma=pool.covariance, arr_0=np.zeros(3))
    (name, read), *_ = read_statistics(tmp_path / "b.npz").items()
    assert name == "pool" and read.count is None
    np.testing.assert_array_equal(read.mean, pool.mean)
    write_statistics(tmp_path / "c.npz", {"pool": read})
    assert read_statistics(tmp_path / "c.npz")["pool"].count is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(3)}, 'no "mu" and "sigma"'),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"pool.*\(3,\).*\(2, 2\)"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": [np.inf], "sigma_s": [[1]]}, "spatial"),
    ],
)
def test_damaged_statistics_are_refused(arrays, words, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(MetricError, match=words):
        read_statistics(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:99])
    for name in ("a.npz", "absent.npz"):
        with pytest.raises(MetricError, match=f"{name} is no npz file"):
            read_statistics(tmp_path / name)


def test_figures_are_those_of_torch_fidelity(fidelity, monkeypatch):
    samples, real = fidelity["samples"], fidelity["real"]
    parts = scores.inception_scores_fidelity(fidelity["logits"])
    found = {
        "inception_score": parts.mean(),
        "inception_score_std": parts.std(),
        "fid": distance(Moments(samples), Moments(real)),
    }
    monkeypatch.setattr(scores, "KID_SUBSETS", 5)  # of 1,000, as the others were taken
    kid = scores.kernel_distances(samples, real)
    found |= {"kid": kid.mean(), "kid_std": kid.std()}
    rows = neighbours.manifold_rows(samples, real)
    found |= {name: rows[name].mean() for name in ("precision", "recall")}
    assert found == pytest.approx({name: fidelity[name] for name in found}, rel=1e-6)


def test_inception_scores_of_chunks_in_their_order():
    sure = np.eye(4)[np.arange(8000) % 4] * 100  # all four classes, and each without a doubt
    assert scores.inception_scores_adm(sure) == pytest.approx([4, 4])
    sure[5000:] = sure[0]  # the second chunk, of 3,000, is one class
    assert scores.inception_scores_adm(sure) == pytest.approx([4, 1])
    assert len(scores.inception_scores_fidelity(sure)) == 10
    assert scores.inception_scores_fidelity(np.zeros((12, 4))) == pytest.approx(np.ones(10))


GRID = np.float32(list(itertools.product(range(12), range(7))))  # many distances are the same


@pytest.mark.parametrize(("samples", "real"), [(SAMPLES, REAL), (GRID + 3, GRID), (GRID, GRID)])
def test_manifolds_are_those_of_plain_numpy(samples, real):
    rows = neighbours.manifold_rows(samples, real)
    cross = pairwise(samples, real)
    radii = np.sort(pairwise(real, real), axis=1)
    radius = np.sort(pairwise(samples, samples), axis=1)[:, 3]
    np.testing.assert_array_equal(rows["precision"], (cross <= radii[:, 3]).any(1))
    np.testing.assert_array_equal(rows["recall"], (cross <= radius[:, None]).any(0))
    np.testing.assert_allclose(rows["density"], (cross < radii[:, 5]).sum(1) / 5)
    np.testing.assert_array_equal(rows["coverage"], (cross < radii[:, 5]).any(0))


def test_manifolds_do_not_depend_on_blocks(monkeypatch):
    expected = neighbours.manifold_rows(SAMPLES, REAL)
    monkeypatch.setattr(neighbours, "BLOCK_MIB", 0.1)  # 26 rows of 500 distances
    found = neighbours.manifold_rows(SAMPLES, REAL)
    for name, rows in expected.items():
        np.testing.assert_array_equal(found[name], rows)


def test_manifolds_of_equal_and_of_disjoint_sets():
    same = neighbours.manifold_rows(REAL, REAL.copy())
    assert {name: rows.mean() for name, rows in same.items()} == pytest.approx(
        {"precision": 1, "recall": 1, "density": 1, "coverage": 1}, abs=0.2
    )
    assert all(same[name].all() for name in ("precision", "recall", "coverage"))
    assert not any(rows.any() for rows in neighbours.manifold_rows(REAL + 100, REAL).values())


def test_distances_of_near_rows_far_from_zero_are_exact():
    rows = np.float32(1000) + np.arange(8, dtype=np.float32)[:, None] / 64 * np.ones(1024)
    found = neighbours.nearest(rows, rows, 1)[:, 1]  # 0.5, of norms of 32,000
    np.testing.assert_allclose(found, 0.5, rtol=1e-3)


def test_memorising_tells_copies_from_new_examples():
    new = np.random.default_rng(1).normal(0, 1, (500, 6)).astype(np.float32)
    figures = neighbours.memorising(new, REAL, REAL[::2])
    assert figures["nearest_real_ratio"] == pytest.approx(1, abs=0.15)
    assert figures["nearest_real_copies"] < 0.05
    copies = REAL[:300] + np.float32(1e-4)
    figures = neighbours.memorising(copies, REAL, REAL[::2])
    assert figures["nearest_real_ratio"] < 0.01 and figures["nearest_real_copies"] == 1
    twice = np.float32([[0], [0], [1], [1]])
    assert neighbours.memorising(twice, twice, twice) == {"nearest_real_copies": 1}


def test_kid_has_no_bias(monkeypatch):
    monkeypatch.setattr(scores, "KID_SUBSET_SIZE", 50)
    halves = [np.random.default_rng(seed).standard_normal((5_000, 4)) for seed in (0, 1)]
    values = scores.kernel_distances(*halves)
    assert abs(values.mean()) < 3 * values.std() / 10 < values.std()
    assert scores.kernel_distances(halves[0] + 1, halves[1]).mean() > 10 * values.std()


def test_mind_of_a_shift_and_of_a_scale():
    assert scores.mind(REAL, REAL) == pytest.approx(0, abs=1e-12)
    shift = np.float32([0, 1, 0, 2, 0, 0])
    assert scores.mind(REAL + shift, REAL) == pytest.approx(3 * 5, rel=0.1)  # 3 |shift|^2
    line = np.arange(1000.0)[:, None] / 1000
    assert scores.mind(2 * line, line) == pytest.approx(3 * np.square(line).mean())
    assert scores.mind(2 * line, np.repeat(line, 3, axis=0)) == pytest.approx(1, abs=0.2)


def test_intervals_hold_what_they_are_to_hold():
    """Of samples of a known distribution, about 95 in 100 intervals hold the expected figure."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(50):
        low, high = intervals.bootstrap(rng.random(200) < 0.3)
        held.append(low <= 0.3 <= high)
    assert np.mean(held) > 0.85
    real = Statistics(np.zeros(3), np.diag([1.0, 2, 3]))
    found = []
    for _ in range(100):
        rows = rng.normal(1, 1, (400, 3))
        value, moved = intervals.frechet(rows, Moments(rows), real)
        found.append((value, *intervals.first_order(value, moved, len(rows))))
    distances, low, high = np.asarray(found).T
    assert distances[0] == pytest.approx(distance(real, Moments(rows)), rel=0.5)
    width = (high - low).mean() / 2 / 1.96
    assert width == pytest.approx(distances.std(), rel=0.25)
    values = rng.normal(5, 1, 100)
    low, high = intervals.subsampling(values, 100, 1000)
    expected = values.std(ddof=1) * np.sqrt(100 / 900 + 1 / 100)
    assert (low + high) / 2 == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * expected)


def test_a_frechet_interval_of_some_rows_is_that_of_all_samples():
    samples, real = Moments(SAMPLES), Moments(REAL)
    whole, part = (intervals.frechet(rows, samples, real) for rows in (SAMPLES, SAMPLES[::2]))
    assert whole[0] == part[0] == distance(real, samples)
    whole, part = (intervals.first_order(*each, samples.count) for each in (whole, part))
    assert part == pytest.approx(whole, rel=0.1) and whole[0] < distance(real, samples) < whole[1]


def test_a_reservoir_is_uniform_and_the_same_for_any_split():
    rows = np.arange(1000)
    whole = Reservoir(50)
    whole.update(rows, 0)
    for bounds in ([10], [500], range(3, 1000, 3)):
        parts = [Reservoir(50), Reservoir(50)]
        starts = [0, *bounds]
        for turn, start, part in zip(
            itertools.cycle((0, 1)), starts, np.split(rows, bounds), strict=False
        ):
            parts[turn].update(part, start)
        parts[1].merge(parts[0])
        np.testing.assert_array_equal(parts[1].rows(), whole.rows())
    counts = np.zeros(100)
    for seed in range(200):
        reservoir = Reservoir(20, seed)
        for start in range(0, 100, 10):
            reservoir.update(rows[start : start + 10], start)
        assert len(reservoir.rows()) == 20
        counts[reservoir.rows()] += 1
    assert counts.min() > 15 and counts.max() < 70  # 40 expected, 5.7 standard deviation
    few = Reservoir(50)
    assert few.rows() is None
    few.update(rows[:7], 0)
    np.testing.assert_array_equal(few.rows(), rows[:7])


def features(rows: slice) -> dict[str, np.ndarray]:
    logits = np.tile(SAMPLES, 2)[rows]
    return {"pool": SAMPLES[rows], "spatial": SAMPLES[rows, :3] ** 2, "logits": logits}


REFERENCE = {"pool": REAL, "spatial": REAL[:, :3] ** 2, "logits": REAL}
LABELS = np.arange(600) % 6


def judged(network="inception", count=600, **options) -> dict[str, float]:
    figures = FeatureFigures(network, REFERENCE, **options)
    figures.update(features(slice(count)), LABELS[:count])
    return figures.result()


def test_the_figures_of_a_network_and_their_names(small_kid):
    figures = judged()
    bounded = {"fid", "sfid", "precision", "recall", "density", "coverage", "kid"}
    bounds = {f"{name}_{side}" for name in bounded for side in ("low", "high")}
    of_fidelity = {f"inception_score_fidelity{end}" for end in ("", "_std", "_low", "_high")}
    rest = {"inception_score", "inception_score_std", "mind", "mind_real", "fid_real"} | of_fidelity
    assert figures.keys() == bounded | bounds | rest | {
        "nearest_real_ratio",
        "nearest_real_copies",
    }
    assert all(type(value) is float for value in figures.values())
    for name in bounded:
        assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"], name
    assert figures["fid"] == pytest.approx(distance(Moments(SAMPLES), Moments(REAL)))
    assert figures["mind"] == scores.mind(SAMPLES, REAL)
    other = judged("efficientnet_lite0")
    assert {"fd_efficientnet_lite0", "sfd_efficientnet_lite0_low"} <= other.keys()
    assert not {name for name in other if "inception" in name or "fid" in name}
    assert "accuracy" not in other


def test_accuracy_of_a_classifier(small_kid):
    figures = judged("classifier", classifier=True)
    expected = (SAMPLES.argmax(1) == LABELS).mean()
    assert figures["accuracy"] == pytest.approx(expected)
    assert figures["accuracy_low"] < expected < figures["accuracy_high"]


@pytest.mark.parametrize("max_rows", [10_000, 200])
def test_any_split_gives_the_figures_of_one_pass(small_kid, max_rows):
    options = {"network": "inception", "reference": REFERENCE, "max_rows": max_rows}
    options["classifier"] = True
    whole, *parts = [FeatureFigures(**options) for _ in range(3)]
    whole.update(features(slice(600)), LABELS)
    for turn, start in enumerate(range(0, 600, 77)):
        rows = slice(start, min(start + 77, 600))
        parts[turn % 2].update(features(rows), LABELS[rows], start)
    parts[1].merge(parts[0])
    assert parts[1].count == 600 and parts[1].caveats() == whole.caveats()
    assert parts[1].result() == pytest.approx(whole.result(), rel=1e-10, abs=1e-10)
    assert ("of 200 rows at most" in " ".join(whole.caveats())) == (max_rows == 200)
    in_turn = FeatureFigures(**options)  # without being told where parts start
    for start in range(0, 600, 77):
        rows = slice(start, min(start + 77, 600))
        in_turn.update(features(rows), LABELS[rows])
    assert in_turn.result() == pytest.approx(whole.result(), rel=1e-10, abs=1e-10)


def test_statistics_of_a_file_stand_in_for_those_of_the_reference():
    statistics = {"pool": Statistics(np.ones(6), np.eye(6))}
    alone = FeatureFigures("inception", {}, statistics)
    alone.update({"pool": SAMPLES})
    expected = distance(statistics["pool"], Moments(SAMPLES))
    assert alone.result().keys() == {"fid", "fid_low", "fid_high"}
    assert alone.result()["fid"] == pytest.approx(expected)
    assert any("statistics alone" in caveat for caveat in alone.caveats())
    figures = judged(statistics=statistics)
    assert figures["fid"] == pytest.approx(expected) and "precision" in figures
    assert figures["sfid"] == pytest.approx(judged()["sfid"])


def test_too_few_samples_leave_figures_out_and_say_so(monkeypatch):
    figures = FeatureFigures("inception", REFERENCE)
    figures.update(features(slice(4)))
    assert figures.result().keys() >= {"fid", "mind", "inception_score"}
    left_out = {"kid", "precision", "nearest_real_ratio", "inception_score_fidelity"}
    assert not figures.result().keys() & left_out
    said = "\n".join(figures.caveats())
    assert "4 samples show a trend only" in said and "no KID" in said
    assert "fid: 4 samples are too few for 6 dimensions" in said and "sfid" not in said
    for count in (0, 1):
        empty = FeatureFigures("inception", REFERENCE)
        empty.update(features(slice(count)))
        with pytest.raises(MetricError, match=f"at least 2 samples, there are {count}"):
            empty.result()
    monkeypatch.setattr(feature_figures, "TREND_BELOW", 4)
    assert "4 samples, published figures take 50000" in figures.caveats()


def test_features_that_cannot_be_judged_are_refused_before_anything_is_taken_in():
    figures = FeatureFigures("inception", REFERENCE)
    figures.update(features(slice(100)))
    bad = {name: rows.copy() for name, rows in features(slice(100, 200)).items()}
    bad["spatial"][[5, 50]] = np.nan
    with pytest.raises(MetricError, match="spatial.* 2 of 100 samples .*finite.* number 105;"):
        figures.update(bad)
    wrong = features(slice(100, 200)) | {"pool": SAMPLES[:100, :5]}
    with pytest.raises(MetricError, match=r"pool.*\(5,\).*\(6,\); take statistics of the same"):
        figures.update(wrong)
    with pytest.raises(MetricError, match="gives no spatial features"):
        figures.update({"pool": SAMPLES})
    assert figures.count == 100
    assert figures.result() == pytest.approx(judged(count=100), rel=1e-10)
    with pytest.raises(MetricError, match="real examples.*finite.*number 0;"):
        FeatureFigures("inception", {"pool": REAL * np.float32(np.inf)})
    statistics = {"pool": Statistics(np.ones(5), np.eye(5))}
    with pytest.raises(MetricError, match="same network"):
        FeatureFigures("inception", REFERENCE, statistics)
