"""What each mode does, what it needs, and the flags of all of them."""

import dataclasses
import os
from collections.abc import Callable

from absl import flags

from djepa_jax.config.experiment import Experiment
from djepa_jax.config.flags import UsageError
from djepa_jax.runtime import distributed

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
    """Make places of an example anew, or variations of it, with the latest checkpoint."""
    from djepa_jax.sampling.edit_files import run_edit

    what = values.source, values.mask, values.out, values.keep, values.overwrite
    for path in run_edit(experiment, values.workdir, *what):
        print(f"wrote {path}")


def evaluate(values: flags.FlagValues, experiment: Experiment) -> None:
    """Judge samples of the latest checkpoint."""
    from djepa_jax.evaluation.evaluate import describe, run_evaluate

    options = (values.overwrite, values.keep_images)
    record, path, is_new = run_evaluate(experiment, values.workdir, *options)
    if distributed.is_main_process():
        print(f"step {record['step']}: {describe(record['metrics'])}")
        for text in record.get("judged_by", {}).get("caveats", ()):
            print(f"note: {text}")
        again = "made before of the same weights, settings and data; --overwrite makes it again"
        print(f"wrote {path}" if is_new else f"{path} was {again}")


def search(values: flags.FlagValues, experiment: Experiment) -> None:
    """Find the settings of sampling whose samples are best, or cost least."""
    from djepa_jax.evaluation import acceleration
    from djepa_jax.evaluation.search import run_search, words_of

    what = experiment, values.workdir, values.overwrite
    if experiment.search.preset == "acceleration":
        record, paths = acceleration.run_acceleration(*what)
        print("\n".join(acceleration.words_of(record)))
    else:
        record, paths = run_search(*what)
        for best in record["best"].values():
            print("\n".join(words_of(best)))
    print("\n".join(f"note: {text}" for text in record["caveats"]))
    print("\n".join(f"wrote {path}" for path in paths))


def probe(values: flags.FlagValues, experiment: Experiment) -> None:
    """Tell what the features of the latest checkpoint know of the classes."""
    from djepa_jax.evaluation.probe import run_probe, table

    record, path = run_probe(experiment, values.workdir, values.layers, values.with_prefix)
    print(f"step {record['step']}:\n{table(record['figures'])}")
    print("\n".join(f"note: {text}" for text in record["caveats"]))
    print(f"wrote {path}")


def report(values: flags.FlagValues, experiment: Experiment | None) -> None:
    """Put curves, samples and figures of runs into one HTML file."""
    from djepa_jax.evaluation.report import run_report

    if experiment is not None:
        raise UsageError("--mode=report reads what the workdir has; leave out --config.")
    print(f"wrote {run_report(values.workdir, values.out, values.overwrite)}")


def serve(values: flags.FlagValues, experiment: Experiment) -> None:
    """Play with the latest checkpoint on a page in the browser, on this machine alone."""
    from djepa_jax.serving.server import run_serve

    run_serve(experiment, values.workdir, values.host, values.port)


def gallery(values: flags.FlagValues, experiment: Experiment) -> None:
    """Put samples as they grow into one HTML file, for people who have no Python."""
    from djepa_jax.serving.gallery import run_gallery

    print(f"wrote {run_gallery(experiment, values.workdir, values.out, values.overwrite)}")


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
    "evaluate": Mode(
        evaluate,
        ("config", "workdir"),
        "--workdir=runs/digits",
        own=("overwrite", "keep_images"),
    ),
    "search": Mode(
        search,
        ("config", "workdir"),
        "--workdir=runs/digits --config.search.cfg_scale=1,1.5,2",
        own=("overwrite",),
        one_process=True,
    ),
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
    "report": Mode(
        report,
        ("workdir",),
        "--workdir=runs/digits,runs/mine",
        own=("out", "overwrite"),
        one_process=True,
    ),
    "serve": Mode(
        serve,
        ("config", "workdir"),
        "--workdir=runs/digits",
        own=("host", "port"),
        one_process=True,
    ),
    "gallery": Mode(
        gallery,
        ("config", "workdir"),
        "--workdir=runs/digits --config.sample.count=40",
        own=("out", "overwrite"),
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


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of all modes."""
    text = {
        "workdir": "Folder of checkpoints, metrics and samples; report: several, with commas.",
        "mask": "edit: a picture, white where it is to change, or left, random:0.5, after:4, ...",
        "out": "sample, edit, reference, report, gallery, export, benchmark: what to write.",
        "source": "import: a file of tensors, an export; edit: an example, or real:INDEX.",
        "license": "export: licence of the weights, for the model card.",
        "push": "export: USER/NAME, where to put it on the Hugging Face Hub, too.",
        "restore_from": "train: PATH@STEP, go on from that step.",
        "wandb": "train: a project of Weights & Biases, for scalars and grids.",
        "init_from": "train: a workdir, PATH@STEP or export, to begin with its weights.",
        "compare": "benchmark: FILE of an earlier --out, to be put beside this one.",
        "host": "serve: another address, for other machines; whoever reaches it can use this one.",
        "shard": "prepare: i/n, only every n-th shard from the i-th on, for several machines.",
        "coordinator": "HOST:PORT of process 0.",
        "distributed": "none, auto (tpu and slurm are found so), or explicit.",
    }
    defaults = {"distributed": os.environ.get(distributed.VARIABLE, "none"), "host": "127.0.0.1"}
    for name, words in text.items():
        flags.DEFINE_string(name, defaults.get(name, ""), words, flag_values=values)
    switches = {
        "latents_only": "sample: write latents and no pictures.",
        "overwrite": "in modes that write files: replace what is there.",
        "keep_images": "evaluate: write the pictures that are judged into the workdir, too.",
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
        "port": (8080, 0, "serve: where the page is; 0 = one that is free."),
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
