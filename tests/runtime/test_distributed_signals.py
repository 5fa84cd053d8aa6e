"""SIGTERM, SIGHUP and Ctrl-C, wherever a run of one process is, and what else ends it early;
`test_distributed_processes.py` has those of several.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from processes import CONTEXT, Training, _train, start
from waiting import LIMIT
from workdirs import EVERY, RUN, STEPS, arrays, assert_same_arrays, compiled, run

from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.runtime import distributed
from djepa_jax.runtime.distributed import StopSignals
from djepa_jax.runtime.metric_writer import METRICS_NAME

MAKES_THE_REST = (
    f"stopped at step {STEPS} of {STEPS}; the same command makes the missing samples or figures."
)


def interrupt(workdir, place, *arguments: str, number=signal.SIGTERM, **troubles) -> str:
    """Send a signal to a run that is held at a place; what the run says until it ends, with status
    0.
    """
    command = (*RUN, f"--config.checkpoint_every={EVERY}", f"--workdir={workdir}", *arguments)
    training = Training(compiled(), *command, hold=place, **troubles)
    training.wait_for(f"holding at {place}")
    os.kill(training.process.pid, number)
    status, output = training.finish()
    assert status == 0 and f"{number.name}: " in output, output
    return output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_the_same_command_comes_to_the_same_bits(
    number, saved_run, tmp_path
):
    output = interrupt(tmp_path, 7, number=number)
    again = "Ctrl-C again" if number == signal.SIGINT else "Ctrl-C to"
    said = re.search(rf"{number.name}: waiting for .*, then {distributed.SAVING}; (.*)", output)
    assert again in said[1], output
    assert "saved step 7 in " in output and Checkpoints(tmp_path).latest_step() == 7
    assert output.endswith(f"stopped at step 7 of {STEPS}; the same command goes on from there.\n")
    if number == signal.SIGINT:
        return  # it is saved in the same way
    status, output = run(tmp_path)
    assert status == 0 and "going on from step 7" in output, output
    assert_same_arrays(arrays(saved_run), arrays(tmp_path))


def test_a_signal_during_the_last_save_is_not_lost(tmp_path):
    output = interrupt(tmp_path, "saving", pictures=True)
    assert f"saved step {STEPS} in " in output and Checkpoints(tmp_path).latest_step() == STEPS
    assert output.endswith(f"{MAKES_THE_REST}\n") and "Training is complete" not in output
    assert "no sample grid" not in output, "a grid was begun"
    before_training = output.partition("\nstep 1/")[0]
    assert "memory per device: " in before_training, "what it takes is told before the first step"


def test_a_signal_during_the_evaluation_ends_it(saved_run, tmp_path):
    shutil.copytree(saved_run, tmp_path / "run")
    output = interrupt(tmp_path / "run", "evaluating", "--config.evaluation.kind=small_images")
    assert f"SIGTERM: waiting for the batch of samples, then {distributed.SAVED}" in output
    assert output.endswith(f"{MAKES_THE_REST}\n")
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_a_signal_while_a_checkpoint_is_read_ends_before_anything_is_compiled(saved_run, tmp_path):
    shutil.copytree(saved_run, tmp_path / "run")
    output = interrupt(tmp_path / "run", "restoring", f"--config.num_steps={STEPS + 10}")
    assert f"SIGTERM: {distributed.STARTING}" in output and "compiling" not in output
    assert output.endswith(
        f"stopped at step {STEPS} of {STEPS + 10}; the same command goes on from there.\n"
    )


def test_a_reader_that_fails_ends_the_run_with_one_error(tmp_path):
    """It fails in Grain's threads, while training goes on."""
    training = Training(compiled(), *RUN, f"--workdir={tmp_path}", fail_after=320)
    training.wait_for("error: ")
    status, output = training.finish()
    assert status == 2 and "\nstep 1/" in output, output
    assert (
        re.search(r"\nerror: example \d+ cannot be read\n\Z", output) and "Traceback" not in output
    ), output


def test_a_terminal_that_goes_saves_the_step_and_loses_no_metrics(tmp_path):
    """From the first line on nobody reads; then comes SIGHUP."""
    reader, writer = CONTEXT.Pipe(duplex=False)
    reader.close()
    command = (*RUN, "--config.log_every=1", f"--workdir={tmp_path}")
    process = start(_train, compiled(), command, {"hold": 7}, writer)
    metrics = tmp_path / METRICS_NAME
    while process.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") > 1):
        process.join(0.05)
    os.kill(process.pid, signal.SIGHUP)
    process.join()
    assert process.exitcode == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    saved = Checkpoints(tmp_path).latest_step()
    assert saved <= 7 and steps == list(range(1, saved + 1))


# ---------------------------------------------------------------- the handler


def test_first_signal_asks_second_interrupt_ends(capfd):
    before = signal.getsignal(signal.SIGINT)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with StopSignals() as signals:
            assert not signals.requested(0)
            os.kill(os.getpid(), number)
            assert signals.requested(1) and "saving a checkpoint" in capfd.readouterr().out
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, (
                "the next one would be Python's, after what it waits for"
            )
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == before


def test_a_signal_names_what_it_waits_for(capfd):
    with StopSignals() as signals, signals.during("the compilation"):
        os.kill(os.getpid(), signal.SIGTERM)
        assert "waiting for the compilation" in capfd.readouterr().out


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.requested(1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_counts_when_nobody_reads_what_the_run_says(capfd):
    """A terminal that is gone, or `| head`: writing fails, and the error would come up anywhere in
    the training.
    """
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(1)
    try:
        with StopSignals() as signals:
            os.dup2(writer, 1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.requested(1) and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(writer)


def test_second_interrupt_does_not_wait_for_a_save(tmp_path):
    code = (
        "import os, signal, sys, time; from djepa_jax.runtime.distributed import StopSignals\n"
        "with StopSignals():\n"
        "    print('ready', flush=True)\n"
        "    try:\n        time.sleep(600)\n    finally:\n        time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert (
            process.stdout.readline() == "\n" and "press Ctrl-C again" in process.stdout.readline()
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == -signal.SIGINT
