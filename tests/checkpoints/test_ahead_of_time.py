"""`--format=stablehlo`: the compiled sampler runs where only JAX is installed, and draws what the
Generator draws.
"""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import assert_close
from flax import traverse_util
from jax import export as jax_export
from safetensors.numpy import save_file
from tiny import CONFIG, TINY, tiny_config

import djepa_jax
from djepa_jax.checkpoints import stablehlo
from djepa_jax.checkpoints.convert.official import official_shapes
from djepa_jax.checkpoints.restore import find_model, placed_params
from djepa_jax.config import experiment as configuration
from djepa_jax.config.settings import Settings
from djepa_jax.core import sharding
from djepa_jax.core.models.djepa import split_model
from djepa_jax.main import main
from djepa_jax.sampling.generator import Generator

BATCH, SEED, TEMPERATURE = 4, 7, 0.8
LABELS = (3, 7, 0, 9, 1, 10, 3, 2)  # two batches; 10 stands for no class
CASES = {
    "guided": ("diffusion", 2.5),
    "unguided": ("flow", 1.0),
}  # variant of the configuration, guidance scale

# Put before a program, this leaves it JAX with what JAX needs, and flatbuffers.
ONLY_JAX = """
import importlib, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class OnlyJax(PathFinder):
    allowed = {"jax", "jaxlib", "numpy", "flatbuffers", "ml_dtypes", "opt_einsum", "scipy"} | sys.stdlib_module_names

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = name.partition(".")[0] in cls.allowed or name.startswith("_sysconfigdata")
        return super().find_spec(name, path, target) if found else None

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, OnlyJax]
for absent in ("djepa_jax", "configs", "flax", "optax", "orbax", "einops", "safetensors", "ml_collections"):
    try:
        importlib.import_module(absent)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{absent} can be imported")
"""

# Samples all batches and saves them: python -c ... JOB, where the job is JSON.
STANDALONE = """
import json
import jax, numpy as np
from jax import export

job = json.loads(sys.argv[1])
sampler = export.deserialize(bytearray(open("sampler.stablehlo", "rb").read()))
params = dict(np.load("params.npz"))
scalars = [np.float32(value) for value in job["scalars"]]
results = []
for start in range(0, len(job["labels"]), job["batch"]):
    ids = np.arange(start, start + job["batch"], dtype=np.int32)
    results.append(sampler.call(params, np.array(job["labels"], np.int32)[ids], ids, job["seed"], *scalars))
np.savez(job["out"], **{name: np.concatenate([result[name] for result in results]) for name in results[0]})
"""


def run_alone(program: str, folder: pathlib.Path, *arguments: str) -> str:
    """Run a program in `folder` with nothing but JAX to import; returns what it printed."""
    command = [sys.executable, "-I", "-c", ONLY_JAX + program, *arguments]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env=settings
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def run(variant: str, *arguments: str):
    assert main(["djepa_jax", f"--config={CONFIG}:{variant}", *TINY, *arguments]) == 0


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Tiny models of random weights that all matter; after a little training the last layers would
    be almost zero.
    """
    folder, rng = tmp_path_factory.mktemp("weights"), np.random.default_rng(0)
    for name, (variant, _) in CASES.items():
        _, abstract = split_model(configuration.build(tiny_config(variant=variant)).train.model)
        shapes = official_shapes(abstract)
        tensors = {
            key: rng.normal("norm" in key, 0.2, shape).astype(np.float32)
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / f"{name}.safetensors")
        run(
            variant,
            "--mode=import",
            f"--source={folder / name}.safetensors",
            f"--workdir={folder / name}",
        )
    return {name: folder / name for name in CASES}


@pytest.fixture(scope="module")
def samplers(workdirs, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The models as compiled samplers, one with guidance and one without."""
    folder = tmp_path_factory.mktemp("samplers")
    for name, (variant, scale) in CASES.items():
        stored = 1.5 if scale != 1 else 1.0  # any scale but 1 makes the same sampler
        flags = (f"--config.sample.batch_size={BATCH}", f"--config.sample.cfg_scale={stored}")
        arguments = (
            "--mode=export",
            "--format=stablehlo",
            f"--workdir={workdirs[name]}",
            f"--out={folder / name}",
        )
        run(variant, *arguments, *flags)
    return {name: folder / name for name in CASES}


