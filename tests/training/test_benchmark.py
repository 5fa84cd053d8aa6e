"""The benchmark command: what it measures, what it writes, what bad input gets; and what
docs/benchmarks.md says.
"""

import gzip
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import CONFIGS, run, tiny_config

from djepa_jax.config.convert import ConfigError
from djepa_jax.core import flops, sharding
from djepa_jax.data.arrays import load_npz
from djepa_jax.training import benchmark
from djepa_jax.training.benchmark import BenchmarkCase, Timing, rates, run_benchmark, time_calls

COUNTS = {"ideal", "padded", "traced", "compiled"}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> tuple[dict, str]:
    """The JSON of a tiny benchmark of both parts, and its table."""
    out, lines = tmp_path_factory.mktemp("benchmark") / "sub" / "tiny.json", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        timing = ("--steps=2", "--repeats=2", "--warmup=1")
        assert run("--mode=benchmark", *timing, f"--out={out}") == 0
    return json.loads(out.read_text()), "\n".join(lines)


def test_what_the_figures_depend_on_is_written(tiny_run):
    results, table = tiny_run
    assert results["device"], "by this the file is told from others, which are not replaced"
    assert results["devices"] == 8 and results["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert results["versions"]["jax"] == jax.__version__ and "flax" in results["versions"]
    config = results["config"]
    assert config["compute_dtype"] == "float32" and config["model"]["dropout"] == 0.0
    assert [segment["stop"] for segment in results["segments"]] == [3]
    words = ["cpu", "XLA_FLAGS", "float32", "dropout", "batch 16", "segments", "peak not known"]
    assert all(word in table for word in (*words, jax.__version__))


def test_figures_of_both_parts_are_consistent(tiny_run):
    for part, batch, calls in (("train", 16, 2), ("sample", 40, 1)):
        record = tiny_run[0][part]
        ms, counts = record["milliseconds"], record["flops"]
        assert record["batch_size"] == batch and record["calls_per_repeat"] == calls
        assert len(record["seconds"]) == 2
        assert 0 < ms["min"] <= ms["p10"] <= ms["median"] <= ms["p90"]
        assert record["images_per_second"] == pytest.approx(1e3 * batch / ms["median"])
        assert record["compile_seconds"] > 0
        assert record["memory_bytes"]["xla_plan"] > 0
        assert counts.keys() == COUNTS and counts["ideal"] <= counts["padded"]
        assert record["useful_mfu"] is None


def test_a_repeat_is_some_calls_after_the_warm_up(monkeypatch):
    """By a clock that goes on one second with every call."""
    arguments, clock = [], [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def function(number: int) -> int:
        arguments.append(number)
        clock[0] += 1
        return number + 1

    case = BenchmarkCase("step", function, (0,), lambda _, result: (result,), 3, 8, {})
    assert time_calls(case, function, Timing(steps=3, repeats=2, warmup=4)) == [1.0, 1.0]
    assert arguments == list(range(4 + 2 * 3)), "every call gets what the one before gave"


def test_utilisation_is_ideal_work_over_time_and_peak(monkeypatch):
    monkeypatch.setattr(flops, "peak_flops", lambda kind: 1e12)
    case = BenchmarkCase("step", None, (), None, 1, 8, {"ideal": 3e11})
    found = rates([0.4, 0.5, 0.9], case, sharding.make_mesh((-1, 1, 1)))
    assert found["useful_mfu"] == pytest.approx(3e11 / 0.5 / (8 * 1e12))
    assert found["images_per_second"] == pytest.approx(16)


def test_what_cannot_be_measured_is_refused(tmp_path):
    good, timing = tiny_config(), Timing(1, 1, 0)
    table = [
        (good, ["train", "fly"], timing, "fly.*train.*sample"),
        (good, [], timing, "parts"),
        (good.updated({"batch_size": 12}), ["train"], timing, "batch_size is 12.* 8"),
    ]
    for experiment, parts, timing, words in table:
        with pytest.raises(ConfigError, match=words):
            run_benchmark(experiment, parts, timing, str(tmp_path / "out.json"))
    for counts, words in (((1, 0, 0), "repeats is 0"), ((0, 1, 0), "steps is 0")):
        with pytest.raises(ValueError, match=words):
            Timing(*counts)
    with pytest.raises(ValueError, match="warmup is -1"):
        Timing(1, 1, -1)


DOCS = CONFIGS.parent / "docs"


def test_pictures_of_the_documentation_carry_their_command():
    text = (DOCS / "benchmarks.md").read_text() + (DOCS.parent / "README.md").read_text()
    paths = sorted((DOCS / "images").glob("*.png"))
    assert paths
    for path in paths:
        with Image.open(path) as picture:
            command = picture.info["command"]
        assert re.search(r"(djepa|-m djepa_jax.main) --config=\w", command)
        assert {*re.findall(r"--\S+", command)} <= {*re.findall(r"--[^\s`]+", text)}, path


def test_mnist_is_read_as_the_documentation_says(tmp_path, monkeypatch):
    images = np.arange(2 * 784, dtype=np.uint8).reshape(2, 28, 28)
    labels = np.array([5, 0], np.uint8)
    for name, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
        with gzip.open(tmp_path / f"train-{name}-ubyte.gz", "wb") as file:
            file.write(bytes(header) + values.tobytes())
    text = (DOCS / "benchmarks.md").read_text()
    code = re.search(r"```python\n(import gzip.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    source = load_npz("mnist_train.npz", "mnist_train.npz")
    np.testing.assert_array_equal(source.images[..., 0], images)
    assert source.labels.tolist() == [5, 0]
