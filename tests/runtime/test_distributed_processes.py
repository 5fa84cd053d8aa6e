"""Several processes that train together: real ones, connected over loopback."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
from conftest import assert_close
from processes import CONTEXT, Member, free_port
from processes import start as start_process
from tiny import CONFIG, TINY
from waiting import LIMIT, wait_until
from workdirs import arrays

from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.runtime import distributed
from djepa_jax.runtime.distributed import SAVED, STARTING
from djepa_jax.runtime.lock import lock_workdir

STEPS, EVERY = 6, 2
HEARTBEAT = 10  # seconds after which a process counts as lost, if nothing tells it sooner
MESH = "(1,4,1)"  # parameters are split over the processes, as the batch is
ENDS = (
    2,
    -signal.SIGABRT,
)  # of a process that has lost another: with a line of ours, or by JAX's heartbeat


def arguments(workdir, *extra: str, mesh: str = MESH) -> tuple[str, ...]:
    run = (
        f"--config.num_steps={STEPS}",
        f"--config.checkpoint_every={EVERY}",
        f"--config.mesh={mesh}",
    )
    return (
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        *TINY,
        *run,
        "--config.data.random_flip=True",
        *extra,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> str:
    """Where all processes keep compiled programs."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def start(compiled, tmp_path):
    """Starts both processes of a run; what still runs at the end is killed."""
    members = []

    def both(*commands: tuple[str, ...], **troubles) -> list[Member]:
        commands, port = commands if len(commands) == 2 else commands * 2, free_port()
        for index, command in enumerate(commands):
            members.append(
                Member(
                    compiled, tmp_path / f"log{len(members)}", command, (port, index), **troubles
                )
            )
        return members[-2:]

    yield both
    for member in members:
        member.process.kill()
        member.process.join()


def statuses(members: list[Member]) -> list[int | None]:
    return [member.status() for member in members]


def assert_same_arrays(workdir: pathlib.Path, expected: pathlib.Path, tolerance: float = 0) -> None:
    """None differs by more than `tolerance`, nor by much of its own size where it is small."""
    actual, expected = arrays(workdir, STEPS), arrays(expected, STEPS)
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_allclose(actual[path], array, rtol=0, atol=tolerance, err_msg=path)
        assert_close(actual[path], array, 100 * tolerance)


def metrics(workdir: pathlib.Path) -> list[dict]:
    """The lines of training steps."""
    return [
        line
        for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]


@pytest.fixture(scope="module")
def alone(compiled, tmp_path_factory) -> pathlib.Path:
    """The workdir of one process with all four devices."""
    workdir = tmp_path_factory.mktemp("alone")
    member = Member(compiled, workdir / "log", arguments(workdir))
    assert member.status() == 0, member.log
    return workdir


@pytest.fixture(scope="module")
def together(compiled, tmp_path_factory) -> tuple[pathlib.Path, list[Member]]:
    """The workdir of two processes with two devices each, and the processes, which have ended."""
    workdir, port = tmp_path_factory.mktemp("together"), free_port()
    members = [
        Member(compiled, workdir / f"log{index}", arguments(workdir), (port, index))
        for index in (0, 1)
    ]
    assert statuses(members) == [0, 0], members[0].log + members[1].log
    return workdir, members


