"""The benchmark's suite: its checks find what is wrong, and its cases leave each other alone."""

import json
import pathlib
import shlex
import shutil
import signal
import sys
import time
import types

import jax
import numpy as np
import pytest
from tiny import load_config, tiny_config

from djepa_jax.config import files
from djepa_jax.core.models.attention import attend
from djepa_jax.main import main
from djepa_jax.training import benchmark_attention, benchmark_suite
from djepa_jax.training.benchmark import plan_parts
from djepa_jax.training.benchmark_attention import check_attention
from djepa_jax.training.benchmark_parity import (
    TOLERANCE,
    CheckError,
    check_parity,
    judge,
    make_arguments,
    make_program,
)
from djepa_jax.training.benchmark_suite import (
    check_resume,
    run_command,
    run_suite,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "workdirs" / "v2"
SUITES = files.builtin("suites").SUITES


@pytest.fixture(autouse=True)
def signals():
    """A suite in this process must not keep SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def parity_run():
    """The program that is compared, its arguments, and what it gives."""
    experiment = tiny_config("--config.batch_size=8")
    program = make_program(experiment)
    arguments = jax.device_put(make_arguments(experiment), jax.devices()[0])
    return program, arguments, program(*arguments)


def test_parity_finds_a_thousandth_in_any_array_of_the_parameters(parity_run):
    program, (params, *others), truth = parity_run
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(3)
    for place, leaf in enumerate(leaves):
        values = np.asarray(leaf)
        assert np.all(values != 0)
        changed = values + 1e-3 * rng.standard_normal(leaf.shape, np.float32)
        changed = jax.device_put(changed, leaf.sharding)
        changed = jax.tree.unflatten(tree, [*leaves[:place], changed, *leaves[place + 1 :]])
        with pytest.raises(CheckError, match="differ by at most .* computes wrongly"):
            judge(program(changed, *others), truth, TOLERANCE, "both")


def test_parity_of_a_device_with_itself(parity_run, monkeypatch):
    monkeypatch.setattr("djepa_jax.training.benchmark_parity.make_program", lambda _: parity_run[0])
    found = check_parity(tiny_config("--config.batch_size=8"))
    assert max(found["errors"].values()) == 0 and "samples" in found["errors"]
    assert len(found["errors"]) > len(jax.tree.leaves(parity_run[1][0]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parity_takes_no_value_that_is_no_number(value):
    with pytest.raises(CheckError, match="computes wrongly"):
        judge({"x": np.array([1.0, value])}, {"x": np.ones(2)}, TOLERANCE, "both")


@pytest.mark.parametrize("factor, works", [(1.0, True), (1.1, False)])
def test_attention_is_compared_with_the_plain_one(monkeypatch, factor, works):
    def scaled(*arrays, implementation, **how):
        own = factor if implementation == "fused" else 1
        return own * attend(*arrays, implementation="plain", **how)

    monkeypatch.setattr(benchmark_attention, "attend", scaled)
    monkeypatch.setattr(benchmark_attention, "CASES", (("fused", 0.1),))
    assert check_attention(tiny_config())["found"].startswith("skipped")
    fake = types.SimpleNamespace(**vars(jax) | {"default_backend": lambda: "gpu"})
    monkeypatch.setattr(benchmark_attention, "jax", fake)
    if works:
        assert check_attention(tiny_config())["tolerance"] == benchmark_attention.TOLERANCE
    else:
        with pytest.raises(CheckError, match="fused"):
            check_attention(tiny_config())


def test_cases_of_both_suites_are_understood():
    assert list(SUITES["gpu"])[:5] == ["parity", "attention", "resume", "b_train", "b_sample"]
    kinds = {name: {part for part, _ in cases.values()} for name, cases in SUITES.items()}
    assert kinds["gpu"] == kinds["tiny"]
    for cases in SUITES.values():
        for part, text in cases.values():
            words = shlex.split(text)
            if part in ("resume", "tests"):
                continue
            config = words[0].removeprefix("--config=")
            keys = [word for word in words if word.startswith("--config.")]
            sizes = [w.partition("=")[2] for w in words if w.startswith("--batch_sizes=")]
            plan = plan_parts(load_config(config, *keys), [part], sizes)
            assert list(plan) == [part], "a case is one row"


PROGRAM = """
import json, pathlib, sys, time
words = sys.argv[1:]
part, = (word.partition("=")[2] for word in words if word.startswith("--parts="))
out, = (word.partition("=")[2] for word in words if word.startswith("--out="))
if "--crash" in words:
    print("something is wrong")
    sys.exit(3)
if "--slow" in words:
    time.sleep(1000)
record = {"found": f"all well with {part}"}
if part == "train":
    times = dict.fromkeys(("median", "p10", "p90"), 2.0)
    record = {"unit": "step", "milliseconds": times, "images_per_second": 1.0, "batch_size": 4}
    record |= {"milliseconds_per_image": 0.5, "useful_mfu": 0.25}
    record |= {"compile_seconds": 1.0, "lower_seconds": 1.0, "kernels": None}
    record |= {"memory_bytes": {"xla_plan": None, "device_peak": 2**20}}
pathlib.Path(out).write_text(json.dumps({"device": "fake", part: record}))
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Run a suite of the given cases with a program that is none: suite(cases, time_limit)."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(benchmark_suite, "PROGRAM", (sys.executable, str(program)))

    def run(cases: dict, time_limit: int = 600, **options):
        module = types.SimpleNamespace(SUITES={"own": cases})
        monkeypatch.setattr(files, "builtin", lambda name: module)
        return run_suite("own", str(tmp_path / "out.json"), time_limit, **options)

    return run


def test_a_case_that_fails_leaves_the_others(suite, tmp_path, capsys):
    cases = {
        "first": ("parity", ""),
        "broken": ("train", "--crash"),
        "last": ("train", "--steps=1"),
        "files": ("tests", "test_of_nothing.py"),
    }
    with pytest.raises(CheckError, match="failed: broken; .*out.json"):
        suite(cases)
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["last"]["device"] == "fake" and results["last"]["batch_size"] == 4
    outcomes = [case["outcome"] for case in results["cases"].values()]
    assert outcomes[0] == outcomes[2] == "done" and "broken" not in results
    assert "exit status 3" in outcomes[1] and "something is wrong" in outcomes[1]
    table = capsys.readouterr().out
    assert "all well with parity" in table and "2 ms (2 to 2) a step" in table
    assert "skipped: needs a checkout" in table and "25.0%" in table
    other = {"last": {"batch_size": 2, "milliseconds": {"median": 4.0}}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    suite({"last": cases["last"]}, compare=str(tmp_path / "other.json"))
    assert "4.000" in capsys.readouterr().out


def test_the_time_limit_ends_the_running_case_and_leaves_out_the_rest(suite, tmp_path):
    results = suite({"slow": ("train", "--slow"), "late": ("parity", "")}, time_limit=1)
    assert [case["outcome"][:8] for case in results["cases"].values()] == ["left out"] * 2
    assert json.loads((tmp_path / "out.json").read_text()) == results


def test_what_was_measured_is_there_when_the_suite_is_ended(suite, tmp_path, monkeypatch):
    start = benchmark_suite.run_command

    def ended(words, deadline, **options):
        if "--slow" in words:
            signal.raise_signal(signal.SIGTERM)
        return start(words, deadline, **options)

    monkeypatch.setattr(benchmark_suite, "run_command", ended)
    with pytest.raises(SystemExit):
        suite({"first": ("train", ""), "slow": ("train", "--slow")})
    assert "first" in json.loads((tmp_path / "out.json").read_text())


def test_a_command_gets_sigterm_when_it_has_said_so():
    code = "import sys, signal, time; print('saved step 2', 'and 3'); time.sleep(1000)"
    words, deadline = [sys.executable, "-c", code], time.monotonic() + 600
    with pytest.raises(CheckError, match=f"exit status -{int(signal.SIGTERM)}.*saved step 2"):
        run_command(words, deadline, terminate_at="saved step")


class Trainings:
    """In place of `run_command`: what three trainings leave, the second stopped by SIGTERM."""

    def __init__(self, finished: pathlib.Path, stops: bool = True):
        self.finished, self.stops = finished, stops

    def __call__(self, words, deadline, terminate_at=""):
        workdir = pathlib.Path(words[-1].removeprefix("--workdir="))
        shutil.copytree(self.finished, workdir, dirs_exist_ok=True)
        if terminate_at and self.stops:
            (workdir / "checkpoints" / "2").rename(workdir / "checkpoints" / "1")


def test_a_resumed_training_is_compared_to_the_bit(tmp_path, monkeypatch):
    finished = tmp_path / "finished"
    shutil.copytree(GOLDEN, finished)
    (finished / "samples").mkdir()
    (finished / "samples" / "step_00000002.png").touch()
    (finished / "evaluation.json").touch()
    monkeypatch.setattr(benchmark_suite, "run_command", Trainings(finished))
    arrays = benchmark_suite.stored_arrays(finished)
    assert len(arrays) > 100 and any(np.ptp(array) > 0 for array in arrays)
    other = [*arrays[:-1], arrays[-1] + 1]
    cases = {"same": (arrays, None), "other": (other, "1 of .* arrays of step 2 are not those")}
    for name, (theirs, words) in cases.items():
        found = {"straight": arrays, "stopped": theirs}
        monkeypatch.setattr(benchmark_suite, "stored_arrays", lambda d, f=found: f[d.name])
        if words is None:
            assert "step 1" in check_resume(tmp_path / name, ["x"], 0)["found"]
        else:
            with pytest.raises(CheckError, match=words):
                check_resume(tmp_path / name, ["x"], 0)
    monkeypatch.setattr(benchmark_suite, "stored_arrays", lambda _: arrays)
    (finished / "evaluation.json").unlink()
    with pytest.raises(CheckError, match="evaluation.json"):
        check_resume(tmp_path / "blind", ["x"], 0)
    monkeypatch.setattr(benchmark_suite, "run_command", Trainings(finished, stops=False))
    with pytest.raises(CheckError, match="did not stop training"):
        check_resume(tmp_path / "late", ["x"], 0)


@pytest.mark.parametrize("flag", ["--config=digits", "--parts=train", "--batch_sizes=1"])
def test_a_suite_has_flags_of_its_own(flag, capsys):
    assert main(["djepa_jax", "--mode=benchmark", "--suite=tiny", flag]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and flag.partition("=")[0] in error and "--suite" in error
