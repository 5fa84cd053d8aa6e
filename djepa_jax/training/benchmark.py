"""The `--mode=benchmark` command: speed of the training step and of the sampler, beside the limits.

A repeat is `steps` training steps, or one batch of samples, timed until the device is done. Data is
random and on the device before the clock starts, so neither a dataset nor the input pipeline plays
a part.

FLOPs are those of one training step, or of one batch of samples, over all devices:

1. ideal: `flops.py`, nothing computed that is not used; useful MFU is this one over time and peak;
2. padded: `flops.py` with the static shapes that run;
3. traced: matrix products of the traced program, loops expanded; what remat computes again is here;
4. compiled: XLA's cost analysis times the devices, elementwise work included; XLA counts the body
   of a loop once, however often it runs.
"""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Sequence

import flax
import jax
import jaxlib
import numpy as np

from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import flops, sharding
from djepa_jax.core.bounds import Natural, Positive, check_bounds
from djepa_jax.core.models.djepa import init_params
from djepa_jax.core.sampler import SampleInputs, SamplerConfig, make_sampler, plan_segments
from djepa_jax.core.train_step import TrainStepConfig, init_state
from djepa_jax.runtime.storage import as_path, check_ours, check_writable, write_json
from djepa_jax.training.benchmark_table import report
from djepa_jax.training.compile_step import StepProgram, planned_bytes
from djepa_jax.training.initial_state import abstract_state, check_mesh


@dataclasses.dataclass(frozen=True)
class Timing:
    """How often to run: `repeats` timed runs of `steps` training steps, after `warmup` calls."""

    steps: Positive
    repeats: Positive
    warmup: Natural

    def __post_init__(self):
        check_bounds(self)


@dataclasses.dataclass(frozen=True)
class BenchmarkCase:
    """Something to measure: a jitted function and its arguments on the device."""

    unit: str
    function: Callable
    arguments: tuple
    following: Callable  # (arguments, result) -> the next call's arguments
    calls: int  # calls of the function in one repeat
    batch_size: int
    flops: dict[str, float]  # of one call: ideal, padded


def run_benchmark(
    experiment: Experiment, parts: Sequence[str], timing: Timing, out="", overwrite=False
) -> dict:
    """Measure some of `PARTS`, print the table, and write the results into `out` as JSON.

    Raises:
        PathError: `out` cannot be written, or is a file of others and `overwrite` is not set.
        ConfigError: an unknown part, or a mesh that cannot split the batch.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ConfigError(f"--parts={','.join(parts)}: the parts are {', '.join(PARTS)}.")
    if out:
        check_writable(as_path(out).parent, "--out")
        if out.endswith("/") or as_path(out).is_dir():
            raise ConfigError(f'--out "{out}" is a folder; name a file in it.')
        if not overwrite:
            check_ours(out, "device", "let --out name another, or add --overwrite")
    mesh = sharding.make_mesh(experiment.mesh)
    check_mesh(experiment, mesh)
    results = describe(experiment, mesh) | {"timing": dataclasses.asdict(timing)}
    for part in parts:
        results[part] = measure(PARTS[part](experiment, mesh, timing), mesh, timing)
    print(report(results, parts))
    if out:
        write_json(as_path(out), results)
        print(f"wrote {out}")
    return results


def describe(experiment: Experiment, mesh) -> dict:
    """What the figures depend on: machine, versions, settings."""
    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__}
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "peak_flops_per_device": flops.peak_flops(device.device_kind),
        "versions": versions | {"python": platform.python_version()},
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "compilation_cache": jax.config.jax_compilation_cache_dir or "none",
        "segments": [dataclasses.asdict(segment) for segment in plan_segments(experiment.sampler)],
        "config": experiment.to_dict(),
    }


def prepare_training(experiment: Experiment, mesh, timing: Timing) -> BenchmarkCase:
    """The donated training step, a fresh state and one random batch."""
    config = experiment.train
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(experiment, mesh))
    state = jax.jit(lambda: init_state(config), out_shardings=shardings)()
    batch = random_batch(experiment, mesh)
    program = StepProgram(config, shardings)
    values = program.values(state)
    return BenchmarkCase(
        unit="step",
        function=program.jitted(donate=True),
        arguments=(state, batch, values),
        following=lambda _, result: (result[0], batch, values),
        calls=timing.steps,
        batch_size=experiment.batch_size,
        flops=train_flops(config),
    )


def prepare_sampling(experiment: Experiment, mesh, _: Timing) -> BenchmarkCase:
    """The whole sampler, fresh parameters and one batch, rounded up to the devices."""
    config, sample = experiment.sampler, experiment.sample
    divisor = sharding.batch_divisor(mesh)
    size = -(-sample.batch_size // divisor) * divisor

    def init():
        return init_params(config.model, jax.random.key(experiment.seed))

    params = jax.jit(init, out_shardings=sharding.state_shardings(jax.eval_shape(init), mesh))()
    conditions = config.model.conditioner.in_turn(size)
    ids = np.arange(size, dtype=np.int32)  # [B]
    conditions, ids = jax.device_put((conditions, ids), sharding.batch_sharding(mesh))
    scales = experiment.cfg_scales  # [T]
    inputs = SampleInputs(conditions, ids, sample.seed, scales, sample.temperature)
    return BenchmarkCase(
        unit="batch",
        function=jax.jit(make_sampler(config), out_shardings=sharding.replicated(mesh)),
        arguments=(params, inputs),
        following=lambda arguments, _: arguments,
        calls=1,
        batch_size=size,
        flops=sample_flops(config, size),
    )


PARTS = {"train": prepare_training, "sample": prepare_sampling}


def random_batch(experiment: Experiment, mesh) -> dict[str, jax.Array]:
    """A batch of noise in the form that the modality's source has, placed on the mesh."""
    rng, size = np.random.default_rng(experiment.seed), experiment.batch_size
    modality = experiment.modality
    shape = (size, *modality.example_shape)
    if modality.example_dtype.kind == "f":
        examples = rng.standard_normal(shape, np.float32)  # [B, ...]
    else:
        examples = rng.integers(0, 256, shape, np.uint8)  # [B, ...]
    conditions = experiment.network.conditioner.in_turn(size)
    batch = {"example": examples, "condition": conditions}
    return jax.device_put(batch, sharding.batch_sharding(mesh))


