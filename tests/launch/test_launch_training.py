"""The launch scripts that train on one machine with GPUs, and in Slurm; nothing is downloaded."""

import os
import shutil
import signal
import subprocess

import pytest
from launching import ROOT, as_json, dry_run, installing, one_error, program

GPU = ["--config=configs/digits.py:diffusion", "--workdir=a run"]
NVIDIA_SMI = '#!/usr/bin/env bash\n[ "$*" = -L ] && printf "GPU 0: H100\\nGPU 1: H100\\n"\n'
SHOW = 'env | grep -E "^(XLA|JAX|CUDA|DJEPA_D)" | sort >>"$LOG"'


def test_dry_run_of_gpus(machine):
    commands = dry_run(
        machine,
        "train_gpu.sh",
        *GPU,
        "--gpus=0,1",
        "--config.seed=1",
        "--dry_run",
        "--",
        "--mode=sample",
        "--out=b c",
    )
    settings = [
        "env",
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",
        "JAX_PLATFORMS=cuda,cpu",
        "CUDA_VISIBLE_DEVICES=0,1",
    ]
    last = program(machine, "djepa_jax.main", *GPU, "--config.seed=1", "--mode=sample", "--out=b c")
    assert commands == [["nvidia-smi", "-L"], *installing(machine, "jax[cuda13]"), settings + last]


@pytest.mark.parametrize("script", ["train_gpu.sh", "train_slurm.sh"])
def test_configuration_may_be_data(machine, script):
    command = dry_run(
        machine, script, as_json(machine), "--workdir=w", "--dry_run", "--config.seed=1"
    )[-1]
    assert command[-3:] == ["--config_json=configs/mine.json", "--workdir=w", "--config.seed=1"]


def test_gpus_train_in_one_process(machine):
    machine.install("nvidia-smi", NVIDIA_SMI)
    done = machine.launch(
        "train_gpu.sh", *GPU, "--gpus=1", "--config.seed=1", PROGRAM=f"{SHOW}; exit 7"
    )
    assert done.returncode == 7, done.stderr
    calls = machine.log()
    assert [call.split()[1] for call in calls[:3]] == ["venv", "pip", "pip"]
    assert (
        calls[3]
        == "-m djepa_jax.main --config=configs/digits.py:diffusion --workdir=a run --config.seed=1"
    )
    assert calls[4:] == [
        "CUDA_VISIBLE_DEVICES=1",
        "JAX_PLATFORMS=cuda,cpu",
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",
    ]
    # The second time nothing is installed; what is set stays.
    done = machine.launch(
        "train_gpu.sh",
        *GPU,
        PROGRAM=SHOW,
        XLA_PYTHON_CLIENT_MEM_FRACTION="0.5",
        JAX_PLATFORMS="cuda",
    )
    assert done.returncode == 0
    assert machine.log()[1:] == ["JAX_PLATFORMS=cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.5"]


def test_signals_reach_the_program(machine):
    machine.install("nvidia-smi", NVIDIA_SMI)
    assert machine.launch("train_gpu.sh", *GPU).returncode == 0
    wait = "trap 'exit 43' TERM; echo ready; for i in {1..100}; do sleep 0.1; done"
    child = subprocess.Popen(
        ["bash", str(machine.checkout / "launch/train_gpu.sh"), *GPU],
        env={**os.environ, **machine.environment, "PROGRAM": wait},
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGTERM)  # to the one process only
    assert child.wait(timeout=60) == 43


def test_no_gpu_is_one_line(machine):
    one_error(machine.launch("train_gpu.sh", *GPU), "no nvidia-smi here")
    machine.install("nvidia-smi", '#!/usr/bin/env bash\necho "NVIDIA-SMI has failed"\nexit 9\n')
    one_error(machine.launch("train_gpu.sh", *GPU), "finds no GPU: NVIDIA-SMI has failed")
    machine.install("nvidia-smi", '#!/usr/bin/env bash\necho "No devices found."\n')
    one_error(machine.launch("train_gpu.sh", *GPU), "finds no GPU: No devices found.")
    machine.install("nvidia-smi", NVIDIA_SMI)
    one_error(machine.launch("train_gpu.sh", *GPU, "--gpus=0,2"), "no GPU 2", "lists 0 to 1")
    assert machine.log() == [] and not (machine.checkout / ".venv").exists()


# ---- Slurm ---------------------------------------------------------------------------------------
# --------------------


def test_dry_run_of_slurm(machine):
    (command,) = dry_run(machine, "train_slurm.sh", *GPU, "--dry_run", "--config.seed=1")
    assert command[:4] == ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    settings = [
        "env",
        "DJEPA_DISTRIBUTED=slurm",
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",
        "JAX_PLATFORMS=cuda,cpu",
        "bash",
        "-c",
    ]
    assert (
        command[4:10] == settings and command[10].endswith('exec "$@"') and command[11] == "on_node"
    )
    assert command[12:] == program(machine, "djepa_jax.main", *GPU, "--config.seed=1")


def test_slurm_directives():
    text = (ROOT / "launch/train_slurm.sh").read_text()
    before_commands = text[: text.index("\nset ")]
    for directive in (
        "--signal=TERM@300",
        "--requeue",
        "--open-mode=append",
        "--ntasks-per-node=1",
    ):
        assert f"#SBATCH {directive}\n" in before_commands


@pytest.mark.parametrize(
    ("visible", "listed", "ids"),
    [("0,1,2,3", "", "0,1,2,3"), ("3", "", "0"), ("", "0\\n1\\n", "0,1"), ("", "", None)],
)
def test_slurm_gives_a_process_all_gpus_of_its_node(machine, visible, listed, ids):
    # JAX itself would take the GPU of the local rank only.
    machine.install(
        "srun", '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
    )
    machine.install("nvidia-smi", f'#!/usr/bin/env bash\nprintf "{listed}"\n')
    assert machine.launch("setup.sh", "cuda").returncode == 0
    machine.log()
    # Slurm runs a copy of the script, in the folder from which it was submitted.
    spool = machine.folder / "spool" / "job7"
    spool.mkdir(parents=True)
    shutil.copy(machine.checkout / "launch/train_slurm.sh", spool / "slurm_script")
    slurm = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": visible, "PROGRAM": f"{SHOW}; exit 5"}
    command = ["bash", str(spool / "slurm_script"), *GPU]
    environment = {**os.environ, **machine.environment, **slurm}
    done = subprocess.run(
        command, cwd=machine.checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 5, done.stderr
    calls = machine.log()
    assert calls[0] == "-m djepa_jax.main --config=configs/digits.py:diffusion --workdir=a run"
    assert "DJEPA_DISTRIBUTED=slurm" in calls
    assert [call for call in calls if call.startswith("JAX_LOCAL")] == (
        [] if ids is None else [f"JAX_LOCAL_DEVICE_IDS={ids}"]
    )
    one_error(
        subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True),
        "not the repository",
        "--chdir",
    )


def test_slurm_script_outside_of_slurm(machine):
    assert machine.launch("setup.sh", "cpu").returncode == 0
    one_error(
        machine.launch("train_slurm.sh", *GPU, "--platform=cpu", SLURM_JOB_ID=""),
        "submit it: sbatch",
    )
