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
from small_autoencoder import FLAGS, PIXELS, registered
from tiny import CONFIGS, load_config, run, tiny_config

from djepa_jax.config.convert import ConfigError
from djepa_jax.core import flops, sharding
from djepa_jax.data.arrays import load_npz
from djepa_jax.runtime.profiling import largest_kernels
from djepa_jax.training import benchmark
from djepa_jax.training.benchmark import Timing, plan_parts, rates, run_benchmark, time_calls
from djepa_jax.training.benchmark_cases import BenchmarkCase, prepare_decoding
from djepa_jax.training.benchmark_compare import comparison

COUNTS = {"ideal", "padded", "traced", "compiled"}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> tuple[dict, str]:
    """The JSON of a tiny benchmark of three parts, and its table."""
    out, lines = tmp_path_factory.mktemp("benchmark") / "sub" / "tiny.json", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        timing = ("--steps=2", "--repeats=2", "--warmup=1", "--profile")
        parts = "--parts=train,sample,denoise"
        assert run("--mode=benchmark", parts, *timing, f"--out={out}") == 0
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


def test_figures_of_all_parts_are_consistent(tiny_run):
    for part, batch, calls in (("train", 16, 2), ("sample", 40, 1), ("denoise", 40, 2)):
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
        kernels = record["kernels"]
        assert 0 < len(kernels["largest"]) <= 10 and kernels["calls"] >= len(kernels["largest"])
        assert all(name in tiny_run[1] for name, _, _ in kernels["largest"])


