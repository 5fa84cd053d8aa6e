"""The launch script that trains on Cloud TPU, with a cloud that is not the real one; nothing is
downloaded.
"""

import os
import re
import shlex
import signal
import subprocess

import pytest
from launching import ROOT, Machine, commit, dry_run, one_error
from waiting import LIMIT

TPU = ["--name=t", "--zone=z", "--accelerator_type=v6e-8", "--poll_seconds=0"]
TPU += ["--config=configs/digits.py", "--workdir=gs://b/run"]

# Plays the states in the files "requests" and "nodes" (a line each time; the last stays) and, for
# the program, the lines of "runs": a status; "wait" until it is ended; "real" runs the command in
# the folder "vm".
FAKE_GCLOUD = """
next() {
  local line
  line=$(head -n 1 "$HOME/$1")
  [ "$(wc -l <"$HOME/$1")" -le 1 ] || sed -i 1d "$HOME/$1"
  echo "$line"
}
state() {
  [ "$1" != DENIED ] || { printf 'ERROR: PERMISSION_DENIED: no.\\n\\n' >&2; exit 1; }
  [ "$1" = ABSENT ] || echo "$1"
}
printf 'gcloud %s\\n' "$(printf '%q ' "${@:3}")" >>"$LOG"
for last; do case $last in --command=*) command=${last#--command=} ;; esac; done
case "$3 $4" in
  "queued-resources list") state "$(next requests)" ;;
  "tpu-vm list") state "$(next nodes)" ;;
  "queued-resources create") exit "$(next creations)" ;;
  "tpu-vm scp") [ ! -d "$HOME/vm" ] || cp "$5" "$HOME/vm/djepa_jax.tar.gz" ;;
  "tpu-vm ssh")
    case $command in *djepa_jax.main*) run=$(next runs) ;; *) run=$(next installations) ;; esac
    case $run in
      wait) echo waiting; exec sleep 600 ;; # no child: a signal while one is forked would be lost
      real) cd "$HOME/vm" && HOME=$PWD exec bash -c "$command" ;;
      *) exit "$run" ;;
    esac
    ;;
esac
"""
LOST, CUT, REPLACED = "1", "75", "76"  # statuses


@pytest.fixture
def cloud(machine):
    """Launches on a fake cloud: cloud(flags, requests="ABSENT ACTIVE", ...) gives the result and
    the calls.
    """
    machine.install("gcloud", FAKE_GCLOUD)
    commit(machine.checkout)

    def launch(*flags: str, environment=(), **plays):
        usual = dict(requests="ACTIVE", nodes="READY", runs="0", installations="0", creations="0")
        for name, lines in (usual | plays).items():
            (machine.folder / name).write_text("".join(f"{line}\n" for line in lines.split()))
        done = machine.launch("train_tpu_vm.sh", *TPU, *flags, **dict(environment))
        return done, [shlex.split(line)[1:] for line in machine.log() if line.startswith("gcloud ")]

    return launch


def kinds(calls: list[list[str]]) -> list[str]:
    """What was asked of gcloud, without the questions for the state."""
    names = {"create": "create", "delete": "delete", "scp": "copy", "ssh": "install"}
    done = [call for call in calls if call[1] != "list"]
    return ["train" if "djepa_jax.main" in str(call) else names[call[1]] for call in done]


START = ["copy", "install", "train"]
ANEW = ["delete", "create", *START]


