"""The launch scripts in a copy of the repository, on a machine whose programs are not the real
ones.
"""

import os
import pathlib
import shlex
import shutil
import subprocess

ROOT = pathlib.Path(__file__).parents[1]


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


# Takes the place of Python everywhere: notes its arguments, makes environments that hold itself,
# runs $PROGRAM.
FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$LOG"
case "$*" in
  --version) echo "Python 3.12.1" ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-c import jax"*) echo "[FakeDevice]" ;;
  "-m djepa_jax.data.ilsvrc"*) exit "${IMAGENET_STATUS:-0}" ;;
  "-m djepa_jax.main"*) eval "${PROGRAM:-}" ;;
esac
"""
TOOLS = (
    "bash basename cat chmod cmp cp date dirname env find git grep gzip head hostname mkdir "
    "mktemp mv paste rm sed seq "
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


def commit(checkout: pathlib.Path) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (
        ["init", "-q"],
        ["add", "launch", "configs", "requirements.txt", "pyproject.toml"],
        [*identity, "commit", "-qm", "x"],
    ):
        subprocess.run(
            ["git", *command],
            cwd=checkout,
            check=True,
            env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"},
        )


def one_error(done, *texts: str) -> None:
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, (
        done.returncode,
        done.stdout,
        done.stderr,
    )
    assert done.stderr.startswith("error: ") and all(text in done.stderr for text in texts), (
        done.stderr
    )


TPU = [
    "--name=t",
    "--zone=z",
    "--accelerator_type=v6e-8",
    "--config=configs/digits.py",
    "--workdir=gs://b/run",
]


def installing(machine: Machine, jax: str, extra: str = "") -> list[list[str]]:
    """The commands that make .venv."""
    pip = [
        str(machine.checkout / ".venv/bin/python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
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
    assert [
        (path, path.stat().st_mtime_ns) for path in sorted(machine.checkout.rglob("*"))
    ] == before
    assert machine.log() == []
    return [shlex.split(line) for line in done.stdout.splitlines()]


def as_json(machine: Machine) -> str:
    """A configuration as data, beside the others."""
    (machine.checkout / "configs/mine.json").write_text("{}")
    return "--config_json=configs/mine.json"
