"""The launch scripts, run from elsewhere and in a path with spaces; nothing is downloaded."""

import os
import pathlib
import shutil
import subprocess

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
    target = tmp_path / "a path with spaces"
    target.mkdir()
    for name in ("launch", "configs", "djepa_jax"):
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
