"""Command line: `djepa --config=NAME --workdir=DIR [--mode=MODE]`, also `python -m djepa_jax`."""

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import flags

from djepa_jax.config import files
from djepa_jax.config.convert import SYNONYMS, keys_of
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.flags import HelpRequest, UsageError
from djepa_jax.config.flags import parse as parse_flags
from djepa_jax.runtime import distributed, errors
from djepa_jax.runtime.compilation_cache import use_compilation_cache
from djepa_jax.runtime.streams import ignore_lost_readers

# Flags of the benchmark that a suite sets for its cases.
OF_PARTS = ("parts", "steps", "repeats", "warmup", "batch_sizes", "profile")
EXPORT_FORMATS = ("orbax", "safetensors", "official", "stablehlo")


def train(values: flags.FlagValues, experiment: Experiment) -> None:
    """Train, or go on with training."""
    if distributed.is_main_process():
        print(f"training in {values.workdir}: reading the program and the data")
    from djepa_jax.training.loop import train
    from djepa_jax.training.reporting import summarise

    begin = {"restore_from": values.restore_from, "init_from": values.init_from}
    result = train(experiment, values.workdir, wandb=values.wandb, **begin)
    if distributed.is_main_process():
        summarise(result, result.experiment, values.workdir)


def sample(values: flags.FlagValues, experiment: Experiment) -> None:
    """Draw samples from the latest checkpoint into files."""
    from djepa_jax.sampling.sample_to_npz import run_sample

    options = (values.latents_only, values.overwrite)
    for path in run_sample(experiment, values.workdir, values.out, *options):
        print(f"wrote {path}")


def edit(values: flags.FlagValues, experiment: Experiment) -> None:
    """Make places of a picture or clip anew, or variations of it, with the latest checkpoint."""
    from djepa_jax.sampling.edit import run_edit

    what = values.source, values.mask, values.out, values.keep, values.overwrite
    for path in run_edit(experiment, values.workdir, *what):
        print(f"wrote {path}")


def evaluate(values: flags.FlagValues, experiment: Experiment) -> None:
    """Judge samples of the latest checkpoint."""
    from djepa_jax.evaluation.evaluate import describe, run_evaluate

    record, path, is_new = run_evaluate(experiment, values.workdir, values.overwrite)
    if distributed.is_main_process():
        print(f"step {record['step']}: {describe(record['metrics'])}")
        again = "made before of the same weights, settings and data; --overwrite makes it again"
        print(f"wrote {path}" if is_new else f"{path} was {again}")


def probe(values: flags.FlagValues, experiment: Experiment) -> None:
    """Tell what the features of the latest checkpoint know of the classes."""
    from djepa_jax.evaluation.probe import run_probe, table

    record, path = run_probe(experiment, values.workdir, values.layers, values.with_prefix)
    print(f"step {record['step']}:\n{table(record['figures'])}")
    print("\n".join(f"note: {text}" for text in record["caveats"]))
    print(f"wrote {path}")


def import_weights(values: flags.FlagValues, experiment: Experiment) -> None:
    """Make a checkpoint of weights from elsewhere."""
    from djepa_jax.checkpoints.convert.import_weights import run_import

    for line in run_import(experiment, values.workdir, values.source):
        print(line)


def export(values: flags.FlagValues, experiment: Experiment | None) -> None:
    """Make a folder of a trained model that can be taken anywhere."""
    from djepa_jax.checkpoints.export import run_export

    options = (values.format, values.overwrite, values.license, values.push)
    folder = run_export(experiment, values.workdir, values.out, *options)
    for path in sorted(folder.iterdir()):
        print(f"wrote {path}")
    if values.push:
        print(f"pushed to hf://{values.push} (private, unless it was public before)")


def prepare(values: flags.FlagValues, experiment: Experiment) -> None:
    """Encode a data set into a latent cache."""
    from djepa_jax.data.prepare_latents import run_prepare

    run_prepare(experiment, values.workdir, values.measure_scale, values.shard)


def reference(values: flags.FlagValues, experiment: Experiment) -> None:
    """Measure the pictures of a data set, for evaluations to compare samples with."""
    from djepa_jax.evaluation.reference import run_reference

    print(f"wrote {run_reference(experiment, values.out, values.overwrite)}")


def benchmark(values: flags.FlagValues, experiment: Experiment | None) -> None:
    """Measure the speed of training, sampling and decoding; with --suite=gpu, check a machine."""
    from djepa_jax.training.benchmark import Timing, run_benchmark

    if values.suite:
        from djepa_jax.training.benchmark_suite import run_suite

        run_suite(values.suite, values.out, values.time_limit, values.compare, values.overwrite)
        return
    timing = Timing(values.steps, values.repeats, values.warmup, values.profile)
    options = (values.out, values.batch_sizes, values.compare, values.overwrite)
    run_benchmark(experiment, values.parts, timing, *options)