def test_two_processes_train_as_one_does(alone, together):
    assert_same_arrays(together[0], alone, 1e-6)
    for one, two in zip(metrics(alone), metrics(together[0]), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_two_processes_sample_and_judge_as_one_does(alone, together):
    name = f"samples/step_{STEPS:08d}.npz"
    one, two = np.load(alone / name), np.load(together[0] / name)
    np.testing.assert_array_equal(two["arr_1"], one["arr_1"])
    assert np.abs(two["arr_0"].astype(int) - one["arr_0"]).max() <= 1
    one, two = (
        json.loads((workdir / "evaluation.json").read_text())["metrics"]
        for workdir in (alone, together[0])
    )
    assert two["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=1e-3)


def test_only_the_first_process_writes_and_speaks(together):
    workdir, (first, second) = together
    assert [line["step"] for line in metrics(workdir)] == list(range(1, STEPS + 1))
    assert len(list(workdir.glob("events.out.tfevents*"))) == 1
    assert "Training is complete" in first.log
    assert "process 1 of 2, coordinator 127.0.0.1:" in second.log
    assert "waiting up to 300 s for the others" in second.log
    assert f"pid {second.process.pid}) is connected" in second.log and "step" not in second.log
    assert not list(workdir.glob(".shared*"))


# ---------------------------------------------------------------- ends that were not planned


QUICKLY = {
    "simple": True,
    "pictures": False,
}  # a stand-in for the training step that compiles at once


@pytest.fixture(scope="module")
def quickly_together(compiled, tmp_path_factory) -> pathlib.Path:
    """The workdir of two processes that nobody interrupted, with the stand-in for the training
    step.
    """
    workdir, port = tmp_path_factory.mktemp("quickly"), free_port()
    command = arguments(workdir, "--config.evaluation.kind=none")
    members = [
        Member(compiled, workdir / f"log{index}", command, (port, index), **QUICKLY)
        for index in (0, 1)
    ]
    assert statuses(members) == [0, 0], members[0].log + members[1].log
    return workdir


def assert_goes_on(start, workdir: pathlib.Path, expected: pathlib.Path, **troubles) -> None:
    """The same command comes to the same bits, and every step is recorded once."""
    members = start(arguments(workdir, "--config.evaluation.kind=none"), **troubles)
    assert statuses(members) == [0, 0], members[0].log + members[1].log
    assert "going on from step" in members[0].log
    assert_same_arrays(workdir, expected)
    assert [line["step"] for line in metrics(workdir)] == list(range(1, STEPS + 1))


def stop_by_signal(
    start, workdir: pathlib.Path, which: int, number: signal.Signals, **troubles
) -> None:
    """Send a signal to one of two processes that are held after a step: both save that step and end
    with status 0.
    """
    members, step = start(arguments(workdir), hold=3, **troubles), 3
    for member in members:
        member.wait_for(f"holding at {step}")
    began = time.monotonic()
    os.kill(members[which].process.pid, number)
    assert statuses(members) == [0, 0], members[0].log + members[1].log
    print(f"seconds from {number.name} to the end of both: {time.monotonic() - began:.1f}")
    assert Checkpoints(workdir).latest_step() == step
    assert (
        f"a process was asked to stop, at step {step}: saving a checkpoint, then stopping"
        in members[0].log
    )
    assert (
        f"stopped at step {step} of {STEPS}; the same command goes on from there." in members[0].log
    )


def test_a_signal_to_one_stops_both_and_the_same_command_goes_on(quickly_together, start, tmp_path):
    stop_by_signal(start, tmp_path / "run", 1, signal.SIGTERM, **QUICKLY)
    assert_goes_on(start, tmp_path / "run", quickly_together, **QUICKLY)


@pytest.mark.parametrize(
    ("place", "more", "answer"), [("restoring", 1, STARTING), ("sampling", 0, SAVED)]
)
def test_a_signal_to_one_ends_both_where_there_is_nothing_to_save(
    quickly_together, start, tmp_path, place, more, answer
):
    shutil.copytree(quickly_together, tmp_path / "run")
    members = start(
        arguments(tmp_path / "run", f"--config.num_steps={STEPS + more}"), hold=place, **QUICKLY
    )
    for member in members:
        member.wait_for(f"holding at {place}")
    os.kill(members[1].process.pid, signal.SIGTERM)
    assert statuses(members) == [0, 0], members[0].log + members[1].log
    assert (
        f": {answer}\n" in members[0].log
        and f"stopped at step {STEPS} of {STEPS + more};" in members[0].log
    )
    assert not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.slow
def test_with_the_training_step_as_it_is_a_signal_stops_both(together, start, tmp_path):
    stop_by_signal(start, tmp_path / "run", 0, signal.SIGINT)
    assert_goes_on(start, tmp_path / "run", together[0], pictures=False)


def lose_one(start, workdir: pathlib.Path, which: int, **troubles) -> None:
    """Kill one of two processes: the other ends with another status than 0, and it was said before
    which one is which.
    """
    gate = workdir.with_name("gate")
    troubles |= {"hold": EVERY + 1, "gate": str(gate), "heartbeat": HEARTBEAT}
    members = start(arguments(workdir), **troubles)
    for member in members:
        member.wait_for(f"holding at {EVERY + 1}")
    wait_until(lambda: Checkpoints(workdir).recorded()[0] == EVERY)
    name = f"process {which} of 2 ({socket.gethostname()}, pid {members[which].process.pid})"
    assert f"{name} is connected" in members[which].log
    began = time.monotonic()
    members[which].process.kill()
    members[which].process.join()
    gate.touch()
    other = members[1 - which]
    assert other.status() in ENDS, other.log
    print(
        f"seconds from the kill to the end of the other, with {other.status()}: "
        f"{time.monotonic() - began:.1f}"
    )
    assert (
        other.status() != 2 or "error: another process has ended or cannot be reached" in other.log
    ), other.log


def test_when_one_is_killed_the_other_ends(start, tmp_path):
    lose_one(start, tmp_path / "run", 1, **QUICKLY)


@pytest.mark.slow
def test_when_one_was_killed_the_same_command_goes_on(together, start, tmp_path):
    lose_one(start, tmp_path / "run", 0)
    assert_goes_on(start, tmp_path / "run", together[0], pictures=False)


@pytest.mark.slow
def test_a_second_interrupt_ends_the_process_at_once(start, tmp_path):
    never = {"hold": 1, "gate": str(tmp_path / "never"), "heartbeat": HEARTBEAT}
    first, second = start(arguments(tmp_path / "run"), **never)
    first.wait_for("holding at 1")
    os.kill(first.process.pid, signal.SIGINT)
    first.wait_for("press Ctrl-C again")
    os.kill(first.process.pid, signal.SIGINT)
    assert first.status() == -signal.SIGINT
    assert second.status() in ENDS, second.log


# ---------------------------------------------------------------- what cannot work


def assert_refused(members: list[Member], *messages: str) -> None:
    """Both end with status 2, each with its line."""
    assert statuses(members) == [2, 2], members[0].log + members[1].log
    for member, message in zip(members, messages, strict=True):
        assert "\nerror: " in member.log and message in member.log, member.log


def test_a_workdir_in_use_is_refused_by_both(start, tmp_path):
    with lock_workdir(tmp_path):
        assert_refused(
            start(arguments(tmp_path)),
            f"is in use by process {os.getpid()} on",
            "process 0 cannot go on",
        )


def test_checkpoints_that_the_first_process_cannot_use_end_both(together, start, tmp_path):
    shutil.copytree(together[0], tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(step / "state")
    assert_refused(
        start(arguments(tmp_path / "run")),
        "can be used, and nothing was changed",
        "process 0 cannot go on",
    )


def test_workdirs_that_are_not_shared_are_refused_by_both(start, tmp_path):
    (tmp_path / "two").mkdir()
    members = start(arguments(tmp_path / "one"), arguments(tmp_path / "two"))
    assert_refused(members, *["is not the same folder for all processes"] * 2)
    assert not list((tmp_path / "two").iterdir())


def test_unlike_commands_are_refused_by_both(start, tmp_path):
    other = arguments(tmp_path / "run", f"--restore_from={tmp_path / 'other'}")
    assert_refused(
        start(arguments(tmp_path / "run"), other), *["of process 1 is not that of process 0"] * 2
    )


def test_waiting_for_others_has_an_end(compiled, tmp_path):
    """For either process, at the same time: each waits for its own other one."""
    began, command = time.monotonic(), arguments(tmp_path / "run", "--rendezvous_timeout=4")
    ports = [free_port(), free_port()]
    members = [
        Member(compiled, tmp_path / f"log{index}", command, (ports[index], index))
        for index in (0, 1)
    ]
    assert statuses(members) == [2, 2], members[0].log + members[1].log
    assert time.monotonic() - began >= 4
    for index, member in enumerate(members):
        place = f"process {index} of 2, coordinator 127.0.0.1:{ports[index]}"
        assert f"{place}: waiting up to 4 s for the others\n" in member.log
        assert member.log.endswith(
            "error: not all processes came within 4 s; start all of them again.\n"
        )
    assert not (tmp_path / "run").exists()


def test_a_machine_where_jax_finds_no_others_is_told_so(compiled, tmp_path):
    command = arguments(tmp_path / "run", "--distributed=tpu")
    member = Member(compiled, tmp_path / "log", command)
    assert member.status() == 2, member.log
    (line,) = [line for line in member.log.splitlines() if line.startswith("error: ")]
    assert "--distributed=tpu" in line and "--distributed=explicit" in line
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- other meshes, other ways to meet


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["(2,2,1)", "(1,2,2)"])
def test_any_mesh_over_two_processes_trains_as_one_process_does(alone, start, tmp_path, mesh):
    members = start(arguments(tmp_path / "run", "--config.evaluation.kind=none", mesh=mesh))
    assert statuses(members) == [0, 0], members[0].log + members[1].log
    for one, two in zip(metrics(alone), metrics(tmp_path / "run"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def meet(job: dict[str, str], pipe) -> None:
    """Connect as a task of a job; send what was said, and the largest index of a process."""
    os.environ.update(job)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        distributed.connect("slurm")
        largest = distributed.max_over_processes(jax.process_index())
    pipe.send((said.getvalue(), largest))
    jax.distributed.shutdown()  # as JAX does when Python ends


def test_slurm_tells_where_to_meet():
    """What `launch/train_slurm.sh` relies on: JAX reads Slurm's variables."""
    job = {
        "SLURM_JOB_ID": "7",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_LOCALID": "0",
    }
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
    tasks = [
        start_process(meet, job | {"SLURM_PROCID": str(index)}, theirs)
        for index, (_, theirs) in enumerate(pipes)
    ]
    for index, (task, (ours, theirs)) in enumerate(zip(tasks, pipes, strict=True)):
        theirs.close()
        said, largest = ours.recv()
        task.join(LIMIT)
        assert task.exitcode == 0 and largest == 1
        assert "--distributed=slurm: waiting up to" in said and f"process {index} of 2 (" in said
