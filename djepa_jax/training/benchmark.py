"""Speed of the real training step and of the real sampler, beside what the arithmetic allows.

    python -m djepa_jax.training.benchmark --config=configs/digits.py [--parts=train,sample]
        [--out=FILE.json] [--steps=10] [--repeats=10] [--warmup=2] [--config.KEY=VALUE ...]

A repeat is `steps` training steps, or one batch of samples, timed until the device is done. Data is
random and on the device before the clock starts, so neither a dataset nor the input pipeline plays
a part.

FLOPs are those of one training step, or of one batch of samples, over all devices, counted in five
ways:

1. ideal: `flops.py`, nothing computed that is not used; useful MFU is this one over time and peak;
2. padded: `flops.py` with the static shapes that run;
3. traced: matrix products of the traced program, loops expanded; what `model.remat` computes again
   shows here;
4. unrolled: XLA's cost analysis of the training step lowered with its scans unrolled (small depths
   only);
5. compiled: XLA's cost analysis of the program that ran, times the devices. XLA counts the body of
   a loop once, however often it runs (GPU builds may differ), so this is the whole only if the
   config unrolls every scan; work that every device repeats, such as the optimiser's on replicated
   parameters, counts on each.

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

from djepa_jax.checkpoints.integrity import CheckpointError
from djepa_jax.config import experiment as configuration
from djepa_jax.config.experiment import ConfigError, Experiment
from djepa_jax.core import flops, sharding
from djepa_jax.core.models.djepa import init_params
from djepa_jax.core.sampler import SampleSpec, make_sampler, plan_segments
from djepa_jax.core.train_step import TrainSpec, init_state, make_train_step
from djepa_jax.main import HelpRequest, UsageError, read_flags
from djepa_jax.runtime.storage import check_writable
from djepa_jax.sampling.generator import Generator
from djepa_jax.training.benchmark_table import MAX_UNROLLED_DEPTH, report
from djepa_jax.training.compile_step import StepProgram

USAGE = (
    "usage: python -m djepa_jax.training.benchmark --config=FILE|--config_json=FILE "
    "[--parts=train,sample] [--out=FILE.json] "
    "[--config.KEY=VALUE ...]"
)
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Timing:
    """How often to run: `repeats` timed runs of `steps` training steps, after `warmup` untimed
    calls.
    """

    steps: int
    repeats: int
    warmup: int


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to measure: a jitted function and its arguments on the device."""

    unit: str
    function: Callable
    arguments: tuple
    following: Callable  # (arguments, result) -> the next call's arguments
    calls: int  # calls of the function in one repeat
    batch_size: int
    flops: dict[str, float | None]  # of one call: ideal, padded, unrolled
    microbatches: int = 1  # parts in which a batch is taken


def benchmark(config, parts: Sequence[str], timing: Timing) -> dict:
    """Measure some of `PARTS` under a config: numbers and texts, ready for JSON.

    Raises:
        ConfigError, ValueError: a setting that cannot work.
    """
    experiment, mesh = configuration.build(config), sharding.make_mesh(config.mesh)
    divisor = sharding.batch_divisor(mesh)
    if config.batch_size % divisor:
        raise ConfigError(
            f"config.batch_size is {config.batch_size}; it must be a multiple of {divisor}, the "
            "devices."
        )
    chosen = {part: prepare for part, prepare in PARTS.items() if part in parts}
    results = {
        part: measure(prepare(config, experiment, mesh, timing), mesh, timing)
        for part, prepare in chosen.items()
    }
    return describe(config, experiment, mesh) | {"timing": dataclasses.asdict(timing)} | results


def describe(config, experiment: Experiment, mesh) -> dict:
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
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "segments": [dataclasses.asdict(segment) for segment in plan_segments(experiment.sample)],
        "config": configuration.resolved(config),
    }