@dataclasses.dataclass(frozen=True)
class Mode:
    """What a mode does, the flags that it needs, an example, and flags that are its alone."""

    run: Callable
    needs: tuple[str, ...]
    example: str
    own: tuple[str, ...] = ()
    one_process: bool = False


MODES = {
    "train": Mode(
        train,
        ("config", "workdir"),
        "--config=digits --workdir=runs/digits",
        own=("restore_from", "init_from", "wandb"),
    ),
    "sample": Mode(
        sample,
        ("config", "workdir"),
        "--workdir=runs/digits --out=three.png --config.sample.labels=3",
        own=("latents_only", "out", "overwrite"),
    ),
    "edit": Mode(
        edit,
        ("config", "workdir", "source", "mask"),
        "--workdir=runs/digits --source=seven.png --mask=left --config.sample.labels=7",
        own=("out", "keep", "overwrite"),
        one_process=True,
    ),
    "evaluate": Mode(evaluate, ("config", "workdir"), "--workdir=runs/digits", own=("overwrite",)),
    "reference": Mode(
        reference,
        ("config", "out"),
        "--config=digits --out=digits.npz --config.evaluation.kind=efficientnet_lite0",
        own=("overwrite",),
        one_process=True,
    ),
    "probe": Mode(
        probe,
        ("config", "workdir"),
        "--workdir=runs/digits --layers=2,4",
        own=("layers", "with_prefix"),
        one_process=True,
    ),
    "export": Mode(
        export,
        ("workdir", "out"),
        "--workdir=runs/digits --out=exports/digits --format=safetensors",
        own=("format", "overwrite", "license", "push"),
        one_process=True,
    ),
    "import": Mode(
        import_weights,
        ("config", "workdir", "source"),
        "--config=djepa_l --workdir=runs/imported --source=FILE.pth",
        one_process=True,
    ),
    "prepare": Mode(
        prepare,
        ("config", "workdir"),
        "--config=djepa_l --workdir=CACHE --config.prepare.path=IMAGES",
        own=("measure_scale", "shard"),
        one_process=True,
    ),
    "benchmark": Mode(
        benchmark,
        ("config",),
        "--config=digits --parts=train",
        own=("out", "compare", "suite", "time_limit", "overwrite", *OF_PARTS),
        one_process=True,
    ),
}


