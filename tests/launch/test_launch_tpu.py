"""The launch script that trains on Cloud TPU, with a cloud that is not the real one; nothing is
downloaded.
"""

import os
import shlex
import signal
import subprocess

import pytest
from launching import ROOT, TPU, Machine, as_json, commit, dry_run, one_error

# Plays the states in the files "requests" and "nodes" (a line each time; the last stays) and, for
# the program, the lines
# of "runs": a status; "cut" for SIGTERM; "lost" for a lost connection; "real" runs the command in
# the folder "vm".
FAKE_GCLOUD = """#!/usr/bin/env bash
cd "$HOME"
next() {
  local line
  line=$(head -n 1 "$1")
  [ "$(wc -l <"$1")" -le 1 ] || sed -i 1d "$1"
  echo "$line"
}
state() {
  [ "$1" != ABSENT ] || { echo "ERROR: NOT_FOUND: Requested entity was not found." >&2; exit 1; }
  [ "$1" != DENIED ] || { printf 'ERROR: PERMISSION_DENIED: no.\\n\\n' >&2; exit 1; }
  echo "$1"
}
printf 'gcloud %s\\n' "$(printf '%q ' "${@:3}")" >>"$LOG"
for last; do case $last in --command=*) command=${last#--command=} ;; esac; done
case "$3 $4" in
  "queued-resources describe") state "$(next requests)" ;;
  "tpu-vm describe") state "$(next nodes)" ;;
  "queued-resources create") exit "$(next creations)" ;;
  "tpu-vm scp") [ ! -d vm ] || cp "$OLDPWD/$5" vm/djepa_jax.tar.gz ;;
  "tpu-vm ssh")
    run=0
    case $command in *djepa_jax.main*) run=$(next runs) ;; *setup.sh*) run=$(next installations) ;; esac
    case $run in
      lost) exit 1 ;;
      wait) echo waiting && sleep 10 ;;
      cut) echo "worker w-0: the training was cut off" ;;
      real) cd vm && HOME=$PWD exec bash -c "$command" ;;
      *) echo "worker w-0: the training ended with status $run"; exit "$run" ;;
    esac
    ;;
esac
"""


@pytest.fixture
def cloud(machine):
    """Launches on a fake cloud: cloud(flags, requests="ABSENT ACTIVE", ...) gives the result and
    the calls.
    """
    machine.install("gcloud", FAKE_GCLOUD)
    commit(machine.checkout)

    def start(
        *flags: str,
        requests="ACTIVE",
        nodes="READY",
        runs="0",
        installations="0",
        creations="0",
        **environment,
    ):
        plays = dict(
            requests=requests,
            nodes=nodes,
            runs=runs,
            installations=installations,
            creations=creations,
        )
        for name, lines in plays.items():
            (machine.folder / name).write_text("".join(f"{line}\n" for line in lines.split()))
        done = machine.launch("train_tpu_vm.sh", *TPU, "--poll_seconds=0", *flags, **environment)
        return done, [shlex.split(line)[1:] for line in machine.log() if line.startswith("gcloud ")]

    return start


def kinds(calls: list[list[str]]) -> list[str]:
    """What was asked of gcloud, without the questions for the state."""
    names = {"create": "create", "delete": "delete", "scp": "copy", "ssh": "install"}
    kinds = [names[call[1]] for call in calls if call[1] != "describe"]
    trains = ["djepa_jax.main" in str(call) for call in calls if call[1] != "describe"]
    return ["train" if train else kind for kind, train in zip(kinds, trains, strict=True)]


START = ["copy", "install", "train"]


def test_dry_run_of_tpu(machine):
    commit(machine.checkout)
    flags = ["--project=p", "--spot", "--config.data.path=a b", "--dry_run", "--", "--mode=train"]
    commands = dry_run(machine, "train_tpu_vm.sh", *TPU, *flags)
    tpu, place = ["gcloud", "compute", "tpus"], ["--zone=z", "--quiet", "--project=p"]
    run = commands[-1][7].split("--on_worker=")[1].split()[0]
    install = "mkdir -p djepa_jax && tar -xzf djepa_jax.tar.gz -C djepa_jax && cd djepa_jax"
    install += (
        " && bash launch/train_tpu_vm.sh --on_worker=stop && bash launch/setup.sh tpu "
        "--install_python"
    )
    train = (
        f"cd djepa_jax && bash launch/train_tpu_vm.sh --on_worker={run} -- env "
        "DJEPA_DISTRIBUTED=tpu JAX_PLATFORMS=tpu,cpu"
    )
    train += " .venv/bin/python -m djepa_jax.main --config=configs/digits.py --workdir=gs://b/run"
    train += " '--config.data.path=a b' --mode=train"
    node = [
        "--node-id=t",
        "--accelerator-type=v6e-8",
        "--runtime-version=v2-alpha-tpuv6e",
        "--spot",
    ]
    assert commands == [
        [*tpu, "queued-resources", "describe", "t", "--format=value(state.state)", *place],
        [*tpu, "queued-resources", "create", "t", *node, *place],
        ["git", "archive", "--format=tar.gz", "--output=build/t.tar.gz", "HEAD"],
        [*tpu, "tpu-vm", "scp", "build/t.tar.gz", "t:djepa_jax.tar.gz", "--worker=all", *place],
        [*tpu, "tpu-vm", "ssh", "t", "--worker=all", f"--command={install}", *place],
        [*tpu, "tpu-vm", "ssh", "t", "--worker=all", f"--command={train}", *place],
    ]