@pytest.fixture(scope="module", params=CASES)
def drawn(request, workdirs, samplers, tmp_path_factory) -> tuple[dict, dict]:
    """The same samples by the compiled sampler in a bare process, and by the Generator in this
    one.
    """
    (_, scale), out = CASES[request.param], tmp_path_factory.mktemp("drawn") / "drawn.npz"
    scalars = [scale, TEMPERATURE] if request.param == "guided" else [TEMPERATURE]
    job = {"labels": LABELS, "batch": BATCH, "seed": SEED, "scalars": scalars, "out": str(out)}
    run_alone(STANDALONE, samplers[request.param], json.dumps(job))

    model = find_model(workdirs[request.param])
    changes = {
        "sample.batch_size": BATCH,
        "sample.cfg_scale": scale,
        "sample.temperature": TEMPERATURE,
    }
    config = model.config.updated(changes)
    experiment, mesh = configuration.build(config), sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    tokens = Generator(config, experiment, mesh)(
        model.restore(placed_params(experiment, mesh)), LABELS, SEED
    )
    return dict(np.load(out)), {"tokens": tokens, **experiment.modality.export(tokens)}


def test_bare_process_draws_the_same_tokens(drawn):
    alone, expected = drawn
    assert alone["tokens"].dtype == np.float32 and np.abs(expected["tokens"]).max() > 0.5
    assert_close(alone["tokens"], expected["tokens"], 1e-5)


def test_bare_process_makes_the_same_pictures(drawn):
    alone, expected = drawn
    assert alone.keys() == expected.keys() == {"tokens", "images"}
    assert alone["images"].dtype == np.uint8 and alone["images"].shape == (len(LABELS), 8, 8, 1)
    difference = np.abs(alone["images"].astype(int) - np.asarray(expected["images"], int))
    assert difference.max() <= 1 and len(np.unique(alone["images"])) > 10


@pytest.mark.parametrize("name", CASES)
def test_signature(samplers, name):
    exported = jax_export.deserialize(
        bytearray((samplers[name] / "sampler.stablehlo").read_bytes())
    )
    assert exported.platforms == ("cpu", "cuda", "tpu") and exported.nr_devices == 1
    with np.load(samplers[name] / "params.npz", allow_pickle=False) as arrays:
        shapes = {path: arrays[path].shape for path in arrays}
    (params, *others), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    assert {path: aval.shape for path, aval in params.items()} == shapes
    scalars = (
        ["int32[]", "float32[]", "float32[]"] if name == "guided" else ["int32[]", "float32[]"]
    )
    assert [aval.str_short() for aval in others] == [f"int32[{BATCH}]", f"int32[{BATCH}]", *scalars]
    record = json.loads((samplers[name] / "config.json").read_text())["sampler"]
    names = [
        "params",
        "labels",
        "sample_ids",
        "seed",
        *(["cfg_scale"] if name == "guided" else []),
        "temperature",
    ]
    assert record == {"arguments": names, "batch_size": BATCH} and tuple(
        names
    ) == stablehlo.arguments(name == "guided")
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    assert {key: aval.str_short() for key, aval in results.items()} == {
        "tokens": f"float32[{BATCH},16,4]",
        "images": f"uint8[{BATCH},8,8,1]",
    }


@pytest.mark.parametrize("name", CASES)
def test_use_of_the_card_works_as_it_stands(samplers, name):
    (block,) = re.findall(
        r"```python\n(.*?)```", (samplers[name] / "README.md").read_text("utf-8"), flags=re.DOTALL
    )
    printed = run_alone(block, samplers[name])
    assert "'images': (4, 8, 8, 1)" in printed and "'tokens': (4, 16, 4)" in printed


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_workdir(workdirs, samplers, name):
    params = traverse_util.flatten_dict(djepa_jax.load(workdirs[name]).params, sep="/")
    with np.load(samplers[name] / "params.npz", allow_pickle=False) as arrays:
        assert set(arrays) == set(params)
        assert all(np.array_equal(arrays[path], value) for path, value in params.items())


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_one_scale_stands_for_the_whole_schedule(monkeypatch, schedule, scale):
    seen = []

    def make_sampler(spec):
        def generate(params, labels, sample_ids, seed, scales, temperature):
            seen.append(scales)
            return np.zeros((1, 16, 4), np.float32)

        return generate

    monkeypatch.setattr(stablehlo, "make_sampler", make_sampler)
    config = Settings(
        tiny_config(
            f"--config.sample.cfg_schedule={schedule}", "--config.sample.cfg_scale=2.5"
        ).to_dict()
    )
    stablehlo.make_standalone(config, configuration.build(config))({}, [0], [0], 0, scale, 1.0)
    assert_close(
        seen[0], configuration.step_scales(config.updated({"sample.cfg_scale": scale}), 16), 1e-6
    )