def train_flops(config: TrainStepConfig) -> dict[str, float]:
    """Ideal and padded FLOPs of one training step."""
    counts, loss, masking = {}, config.token_loss, config.masking
    for name, padded in (("ideal", False), ("padded", True)):
        rows = flops.time_rows(loss, masking, padded)
        image = flops.train_image(config.model, masking, loss.noise_multiplicity, padded, rows)
        counts[name] = image * masking.batch_size
    return counts


def sample_flops(config: SamplerConfig, batch_size: int) -> dict[str, float]:
    """Ideal (exact shapes) and padded (segments) FLOPs of one batch of samples."""
    calls = config.token_loss.denoiser_calls
    exact = flops.sample_image(config.model, config.num_ar_steps, calls, config.guided)
    segments = plan_segments(config)
    padded = flops.padded_sample_image(config.model, segments, calls, config.guided)
    return {"ideal": exact * batch_size, "padded": padded * batch_size}


def measure(case: BenchmarkCase, mesh, timing: Timing) -> dict:
    """Compile and run: seconds, FLOPs, bytes, and what follows from them."""
    start = time.perf_counter()
    traced = case.function.trace(*case.arguments)
    lowered = traced.lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    seconds = time_calls(case, compiled, timing)
    analysis = compiled.cost_analysis() or {}
    counts = case.flops | {"traced": flops.count_products(traced.jaxpr)}
    counts["compiled"] = analysis["flops"] * mesh.size if "flops" in analysis else None
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "unit": case.unit,
        "batch_size": case.batch_size,
        "calls_per_repeat": case.calls,
        "lower_seconds": middle - start,
        "compile_seconds": end - middle,
        "flops": counts,
        "memory_bytes": {
            "device_peak": stats.get("peak_bytes_in_use"),
            "xla_plan": planned_bytes(compiled),
        },
        **rates(seconds, case, mesh),
    }


def time_calls(case: BenchmarkCase, compiled: Callable, timing: Timing) -> list[float]:
    """Seconds per call, one figure a repeat."""
    arguments, seconds = case.arguments, []
    for repeat in range(-1, timing.repeats):  # the first one is the warm-up
        start, result = time.perf_counter(), None
        calls = case.calls if repeat >= 0 else timing.warmup
        for _ in range(calls):
            result = compiled(*arguments)
            arguments = case.following(arguments, result)
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / max(calls, 1))
    return seconds[1:]


def rates(seconds: list[float], case: BenchmarkCase, mesh) -> dict:
    """Milliseconds per call, images per second and useful MFU, from the median of the repeats."""
    low, median, high = np.quantile(seconds, (0.1, 0.5, 0.9)).tolist()
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    useful = case.flops["ideal"] / median
    times = {"median": median, "p10": low, "p90": high, "min": min(seconds)}
    return {
        "milliseconds": {name: 1e3 * value for name, value in times.items()},
        "milliseconds_per_image": 1e3 * median / case.batch_size,
        "images_per_second": case.batch_size / median,
        "useful_flops_per_second": useful,
        "useful_mfu": useful / (peak * mesh.size) if peak else None,
        "seconds": seconds,
    }
