"""Command line: `python -m djepa_jax.main --config=FILE --workdir=DIR [--mode=train|sample|evaluate]`."""

import difflib
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence

import jax
from absl import flags
from ml_collections import config_flags

from djepa_jax.config import flatten
from djepa_jax.generate import command_line

MODES = ("train", "sample", "evaluate")
USAGE = (
    "usage: python -m djepa_jax.main --config=configs/digits.py --workdir=DIR [--mode=train|sample|evaluate] "
    "[--config.KEY=VALUE ...]"
)


class UsageError(ValueError):
    """A command line that cannot be understood."""


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """Read the command line into flags of its own (no global state).

    Raises:
        UsageError: an unknown flag, key or variant, a missing file, or a value of the wrong type.
    """
    values = flags.FlagValues()
    flags.DEFINE_enum("mode", "train", MODES, "What to do.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics and samples.", flag_values=values)
    flags.DEFINE_string("out", "", "sample: where to write; the .png and .npz go side by side.", flag_values=values)
    return read_flags(values, argv, USAGE, required=("config", "workdir"))


def read_flags(values: flags.FlagValues, argv: Sequence[str], usage: str, required: Sequence[str]) -> flags.FlagValues:
    """Add `--config` to the flags in `values` and read the command line into them; raises as `parse` does."""
    config_flags.DEFINE_config_file(
        "config", None, "Configuration file, perhaps with :variant.", flag_values=values, sys_argv=list(argv)
    )
    try:
        rest = values(list(argv))[1:]
        if values["config"].value is not None:
            values.config.lock()  # a file that failed to load says so only when it is used
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError, ImportError, SyntaxError) as error:
        raise UsageError(_explain(error, argv)) from error
    if rest:
        raise UsageError(f'"{rest[0]}" is not a flag; values are given as --flag=VALUE.\n{usage}')
    for name in required:
        if values[name].value is None:
            raise UsageError(f"--{name} is missing.\n{usage}")
    return values


def _explain(error: Exception, argv: Sequence[str]) -> str:
    """One line for what went wrong while reading flags, with a suggestion where a key is misspelt."""
    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), "")
    if isinstance(error, OSError):
        return f'--config "{path}" cannot be read; name a Python file such as configs/digits.py, perhaps with :variant.'
    if isinstance(error, AttributeError | KeyError) and path:
        known = flatten(_load_config(path).to_dict())
        keys = [a.split("=")[0].removeprefix("--config.") for a in argv if a.startswith("--config.")]
        unknown = next((key for key in keys if key not in known), None)
        if unknown:
            return f"unknown config key {unknown}; did you mean {_closest(unknown, known)}?"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _closest(key: str, known: Iterable[str]) -> str:
    """The existing key most like a misspelt one, by its last part first."""
    name = key.rpartition(".")[2]
    return max(known, key=lambda k: difflib.SequenceMatcher(None, name, k.rpartition(".")[2]).ratio() + 0.01 * (k[:3] == key[:3]))


def _load_config(path: str):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", path, flag_values=values, sys_argv=[])
    values(["djepa_jax"])
    return values.config


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, one folder per JAX version, unless JAX was told where."""
    if not jax.config.jax_compilation_cache_dir:
        root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(root) / "djepa_jax" / f"jax-{jax.__version__}"))


def run(values: flags.FlagValues) -> int:
    """Do what the flags say; returns the exit status."""
    config, workdir = values.config, values.workdir
    if values.mode == "sample":
        from djepa_jax.generate import run_sample

        for path in run_sample(config, workdir, values.out):
            print(f"wrote {path}")
        return 0
    if values.mode == "evaluate":
        from djepa_jax.evaluation.runner import run_evaluate

        record = run_evaluate(config, workdir)
        print(f"step {record['step']}: accuracy {record['accuracy']:.3f}, Frechet distance {record['frechet_distance']:.3f}")
        print(f"wrote {pathlib.Path(workdir) / 'evaluation.json'}")
        return 0
    from djepa_jax.train import train

    summarise(train(config, workdir), config, workdir)
    return 0


def summarise(result, config, workdir: str) -> None:
    """Say how training ended, where the pictures are and what to try next."""
    if not result.finished:
        print(f"stopped at step {result.step} of {config.num_steps}; the same command goes on from there.")
        return
    print(f"\nTraining is complete ({result.step} steps); to start afresh, name another --workdir or remove {workdir}.")
    if result.grid:
        print(f"Samples:  {result.grid}")
    if result.evaluation:
        figures = f"accuracy {result.evaluation['accuracy']:.3f}, Frechet distance {result.evaluation['frechet_distance']:.3f}"
        print(f"Quality:  {figures} ({pathlib.Path(workdir) / 'evaluation.json'})")
    print("Try next:")
    for extra in NEXT_STEPS:
        print(f"  {command_line(*extra)}")


NEXT_STEPS = (
    ("--mode=sample", "--out=threes.png", "--config.sample.labels=3", "--config.sample.count=25"),
    ("--mode=sample", "--out=four_steps.png", "--config.sample.num_ar_steps=4"),
    ("--mode=evaluate", "--config.sample.cfg_scale=1.0"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: parse, run, and turn every expected failure into one line and exit status 2."""
    from djepa_jax.checkpoint import CheckpointError
    from djepa_jax.train import TrainingError

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl's global flags
    try:
        values = parse(sys.argv if argv is None else argv)
        use_compilation_cache()
        return run(values)
    except (UsageError, ValueError, CheckpointError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