def prepare_training(config, experiment: Experiment, mesh, timing: Timing) -> Work:
    """The donated training step, a fresh state and one random batch; in parts by the estimate, as
    in training.
    """
    spec = experiment.train
    abstract = jax.eval_shape(lambda: init_state(spec))
    shardings = sharding.state_shardings(abstract, mesh)
    program = StepProgram(spec, abstract, shardings)
    if not config.microbatches:
        program = next(program.in_parts())
    spec = program.spec
    state = jax.jit(lambda: init_state(spec), out_shardings=shardings)()
    batch = random_batch(config, experiment.modality, mesh)
    counts = train_flops(spec) | {"unrolled": unrolled_flops(spec, state, batch)}
    return Work(
        unit="step",
        function=program.jitted(donate=True),
        arguments=(state, batch),
        following=lambda _, result: (result[0], batch),
        calls=timing.steps,
        batch_size=config.batch_size,
        flops=counts,
        microbatches=spec.microbatches,
    )


def prepare_sampling(config, experiment: Experiment, mesh, timing: Timing) -> Work:
    """The whole sampler, fresh parameters and one batch of `config.sample.batch_size`, rounded up
    to the devices.
    """
    spec, size = experiment.sample, Generator(config, experiment, mesh).batch_size

    def init():
        return init_params(spec.model, jax.random.key(config.seed))

    params = jax.jit(init, out_shardings=sharding.state_shardings(jax.eval_shape(init), mesh))()
    ids = np.arange(size, dtype=np.int32)  # [B]
    labels, ids = jax.device_put(
        (ids % config.data.num_classes, ids), sharding.batch_sharding(mesh)
    )
    scales = configuration.step_scales(config, experiment.modality.num_tokens)  # [T]
    arguments = (params, labels, ids, config.sample.seed, scales, config.sample.temperature)
    sampler = jax.jit(make_sampler(spec), out_shardings=sharding.replicated(mesh))
    return Work(
        "batch",
        sampler,
        arguments,
        lambda arguments, _: arguments,
        1,
        size,
        sample_flops(spec, size),
    )


PARTS = {"train": prepare_training, "sample": prepare_sampling}


def random_batch(config, modality, mesh) -> dict[str, jax.Array]:
    """A batch of noise in the form that the modality's source has, placed on the mesh."""
    rng, shape = np.random.default_rng(config.seed), (config.batch_size, *modality.example_shape)
    is_float = modality.example_dtype.kind == "f"
    images = (
        rng.standard_normal(shape, np.float32)
        if is_float
        else rng.integers(0, 256, shape, np.uint8)
    )  # [B, ...]
    labels = rng.integers(0, config.data.num_classes, config.batch_size, np.int32)  # [B]
    return jax.device_put({"image": images, "label": labels}, sharding.batch_sharding(mesh))


def train_flops(spec: TrainSpec) -> dict[str, float]:
    """Ideal and padded FLOPs of one training step."""

    def count(padded: bool) -> float:
        rows = flops.time_rows(spec.token_loss, spec.plan, padded)
        return flops.train_image(
            spec.model, spec.plan, spec.token_loss.noise_multiplicity, padded, rows
        )

    return {
        "ideal": count(False) * spec.plan.batch_size,
        "padded": count(True) * spec.plan.batch_size,
    }


def sample_flops(spec: SampleSpec, batch_size: int) -> dict[str, float | None]:
    """Ideal (exact shapes) and padded (segments) FLOPs of one batch of samples."""
    calls = spec.token_loss.denoiser_calls
    exact = flops.sample_image(spec.model, spec.num_ar_steps, calls, spec.guided)
    padded = flops.padded_sample_image(spec.model, plan_segments(spec), calls, spec.guided)
    return {"ideal": exact * batch_size, "padded": padded * batch_size, "unrolled": None}


def xla_flops(program) -> float | None:
    """XLA's cost analysis of a lowered program (all devices) or a compiled one (each device); None
    if there is none.
    """
    analysis = program.cost_analysis()
    return analysis.get("flops") if analysis else None


def unrolled_flops(spec: TrainSpec, state, batch) -> float | None:
    """XLA's count for one training step whose scans are unrolled, which is lowered but not
    compiled.
    """
    depth = max(spec.model.encoder_depth, spec.model.predictor_depth, spec.model.denoiser_depth)
    if depth > MAX_UNROLLED_DEPTH:
        return None
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, scan_unroll=depth))
    return xla_flops(jax.jit(make_train_step(spec)).lower(state, batch))


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


