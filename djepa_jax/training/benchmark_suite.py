"""`--mode=benchmark --suite=gpu`: whether this machine computes rightly, and how fast it is.

The cases are in `configs/suites.py`. Every case is a command in a process of its own, one after the
other, so that one which crashes or runs out of memory leaves the others.
"""

import importlib.util
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

import jax
import numpy as np

from djepa_jax.checkpoints.checkpointer import Checkpoints, read_meta
from djepa_jax.checkpoints.restore import restore_state
from djepa_jax.config import files
from djepa_jax.config.stored import from_stored
from djepa_jax.core import sharding
from djepa_jax.runtime.storage import as_path, write_json
from djepa_jax.runtime.versions import versions
from djepa_jax.training.benchmark import check_out
from djepa_jax.training.benchmark_compare import comparison, read_other
from djepa_jax.training.benchmark_parity import CheckError
from djepa_jax.training.benchmark_table import suite_report
from djepa_jax.training.initial_state import abstract_state

PROGRAM = (sys.executable, "-m", "djepa_jax")
TESTS = files.FOLDER.parent / "tests" / "core"  # of a checkout


class OutOfTimeError(CheckError):
    """The time limit was reached."""


def run_suite(name: str, out: str, time_limit: int, compare="", overwrite=False) -> dict:
    """Run the cases of a suite as long as there is time; write `out` after each, print a table.

    Raises:
        ConfigError: `out` or `compare` cannot be used; nothing was run.
        CheckError: a case failed; all others were run.
    """
    cases, out = files.builtin("suites").SUITES[name], out or f"benchmark_{name}.json"
    check_out(out, overwrite)
    other = read_other(compare, cases) if compare else {}
    jax.config.update("jax_platforms", "cpu")  # the device belongs to the cases
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the running case, too
    results = {"suite": name, "versions": versions(), "cases": {}}
    deadline = time.monotonic() + time_limit
    for case, (part, flags) in cases.items():
        start, outcome = time.monotonic(), "done"
        try:
            results[case] = run_case(part, shlex.split(flags), deadline)
        except OutOfTimeError as error:
            outcome = f"left out: {error}"
        except CheckError as error:
            outcome = f"failed: {error}"
        seconds = round(time.monotonic() - start, 1)
        results["cases"][case] = {"outcome": outcome, "flags": flags, "seconds": seconds}
        write_json(as_path(out), results)
        print(f"{case}: {outcome} ({seconds} s)", flush=True)
    print(suite_report(results))
    if other:
        print(comparison(results, other, compare))
    print(f"wrote {out}")
    failed = [name for name, case in results["cases"].items() if case["outcome"][:6] == "failed"]
    if failed:
        raise CheckError(f"failed: {', '.join(failed)}; {out} says why.")
    return results


def run_case(part: str, flags: list[str], deadline: float) -> dict:
    """What one case has found, with what it depends on.

    Raises:
        OutOfTimeError, CheckError: nothing was found.
    """
    if part == "tests":
        return run_tests(flags, deadline)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if part == "resume":
            return check_resume(folder, [*PROGRAM, *flags], deadline)
        own = ["--mode=benchmark", f"--parts={part}", f"--out={folder / 'case.json'}"]
        run_command([*PROGRAM, *own, *flags], deadline)
        results = json.loads((folder / "case.json").read_text())
    return results | results.pop(part)


def run_command(words: Sequence[str], deadline: float, terminate_at: str = "") -> str:
    """Run a command and give its output; SIGTERM goes to it once it has said some words.

    Raises:
        OutOfTimeError: `deadline`, of `time.monotonic`, had passed.
        CheckError: its exit status is not 0.
    """
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    how["env"] = os.environ | {"PYTHONUNBUFFERED": "1"}
    process, lines = subprocess.Popen(words, errors="replace", **how), []
    timer = threading.Timer(deadline - time.monotonic(), process.kill)
    timer.start()
    try:
        for line in process.stdout:
            lines.append(line.strip())
            if terminate_at and terminate_at in line:
                process.send_signal(signal.SIGTERM)
                terminate_at = ""
        status = process.wait()
    finally:
        timer.cancel()
        process.kill()
    if status and time.monotonic() >= deadline:
        raise OutOfTimeError("the time was up.")
    if status:
        said = " | ".join(lines[-3:])
        raise CheckError(f"exit status {status} of {shlex.join(words)}: {said}")
    return "\n".join(lines)


def check_resume(folder: pathlib.Path, command: list[str], deadline: float) -> dict:
    """Train twice, once with a SIGTERM between: the states must agree to the bit."""
    straight, stopped = folder / "straight", folder / "stopped"
    run_command([*command, f"--workdir={straight}"], deadline)
    run_command([*command, f"--workdir={stopped}"], deadline, terminate_at="saved step")
    last, step = (Checkpoints(workdir).latest_step() for workdir in (straight, stopped))
    if step == last:
        raise CheckError(f"SIGTERM did not stop training before step {last}; give it more steps.")
    run_command([*command, f"--workdir={stopped}"], deadline)
    pairs = list(zip(*map(stored_arrays, (straight, stopped)), strict=True))
    others = [np.abs(x - y).max() for x, y in pairs if not np.array_equal(x, y)]
    if others:
        raise CheckError(
            f"{len(others)} of {len(pairs)} arrays of step {last} are not those of a run without "
            f"a stop at {step}, with differences up to {max(others):.1e}."
        )
    for pattern in ("samples/step_*.png", "evaluation.json"):
        if not list(stopped.glob(pattern)):
            raise CheckError(f"training has not made {pattern}.")
    return {"found": f"stopped at step {step}: {len(pairs)} arrays of step {last} are the same"}


def stored_arrays(workdir: pathlib.Path) -> list[np.ndarray]:
    """The training state in a workdir's last checkpoint."""
    folder = Checkpoints(workdir).latest_folder()
    meta, mesh = read_meta(folder), sharding.make_mesh((1, 1, 1), jax.devices("cpu")[:1])
    state = restore_state(folder, abstract_state(from_stored(meta.config), mesh), meta)
    return jax.tree.leaves(jax.device_get(state))


def run_tests(names: list[str], deadline: float) -> dict:
    """Run test files of a checkout on this device."""
    paths = sorted(str(path) for name in names for path in TESTS.glob(name))
    if not paths or importlib.util.find_spec("pytest") is None:
        return {"found": "skipped: needs a checkout of the repository, and pytest"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *paths]
    return {"found": run_command(command, deadline).rpartition("\n")[2]}
