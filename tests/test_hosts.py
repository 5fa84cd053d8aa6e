"""Several processes that train together: real ones, connected over loopback."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import assert_close
from etils import epath
from processes import Member
from tiny import CONFIG, TINY

from djepa_jax import hosts
from djepa_jax.checkpoint import Checkpoints
from djepa_jax.lock import lock_workdir
from djepa_jax.main import main
from djepa_jax.orbax_io import restore_arrays, stored_arrays

STEPS, EVERY, HEARTBEAT = 12, 4, 10
MESH = "(1,4,1)"  # parameters are split over the processes, as the batch is
SLOWLY = 0.5  # seconds between steps of a run that is to be interrupted
SLACK = 20  # seconds more than what is promised, on a busy machine


def arguments(workdir, *extra: str, mesh: str = MESH) -> tuple[str, ...]:
    run = (f"--config.num_steps={STEPS}", f"--config.checkpoint_every={EVERY}", f"--config.mesh={mesh}")
    return (f"--config={CONFIG}", f"--workdir={workdir}", *TINY, *run, "--config.data.random_flip=True", *extra)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> str:
    """Where all processes keep compiled programs."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def start(compiled, tmp_path):
    """Starts both processes of a run; what still runs at the end is killed."""
    members = []

    def both(*commands: tuple[str, ...], pause: float = 0) -> list[Member]:
        commands, port = commands if len(commands) == 2 else commands * 2, free_port()
        for index, command in enumerate(commands):
            members.append(Member(compiled, tmp_path / f"log{len(members)}", command, (port, index), pause))
        return members[-2:]

    yield both
    for member in members:
        member.process.kill()
        member.process.join()


def statuses(members: list[Member], seconds: float = 240) -> list[int | None]:
    return [member.status(seconds) for member in members]