def usage() -> str:
    """The modes with an example each, the flags, and the built-in configurations."""
    lines = ["usage: djepa --config=NAME|FILE.py --workdir=DIR [--mode=MODE] [--config.KEY=VALUE]"]
    for name, mode in MODES.items():
        lines.append(f"\n  {mode.run.__doc__.strip()}\n    djepa --mode={name} {mode.example}")
    values = flags.FlagValues()
    define_flags(values)
    lines += ["", *(f"  --{name:<20}{values[name].help}" for name in values)]
    names = ", ".join(files.builtin_names())
    lines.append(f"\nconfigurations: {names}\nall keys of a configuration: djepa --help=keys")
    return "\n".join(lines)


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of all modes."""
    text = {
        "workdir": "Folder of checkpoints, metrics and samples.",
        "mask": "edit: a picture, white where it is to change, or left, random:0.5, after:4, ...",
        "out": "sample, edit, reference, export, benchmark: what to write.",
        "source": "import: a file of tensors, an export; edit: a picture, a clip, or real:INDEX.",
        "license": "export: licence of the weights, for the model card.",
        "push": "export: USER/NAME, where to put it on the Hugging Face Hub, too.",
        "restore_from": "train: PATH@STEP, go on from that step.",
        "wandb": "train: a project of Weights & Biases, for scalars and grids.",
        "init_from": "train: a workdir, PATH@STEP or export, to begin with its weights.",
        "compare": "benchmark: FILE of an earlier --out, to be put beside this one.",
        "shard": "prepare: i/n, only every n-th shard from the i-th on, for several machines.",
        "coordinator": "HOST:PORT of process 0.",
        "distributed": "none, auto (tpu and slurm are found so), or explicit.",
    }
    defaults = {"distributed": os.environ.get(distributed.VARIABLE, "none")}
    for name, words in text.items():
        flags.DEFINE_string(name, defaults.get(name, ""), words, flag_values=values)
    switches = {
        "latents_only": "sample: write latents and no pictures.",
        "overwrite": "sample, edit, evaluate, reference, export, benchmark: replace what is there.",
        "profile": "benchmark: trace one call, and name its largest kernels.",
        "with_prefix": "probe: average over the prefix tokens, too.",
        "measure_scale": "prepare: store the measured scale and shift of the latents.",
    }
    for name, words in switches.items():
        flags.DEFINE_bool(name, False, words, flag_values=values)
    numbers = {
        "num_processes": (0, 0, "How many there are."),
        "process_id": (-1, -1, "Which one this is, from 0."),
        "rendezvous_timeout": (distributed.TIMEOUT, 1, "Seconds to wait for the others."),
        "heartbeat_timeout": (distributed.HEARTBEAT, 1, "Seconds until a silent one is dead."),
        "steps": (10, None, "benchmark: training steps in one repeat."),
        "repeats": (10, None, "benchmark: timed repeats."),
        "warmup": (2, None, "benchmark: calls before the clock starts."),
        "time_limit": (480, 1, "benchmark --suite: seconds after which it ends."),
    }
    for name, (default, least, words) in numbers.items():
        flags.DEFINE_integer(name, default, words, lower_bound=least, flag_values=values)
    keep = "edit: share of what the mask hides that stays, drawn at random."
    flags.DEFINE_float("keep", 0.0, keep, 0.0, 1.0, flag_values=values)
    parts = "benchmark: train, sample, denoise, decode; parity, attention."
    flags.DEFINE_list("parts", ["train", "sample"], parts, flag_values=values)
    layers = "probe: of the encoders, from 1; by default the last."
    flags.DEFINE_list("layers", [], layers, flag_values=values)
    sizes = "benchmark: of sample, denoise and decode, each measured."
    flags.DEFINE_list("batch_sizes", [], sizes, flag_values=values)
    suite = "benchmark: check and measure this machine; tiny tries it out."
    flags.DEFINE_enum("suite", None, ["gpu", "tiny"], suite, flag_values=values)
    flags.DEFINE_enum("mode", "train", list(MODES), "What to do.", flag_values=values)
    flags.DEFINE_enum("format", "orbax", EXPORT_FORMATS, "export: its form.", flag_values=values)


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, Experiment | None]:
    """The flags' values, and the configuration, None without one (`config.flags.parse`)."""
    values, experiment = parse_flags(
        argv, define_flags, usage, lambda v: () if v.suite else MODES[v.mode].needs
    )
    takers = {}  # flags that not all modes take, and the modes that do
    for name, mode in MODES.items():
        for flag in {*mode.needs, *mode.own} - {"config", "workdir"}:
            takers.setdefault(flag, []).append(name)
    for flag, modes in takers.items():
        if values[flag].present and values.mode not in modes:
            alike = [key for key in keys_of(Experiment) if key.rpartition(".")[2] == flag]
            alike += [key for key, words in SYNONYMS.items() if flag in words.split()]
            raise UsageError(
                f"--{flag} is for --mode={' or '.join(modes)}; leave it out of {values.mode}"
                f"{f', or write --config.{alike[0]}=VALUE' if alike else ''}."
            )
    for flag in ("config", "config_json", *OF_PARTS) if values.suite else ():
        if values[flag].present:
            raise UsageError(f"--{flag} is not for --suite, which has its own; leave out one.")
    if not values.suite and values["time_limit"].present:
        raise UsageError("--time_limit is for --suite; leave it out, or add --suite=gpu.")
    if values.distributed != "none" and MODES[values.mode].one_process:
        raise UsageError(
            f"--mode={values.mode} is for one process; leave out --distributed "
            f"({distributed.VARIABLE})."
        )
    return values, experiment


def connect(values: flags.FlagValues) -> None:
    """Meet the other processes, if there are to be any."""
    distributed.connect(
        values.distributed,
        values.coordinator,
        values.num_processes,
        values.process_id,
        timeout=values.rendezvous_timeout,
        heartbeat=values.heartbeat_timeout,
        saves=values.mode == "train",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: expected failures become one line and exit status 2 (130 for Ctrl-C)."""
    argv = sys.argv if argv is None else argv
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl's global flags
    ignore_lost_readers()
    try:
        values, experiment = parse(argv if len(argv) > 1 else [*argv, "--help"])
        connect(values)
        use_compilation_cache()
        MODES[values.mode].run(values, experiment)
        return 0
    except HelpRequest as request:
        print(request)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _exit_status(130)
    except Exception as error:
        text = errors.expected(error)
        if text is None:
            if distributed.is_single_process():
                raise
            traceback.print_exc()
            text = f"{type(error).__name__} in process {jax.process_index()}"
        print(f"error: {text}", file=sys.stderr)
        return _exit_status(2)


def _exit_status(status: int) -> int:
    """The status to end with. One of several processes ends at once: JAX would wait for others."""
    if not distributed.is_single_process():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
