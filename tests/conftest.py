"""Shared set-up: eight CPU devices, and models filled with the parity fixtures."""

import fcntl
import functools
import gc
import json
import os
import pathlib
import shutil
import signal
from collections.abc import Callable

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from djepa_jax.checkpoints.convert.official import from_official
from djepa_jax.core.losses import TOKEN_LOSSES
from djepa_jax.core.models.conditioning import Classes
from djepa_jax.core.models.djepa import ModelConfig, split_model

# Most of the time goes into compiling; without optimisations, and with each program in one piece
# for LLVM, it is a third. On a busy machine devices may wait for one another longer than the 40 s
# after which XLA ends the process. Processes that tests start inherit this. With XLA_FLAGS set to
# nothing (XLA_FLAGS= bash launch/test.sh) they test what users run.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
]
if jax.__version_info__ < (0, 11):  # later ones do not know it
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))  # read when the first device is asked for
jax.config.update("jax_num_cpu_devices", 8)
# Places in programs, which nobody reads here, take a tenth of the time to trace and lower
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # for processes that tests start
jax.config.update("jax_traceback_in_locations_limit", 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores, for all processes of tests, too
gc.set_threshold(100_000)  # tracing makes very many objects and hardly a cycle: a quarter faster

# The longest files come first, so that no worker is left alone with one at the end.
LONG = [
    "distributed_processes",
    "train",
    "sample",
    "doors",
    "autoguidance",
    "reporting",
    "configs",
    "sound",
    "benchmark",
    "main",
    "export",
    "guide",
    "losses",
    "benchmark_suite",
    "importing_training",
    "bucket_life",
    "mesh_programs",
    "conditioning",
    "profiling",
    "api",
    "pipeline_proof",
    "parity_sampling",
    "prompts",
    "ahead_of_time",
    "pairs",
    "autoencoder",
    "warm_start",
    "probe",
    "ragged",
    "distributed_signals",
    "kill",
    "masking",
    "search",
    "prepare_interruptions",
    "models",
    "checkpoint_versions",
    "moving_digits",
    "compile_step",
]
PARITY = pathlib.Path(__file__).parent / "fixtures" / "parity"
VARIANTS = ("gauss", "flow", "gauss_p2")


def pytest_collection_modifyitems(items):
    """Long files first; the order within a file stays."""
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


class Parity:
    """One variant of the authors' tiny models: our model with their weights, and their numbers."""

    def __init__(self, variant: str):
        self.variant = variant
        with safe_open(PARITY / f"model_{variant}.safetensors", "np") as file:
            self.official = json.loads(file.metadata()["config"])
            names = file.keys()
            self.tensors = {name: file.get_tensor(name) for name in names}
        self.config = self._model_config()
        self.graph, self.abstract = split_model(self.config)
        self.params = jax.tree.map(jax.numpy.asarray, from_official(self.tensors, self.abstract))
        self.model = nnx.merge(self.graph, self.params)
        self.forward = dict(np.load(PARITY / f"forward_{variant}.npz"))

    def _model_config(self) -> ModelConfig:
        c = self.official
        loss = TOKEN_LOSSES["flow_matching" if c["diffloss"] == "flow" else "diffusion"]
        token_dim = c["vae_embed_dim"] * c["patch_size"] ** 2
        return ModelConfig(
            grid=(self.tensors["encoder_pos_embed_learned"].shape[1],),
            token_dim=token_dim,
            conditioner=Classes(c["class_num"]),
            width=c["encoder_embed_dim"],
            encoder_depth=c["encoder_depth"],
            predictor_depth=c["decoder_depth"],
            num_heads=c["encoder_num_heads"],
            denoiser_depth=c["diffloss_d"],
            denoiser_width=c["diffloss_w"],
            denoiser_out=token_dim * loss.out_per_channel,
            num_prefix_tokens=c["buffer_size"],
            qk_norm=c["qk_norm"],
        )


def shared_folder(tmp_path_factory) -> pathlib.Path:
    """What the worker processes of one call have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(tmp_path_factory, name: str, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """A copy, for this worker process, of a workdir that the first one to ask makes for all."""
    shared = shared_folder(tmp_path_factory) / name
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "complete").exists():
            shutil.rmtree(shared / "run", ignore_errors=True)  # of another that failed
            make(shared / "run")
            (shared / "complete").touch()
    return shutil.copytree(shared / "run", tmp_path_factory.mktemp(name) / "run")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """One cache for all worker processes, so that a second call of the command line compiles
    nothing anew.
    """
    cache = shared_folder(tmp_path_factory) / "cache"
    kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")  # spares whoever runs tests again and again
    jax.config.update("jax_compilation_cache_dir", kept or str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@functools.cache
def load_parity(variant: str) -> Parity:
    return Parity(variant)


@pytest.fixture(params=VARIANTS)
def parity(request) -> Parity:
    return load_parity(request.param)


@pytest.fixture
def gauss() -> Parity:
    return load_parity("gauss")


@pytest.fixture
def flow() -> Parity:
    return load_parity("flow")


class Spy:
    """A denoiser that keeps the noised tokens it was given and what it answered."""

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.time, self.condition = denoiser.time, denoiser.condition

    def __call__(self, xt, time, condition):
        self.xt, self.output = xt, self.denoiser(xt, time, condition)
        return self.output


def assert_close(actual, expected, tolerance: float):
    """Largest difference within `tolerance` times the largest absolute value of the expected
    array.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert error <= tolerance, f"relative error {error:.2e} exceeds {tolerance:.0e}"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> str:
    """The workdir of one finished tiny run, made by the command line."""
    from tiny import CONFIG, TINY

    from djepa_jax.main import main

    def make(workdir: pathlib.Path) -> None:
        assert main(["djepa_jax", f"--config={CONFIG}", f"--workdir={workdir}", *TINY]) == 0

    return str(made_once(tmp_path_factory, "trained", make))


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory, compilation_cache) -> pathlib.Path:
    """The workdir of one tiny run with two saved steps, made in a process of its own; to be copied,
    not changed.
    """
    from workdirs import run

    def make(workdir: pathlib.Path) -> None:
        status, output = run(workdir)
        assert status == 0, output

    return made_once(tmp_path_factory, "saved", make)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A `launching.Machine` with a copy of the repository, and nothing set that the launch scripts
    look at.
    """
    from launching import Machine, copy_repository

    for name in [
        name
        for name in os.environ
        if name.startswith(("JAX_", "XLA_", "CUDA_", "DJEPA_", "SLURM_"))
    ]:
        monkeypatch.delenv(name)
    return Machine(tmp_path, copy_repository(tmp_path, "launch", "configs"))


@pytest.fixture(scope="module")
def store():
    """A bucket whose objects may be read and written, and that tells nothing about itself; for this
    process, too.
    """
    from buckets import reached
    from object_store import ObjectStore

    with ObjectStore() as store, reached(store):
        store.bucket_readable = False
        yield store


@pytest.fixture
def empty(store):
    """That bucket with nothing in it."""
    store.objects.clear()
    store.requests.clear()
    return store


@pytest.fixture
def bucket(store, tmp_path):
    """The bucket with a latent cache in it."""
    from staged import with_cache

    return with_cache(store, tmp_path / "original")


@pytest.fixture
def again(bucket, tmp_path):
    """Copy the cache as the next process would: again(url) gives the copy."""
    from staged import copy_anew

    return functools.partial(copy_anew, bucket, tmp_path / "staged")
