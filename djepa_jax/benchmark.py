"""Speed of the real training step and of the real sampler, beside what the arithmetic allows.

    python -m djepa_jax.benchmark --config=configs/digits.py [--parts=train,sample] [--out=FILE.json]
        [--steps=10] [--repeats=10] [--warmup=2] [--config.KEY=VALUE ...]

A repeat is `steps` training steps, or one batch of samples, timed until the device is done. Data is random and on
the device before the clock starts, so neither a dataset nor the input pipeline plays a part.

FLOPs are those of one training step, or of one batch of samples, over all devices, by five counts:

1. ideal: `flops.py`, nothing computed that is not used; utilisation (useful MFU) is this one over time and peak;
2. padded: `flops.py` with the static shapes that run;
3. traced: matrix products of the traced program, loops expanded; recomputation by `model.remat` shows up here;
4. unrolled: XLA's cost analysis of the training step lowered with its scans unrolled (small depths only);
5. compiled: XLA's cost analysis of the program that ran, times the devices. On most backends it counts the body
   of a loop once, whatever the number of turns, so compare it with 4 only where the config unrolls everything.

XLA's counts include elementwise work, the others are matrix products only.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import flax
import jax
import jaxlib
import numpy as np
from absl import flags

from djepa_jax import config as configuration
from djepa_jax import flops, sharding
from djepa_jax.config import ConfigError, Experiment
from djepa_jax.generate import Generator
from djepa_jax.main import UsageError, read_flags
from djepa_jax.models.djepa import init_params
from djepa_jax.sample import SampleSpec, make_sampler, plan_segments
from djepa_jax.train_step import TrainSpec, init_state, make_train_step

PARTS = ("train", "sample")
USAGE = "usage: python -m djepa_jax.benchmark --config=configs/digits.py [--parts=train,sample] [--out=FILE.json] [--config.KEY=VALUE ...]"
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
MAX_UNROLLED_DEPTH = 12  # lowering that many unrolled layers takes seconds


@dataclasses.dataclass(frozen=True)
class Timing:
    """How often to run: `repeats` timed runs of `steps` training steps, after `warmup` untimed calls."""

    steps: int
    repeats: int
    warmup: int


def benchmark(config, parts: Sequence[str], timing: Timing) -> dict:
    """Measure the named parts under a config: everything as plain numbers and texts, ready for JSON.

    Raises:
        ConfigError, ValueError: a setting that cannot work.
    """
    experiment, mesh = configuration.build(config), sharding.make_mesh(config.mesh)
    if config.batch_size % sharding.batch_divisor(mesh):
        raise ConfigError(f"config.batch_size is {config.batch_size}; {sharding.batch_divisor(mesh)} devices share a batch.")
    measure = {"train": measure_train, "sample": measure_sample}
    results = {part: measure[part](config, experiment, mesh, timing) for part in PARTS if part in parts}
    return describe(config, experiment, mesh) | {"timing": dataclasses.asdict(timing)} | results


def describe(config, experiment: Experiment, mesh) -> dict:
    """What the figures depend on: machine, versions, settings."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "peak_flops_per_device": flops.peak_flops(device.device_kind),
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__}
        | {"python": platform.python_version()},
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "segments": [dataclasses.asdict(segment) for segment in plan_segments(experiment.sample)],
        "config": configuration.resolved(config),
    }


def measure_train(config, experiment: Experiment, mesh, timing: Timing) -> dict:
    """The jitted, donated training step on one random batch."""
    spec = experiment.train
    shardings = sharding.state_shardings(jax.eval_shape(lambda: init_state(spec)), mesh)
    state = jax.jit(lambda: init_state(spec), out_shardings=shardings)()
    batch = random_batch(config, experiment.modality, mesh)
    step = jax.jit(make_train_step(spec), donate_argnums=0, out_shardings=(shardings, None))
    unrolled = unrolled_flops(spec, state, batch)

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    with count_compilations() as compilations:
        compiled, record = compile_program(mesh, step, state, batch)
        times = time_calls(run, timing, timing.steps)
    record |= {"unit": "step", "batch_size": config.batch_size, "programs_compiled": len(compilations)}
    record["flops"] |= train_flops(spec) | {"unrolled": unrolled}
    return record | memory(compiled) | rates(times, record, mesh)


