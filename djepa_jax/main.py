"""Command line: `python -m djepa_jax.main --config=FILE --workdir=DIR [--mode=MODE]`, MODE a key of
`COMMANDS`.
"""

import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from djepa_jax.checkpoints.autoencoder import has_autoencoder, makes_latents
from djepa_jax.config import json_config
from djepa_jax.config.experiment import flatten
from djepa_jax.runtime import distributed, errors, rendezvous
from djepa_jax.runtime.compilation_cache import use_compilation_cache
from djepa_jax.runtime.storage import as_path
from djepa_jax.sampling.generator import command_line

EXPORT_FORMATS = ("orbax", "safetensors", "official", "stablehlo")
USAGE = (
    "usage: python -m djepa_jax.main --config=configs/digits.py|--config_json=FILE --workdir=DIR "
    "[--mode=train|sample|evaluate|import|export|prepare] [--config.KEY=VALUE ...]"
)


class UsageError(ValueError):
    """A command line that cannot be understood."""


class HelpRequest(Exception):
    """Somebody asked for help; the message is it."""


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """Read the command line into flags of its own (no global state).

    Raises:
        UsageError, ConfigError: an unknown flag, key or variant, a missing file, or a value of the
            wrong type.
    """
    values = flags.FlagValues()
    flags.DEFINE_enum("mode", "train", list(COMMANDS), "What to do.", flag_values=values)
    flags.DEFINE_string(
        "workdir", None, "Folder of checkpoints, metrics and samples.", flag_values=values
    )
    flags.DEFINE_string(
        "out",
        "",
        "sample: where to write; the .png and .npz go side by side. export: the folder to write.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "latents_only", False, "sample: write latents and no pictures.", flag_values=values
    )
    flags.DEFINE_string(
        "source",
        "",
        "import: a .pth or .safetensors file, or an export folder.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "format",
        "orbax",
        EXPORT_FORMATS,
        "export: how the weights are written.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "overwrite", False, "export: replace an export that is there.", flag_values=values
    )
    flags.DEFINE_bool(
        "measure_scale",
        False,
        "prepare: store the measured scale and shift of the latents.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "shard",
        "",
        "prepare: i/n, make every n-th shard from the i-th on; the others are other processes'.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "license", "", "export: licence of the weights, for the model card.", flag_values=values
    )
    flags.DEFINE_string(
        "restore_from",
        "",
        "train: PATH@STEP, go on from that step; newer ones in the workdir are set aside.",
        flag_values=values,
    )
    _define_distributed(values)
    values = read_flags(values, argv, USAGE, required=lambda values: REQUIRED[values.mode])
    if values.restore_from and values.mode != "train":
        raise UsageError(
            f"--restore_from is for --mode=train; to {values.mode}, copy the workdir and go back "
            "in the copy."
        )
    if values.latents_only and values.mode != "sample":
        raise UsageError(f"--latents_only is for --mode=sample; to {values.mode}, leave it out.")
    if values.distributed != "none" and values.mode in ("import", "export", "prepare"):
        raise UsageError(
            f"--mode={values.mode} is for one process; leave out --distributed "
            f"({rendezvous.VARIABLE})."
        )
    return values