def test_dry_run_of_tpu(machine):
    commit(machine.checkout)
    flags = ["--project=p", "--spot", "--cache=gs://b/a cache", "--autoencoder=gs://b/kl16.ckpt"]
    commands = dry_run(machine, "train_tpu_vm.sh", *TPU, *flags, "--config.seed=1")
    tpu, place = ["gcloud", "compute", "tpus"], ["--zone=z", "--quiet", "--project=p"]
    node = ["--node-id=t", "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e"]
    archive = ["build/t.tar.gz", "t:djepa_jax.tar.gz"]
    install = "mkdir -p djepa_jax && tar -xzf djepa_jax.tar.gz -C djepa_jax && cd djepa_jax"
    install += " && bash launch/tpu_worker.sh stop && bash launch/setup.sh tpu --install_python"
    assert commands[:4] == [
        [*tpu, "queued-resources", "create", "t", *node, "--spot", *place],
        ["git", "archive", "--format=tar.gz", "--output=build/t.tar.gz", "HEAD"],
        [*tpu, "tpu-vm", "scp", *archive, "--worker=all", *place],
        [*tpu, "tpu-vm", "ssh", "t", "--worker=all", f"--command={install}", *place],
    ]
    assert commands[4][:6] == [*tpu, "tpu-vm", "ssh", "t"] and commands[4][6] == "--worker=all"
    train = shlex.split(commands[4][7].removeprefix("--command=cd djepa_jax && "))
    assert train[:3] == ["bash", "launch/tpu_worker.sh", "follow"] and train[4] == "env"
    assert train[6:] == [
        *(".venv/bin/python", "-m", "djepa_jax.main"),
        *("--config=configs/digits.py", "--workdir=gs://b/run"),
        *("--config.data.path=gs://b/a cache", "--config.autoencoder.path=gs://b/kl16.ckpt"),
        *("--config.seed=1", "--distributed=tpu"),
    ]


def test_tpu_is_made_awaited_and_used_by_all_workers(cloud):
    states = dict(requests="ABSENT WAITING_FOR_RESOURCES ACTIVE", nodes="CREATING READY")
    done, calls = cloud("--spot", "--config=digits", **states)
    assert done.returncode == 0 and "the training is complete" in done.stdout, done.stderr
    assert kinds(calls) == ["create", *START] and "--spot" in calls[1]
    assert all("--worker=all" in call for call in calls[-3:])
    assert "gcloud compute tpus queued-resources delete t --force --zone=z" in done.stdout
    done, calls = cloud()  # it is there
    assert done.returncode == 0 and kinds(calls) == START


@pytest.mark.parametrize(
    ("status", "states"),
    [
        (LOST, dict(requests="ACTIVE ACTIVE SUSPENDING SUSPENDED ABSENT ACTIVE")),
        (
            CUT,
            dict(
                requests="ACTIVE " * 4 + "ABSENT ACTIVE",
                nodes="READY READY PREEMPTED PREEMPTED READY",
            ),
        ),
        (
            "134",
            dict(requests="ACTIVE " * 4 + "ABSENT ACTIVE", nodes="READY READY ABSENT ABSENT READY"),
        ),
    ],
)
def test_tpu_is_made_anew_after_a_preemption(cloud, status, states):
    done, calls = cloud("--max_restarts=1", runs=f"{status} 0", **states)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert kinds(calls) == [*START, *ANEW] and "restart 1 of 1" in done.stdout
    assert "--force" in next(call for call in calls if call[1] == "delete")


def test_tpu_that_stays_is_used_again(cloud):
    done, calls = cloud(runs=f"{LOST} {CUT} 0")
    assert done.returncode == 0 and kinds(calls) == START * 3
    runs = {re.search(r"follow (\S+)", str(call))[1] for call in calls if "follow" in str(call)}
    assert len(runs) == 3
    # A request that failed before there was a machine.
    done, calls = cloud(requests="FAILED FAILED ABSENT ACTIVE")
    assert done.returncode == 0 and kinds(calls) == ANEW


def test_tpu_gives_up_after_max_restarts(cloud):
    done, calls = cloud("--max_restarts=2", runs=LOST)
    assert done.returncode == 1 and kinds(calls) == START * 3
    assert "--max_restarts=2" in done.stdout and "queued-resources delete t" in done.stdout
    done, calls = cloud("--max_restarts=1", requests="ABSENT FAILED ABSENT FAILED ABSENT")
    assert done.returncode == 1 and kinds(calls) == ["create", "delete", "create", "delete"]


def test_tpu_ends_with_the_status_of_the_program(cloud):
    done, calls = cloud(runs="70")
    assert done.returncode == 70 and kinds(calls) == START and "status 70" in done.stdout
    done, calls = cloud(runs=REPLACED)
    one_error(done, "another launch has taken over")


