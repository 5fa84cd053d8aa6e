"""The launch scripts for machines with GPUs and for Slurm; nothing is downloaded."""

import os
import shutil
import signal
import subprocess

from launching import ROOT, dry_run, installing, one_error, program
from waiting import LIMIT

GPU = ["--config=configs/digits.py:diffusion", "--workdir=a run"]
NVIDIA_SMI = '[ "$*" = -L ] && printf "GPU 0: H100\\nGPU 1: H100\\n"\n'
CUBLAS = "XLA_FLAGS=--xla_gpu_enable_triton_gemm=false"
SHOW = 'env | grep -E "^(XLA|JAX|CUDA)" | sort >>"$LOG"'


def test_dry_run_of_gpus(machine):
    after = ["--mode=sample", "--out=b c"]
    commands = dry_run(machine, "train_gpu.sh", *GPU, "--gpus=0,1", "--config.seed=1")
    settings = ["env", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92", "JAX_PLATFORMS=cuda,cpu", CUBLAS]
    install = installing(machine, "jax[cuda13]")
    run = [*settings, "CUDA_VISIBLE_DEVICES=0,1", *program(machine, *GPU, "--config.seed=1")]
    assert commands == [*install, run]
    flags = ["--config_json=mine.json", "--workdir=w"]  # a configuration may be data
    done = machine.launch("train_gpu.sh", *flags, "--dry_run", "--", *after)
    assert done.stdout.endswith(" --config_json=mine.json --workdir=w --mode=sample --out=b\\ c\n")


def test_gpus_train_in_one_process(machine):
    machine.install("nvidia-smi", NVIDIA_SMI)
    done = machine.launch("train_gpu.sh", *GPU, "--gpus=1", PROGRAM=f"{SHOW}; exit 7")
    assert done.returncode == 7, done.stderr
    assert machine.log()[3:] == [
        "-m djepa_jax.main --config=configs/digits.py:diffusion --workdir=a run",
        "CUDA_VISIBLE_DEVICES=1",
        "JAX_PLATFORMS=cuda,cpu",
        CUBLAS,
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",
    ]
    # The second time nothing is installed; what is set stays.
    settings = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", "JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""}
    done = machine.launch("train_gpu.sh", *GPU, PROGRAM=SHOW, **settings)
    assert done.returncode == 0
    assert machine.log()[1:] == [f"{name}={settings[name]}" for name in sorted(settings)]


def test_signals_reach_the_program(machine):
    machine.install("nvidia-smi", NVIDIA_SMI)
    assert machine.launch("train_gpu.sh", *GPU).returncode == 0
    wait = "trap 'exit 43' TERM; echo ready; for i in {1..6000}; do sleep 0.1; done"
    child = machine.start("train_gpu.sh", *GPU, PROGRAM=wait)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)  # to the one process only
    assert child.wait(timeout=LIMIT) == 43


def test_no_gpu_is_one_line(machine):
    one_error(machine.launch("train_gpu.sh", *GPU), "no GPU", "launch/local.sh", "not found")
    machine.install("nvidia-smi", 'echo "NVIDIA-SMI has failed"\nexit 9\n')
    one_error(machine.launch("train_gpu.sh", *GPU), "no GPU", "NVIDIA-SMI has failed")
    machine.install("nvidia-smi", NVIDIA_SMI)
    one_error(machine.launch("train_gpu.sh", *GPU, "--gpus=0,2"), "no GPU 2", "0 to 1")
    assert machine.log() == [] and not (machine.checkout / ".venv").exists()


# ---- Slurm ---------------------------------------------------------------------------------------