def measure_sample(config, experiment: Experiment, mesh, timing: Timing) -> dict:
    """The whole jitted sampler on one batch of `config.sample.batch_size`, rounded up to the devices."""
    spec, size = experiment.sample, Generator(config, experiment, mesh).batch_size
    abstract = jax.eval_shape(lambda: init_params(spec.model, jax.random.key(0)))
    shardings = sharding.state_shardings(abstract, mesh)
    params = jax.jit(lambda: init_params(spec.model, jax.random.key(0)), out_shardings=shardings)()
    ids = np.arange(size, dtype=np.int32)  # [B]
    labels, ids = jax.device_put((ids % config.data.num_classes, ids), sharding.batch_sharding(mesh))
    scales = configuration.step_scales(config, experiment.modality.num_tokens)  # [T]
    arguments = (params, labels, ids, config.sample.seed, scales, config.sample.temperature)
    sampler = jax.jit(make_sampler(spec), out_shardings=sharding.replicated(mesh))

    def run(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(sampler(*arguments))

    with count_compilations() as compilations:
        compiled, record = compile_program(mesh, sampler, *arguments)
        times = time_calls(run, timing, 1)
    record |= {"unit": "batch", "batch_size": size, "programs_compiled": len(compilations)}
    record["flops"] |= sample_flops(spec, size) | {"unrolled": None}
    return record | memory(compiled) | rates(times, record, mesh)


def random_batch(config, modality, mesh) -> dict[str, jax.Array]:
    """A batch of noise in the form that the modality's source has, placed on the mesh."""
    rng, shape = np.random.default_rng(config.seed), (config.batch_size, *modality.example_shape)
    try:
        modality.check_example(np.zeros(modality.example_shape, np.uint8))
        images = rng.integers(0, 256, shape, np.uint8)  # [B, ...]
    except ValueError:
        images = rng.standard_normal(shape, np.float32)
    labels = rng.integers(0, config.data.num_classes, config.batch_size, np.int32)  # [B]
    return jax.device_put({"image": images, "label": labels}, sharding.batch_sharding(mesh))


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that grows by a name for every program that XLA compiles inside the `with`."""
    names: list[str] = []

    def listen(event: str, seconds: float, **details) -> None:
        if event == COMPILE_EVENT:
            names.append(str(details.get("fun_name", "")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def compile_program(mesh, function, *arguments):
    """Compile a jitted function for its arguments; calling the function then uses the same program.

    Returns:
        the compiled program, and a record: seconds of tracing and lowering, seconds of XLA, the traced and the
        compiled count of FLOPs.
    """
    start = time.perf_counter()
    traced = function.trace(*arguments)
    lowered = traced.lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    seconds = {"lower_seconds": middle - start, "compile_seconds": time.perf_counter() - middle}
    per_device = xla_flops(compiled)
    counts = {"traced": flops.count_products(traced.jaxpr), "compiled": per_device and per_device * mesh.size}
    return compiled, seconds | {"flops": counts}


def xla_flops(program) -> float | None:
    """XLA's cost analysis of a lowered program (all devices) or a compiled one (each device); None if there is none."""
    analysis = program.cost_analysis()
    return analysis.get("flops") if analysis else None


def unrolled_flops(spec: TrainSpec, state, batch) -> float | None:
    """XLA's count for one training step whose scans are unrolled, which is lowered but not compiled."""
    depth = max(spec.model.encoder_depth, spec.model.predictor_depth, spec.model.denoiser_depth)
    if depth > MAX_UNROLLED_DEPTH:
        return None
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, scan_unroll=depth))
    return xla_flops(jax.jit(make_train_step(spec)).lower(state, batch))


