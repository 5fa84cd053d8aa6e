"""`--format=stablehlo`: the compiled sampler runs where only JAX is installed, and draws what the
Generator draws.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from filled import save_model
from flax import traverse_util
from jax import export as jax_export
from pairs import pairs_config
from tiny import TINY, load_config, tiny_config
from waiting import LIMIT

import djepa_jax
from djepa_jax.checkpoints import stablehlo
from djepa_jax.checkpoints.export import run_export
from djepa_jax.checkpoints.restore import find_model, placed_params
from djepa_jax.core import sharding
from djepa_jax.core.sampler import SampleInputs
from djepa_jax.sampling.generator import Generator

BATCH, SEED, TEMPERATURE = 4, 7, 0.8
LABELS = (3, 7, 0, 9, 1, 10, 3, 2)  # two batches; 10 stands for no class
CASES = {  # variant of the configuration, guidance scale, scalars of the stored function
    "guided": (
        "diffusion",
        2.5,
        {"seed": "int32", "cfg_scale": "float32", "temperature": "float32"},
    ),
    "unguided": ("flow", 1.0, {"seed": "int32", "temperature": "float32"}),
}

# Put before a program, this leaves it JAX with what JAX needs, and flatbuffers.
ONLY_JAX = """
import importlib, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class OnlyJax(PathFinder):
    allowed = {"jax", "jaxlib", "numpy", "flatbuffers", "ml_dtypes", "opt_einsum", "scipy"}
    allowed |= sys.stdlib_module_names

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = name.partition(".")[0] in cls.allowed or name.startswith("_sysconfigdata")
        return super().find_spec(name, path, target) if found else None

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, OnlyJax]
others = ("flax", "optax", "orbax", "einops", "safetensors", "ml_collections")
for absent in ("djepa_jax", "configs", *others):
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
    labels = np.array(job["labels"], np.int32)[ids]
    results.append(sampler.call(params, labels, ids, job["seed"], *scalars))