@pytest.mark.parametrize("place", ["configs/mine.json", "gs://b/mine.json"])
def test_configuration_of_a_tpu_may_be_data(machine, place):
    as_json(machine)
    commit(machine.checkout)
    commands = dry_run(
        machine, "train_tpu_vm.sh", *TPU[:3], f"--config_json={place}", TPU[4], "--dry_run"
    )
    assert f"djepa_jax.main --config_json={place} --workdir=gs://b/run" in commands[-1][7]


def test_tpu_takes_its_data_from_a_bucket(machine):
    commit(machine.checkout)
    data = ["--cache=gs://b/a cache", "--autoencoder=gs://b/kl16.ckpt"]
    commands = dry_run(
        machine, "train_tpu_vm.sh", *TPU, *data, "--dry_run", "--config.data.staging=/data"
    )
    assert commands[-1][7].endswith(
        " --workdir=gs://b/run '--config.data.path=gs://b/a cache' "
        "--config.autoencoder.path=gs://b/kl16.ckpt"
        " --config.data.staging=/data"
    )


def test_tpu_is_made_awaited_and_used_by_all_workers(cloud):
    done, calls = cloud(
        "--spot",
        requests="ABSENT WAITING_FOR_RESOURCES PROVISIONING ACTIVE",
        nodes="CREATING READY",
    )
    assert done.returncode == 0 and "the training is complete" in done.stdout, done.stderr
    assert kinds(calls) == ["create", *START] and "--spot" in calls[1]
    assert all("--worker=all" in call for call in calls[-3:])
    asked = [call[0] for call in calls if call[1] == "describe"]
    assert asked == ["queued-resources"] * 4 + ["tpu-vm", "queued-resources", "tpu-vm"]
    assert "gcloud compute tpus queued-resources delete t --force --zone=z --quiet" in done.stdout


def test_tpu_that_is_there_is_used(cloud):
    done, calls = cloud()
    assert done.returncode == 0 and kinds(calls) == START


@pytest.mark.parametrize(
    ("end", "states"),
    [
        ("lost", dict(requests="ACTIVE SUSPENDING SUSPENDED ABSENT ACTIVE")),
        (
            "cut",
            dict(
                requests="ACTIVE ACTIVE ACTIVE ABSENT ACTIVE",
                nodes="READY PREEMPTED PREEMPTED READY",
            ),
        ),
        (
            "134",
            dict(requests="ACTIVE ACTIVE ACTIVE ABSENT ACTIVE", nodes="READY ABSENT ABSENT READY"),
        ),
        ("0", dict(requests="FAILED ABSENT PROVISIONING ACTIVE")),
    ],
)
def test_tpu_is_made_anew_after_a_preemption(cloud, states, end):
    done, calls = cloud("--max_restarts=1", runs=f"{end} 0", **states)
    assert done.returncode == 0, (done.stdout, done.stderr)
    again = ["delete", "create", *START]
    assert kinds(calls) == (again if end == "0" else [*START, *again])
    assert ("the TPU is gone; restart 1 of 1" in done.stdout) == (end != "0")
    assert "--force" in next(call for call in calls if call[1] == "delete")


def test_tpu_that_stays_is_used_again(cloud):
    done, calls = cloud(
        runs="lost lost 0"
    )  # the connection only: the same training is looked at again
    assert done.returncode == 0 and kinds(calls) == [*START, "train", "train"]
    commands = {str(call) for call in calls if "djepa_jax.main" in str(call)}
    assert len(commands) == 1
    done, calls = cloud(runs="cut 0")  # stopped: from the last checkpoint
    assert done.returncode == 0 and kinds(calls) == [*START, *START]


def test_tpu_gives_up_after_max_restarts(cloud):
    done, calls = cloud("--max_restarts=2", runs="lost")
    assert done.returncode == 1 and kinds(calls) == [*START, "train", "train"]
    assert (
        "given up after --max_restarts=2" in done.stderr
        and "queued-resources delete t" in done.stdout
    )
    done, calls = cloud("--max_restarts=1", requests="ABSENT FAILED ABSENT FAILED ABSENT")
    assert done.returncode == 1 and kinds(calls) == ["create", "delete", "create", "delete"]


@pytest.mark.parametrize("status", [1, 2, 70])
def test_tpu_ends_with_the_status_of_the_program(cloud, status):
    done, calls = cloud(runs=str(status))
    assert (
        done.returncode == status
        and kinds(calls) == START
        and f"failed with status {status}" in done.stdout
    )