def test_tpu_that_cannot_be_had_or_asked(cloud):
    done, calls = cloud(requests="DENIED")
    one_error(done, "gcloud cannot look for t", "PERMISSION_DENIED: no.")
    done, calls = cloud(requests="ABSENT", creations="1")
    one_error(done, "could not ask for t")
    done, calls = cloud(installations="2")
    assert done.returncode == 2 and kinds(calls) == START[:2]
    done, calls = cloud(requests="ACTIVE DENIED ACTIVE")  # later on it is asked again
    assert done.returncode == 0 and kinds(calls) == START


def test_training_on_the_tpu_goes_on_after_ctrl_c(cloud, machine):
    cloud()
    (machine.folder / "runs").write_text("wait\n")
    child = machine.start("train_tpu_vm.sh", *TPU)
    while "waiting" not in (line := child.stdout.readline()):
        assert line
    os.killpg(child.pid, signal.SIGINT)
    text, _ = child.communicate(timeout=LIMIT)
    assert child.returncode == 130 and "the training goes on" in text
    assert "queued-resources delete t" in text


def test_workers_run_the_committed_repository(cloud, machine):
    (machine.folder / "vm").mkdir()
    (machine.checkout / "launch/uncommitted").touch()
    play = 'echo "step 1"; printf "<%s>" "$@"; echo; exit 3'
    real = dict(runs="real", installations="real", environment={"PROGRAM": play})
    done, _ = cloud("--config.data.path=a  b's", **real)
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert not (machine.folder / "vm/djepa_jax/launch/uncommitted").exists()
    assert "[FakeDevice]" in done.stdout and "<--config.data.path=a  b's>" in done.stdout
    assert done.stdout.count("step 1\n") == 1


# ---- On a worker ---------------------------------------------------------------------------------


def follow(machine: Machine, run: str, play: str) -> subprocess.Popen:
    command = ["env", machine.environment["DJEPA_PYTHON"], "-m", "djepa_jax.main"]
    return machine.start("tpu_worker.sh", "follow", run, *command, PROGRAM=play)


WAIT = 'echo begun; for i in {1..12000}; do [ ! -f "$HOME/go" ] || break; sleep 0.05; done; '


def test_training_outlives_its_connection(machine):
    play = WAIT + "echo ended; exit 6"
    first = follow(machine, "run-1", play)
    assert first.stdout.readline() == "begun\n"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    again = follow(machine, "run-1", play)
    assert again.stdout.readline() == "begun\n"
    (machine.folder / "go").touch()
    text, _ = again.communicate(timeout=LIMIT)
    assert again.returncode == 6 and text == "ended\n"
    assert machine.log() == ["-m djepa_jax.main"]  # once


def test_another_launch_stops_the_training_first(machine):
    first = follow(machine, "run-1", 'trap "echo stopped; exit 0" TERM; ' + WAIT)
    assert first.stdout.readline() == "begun\n"
    assert machine.launch("tpu_worker.sh", "stop").returncode == 0
    text, _ = first.communicate(timeout=LIMIT)
    assert first.returncode == int(REPLACED) and text == "stopped\n"
    second = follow(machine, "run-2", "echo second")
    text, _ = second.communicate(timeout=LIMIT)
    assert second.returncode == 0 and text == "second\n"
    assert machine.launch("tpu_worker.sh", "stop").returncode == 0  # nothing runs


def test_training_that_was_told_to_stop_is_not_complete(machine):
    for run, (play, status) in enumerate(
        [
            ('echo "stopped at step 5 of 9; the same command goes on."', int(CUT)),
            ("kill -TERM $$", int(CUT)),  # before it could handle that
            ("kill -KILL $$", 137),
            ('echo "stopped at step 5 of 9; no."; exit 4', 4),
            ("exit 1", 70),  # 1 is what gcloud gives for a lost connection
        ]
    ):
        child = follow(machine, f"run-{run}", play)
        child.communicate(timeout=LIMIT)
        assert child.returncode == status, play
    # the words that tell it
    assert 'print(f"stopped at step {' in (ROOT / "djepa_jax/training/reporting.py").read_text()