def final_arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, by path."""
    folder = epath.Path(workdir) / "checkpoints" / str(STEPS) / "state"
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), stored_arrays(folder))
    restored = jax.tree_util.tree_leaves_with_path(restore_arrays(folder, wanted))
    return {jax.tree_util.keystr(path): np.asarray(array) for path, array in restored}


def assert_same_arrays(workdir: pathlib.Path, expected: pathlib.Path, tolerance: float = 0) -> None:
    """None differs by more than `tolerance`, nor by much of its own size where it is small."""
    actual, expected = final_arrays(workdir), final_arrays(expected)
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_allclose(actual[path], array, rtol=0, atol=tolerance, err_msg=path)
        assert_close(actual[path], array, 100 * tolerance)


def metrics(workdir: pathlib.Path) -> list[dict]:
    """The lines of training steps."""
    return [line for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


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
    members = [Member(compiled, workdir / f"log{index}", arguments(workdir), (port, index)) for index in (0, 1)]
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
    one, two = (json.loads((workdir / "evaluation.json").read_text()) for workdir in (alone, together[0]))
    assert two["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=1e-3)


def test_only_the_first_process_writes_and_speaks(together):
    workdir, (first, second) = together
    assert [line["step"] for line in metrics(workdir)] == list(range(1, STEPS + 1))
    assert len(list(workdir.glob("events.out.tfevents*"))) == 1
    assert "Training is complete" in first.log
    awaited, connected = second.log.splitlines()
    assert awaited.startswith("process 1 of 2, coordinator 127.0.0.1:") and awaited.endswith("up to 300 s for the others")
    assert connected.startswith("process 1 of 2 is connected")
    assert not list(workdir.glob(".shared*"))


# ---------------------------------------------------------------- ends that were not planned


def assert_goes_on(start, workdir: pathlib.Path, expected: pathlib.Path) -> None:
    """The same command comes to the same bits, and every step is recorded once."""
    members = start(arguments(workdir, "--config.evaluation.kind=none"))
    assert statuses(members) == [0, 0], members[0].log + members[1].log
    assert "going on from step" in members[0].log
    assert_same_arrays(workdir, expected)
    assert [line["step"] for line in metrics(workdir)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("which, number", [(1, signal.SIGTERM), pytest.param(0, signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_stops_both_and_the_same_command_goes_on(together, start, tmp_path, which, number):
    members = start(arguments(tmp_path / "run"), pause=SLOWLY)
    members[0].wait_for("step 2/")
    began = time.monotonic()
    os.kill(members[which].process.pid, number)
    assert statuses(members) == [0, 0], members[0].log + members[1].log
    print(f"seconds from {number.name} to the end of both: {time.monotonic() - began:.1f}")
    assert time.monotonic() - began < HEARTBEAT + SLACK
    step = Checkpoints(tmp_path / "run").latest_step()
    assert 2 <= step < STEPS
    assert f"a process was asked to stop: saving step {step}" in members[0].log
    assert f"stopped at step {step} of {STEPS}; the same command goes on from there." in members[0].log
    assert_goes_on(start, tmp_path / "run", together[0])


SLOW_KILLS = [pytest.param(which, True, marks=pytest.mark.slow) for which in (0, 1)]


@pytest.mark.parametrize("which, go_on", [(1, False), *SLOW_KILLS])
def test_when_one_is_killed_the_other_ends_and_the_same_command_goes_on(together, start, tmp_path, which, go_on):
    members = start(arguments(tmp_path / "run"), pause=SLOWLY)
    members[0].wait_for(f"saved step {EVERY}")
    began = time.monotonic()
    members[which].process.kill()
    other = members[1 - which]
    assert other.status(HEARTBEAT + SLACK) not in (0, None), other.log
    print(f"seconds from the kill to the end of the other, with {other.status()}: {time.monotonic() - began:.1f}")
    assert "another process has ended" in other.log or "another task died" in other.log
    if go_on:
        assert_goes_on(start, tmp_path / "run", together[0])


@pytest.mark.slow
def test_a_second_interrupt_ends_the_process_at_once(start, tmp_path):
    first, second = start(arguments(tmp_path / "run"), pause=5)
    first.wait_for("step 1/")
    os.kill(first.process.pid, signal.SIGINT)
    first.wait_for("press Ctrl-C again", 10)
    began = time.monotonic()
    os.kill(first.process.pid, signal.SIGINT)
    assert first.status() == -signal.SIGINT and time.monotonic() - began < 2
    assert second.status(HEARTBEAT + SLACK) not in (0, None)


# ---------------------------------------------------------------- what cannot work


def assert_refused(members: list[Member], *messages: str) -> None:
    """Both end with status 2, each with its line."""
    assert statuses(members, 60) == [2, 2], members[0].log + members[1].log
    for member, message in zip(members, messages, strict=True):
        assert "\nerror: " in member.log and message in member.log, member.log


def test_a_workdir_in_use_is_refused_by_both(start, tmp_path):
    with lock_workdir(tmp_path):
        assert_refused(start(arguments(tmp_path)), f"is in use by process {os.getpid()} on", "process 0 cannot go on")


def test_checkpoints_that_the_first_process_cannot_use_end_both(together, start, tmp_path):
    shutil.copytree(together[0], tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(step / "state")
    assert_refused(start(arguments(tmp_path / "run")), "can be used, and nothing was changed", "process 0 cannot go on")


def test_workdirs_that_are_not_shared_are_refused_by_both(start, tmp_path):
    (tmp_path / "two").mkdir()
    members = start(arguments(tmp_path / "one"), arguments(tmp_path / "two"))
    assert_refused(members, *["is not the same folder for all processes"] * 2)
    assert not list((tmp_path / "two").iterdir())


def test_unlike_commands_are_refused_by_both(start, tmp_path):
    other = arguments(tmp_path / "run", f"--restore_from={tmp_path / 'other'}")
    assert_refused(start(arguments(tmp_path / "run"), other), *["of process 1 is not that of process 0"] * 2)


@pytest.mark.parametrize("index", [0, 1])
def test_waiting_for_others_has_an_end(compiled, tmp_path, index):
    began = time.monotonic()
    log, port = tmp_path / "log", free_port()
    member = Member(compiled, log, arguments(tmp_path / "run", "--rendezvous_timeout=5"), (port, index))
    assert member.status(5 + SLACK) == 2, member.log
    assert time.monotonic() - began >= 5
    lines = member.log.splitlines()
    assert lines[0] == f"process {index} of 2, coordinator 127.0.0.1:{port}: waiting up to 5 s for the others"
    assert lines[1].startswith("still waiting for the others, ") and lines[1].endswith(" s left")
    assert lines[-1] == "error: not all processes came within 5 s; start all of them again."
    assert not (tmp_path / "run").exists()


EXPLICIT = {"kind": "explicit", "coordinator": "host:1", "num_processes": 2, "process_id": 1}
WRONG = [
    ({"kind": "mpi"}, 'DJEPA_DISTRIBUTED) is "mpi"; it must be one of none, tpu, slurm, explicit'),
    (EXPLICIT | {"coordinator": ""}, "--distributed=explicit needs --coordinator"),
    (EXPLICIT | {"coordinator": "host"}, '--coordinator is "host"; it must be HOST:PORT'),
    (EXPLICIT | {"num_processes": 0}, "--distributed=explicit needs --num_processes"),
    (EXPLICIT | {"process_id": -1}, "--distributed=explicit needs --process_id"),
    (EXPLICIT | {"process_id": 2}, "--process_id is 2; it must be below --num_processes, 2"),
    ({"num_processes": 2}, "--num_processes is only for --distributed=explicit"),
    ({"kind": "tpu", "process_id": 0}, "--process_id is only for --distributed=explicit"),
    (EXPLICIT | {"timeout": 0}, "must be at least 1"),
    (EXPLICIT | {"heartbeat": 0}, "must be at least 1"),
]


@pytest.mark.parametrize("settings, message", WRONG)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(hosts.HostsError) as caught:
        hosts.Rendezvous(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_flags_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(hosts.VARIABLE, "explicit")  # as launch scripts set it
    assert main(["djepa_jax", *arguments(tmp_path / "run"), "--coordinator=host:1"]) == 2
    assert capsys.readouterr().err == "error: --distributed=explicit needs --num_processes.\n"
    assert not (tmp_path / "run").exists()


def test_slurm_is_asked_only_when_told_to(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("connected by accident"))
    job = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}
    hosts.start(hosts.Rendezvous(), environment=job)
    hosts.start(hosts.Rendezvous("slurm"), environment=job | {"SLURM_NTASKS": "1"})
    with pytest.raises(hosts.HostsError, match="SLURM_PROCID is not set: start the processes with srun"):
        hosts.start(hosts.Rendezvous("slurm"), environment={"SLURM_NTASKS": "2"})


# ---------------------------------------------------------------- other meshes, other ways to meet


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["(4,1,1)", "(2,2,1)", "(1,2,2)", "(2,1,2)"])
def test_any_mesh_over_two_processes_trains_as_one_process_does(alone, start, tmp_path, mesh):
    members = start(arguments(tmp_path / "run", "--config.evaluation.kind=none", mesh=mesh))
    assert statuses(members) == [0, 0], members[0].log + members[1].log
    for one, two in zip(metrics(alone), metrics(tmp_path / "run"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def slurm_job() -> str:
    """A job number that gives JAX a port which is free."""
    for number in range(1, 4096):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", 65536 - 4096 + number))
            return str(number)
    raise OSError("no free port")


@pytest.mark.slow
def test_slurm_tells_where_to_meet(together, compiled, tmp_path):
    """The command line as `launch/train_slurm.sh` runs it."""
    job = {"SLURM_JOB_ID": slurm_job(), "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0"}
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    where = {
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": f"{compiled}/slurm",
        "JAX_PLATFORMS": "cpu",
        hosts.VARIABLE: "slurm",
    }
    command = [sys.executable, "-m", "djepa_jax.main", *arguments(tmp_path / "run")]
    children = [
        subprocess.Popen(command, env=os.environ | where | job | {"SLURM_PROCID": str(index)}, stdout=subprocess.PIPE, text=True)
        for index in (0, 1)
    ]
    outputs = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert f"process 1 of 2 in Slurm job {job['SLURM_JOB_ID']} on" in outputs[1]
    assert_same_arrays(tmp_path / "run", together[0])
