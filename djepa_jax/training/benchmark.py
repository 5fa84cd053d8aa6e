"""The `--mode=benchmark` command: speed of training, sampling and decoding, beside the limits.

A repeat is `steps` training steps or calls of the denoiser, or one batch of samples or of decoded
pictures, timed until the device is done. Data is random and on the device before the clock starts,
so neither a dataset nor the input pipeline plays a part.

FLOPs are those of one step, call or batch, over all devices:

1. ideal: `flops.py`, nothing computed that is not used; useful MFU is this one over time and peak;
2. padded: `flops.py` with the static shapes that run;
3. traced: matrix products of the traced program, loops expanded; what remat computes again is here;
4. compiled: XLA's cost analysis times the devices, elementwise work included; XLA counts the body
   of a loop once, however often it runs.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import flops, sharding
from djepa_jax.core.bounds import Natural, Positive, check_bounds
from djepa_jax.core.segments import plan_segments
from djepa_jax.runtime.profiling import largest_kernels
from djepa_jax.runtime.storage import as_path, check_ours, check_writable, write_json
from djepa_jax.runtime.versions import versions
from djepa_jax.training import benchmark_cases as cases
from djepa_jax.training.benchmark_attention import check_attention
from djepa_jax.training.benchmark_compare import ENVIRONMENT, comparison, read_other
from djepa_jax.training.benchmark_parity import check_parity
from djepa_jax.training.benchmark_table import report
from djepa_jax.training.compile_step import planned_bytes
from djepa_jax.training.initial_state import check_mesh

TIMED = {
    "train": cases.prepare_training,
    "sample": cases.prepare_sampling,
    "denoise": cases.prepare_denoiser,
    "decode": cases.prepare_decoding,
}
CHECKS = {"parity": check_parity, "attention": check_attention}


@dataclasses.dataclass(frozen=True)
class Timing:
    """How often to run: `repeats` timed runs of `steps` training steps, after `warmup` calls.

    With `profile` one more call is traced.
    """

    steps: Positive
    repeats: Positive
    warmup: Natural
    profile: bool = False

    def __post_init__(self):
        check_bounds(self)


def run_benchmark(
    experiment: Experiment,
    parts: Sequence[str],
    timing: Timing,
    out: str = "",
    batch_sizes: Sequence[str] = (),
    compare: str = "",
    overwrite: bool = False,
) -> dict:
    """Measure some of `TIMED`, or make some of `CHECKS`; print the table, write `out` as JSON.

    Raises:
        PathError: `out` cannot be written, or is a file of others and `overwrite` is not set.
        ConfigError: an unknown part, a mesh that cannot split the batch, or a bad file to compare.
        CheckError: what a check compares differs.
    """
    mesh = sharding.make_mesh(experiment.mesh)
    plan = plan_parts(experiment, parts, batch_sizes)
    check_out(out, overwrite)
    other = read_other(compare, plan) if compare else {}
    check_mesh(experiment, mesh)
    results = describe(experiment, mesh) | {"timing": dataclasses.asdict(timing)}
    for name, (part, size) in plan.items():
        if part in CHECKS:
            results[name] = CHECKS[part](experiment)
        else:
            size = -(-size // sharding.batch_divisor(mesh)) * sharding.batch_divisor(mesh)
            case = TIMED[part](experiment, mesh, timing.steps, size)
            results[name] = measure(case, mesh, timing)
    print(report(results, list(plan)))
    if other:
        print(comparison(results, other, compare))
    if out:
        write_json(as_path(out), results)
        print(f"wrote {out}")
    return results


def plan_parts(
    experiment: Experiment, parts: Sequence[str], batch_sizes: Sequence[str]
) -> dict[str, tuple[str, int]]:
    """What is measured, by the name it has in the results: the part, and its batch size.

    A part with several sizes is there once for each, as `sample_1`.
    """
    known = TIMED | CHECKS
    if not parts or not known.keys() >= set(parts):
        raise ConfigError(f"--parts={','.join(parts)}: the parts are {', '.join(known)}.")
    if not all(size.isdecimal() and int(size) for size in batch_sizes):
        raise ConfigError(f"--batch_sizes={','.join(batch_sizes)}: write numbers, as 1,100.")
    if "decode" in parts and not experiment.modality.needs_decoder:
        raise ConfigError(
            f"--parts=decode: config.data.modality {experiment.data.modality} takes no "
            "autoencoder; use a config of latents, as djepa_b, or leave out decode."
        )
    sizes = {"sample": (experiment.sample.batch_size,), "denoise": (experiment.sample.batch_size,)}
    sizes["decode"] = tuple(sorted({1, experiment.autoencoder.batch_size}))
    if batch_sizes:
        sizes = dict.fromkeys(sizes, tuple(map(int, batch_sizes)))
        if not sizes.keys() & set(parts):
            raise ConfigError(f"--batch_sizes is for {', '.join(sizes)}; leave it out.")
    plan = {}
    for part in parts:
        chosen = sizes.get(part, (experiment.batch_size,))
        for size in chosen:
            plan[f"{part}_{size}" if len(chosen) > 1 else part] = (part, size)
    return plan


def check_out(out: str, overwrite: bool) -> None:
    """Raise PathError or ConfigError unless `out`, if it is given, can be written."""
    if out:
        check_writable(as_path(out).parent, "--out")
        if out.endswith("/") or as_path(out).is_dir():
            raise ConfigError(f'--out "{out}" is a folder; name a file in it.')
        if not overwrite:
            check_ours(out, "versions", "let --out name another, or add --overwrite")


def describe(experiment: Experiment, mesh) -> dict:
    """What the figures depend on: machine, versions, settings."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "peak_flops_per_device": flops.peak_flops(device.device_kind),
        "versions": versions(),
        **{name: os.environ.get(name, "") for name in ENVIRONMENT},
        "compilation_cache": jax.config.jax_compilation_cache_dir or "none",
        "segments": [dataclasses.asdict(segment) for segment in plan_segments(experiment.sampler)],
        "config": experiment.to_dict(),
    }