def test_dry_run_and_directives_of_slurm(machine):
    (command,) = dry_run(machine, "train_slurm.sh", *GPU, "--config.seed=1")
    assert command[:4] == ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    settings = ["env", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92", "JAX_PLATFORMS=cuda,cpu", CUBLAS]
    assert command[4:10] == [*settings, "bash", "-c"] and command[11] == "on_node"
    assert command[12:] == program(machine, *GPU, "--config.seed=1")
    text = (ROOT / "launch/train_slurm.sh").read_text()
    directives = text[: text.index("\nset ")].splitlines()
    for wanted in ("--signal=TERM@300", "--requeue", "--open-mode=append", "--ntasks-per-node=1"):
        assert f"#SBATCH {wanted}" in directives


def test_job_of_slurm(machine):
    machine.install("srun", 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    assert machine.launch("setup.sh", "cuda").returncode == 0
    # Slurm runs a copy of the script, in the folder from which it was submitted.
    script = machine.folder / "spool" / "slurm_script"
    script.parent.mkdir()
    shutil.copy(machine.checkout / "launch/train_slurm.sh", script)

    def job(visible: str, listed: str, *flags: str, **settings):
        machine.install("nvidia-smi", f'printf "{listed}"\n')
        machine.log()
        slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "PROGRAM": SHOW}
        environment = {**os.environ, **machine.environment, **slurm, **settings}
        environment["CUDA_VISIBLE_DEVICES"] = visible
        command = ["bash", str(script), *GPU, *flags]
        return subprocess.run(
            command, cwd=machine.checkout, env=environment, capture_output=True, text=True
        )

    # A process gets all GPUs of its node; JAX itself would take the one of the local rank only.
    for visible, listed, ids in (
        ("0,1,2,3", "", ["0,1,2,3"]),
        ("3", "", ["0"]),
        ("", "0\\n1\\n", ["0,1"]),
        ("", "", []),
    ):
        done = job(visible, listed)
        assert done.returncode == 0, done.stderr
        call, *settings = machine.log()
        assert call == f"-m djepa_jax.main {' '.join(GPU)} --distributed=slurm"
        told = [line for line in settings if line.startswith("JAX_LOCAL")]
        assert told == [f"JAX_LOCAL_DEVICE_IDS={value}" for value in ids]
    # Preparing is done in shares.
    assert job("0", "", "--", "--mode=prepare", PROGRAM="exit 5").returncode == 5
    assert machine.log()[0].endswith(" --mode=prepare --shard=1/2")

    one_error(job("0", "", SLURM_JOB_ID=""), "submit it: sbatch")
    elsewhere = subprocess.run(["bash", str(script)], cwd="/", capture_output=True, text=True)
    one_error(elsewhere, "not the repository", "--chdir")


# ---- ImageNet ------------------------------------------------------------------------------------

IMAGENET = ["--tars=the tars", "--cache_dir=the cache"]


def test_dry_run_of_imagenet(machine):
    encode = program(machine, "--mode=prepare", "--config=configs/djepa_l.py")
    encode += ["--workdir=the cache", "--config.prepare.source=ilsvrc"]
    encode += ["--config.prepare.path=the tars", "--config.autoencoder.path=k"]
    flags = [*IMAGENET, "--platform=tpu", "--config.autoencoder.path=k"]
    commands = dry_run(machine, "prepare_imagenet.sh", *flags)
    assert commands == [*installing(machine, "jax[tpu]", "[gcs]"), encode]
    published = dry_run(machine, "prepare_imagenet.sh", *flags, "--publish=gs://b/cache/")
    rsync = ["rsync", "--recursive", "--exclude=^metadata\\.json$|^\\.lock"]
    assert published == [
        *commands,
        ["gcloud", "storage", *rsync, "the cache", "gs://b/cache"],
        ["gcloud", "storage", "cp", "the cache/metadata.json", "gs://b/cache/metadata.json"],
    ]


def test_only_a_finished_cache_is_published(machine):
    machine.install("gcloud", 'echo "gcloud ${*:1:2}" >>"$LOG"\n')
    flags = [*IMAGENET, "--publish=gs://b/cache", "--data_dir=x"]  # the last one: as it was once
    done = machine.launch("prepare_imagenet.sh", *flags, PROGRAM="exit 3")
    assert done.returncode == 3 and "--data_dir is no longer needed" in done.stderr
    assert "djepa_jax.main" in machine.log()[-1]
    assert machine.launch("prepare_imagenet.sh", *flags).returncode == 0
    assert machine.log()[-2:] == ["gcloud storage rsync", "gcloud storage cp"]


def test_imagenet_is_shared_between_the_processes_of_srun(machine):
    step = {"SLURM_STEP_NODELIST": "a,b", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    one_error(machine.launch("prepare_imagenet.sh", *IMAGENET, **step), "launch/setup.sh cpu")
    assert machine.launch("setup.sh", "cpu").returncode == 0
    machine.install("gcloud", "")
    done = machine.launch("prepare_imagenet.sh", *IMAGENET, "--publish=gs://b/c", **step)
    one_error(done, "--publish", "without srun")
    machine.log()
    done = machine.launch("prepare_imagenet.sh", *IMAGENET, **step)
    assert done.returncode == 0 and machine.log()[0].endswith(" --shard=1/2")