def test_tpu_that_cannot_be_had_or_asked(cloud):
    done, calls = cloud(requests="DENIED")
    one_error(done, "gcloud cannot describe t", "PERMISSION_DENIED: no.")
    done, calls = cloud(requests="ABSENT", creations="1")
    one_error(done, "could not ask for t")
    assert kinds(calls) == ["create"]
    done, calls = cloud(installations="2")
    assert done.returncode == 2 and kinds(calls) == START[:2]
    done, calls = cloud(nodes="STOPPED")
    one_error(done, "t is STOPPED")


def test_training_on_the_tpu_goes_on_after_ctrl_c(cloud, machine):
    cloud()
    (machine.folder / "runs").write_text("wait\n")
    child = start(machine, *TPU)
    while "waiting" not in (line := child.stdout.readline()):
        assert line
    os.killpg(child.pid, signal.SIGINT)
    text, _ = child.communicate(timeout=60)
    assert (
        child.returncode == 130
        and "a training on t goes on" in text
        and "queued-resources delete t" in text
    )


def start(machine: Machine, *arguments: str, **environment: str) -> subprocess.Popen:
    """The TPU script in the background, in a session of its own like that of a terminal or of a
    connection.
    """
    return subprocess.Popen(
        ["bash", str(machine.checkout / "launch/train_tpu_vm.sh"), *arguments],
        env={**os.environ, **machine.environment, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_tpu_without_gcloud_is_one_line(machine):
    commit(machine.checkout)
    one_error(machine.launch("train_tpu_vm.sh", *TPU), "no gcloud here")


def test_tpu_workers_run_the_committed_repository(cloud, machine):
    vm = machine.folder / "vm"
    vm.mkdir()
    (machine.checkout / "launch/uncommitted").touch()
    play = (
        'echo "step 1"; trap "echo stopped at step 5 of 9; exit 0" TERM; printf "<%s>" "$@"; '
        "echo; exit 3"
    )
    done, _ = cloud("--config.data.path=a  b's", runs="real", installations="real", PROGRAM=play)
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert (
        "note: changes that are not committed" in done.stdout
        and not (vm / "djepa_jax/launch/uncommitted").exists()
    )
    assert "[FakeDevice]" in done.stdout and "<--config.data.path=a  b's>" in done.stdout
    assert done.stdout.count("step 1\n") == 1 and "the training ended with status 3" in done.stdout


def on_worker(machine: Machine, run: str, play: str) -> subprocess.Popen:
    command = ["env", machine.environment["DJEPA_PYTHON"], "-m", "djepa_jax.main"]
    return start(machine, f"--on_worker={run}", "--", *command, PROGRAM=play)


def test_training_outlives_its_connection(machine):
    play = (
        'echo begun; for i in {1..200}; do [ ! -f "$HOME/go" ] || break; sleep 0.05; done; echo '
        "ended; exit 6"
    )
    first = on_worker(machine, "run-1", play)
    assert first.stdout.readline() == "begun\n"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    again = on_worker(machine, "run-1", play)
    assert again.stdout.readline() == "begun\n"
    (machine.folder / "go").touch()
    text, _ = again.communicate(timeout=60)
    assert (
        again.returncode == 6
        and text.startswith("ended\n")
        and text.endswith("ended with status 6\n")
    )
    assert machine.log() == ["-m djepa_jax.main"]  # once


def test_another_launch_stops_the_training_first(machine):
    play = (
        'trap "echo stopped at step 5 of 9; exit 0" TERM; echo begun; for i in {1..200}; do sleep '
        "0.05; done"
    )
    first = on_worker(machine, "run-1", play)
    assert first.stdout.readline() == "begun\n"
    second = on_worker(machine, "run-2", "echo second")
    text, _ = first.communicate(timeout=60)
    assert (
        first.returncode == 2
        and "stopped at step 5" in text
        and "another launch has taken over" in text
    )
    text, _ = second.communicate(timeout=60)
    assert (
        second.returncode == 0
        and text.endswith("the training ended with status 0\n")
        and "second\n" in text
    )


@pytest.mark.parametrize(
    ("play", "status", "end"),
    [
        ('echo "stopped at step 5 of 9; the same command goes on from there."', 0, "was cut off"),
        ("kill -TERM $$", 143, "was cut off"),
        ("kill -KILL $$", 137, "ended with status 137"),
        ('echo "stopped at step 5 of 9; no."; exit 4', 4, "ended with status 4"),
    ],
)
def test_training_that_was_told_to_stop_is_not_complete(machine, play, status, end):
    child = on_worker(machine, "run-1", play)
    text, _ = child.communicate(timeout=60)
    assert child.returncode == status and text.endswith(f"the training {end}\n")
    assert (
        'print(f"stopped at step {' in (ROOT / "djepa_jax/main.py").read_text()
    )  # the words that tell it
