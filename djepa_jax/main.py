"""Command line: `djepa --config=NAME --workdir=DIR [--mode=MODE]`, also `python -m djepa_jax`."""

import os
import sys
import traceback
from collections.abc import Sequence

import jax
from absl import flags

from djepa_jax.config import files
from djepa_jax.config.convert import SYNONYMS, keys_of
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.flags import HelpRequest, UsageError
from djepa_jax.config.flags import parse as parse_flags
from djepa_jax.modes import MODES, OF_PARTS, define_flags
from djepa_jax.runtime import distributed, errors
from djepa_jax.runtime.compilation_cache import use_compilation_cache
from djepa_jax.runtime.streams import ignore_lost_readers


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