def train_flops(spec: TrainSpec) -> dict[str, float]:
    """Ideal and padded FLOPs of one training step."""

    def count(padded: bool) -> float:
        rows = flops.time_rows(spec.token_loss, spec.plan, padded)
        return flops.train_image(spec.model, spec.plan, spec.token_loss.noise_multiplicity, padded, rows)

    return {"ideal": count(False) * spec.plan.batch_size, "padded": count(True) * spec.plan.batch_size}


def sample_flops(spec: SampleSpec, batch_size: int) -> dict[str, float]:
    """Ideal (exact shapes) and padded (segments) FLOPs of one batch of samples."""
    calls = flops.sampling_calls(spec.token_loss)
    exact = flops.sample_image(spec.model, spec.num_ar_steps, calls, spec.guided)
    padded = flops.padded_sample_image(spec.model, plan_segments(spec), calls, spec.guided)
    return {"ideal": exact * batch_size, "padded": padded * batch_size}


def memory(compiled) -> dict:
    """Bytes on each device: what the device has seen at most in this process, and what XLA plans for the program."""
    stats, plan = jax.local_devices()[0].memory_stats(), compiled.memory_analysis()
    planned = None
    if plan is not None:
        planned = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes
    return {"memory_bytes": {"device_peak": (stats or {}).get("peak_bytes_in_use"), "xla_plan": planned}}


def time_calls(run: Callable[[int], None], timing: Timing, calls: int) -> list[float]:
    """Seconds per call in each repeat; `run(n)` makes n calls and waits for the device."""
    if timing.warmup:
        run(timing.warmup)
    seconds = []
    for _ in range(timing.repeats):
        start = time.perf_counter()
        run(calls)
        seconds.append((time.perf_counter() - start) / calls)
    return seconds


def rates(seconds: list[float], record: dict, mesh) -> dict:
    """Milliseconds per call, images per second and useful MFU from the median of the repeats."""
    low, median, high = np.quantile(seconds, (0.1, 0.5, 0.9)).tolist()
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    return {
        "milliseconds": {"median": 1e3 * median, "p10": 1e3 * low, "p90": 1e3 * high, "min": 1e3 * min(seconds)},
        "milliseconds_per_image": 1e3 * median / record["batch_size"],
        "images_per_second": record["batch_size"] / median,
        "useful_flops_per_second": record["flops"]["ideal"] / median,
        "useful_mfu": record["flops"]["ideal"] / median / (peak * mesh.size) if peak else None,
        "seconds": seconds,
    }


