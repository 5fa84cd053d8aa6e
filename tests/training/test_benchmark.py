"""The benchmark command: what it measures, what it writes, what bad input gets; and what
docs/benchmarks.md says.
"""

import gzip
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import CONFIG, CONFIGS, TINY, tiny_config

from configs import digits
from djepa_jax.config import experiment as configuration
from djepa_jax.core import flops, sharding
from djepa_jax.core.train_step import init_state
from djepa_jax.data.arrays import load_npz
from djepa_jax.training import benchmark, memory

COUNTS = {"ideal", "padded", "traced", "unrolled", "compiled"}


def run(*arguments: str) -> int:
    return benchmark.main(["benchmark", f"--config={CONFIG}", *TINY, *arguments])


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> tuple[dict, str]:
    """The JSON of a tiny benchmark of both parts, and its table."""
    out, capture = tmp_path_factory.mktemp("benchmark") / "sub" / "tiny.json", pytest.MonkeyPatch()
    lines: list[str] = []
    with capture.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        assert run("--steps=2", "--repeats=2", "--warmup=1", f"--out={out}") == 0
    return json.loads(out.read_text()), "\n".join(lines)


def test_what_the_figures_depend_on_is_written(tiny_run):
    results, table = tiny_run
    assert results["devices"] == 8 and results["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert results["versions"]["jax"] == jax.__version__ and "flax" in results["versions"]
    assert (
        results["config"]["compute_dtype"] == "float32"
        and results["config"]["model"]["dropout"] == 0.0
    )
    assert [segment["stop"] for segment in results["segments"]] == [3]
    for words in (
        "cpu",
        jax.__version__,
        "XLA_FLAGS",
        "float32",
        "dropout",
        "batch 16",
        "segments",
        "peak not known",
    ):
        assert words in table


@pytest.mark.parametrize("part, batch, calls", [("train", 16, 2), ("sample", 40, 1)])
def test_figures_of_a_part_are_consistent(tiny_run, part, batch, calls):
    record = tiny_run[0][part]
    ms = record["milliseconds"]
    assert (
        len(record["seconds"]) == 2
        and record["batch_size"] == batch
        and record["calls_per_repeat"] == calls
    )
    assert 0 < ms["min"] <= ms["p10"] <= ms["median"] <= ms["p90"]
    assert record["images_per_second"] == pytest.approx(1e3 * batch / ms["median"])
    assert record["programs_compiled"] == 1 and record["compile_seconds"] > 0
    assert record["memory_bytes"]["xla_plan"] > 0
    assert (
        record["flops"].keys() == COUNTS and record["flops"]["ideal"] <= record["flops"]["padded"]
    )
    assert record["useful_mfu"] is None


def test_a_batch_is_taken_in_parts_where_training_would(monkeypatch):
    """On a device that is too small for the whole; the table says so."""
    config = tiny_config("--config.batch_size=64")
    experiment, mesh = configuration.build(config), sharding.make_mesh((-1, 1, 1))
    monkeypatch.setattr(memory, "device_limit", lambda: 1000)
    monkeypatch.setattr(benchmark, "unrolled_flops", lambda *_: None)  # takes seconds
    parts = []
    for config.microbatches in (0, 1):
        parts.append(
            benchmark.prepare_training(
                config, experiment, mesh, benchmark.Timing(1, 1, 0)
            ).microbatches
        )
    assert parts == [2, 1]


def test_xla_counts_a_compiled_program_on_one_device_and_a_lowered_one_on_all():
    mesh = sharding.make_mesh((-1, 1, 1))
    x = jax.device_put(jnp.ones((64, 32)), sharding.batch_sharding(mesh))
    lowered = jax.jit(lambda x, w: x @ w).lower(x, jnp.ones((32, 16)))
    assert benchmark.xla_flops(lowered) == 2 * 64 * 32 * 16
    assert benchmark.xla_flops(lowered.compile()) * mesh.size == pytest.approx(
        2 * 64 * 32 * 16, rel=0.05
    )


def test_xla_agrees_with_the_model_where_products_dominate():
    config = digits.get_config()
    config.model.update(encoder_depth=2, predictor_depth=3, denoiser_depth=2, scan_unroll=1)
    config.batch_size = 32
    experiment = configuration.build(config)
    spec = experiment.train
    batch = {
        "example": jax.ShapeDtypeStruct((32, *experiment.modality.example_shape), "uint8"),
        "condition": jax.ShapeDtypeStruct((32,), "int32"),
    }
    unrolled = benchmark.unrolled_flops(spec, jax.eval_shape(lambda: init_state(spec)), batch)
    assert unrolled / benchmark.train_flops(spec)["padded"] == pytest.approx(1, abs=0.05)


def test_utilisation_is_ideal_work_over_time_and_peak(monkeypatch):
    monkeypatch.setattr(flops, "peak_flops", lambda kind: 1e12)
    work = benchmark.Work("step", None, (), None, 1, 8, {"ideal": 3e11})
    mesh = sharding.make_mesh((-1, 1, 1))
    rates = benchmark.rates([0.4, 0.5, 0.9], work, mesh)
    assert rates["useful_mfu"] == pytest.approx(3e11 / 0.5 / (8 * 1e12))
    assert rates["images_per_second"] == pytest.approx(16)


BAD_INPUT = {
    "unknown part": (["--parts=train,fly"], ["fly", "train", "sample"]),
    "no part": (["--parts="], ["parts"]),
    "no repeats": (["--repeats=0"], ["repeats", "0"]),
    "no steps": (["--steps=0"], ["steps", "0"]),
    "not a number": (["--steps=many"], ["steps", "many"]),
    "unknown flag": (["--workdir=x"], ["workdir"]),
    "unknown key": (["--config.model.widht=8"], ["model.widht", "model.width"]),
    "unusable value": (["--config.loss.name=gan"], ["loss.name", "gan"]),
    "batch does not split": (["--config.batch_size=12"], ["batch_size", "12", "8"]),
    "stray word": (["train"], ["train", "--flag=VALUE"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_error(case, capsys):
    arguments, words = BAD_INPUT[case]
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.startswith("error: ")
        and "Traceback" not in captured.err
        and captured.out == ""
    )
    for word in words:
        assert word in captured.err


def test_a_config_is_needed(capsys):
    assert benchmark.main(["benchmark"]) == 2
    assert "--config is missing" in capsys.readouterr().err


DOCS = CONFIGS.parent / "docs"


@pytest.mark.parametrize(
    "path", sorted((DOCS / "images").glob("*.png")), ids=lambda path: path.stem
)
def test_pictures_of_the_documentation_carry_their_command(path):
    with Image.open(path) as picture:
        command = picture.info["command"]
    assert "-m djepa_jax.main --config=configs/" in command
    flags = set(re.findall(r"--\S+", command))
    assert flags <= set(
        re.findall(
            r"--[^\s`]+",
            (DOCS / "benchmarks.md").read_text() + (DOCS.parent / "README.md").read_text(),
        )
    )


def test_mnist_is_read_as_the_documentation_says(tmp_path, monkeypatch):
    images, labels = (
        np.arange(2 * 784, dtype=np.uint8).reshape(2, 28, 28),
        np.array([5, 0], np.uint8),
    )
    for name, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
        with gzip.open(tmp_path / f"train-{name}-ubyte.gz", "wb") as file:
            file.write(bytes(header) + values.tobytes())
    code = re.search(
        r"```python\n(import gzip.*?)```", (DOCS / "benchmarks.md").read_text(), re.DOTALL
    )[1]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    source = load_npz("mnist_train.npz", "mnist_train.npz")
    np.testing.assert_array_equal(source.images[..., 0], images)
    assert source.labels.tolist() == [5, 0]