def measure(case: cases.BenchmarkCase, mesh, timing: Timing) -> dict:
    """Compile and run: seconds, FLOPs, bytes, and what follows from them."""
    start = time.perf_counter()
    traced = case.function.trace(*case.arguments)
    lowered = traced.lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    seconds, arguments = time_calls(case, compiled, timing)
    analysis = compiled.cost_analysis() or {}
    counts = case.flops | {"traced": flops.count_products(traced.jaxpr) / case.inside}
    counts["compiled"] = analysis["flops"] * mesh.size if "flops" in analysis else None
    stats = jax.local_devices()[0].memory_stats() or {}
    kernels = profile_call(compiled, arguments) if timing.profile else None
    return {
        "unit": case.unit,
        "batch_size": case.batch_size,
        "calls_per_repeat": case.calls * case.inside,
        "lower_seconds": middle - start,
        "compile_seconds": end - middle,
        "flops": counts,
        "memory_bytes": {
            "device_peak": stats.get("peak_bytes_in_use"),
            "xla_plan": planned_bytes(compiled),
        },
        "kernels": kernels,
        **rates(seconds, case, mesh),
    }


def profile_call(compiled: Callable, arguments: tuple) -> dict:
    """The largest kernels of one call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(*arguments))
        return largest_kernels(folder)


def time_calls(case: cases.BenchmarkCase, compiled: Callable, timing: Timing) -> tuple:
    """Seconds per unit, one figure a repeat, and the arguments of the next call."""
    arguments, seconds = case.arguments, []
    for repeat in range(-1, timing.repeats):  # the first one is the warm-up
        start, result = time.perf_counter(), None
        calls = case.calls if repeat >= 0 else timing.warmup
        for _ in range(calls):
            result = compiled(*arguments)
            arguments = case.following(arguments, result)
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / max(calls, 1) / case.inside)
    return seconds[1:], arguments


def rates(seconds: list[float], case: cases.BenchmarkCase, mesh) -> dict:
    """Milliseconds per call, images per second and useful MFU, from the median of the repeats."""
    low, median, high = np.quantile(seconds, (0.1, 0.5, 0.9)).tolist()
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    useful = case.flops["ideal"] / median if case.flops else None
    times = {"median": median, "p10": low, "p90": high, "min": min(seconds)}
    return {
        "milliseconds": {name: 1e3 * value for name, value in times.items()},
        "milliseconds_per_image": 1e3 * median / case.batch_size,
        "images_per_second": case.batch_size / median,
        "useful_flops_per_second": useful,
        "useful_mfu": useful / (peak * mesh.size) if peak and useful else None,
        "seconds": seconds,
    }