whole = {name: np.concatenate([result[name] for result in results]) for name in results[0]}
np.savez(job["out"], **whole)
"""


def run_alone(program: str, folder: pathlib.Path, *arguments: str) -> str:
    """Run a program in `folder` with nothing but JAX to import; returns what it printed."""
    command = [sys.executable, "-I", "-c", ONLY_JAX + program, *arguments]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "XLA_FLAGS": os.environ["XLA_FLAGS"],
    }
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=LIMIT, env=settings
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module", params=CASES)
def sampler(request, tmp_path_factory) -> tuple[str, str, pathlib.Path]:
    """A case, the workdir of a model with filled weights, and its compiled sampler."""
    variant, scale, _ = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    stored = 1.5 if scale != 1 else 1.0  # any scale but 1 makes the same sampler
    flags = (f"--config.sample.batch_size={BATCH}", f"--config.sample.cfg_scale={stored}")
    config = tiny_config(*flags, variant=variant)
    workdir = save_model(folder / "run", config)
    return request.param, workdir, run_export(config, workdir, str(folder / "out"), "stablehlo")


def test_bare_process_draws_what_the_generator_draws(sampler, tmp_path):
    """And runs the program of the model card as it stands."""
    case, workdir, folder = sampler
    scale, out = CASES[case][1], tmp_path / "drawn.npz"
    scalars = [scale, TEMPERATURE] if case == "guided" else [TEMPERATURE]
    job = {"labels": LABELS, "batch": BATCH, "seed": SEED, "scalars": scalars, "out": str(out)}
    (use,) = re.findall(
        r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL
    )
    printed = run_alone(use + STANDALONE, folder, json.dumps(job))
    assert "'images': (4, 8, 8, 1)" in printed and "'tokens': (4, 16, 4)" in printed
    alone = dict(np.load(out))

    model = find_model(workdir)
    changes = {"sample.cfg_scale": scale, "sample.temperature": TEMPERATURE}
    experiment = model.config.updated(changes)
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    params = model.restore(placed_params(experiment, mesh))
    tokens = Generator(experiment, mesh).tokens(params, np.array(LABELS), SEED)
    images = np.asarray(experiment.modality.export(tokens)["images"])
    assert alone.keys() == {"tokens", "images"} and alone["tokens"].dtype == np.float32
    assert np.abs(tokens).max() > 0.5
    assert_close(alone["tokens"], tokens, 1e-5)
    assert alone["images"].dtype == np.uint8 and alone["images"].shape == (len(LABELS), 8, 8, 1)
    assert np.abs(alone["images"].astype(int) - images).max() <= 1
    assert len(np.unique(alone["images"])) > 10


def test_stored_function_and_weights(sampler):
    case, workdir, folder = sampler
    exported = jax_export.deserialize(bytearray((folder / "sampler.stablehlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu") and exported.nr_devices == 1
    params = traverse_util.flatten_dict(djepa_jax.load(workdir).params, sep="/")
    with np.load(folder / "params.npz", allow_pickle=False) as arrays:
        assert set(arrays) == set(params)
        assert all(np.array_equal(arrays[path], value) for path, value in params.items())
    (stored, *others), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    assert {path: aval.shape for path, aval in stored.items()} == {
        path: value.shape for path, value in params.items()
    }
    scalars = CASES[case][2]
    expected = [f"int32[{BATCH}]"] * 2 + [f"{dtype}[]" for dtype in scalars.values()]
    assert [aval.str_short() for aval in others] == expected
    record = json.loads((folder / "config.json").read_text())["sampler"]
    names = ["params", "labels", "sample_ids", *scalars]
    assert record == {"arguments": names, "batch_size": BATCH}
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    assert {key: aval.str_short() for key, aval in results.items()} == {
        "tokens": f"float32[{BATCH},16,4]",
        "images": f"uint8[{BATCH},8,8,1]",
    }


def test_one_scale_stands_for_the_whole_schedule(monkeypatch):
    seen = []

    def generate(params, inputs):
        seen.append(inputs.cfg_scales)
        return np.zeros((1, 16, 4), np.float32)

    monkeypatch.setattr(stablehlo, "make_sampler", lambda config: generate)
    for schedule in ("linear", "constant"):
        flags = (f"--config.sample.cfg_schedule={schedule}", "--config.sample.cfg_scale=2.5")
        experiment = tiny_config(*flags)
        draw = stablehlo.make_standalone(experiment)
        for scale in (1.0, 1.5, 3.0):
            draw({}, [0], [0], 0, scale, 1.0)
            expected = experiment.updated({"sample.cfg_scale": scale}).cfg_scales
            assert_close(seen[-1], expected, 1e-6)


@pytest.mark.parametrize("kind", ["sound", "pairs"])
def test_sounds_and_pairs_come_out_of_a_file(kind, tmp_path, monkeypatch):
    """Of a sampler that takes no time to compile; the program of the card is run as it stands."""

    def make_sampler(config):
        shape = (config.model.num_tokens, config.model.token_dim)

        def draw(params, inputs):
            first, *second = jax.tree.leaves(inputs.conditions)
            mark = inputs.sample_ids + 3 * first + sum(7 * leaf for leaf in second)  # [B]
            return jnp.cos(mark[:, None, None] + jnp.arange(np.prod(shape)).reshape(shape))

        return draw

    monkeypatch.setattr(stablehlo, "make_sampler", make_sampler)
    few = ("--config.sample.batch_size=2", "--config.data.num_classes=10")
    sound = ("--config.data.options.frames=32", "--config.model.condition_options.second_classes=2")
    if kind == "sound":
        config = load_config("spoken_digits", *TINY, *few, *sound)
    else:
        config = pairs_config({"pictures": "a", "sounds": "b"}, *few)
    workdir = save_model(tmp_path / "run", config)
    folder = run_export(config, workdir, str(tmp_path / "out"), "stablehlo")
    card, found = (folder / "README.md").read_text("utf-8"), {}
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(folder)
    exec(program, found)
    result, ids = found["result"], found["sample_ids"]
    tokens = make_sampler(config.sampler)(None, SampleInputs(found["labels"], ids, 0, 1, 1))
    expected = {"tokens": tokens, **config.modality.export(tokens)}
    assert result.keys() == expected.keys()
    for name, array in expected.items():
        assert result[name].shape == array.shape
        difference = np.abs(np.asarray(array, float) - np.asarray(result[name], float)).max()
        bound = {"images": 1}.get(name, 1e-3)
        assert difference <= bound, name
