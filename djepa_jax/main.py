"""Command line: `python -m djepa_jax.main --config=FILE --workdir=DIR [--mode=train|sample|evaluate]`."""

import difflib
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import config_flags

MODES = ("train", "sample", "evaluate")
USAGE = "usage: python -m djepa_jax.main --config=configs/digits.py --workdir=DIR [--mode=train|sample|evaluate] [--config.KEY=VALUE ...]"


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
    config_flags.DEFINE_config_file("config", None, "Configuration file, perhaps with :variant.", flag_values=values)
    try:
        rest = values(list(argv))[1:]
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError, ImportError, SyntaxError) as error:
        raise UsageError(_explain(error, argv)) from error
    if rest:
        raise UsageError(f'"{rest[0]}" is not a flag; values are given as --flag=VALUE.\n{USAGE}')
    for name in ("config", "workdir"):
        if values[name].value is None:
            raise UsageError(f"--{name} is missing.\n{USAGE}")
    return values


def _explain(error: Exception, argv: Sequence[str]) -> str:
    """One line for what went wrong while reading flags, with a suggestion where a key is misspelt."""
    text = str(error).strip("'\"").splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, OSError):
        return f"the config file cannot be read: {error}"
    if isinstance(error, AttributeError | KeyError):
        keys = [a.split("=")[0].removeprefix("--config.") for a in argv if a.startswith("--config.")]
        unknown = next((key for key in keys if key.rpartition(".")[2] in text or key in text), "")
        suggestion = _closest(unknown, argv)
        if unknown:
            return f"unknown config key {unknown}." + (f" Did you mean {suggestion}?" if suggestion else "")
    return text


def _closest(key: str, argv: Sequence[str]) -> str | None:
    """The existing key most like a misspelt one."""
    from djepa_jax.config import flatten

    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if path is None:
        return None
    known = flatten(_load_config(path).to_dict())
    by_name = {name.rpartition(".")[2]: name for name in known}
    close = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1)
    return by_name.get(close[0], close[0]) if close else None


def _load_config(path: str):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", path, flag_values=values)
    values(["djepa_jax"])
    return values.config


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, one folder per JAX version, unless JAX was told where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
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
    command = next((a for a in sys.argv if a.startswith("--config=")), "--config=FILE")
    base = f"python -m djepa_jax.main {command} --workdir={workdir}"
    print(f"\nTraining is complete ({result.step} steps); to start afresh, name another --workdir or remove {workdir}.")
    if result.grid:
        print(f"Samples:  {result.grid}")
    if result.evaluation:
        figures = f"accuracy {result.evaluation['accuracy']:.3f}, Frechet distance {result.evaluation['frechet_distance']:.3f}"
        print(f"Quality:  {figures} ({pathlib.Path(workdir) / 'evaluation.json'})")
    print("Try next:")
    print(f"  {base} --mode=sample --out=threes.png --config.sample.labels=3 --config.sample.count=25")
    print(f"  {base} --mode=evaluate --config.sample.cfg_scale=1.0")
    print(f"  tensorboard --logdir={workdir}")


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