def report(results: dict) -> str:
    """The results as a table for people."""
    config, model = results["config"], results["config"]["model"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    mesh = ", ".join(f"{axis} {size}" for axis, size in results["mesh"].items())
    sample = f"{config['sample']['num_ar_steps']} steps of {config['sample']['num_denoise_steps']}, cfg {config['sample']['cfg_scale']}"
    cuts = ", ".join(f"{s['start']}-{s['stop']} ({s['visible']} + {s['new']})" for s in results["segments"])
    rows = [
        ("device", f"{results['devices']} x {results['device']} ({results['platform']}), mesh {mesh}"),
        ("versions", versions),
        ("XLA_FLAGS", results["XLA_FLAGS"] or "none"),
        ("precision", f"{config['compute_dtype']}, matrix products {results['matmul_precision']}"),
        ("model", f"width {model['width']}, depths {model['encoder_depth']} + {model['predictor_depth']}, "
         f"denoiser {model['denoiser_depth']} x {model['denoiser_width']}, remat {model['remat']}, unroll {model['scan_unroll']}"),
        ("dropout", f"{model['dropout']}, attention {model['attention_dropout']}"),
        ("sampler", f"{config['sample']['sampler']}, {sample}"),
        ("segments", f"{cuts}: steps (visible + new)"),
    ]  # fmt: skip
    for part in PARTS:
        if part in results:
            rows += [("", ""), *part_rows(part, results[part], results)]
    return "\n".join(f"{name:<18}{text}".rstrip() for name, text in rows)


def part_rows(part: str, record: dict, results: dict) -> list[tuple[str, str]]:
    """Rows of the table for one part."""
    ms, memory, unit, timing = record["milliseconds"], record["memory_bytes"], record["unit"], results["timing"]
    calls = timing["steps"] if part == "train" else 1
    spread = f"10 % {ms['p10']:.1f}, 90 % {ms['p90']:.1f}, least {ms['min']:.1f}; {timing['repeats']} repeats of {calls}"
    planned, peak = (f"{memory[key] / 2**20:,.0f} MiB" if memory[key] else "not told" for key in ("xla_plan", "device_peak"))
    mfu = record["useful_mfu"]
    return [
        (part.upper(), f"batch {record['batch_size']}"),
        ("compile", f"{record['compile_seconds']:.1f} s, after {record['lower_seconds']:.1f} s of tracing and lowering"),
        ("programs compiled", str(record["programs_compiled"])),
        ("time", f"{ms['median']:.1f} ms a {unit} ({spread}), {record['milliseconds_per_image']:.2f} ms an image"),
        ("images/s", f"{record['images_per_second']:.1f}"),
        ("memory a device", f"{planned} planned by XLA; peak of the process so far {peak}"),
        *flop_rows(record["flops"], unit),
        ("useful FLOP/s", f"{record['useful_flops_per_second'] / 1e9:,.1f} G"),
        ("useful MFU", f"{mfu:.1%} of the bfloat16 peak" if mfu is not None else "peak not known for this device"),
    ]


def flop_rows(counts: dict, unit: str) -> list[tuple[str, str]]:
    """The five counts, and each of the later ones relative to the padded model."""

    def against_padded(name: str, missing: str, remark: str = "") -> str:
        value = counts[name]
        return missing if value is None else f"{value / 1e9:,.2f} G, {value / counts['padded']:.3f} x padded{remark}"

    return [
        (f"FLOPs a {unit}", f"ideal {counts['ideal'] / 1e9:,.2f} G"),
        ("  padded", f"{counts['padded'] / 1e9:,.2f} G, {counts['padded'] / counts['ideal']:.3f} x ideal"),
        ("  traced", against_padded("traced", "")),
        ("  XLA, unrolled", against_padded("unrolled", f"not made: training only, depth at most {MAX_UNROLLED_DEPTH}")),
        ("  XLA, compiled", against_padded("compiled", "not told", "; a loop's body may be counted once")),
    ]


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """Read the command line.

    Raises:
        UsageError: an unknown flag, key or part, or a count that is too small.
    """
    values = flags.FlagValues()
    flags.DEFINE_list("parts", list(PARTS), "What to measure.", flag_values=values)
    flags.DEFINE_string("out", "", "JSON file for the results.", flag_values=values)
    flags.DEFINE_integer("steps", 10, "Training steps in one repeat.", 1, flag_values=values)
    flags.DEFINE_integer("repeats", 10, "Timed repeats.", 1, flag_values=values)
    flags.DEFINE_integer("warmup", 2, "Calls before the clock starts.", 0, flag_values=values)
    read_flags(values, argv, USAGE, required=("config",))
    unknown = [part for part in values.parts if part not in PARTS]
    if unknown or not values.parts:
        raise UsageError(f"--parts={','.join(values.parts)} names no part to measure; parts are {' and '.join(PARTS)}.\n{USAGE}")
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: measure, print the table, write the JSON; bad input is one error and exit status 2."""
    try:
        values = parse(sys.argv if argv is None else argv)
        results = benchmark(values.config, values.parts, Timing(values.steps, values.repeats, values.warmup))
        print(report(results))
        if values.out:
            out = pathlib.Path(values.out)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=2) + "\n")
            print(f"wrote {out}")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