def test_a_repeat_is_some_calls_after_the_warm_up(monkeypatch):
    """By a clock that goes on one second with every call."""
    arguments, clock = [], [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def function(number: int) -> int:
        arguments.append(number)
        clock[0] += 1
        return number + 1

    case = BenchmarkCase("step", function, (0,), 8, {}, 3, lambda _, result: (result,))
    timing = Timing(steps=3, repeats=2, warmup=4)
    assert time_calls(case, function, timing) == ([1.0, 1.0], (10,))
    assert arguments == list(range(4 + 2 * 3)), "every call gets what the one before gave"


def test_utilisation_is_ideal_work_over_time_and_peak(monkeypatch):
    monkeypatch.setattr(flops, "peak_flops", lambda kind: 1e12)
    case = BenchmarkCase("step", None, (), 8, {"ideal": 3e11})
    found = rates([0.4, 0.5, 0.9], case, sharding.make_mesh((-1, 1, 1)))
    assert found["useful_mfu"] == pytest.approx(3e11 / 0.5 / (8 * 1e12))
    assert found["images_per_second"] == pytest.approx(16)


def test_what_cannot_be_measured_is_refused(tmp_path):
    good, timing = tiny_config(), Timing(1, 1, 0)
    table = [
        (good, ["train", "fly"], timing, "fly.*train.*sample"),
        (good, ["train", "decode"], timing, "decode.*image_pixels.*djepa_b"),
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


def test_every_batch_size_is_a_row():
    latents = load_config("djepa_b:debug")
    assert plan_parts(latents, ["train", "sample", "decode"], []) == {
        "train": ("train", 8),
        "sample": ("sample", 4),
        "decode_1": ("decode", 1),
        "decode_32": ("decode", 32),
    }
    plan = plan_parts(latents, ["train", "sample"], ["1", "100"])
    assert plan["sample_1"] == ("sample", 1) and plan["sample_100"] == ("sample", 100)
    for sizes in (["0"], ["1", "x"], ["-1"]):
        with pytest.raises(ConfigError, match="--batch_sizes.*1,100"):
            plan_parts(latents, ["sample"], sizes)
    with pytest.raises(ConfigError, match="--batch_sizes.*decode"):
        plan_parts(latents, ["train"], ["1"])


def test_decoding_makes_pictures_of_the_size_and_number_asked_for():
    with registered():
        experiment = load_config("djepa_b:debug", *FLAGS)
        case = prepare_decoding(experiment, sharding.make_mesh((1, 1, 1), jax.devices()[:1]), 1, 3)
    pictures = jax.eval_shape(case.function, *case.arguments)
    assert pictures.shape == (3, PIXELS, PIXELS, 3) and pictures.dtype == np.uint8


@pytest.mark.parametrize("thread, found", [("Stream #13(Compute)", 3), ("python", 1)])
def test_kernels_are_the_events_of_streams_or_the_operations_of_xla(tmp_path, thread, found):
    """Of a trace made by hand: milliseconds from microseconds, summed by name."""
    events = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": thread}},
        {"ph": "M", "name": "thread_name", "pid": 2, "tid": 7, "args": {"name": "host"}},
        {"ph": "X", "name": "gemm", "pid": 1, "tid": 7, "dur": 1500.0},
        {"ph": "X", "name": "copy", "pid": 1, "tid": 7, "dur": 2000.0},
        {"ph": "X", "name": "gemm", "pid": 1, "tid": 7, "dur": 1500.0},
        {"ph": "X", "name": "dot.1", "pid": 2, "tid": 7, "dur": 9e6, "args": {"hlo_op": "dot.1"}},
        {},
    ]
    (tmp_path / "plugins").mkdir()
    with gzip.open(tmp_path / "plugins" / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    kernels = largest_kernels(tmp_path, count=1)
    assert kernels["calls"] == found
    if found == 3:
        assert kernels["largest"] == [("gemm", 3.0, 2)] and kernels["milliseconds"] == 5.0


def test_a_file_of_another_program_stands_beside_ours(tiny_run, tmp_path):
    ours = tiny_run[0]
    own = json.loads(json.dumps(ours)) | {"device": "abacus"}
    own["config"]["model"]["width"] = 17
    text = comparison(ours, own, "own.json")
    assert "differs: device cpu here, abacus there (train, sample, denoise)" in text
    assert "config.model.width 16 here, 17 there" in text and text.count("1.000") == 3
    assert text.count("differs") == 2
    assert "differs" not in comparison(
        ours | {"config": {"mesh": (1, 1)}}, ours | {"config": {"mesh": [1, 1]}}, "x"
    )
    median = ours["train"]["milliseconds"]["median"]
    other = {"train": {"batch_size": 32, "milliseconds": {"median": 4 * median}}}
    text = comparison(ours, other, "other.json")
    assert "2.000" in text and "batch_size 16 here, 32 there" in text
    assert "config is told here alone (train)" in text and "denoise" not in text


BAD_FILES = {
    "absent": (None, "cannot be read"),
    "no JSON": ("{", "must be of the form"),
    "a list": ("[1]", "must be of the form"),
    "no batch size": ('{"train": {"milliseconds": {"median": 1}}}', "form.*batch_size'"),
    "text for a number": (
        '{"train": {"batch_size": 1, "milliseconds": {"median": "1"}}}',
        "must be of the form",
    ),
    "text for a percentile": (
        '{"train": {"batch_size": 1, "milliseconds": {"median": 1, "p10": 1, "p90": "1"}}}',
        "must be of the form",
    ),
    "no images": (
        '{"train": {"batch_size": 0, "milliseconds": {"median": 1}}}',
        "must be of the form",
    ),
    "no common part": (
        '{"sample": {"batch_size": 1, "milliseconds": {"median": 1}}}',
        "times sample, this run train",
    ),
    "nothing timed": ('{"device": "cpu"}', "times nothing"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_to_compare_is_refused_before_anything_is_measured(name, tmp_path, monkeypatch):
    text, words = BAD_FILES[name]
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(ConfigError, match=f"--compare .*other.json.*{words}"):
        run_benchmark(tiny_config(), ["train"], Timing(1, 1, 0), compare=str(path))


DOCS = CONFIGS.parent / "docs"


def test_pictures_of_the_documentation_carry_their_command():
    pages = *DOCS.glob("*.md"), DOCS.parent / "README.md"
    text = "".join(page.read_text() for page in pages)
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