def measure(work: Work, mesh, timing: Timing) -> dict:
    """Compile and run: seconds, FLOPs, bytes, and what follows from them."""
    with count_compilations() as compilations:
        start = time.perf_counter()
        traced = work.function.trace(*work.arguments)
        lowered = traced.lower()
        middle = time.perf_counter()
        compiled = lowered.compile()  # calls of the function use this program
        end = time.perf_counter()
        seconds = time_calls(work, timing)
    counts = work.flops | {
        "traced": flops.count_products(traced.jaxpr),
        "compiled": xla_flops(compiled),
    }
    if counts["compiled"] is not None:
        counts["compiled"] *= mesh.size
    record = {"unit": work.unit, "batch_size": work.batch_size, "microbatches": work.microbatches}
    record |= {"calls_per_repeat": work.calls}
    record |= {
        "lower_seconds": middle - start,
        "compile_seconds": end - middle,
        "programs_compiled": len(compilations),
    }
    return record | {"flops": counts, "memory_bytes": memory(compiled)} | rates(seconds, work, mesh)


def time_calls(work: Work, timing: Timing) -> list[float]:
    """Seconds per call, one figure a repeat."""
    arguments, seconds = work.arguments, []
    for repeat in range(-1, timing.repeats):  # the first one is the warm-up
        start, calls, result = (
            time.perf_counter(),
            work.calls if repeat >= 0 else timing.warmup,
            None,
        )
        for _ in range(calls):
            result = work.function(*arguments)
            arguments = work.following(arguments, result)
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / max(calls, 1))
    return seconds[1:]


def memory(compiled) -> dict[str, int | None]:
    """Bytes on a device: the most that it held in this process so far, and what XLA plans for this
    program.
    """
    stats, plan = jax.local_devices()[0].memory_stats(), compiled.memory_analysis()
    planned = plan and sum(
        getattr(plan, f"{kind}_size_in_bytes") for kind in ("argument", "output", "temp")
    )
    return {
        "device_peak": (stats or {}).get("peak_bytes_in_use"),
        "xla_plan": planned and planned - plan.alias_size_in_bytes,
    }


def rates(seconds: list[float], work: Work, mesh) -> dict:
    """Milliseconds per call, images per second and useful MFU, from the median of the repeats."""
    low, median, high = np.quantile(seconds, (0.1, 0.5, 0.9)).tolist()
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    return {
        "milliseconds": {
            "median": 1e3 * median,
            "p10": 1e3 * low,
            "p90": 1e3 * high,
            "min": 1e3 * min(seconds),
        },
        "milliseconds_per_image": 1e3 * median / work.batch_size,
        "images_per_second": work.batch_size / median,
        "useful_flops_per_second": work.flops["ideal"] / median,
        "useful_mfu": work.flops["ideal"] / median / (peak * mesh.size) if peak else None,
        "seconds": seconds,
    }


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
    read_flags(values, argv, USAGE, required=lambda _: ("config",))
    unknown = [part for part in values.parts if part not in PARTS]
    if unknown or not values.parts:
        raise UsageError(
            f'--parts={",".join(values.parts)}: "{"".join(unknown[:1])}" is not one of '
            f"{', '.join(PARTS)}."
        )
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: measure, print the table, write the JSON; bad input is one error and exit status
    2.
    """
    try:
        values = parse(sys.argv if argv is None else argv)
        if values.out:
            check_writable(pathlib.Path(values.out).parent, "--out")
        results = benchmark(
            values.config, values.parts, Timing(values.steps, values.repeats, values.warmup)
        )
        print(report(results, [part for part in PARTS if part in results]))
        if values.out:
            out = pathlib.Path(values.out)
            out.write_text(json.dumps(results, indent=2) + "\n")
            print(f"wrote {out}")
        return 0
    except HelpRequest as request:
        print(request)
        return 0
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