def _define_distributed(values: flags.FlagValues) -> None:
    """The flags that tell where several processes meet (`meeting.Rendezvous`)."""
    default = os.environ.get(rendezvous.VARIABLE, "none")
    kinds = "none: alone; tpu, slurm: as these tell; explicit: as the next three flags tell."
    flags.DEFINE_string("distributed", default, kinds, flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", 0, "How many there are.", flag_values=values)
    flags.DEFINE_integer("process_id", -1, "Which one this is, from 0.", flag_values=values)
    flags.DEFINE_integer(
        "rendezvous_timeout",
        rendezvous.TIMEOUT,
        "Seconds to wait for the others.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "heartbeat_timeout",
        rendezvous.HEARTBEAT,
        "Seconds after which a silent one is dead.",
        flag_values=values,
    )


def read_flags(
    values: flags.FlagValues,
    argv: Sequence[str],
    usage: str,
    required: Callable[[flags.FlagValues], Sequence[str]],
) -> flags.FlagValues:
    """Add `--config` and `--config_json` to the flags in `values` and read the command line into
    them.

    `required` tells, from the values, which flags must be given.

    Raises:
        UsageError, ConfigError: as `parse` does.
        HelpRequest: -h, --help or --helpfull was typed.
    """
    argv = _join_config([_with_underscores(word) for word in argv])
    flags.DEFINE_string(
        "config_json", None, "Configuration as data: JSON over the defaults.", flag_values=values
    )
    if {"-h", "--help", "--helpfull"} & set(argv):
        _define_config(values, argv[:1], None)
        raise HelpRequest(f"{usage}\n\n{values.main_module_help() or values.get_help()}")
    path = json_config.find(argv)
    stored = None if path is None else json_config.read(path, _overridden(argv))
    try:
        _define_config(values, argv, stored)
        rest = values(argv)[1:]
        if values["config"].value is not None:
            values.config.lock()  # a file that failed to load says so only when it is used
    except Exception as error:  # a config file is a program: anything can happen in it
        raise UsageError(_explain(error, argv, usage, flatten(stored or {}))) from error
    if rest:
        raise UsageError(f'"{rest[0]}" is not a flag; values are given as --flag=VALUE.\n{usage}')
    for name in required(values):
        if not values[name].value:
            raise UsageError(f"--{name} is missing.\n{usage}")
    return values


def _define_config(values: flags.FlagValues, argv: Sequence[str], stored: dict | None) -> None:
    """The flag `--config` with what follows a dot: of a file, a program that will run, or of what
    JSON gave.
    """
    if stored is not None:
        config_flags.DEFINE_config_dict(
            "config", ConfigDict(stored), flag_values=values, sys_argv=argv
        )
        return
    sys.modules.pop(
        "config_config", None
    )  # ml_collections would load the file on top of the one before
    text = (
        "Configuration file, perhaps with :variant. It is a Python program: use only those you "
        "trust."
    )
    config_flags.DEFINE_config_file("config", None, text, flag_values=values, sys_argv=argv)


def _with_underscores(word: str) -> str:
    """A flag such as --measure-scale as it is called here, --measure_scale."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def _join_config(argv: Sequence[str]) -> list[str]:
    """The arguments with "--config FILE" written as "--config=FILE"."""
    joined = list(argv)
    for index in range(len(joined) - 1):
        if joined[index] in ("--config", "-config"):
            joined[index : index + 2] = [f"--config={joined[index + 1]}"]
            break
    return joined


def _overridden(argv: Sequence[str]) -> list[str]:
    """The keys that the command line sets."""
    return [
        word.split("=")[0].removeprefix("--config.")
        for word in argv
        if word.startswith("--config.")
    ]


def _explain(error: Exception, argv: Sequence[str], usage: str, known: dict) -> str:
    """One line for what went wrong while reading flags, with a suggestion where a key is misspelt.

    `known` are the keys of the config, empty if it comes from a Python file, which may have others.
    """
    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), "")
    known = known or _known_keys(path)
    unknown = next((key for key in _overridden(argv) if key not in known), None)
    if known and unknown:
        return f"unknown config key {unknown}; did you mean {json_config.closest(unknown, known)}?"
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"{error}\n{usage}"
    if isinstance(error, OSError):
        return (
            f'--config "{path}" cannot be read; name a Python file such as configs/digits.py, '
            "perhaps with :variant."
        )
    if path and not known:
        while error.__context__ is not None:  # the innermost one is the file's own
            error = error.__context__
        return f'--config "{path}" failed: {type(error).__name__}: {error}'
    return " ".join(str(error).split()) or type(error).__name__


def _known_keys(path: str) -> dict:
    """All keys of the config in a file; none if it cannot be loaded."""
    values = flags.FlagValues()
    sys.modules.pop("config_config", None)
    try:
        config_flags.DEFINE_config_file("config", path or None, flag_values=values, sys_argv=[])
        values(["djepa_jax"])
        return flatten(values.config.to_dict())
    except Exception:  # the error that matters is being explained by the caller
        return {}


def run_training(values: flags.FlagValues) -> None:
    """Train, or go on with training."""
    from djepa_jax.training.loop import train

    result = train(values.config, values.workdir, restore_from=values.restore_from)
    if distributed.is_main():
        summarise(result, values.config, values.workdir)


def run_sampling(values: flags.FlagValues) -> None:
    """Draw samples from the latest checkpoint into files."""
    from djepa_jax.sampling.sample_to_npz import run_sample

    for path in run_sample(values.config, values.workdir, values.out, values.latents_only):
        print(f"wrote {path}")


def run_evaluation(values: flags.FlagValues) -> None:
    """Judge samples of the latest checkpoint."""
    from djepa_jax.evaluation.evaluate import run_evaluate

    record = run_evaluate(values.config, values.workdir)
    if not distributed.is_main():
        return
    print(
        f"step {record['step']}: accuracy {record['accuracy']:.3f}, Frechet distance "
        f"{record['frechet_distance']:.3f}"
    )
    print(f"wrote {as_path(values.workdir) / 'evaluation.json'}")


def run_importing(values: flags.FlagValues) -> None:
    """Make a checkpoint of weights from elsewhere."""
    from djepa_jax.checkpoints.convert.importing import run_import

    for line in run_import(values.config, values.workdir, values.source):
        print(line)


def run_exporting(values: flags.FlagValues) -> None:
    """Make a folder of a trained model that can be taken anywhere."""
    from djepa_jax.checkpoints.export import run_export

    folder = run_export(
        values.config, values.workdir, values.out, values.format, values.overwrite, values.license
    )
    for path in sorted(folder.iterdir()):
        print(f"wrote {path}")


def run_preparing(values: flags.FlagValues) -> None:
    """Make a latent cache of a data set."""
    from djepa_jax.data.prepare_latents import run_prepare

    run_prepare(values.config, values.workdir, values.measure_scale, values.shard)


# What each mode does, and the flags that it needs.
COMMANDS = {
    "train": run_training,
    "sample": run_sampling,
    "evaluate": run_evaluation,
    "import": run_importing,
    "export": run_exporting,
    "prepare": run_preparing,
}
REQUIRED = {mode: ("config", "workdir") for mode in COMMANDS} | {
    "import": ("config", "workdir", "source"),
    "export": ("workdir", "out"),
}


def summarise(result, config, workdir: str) -> None:
    """Say how training ended, where the pictures are and what to try next."""
    if not result.finished:
        rest = (
            "goes on from there"
            if result.step < config.num_steps
            else "makes the samples and the evaluation"
        )
        print(f"stopped at step {result.step} of {config.num_steps}; the same command {rest}.")
        return
    print(
        f"\nTraining is complete ({result.step} steps); to start afresh, name another --workdir "
        f"or remove {workdir}."
    )
    if result.grid:
        print(f"Samples:  {result.grid}")
    if result.evaluation:
        figures = (
            f"accuracy {result.evaluation['accuracy']:.3f}, Frechet distance "
            f"{result.evaluation['frechet_distance']:.3f}"
        )
        print(f"Quality:  {figures} ({as_path(workdir) / 'evaluation.json'})")
    print(f"Try next (in {pathlib.Path.cwd()}):")
    for extra in next_steps(config):
        print(f"  {command_line(*extra)}")


def next_steps(config) -> list[tuple[str, ...]]:
    """Flags worth adding to the command of a finished run."""
    last, few = config.data.num_classes - 1, max(1, config.sample.num_ar_steps // 2)
    sample, ending = ("--mode=sample",), "png"
    if makes_latents(config) and not has_autoencoder(config):  # of which no picture can be made
        sample, ending = ("--mode=sample", "--latents_only"), "npz"
    return [
        (
            *sample,
            f"--out=one_class.{ending}",
            f"--config.sample.labels={min(3, last)}",
            "--config.sample.count=25",
        ),
        (*sample, f"--out=fewer_steps.{ending}", f"--config.sample.num_ar_steps={few}"),
        (*sample, f"--out=strong_guidance.{ending}", "--config.sample.cfg_scale=4.0"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: parse, run, and turn every expected failure into one line and exit status 2 (130
    for Ctrl-C).
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl's global flags
    try:
        values = parse(sys.argv if argv is None else argv)
        names = ("coordinator", "num_processes", "process_id")
        place = {name: values[name].value for name in names}
        rendezvous.start(
            rendezvous.Rendezvous(values.distributed, **place, **_timeouts(values)),
            saves=values.mode == "train",
        )
        use_compilation_cache()
        COMMANDS[values.mode](values)
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
            if distributed.alone():
                raise
            traceback.print_exc()
            text = f"{type(error).__name__} in process {jax.process_index()}"
        print(f"error: {text}", file=sys.stderr)
        return _exit_status(2)


def _timeouts(values: flags.FlagValues) -> dict[str, int]:
    return {"timeout": values.rendezvous_timeout, "heartbeat": values.heartbeat_timeout}


def _exit_status(status: int) -> int:
    """The status to end with. One of several processes ends at once, for JAX would first wait for
    the others.
    """
    if not distributed.alone():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
