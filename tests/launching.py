"""The launch scripts in a copy of the repository, on a machine whose programs are not the real
ones.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

from waiting import LIMIT

ROOT = pathlib.Path(__file__).parents[1]
FILES = ("requirements.txt", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def copy_repository(folder: pathlib.Path, *names: str) -> pathlib.Path:
    target = folder / "a path with spaces"
    target.mkdir()
    for name in names:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    return target


# Takes the place of Python everywhere: notes its arguments, makes environments that hold itself,
# runs $PROGRAM.
FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$LOG"
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip"*) [ -z "${PIP_ERROR:-}" ] || { echo "2026 ERROR: $PIP_ERROR" >.venv/pip.log; exit 1; } ;;
  "-c import jax"*) echo "[FakeDevice]" ;;
  "-m djepa_jax.main"*) eval "${PROGRAM:-}" ;;
esac
"""
TOOLS = (
    "bash basename cat chmod cmp cp date dirname env find git grep gzip head hostname mkdir "
    "mktemp mv paste rm sed seq setsid sleep sort tail tar timeout touch wc"
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
        path.write_text(f"#!/usr/bin/env bash\n{text}")
        path.chmod(0o755)
        return path

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        """The script in the background, in a session of its own like that of a terminal."""
        # Tests that run in the background ignore SIGINT, and what is ignored cannot be trapped.
        restored = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        restored += "os.execvp('bash', sys.argv[1:])"
        script = str(self.checkout / "launch" / script)
        return subprocess.Popen(
            [sys.executable, "-c", restored, "bash", script, *arguments],
            env={**os.environ, **self.environment, **environment},
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def launch(self, script: str, *arguments: str, **environment: str):
        return subprocess.run(
            ["bash", str(self.checkout / "launch" / script), *arguments],
            env={**os.environ, **self.environment, **environment},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )

    def log(self) -> list[str]:
        """What was asked since the last time, except for Python's version."""
        path = self.folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line for line in lines if not line.startswith(("-c import sys", "--version"))]


def commit(checkout: pathlib.Path) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (
        ["init", "-q"],
        ["add", "launch", "configs", *FILES],
        [*identity, "commit", "-qm", "x"],
    ):
        environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
        subprocess.run(["git", *command], cwd=checkout, check=True, env=environment)


def one_error(done, *texts: str) -> None:
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(text in done.stderr for text in texts), done.stderr


def installing(machine: Machine, jax: str, extra: str = "") -> list[list[str]]:
    """The commands that make .venv."""
    pip = [str(machine.checkout / ".venv/bin/python"), "-m", "pip", "install", "--quiet"]
    pip += ["--progress-bar=off", "--disable-pip-version-check", "--log=.venv/pip.log"]
    return [
        [machine.environment["DJEPA_PYTHON"], "-m", "venv", ".venv"],
        [*pip, "setuptools>=77", "wheel", jax, "-r", "requirements.txt"],
        [*pip, "--no-build-isolation", "-e", f".{extra}"],
    ]


def program(machine: Machine, *arguments: str) -> list[str]:
    return [str(machine.checkout / ".venv/bin/python"), "-m", "djepa_jax.main", *arguments]


def dry_run(machine: Machine, script: str, *arguments: str) -> list[list[str]]:
    """The words of each command that the script would run; it runs none and changes nothing."""
    for name in ("gcloud", "srun", "nvidia-smi"):
        machine.install(name, 'echo "$0" >>"$LOG"\n')
    before = [(path, path.stat().st_mtime_ns) for path in sorted(machine.checkout.rglob("*"))]
    done = machine.launch(script, *arguments, "--dry_run")
    after = [(path, path.stat().st_mtime_ns) for path in sorted(machine.checkout.rglob("*"))]
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert after == before and machine.log() == []
    return [shlex.split(line) for line in done.stdout.splitlines()]
