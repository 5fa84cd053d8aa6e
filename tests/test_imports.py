"""Who may import what, and that importing the package touches no device and needs nothing heavy."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "djepa_jax"
# A folder imports those before it; `core` and `runtime` nothing of ours.
ROOMS = ["core runtime", "config", "checkpoints", "data", "sampling", "evaluation"]
ROOMS += ["serving training"]  # neither imports the other
CORE = {"jax", "flax", "optax", "einops", "numpy"} | set(sys.stdlib_module_names)
OWNERS = {  # package -> the only places that may import it
    "grain": "data",
    "tensorflow_datasets": "data",
    "orbax": "checkpoints",
    "torch": "checkpoints/convert",
    "clu": "runtime/metric_writer.py",
    "tensorboardX": "runtime/metric_writer.py",
    "huggingface_hub": "checkpoints/hub.py",
    "wandb": "runtime/metric_writer.py",
    "tensorflow": "nowhere",
}


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names of everything that a file imports, lazily or not."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = {path.relative_to(PACKAGE).as_posix(): imports(path) for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("level", range(len(ROOMS)))
def test_a_room_imports_those_before_it_and_nothing_else(level):
    for file, names in FILES.items():
        room = file.partition("/")[0]
        if room not in ROOMS[level].split():
            continue
        below = {*" ".join(ROOMS[:level]).split(), room, "__version__"}
        ours = {name.split(".")[1] for name in names if name.startswith("djepa_jax.")}
        assert ours <= below, f"{file} imports {ours - below}"
        if room == "core":  # a modality may write files, with a package imported then
            allowed = CORE | {"djepa_jax"} | ({"PIL", "av"} if "modalities" in file else set())
            assert {name.split(".")[0] for name in names} <= allowed, file


@pytest.mark.parametrize("package", OWNERS)
def test_heavy_packages_have_one_owner(package):
    users = [file for file, names in FILES.items() if package in {n.split(".")[0] for n in names}]
    assert all(file.startswith(OWNERS[package]) for file in users), users


def test_importing_touches_no_device():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'tensorflow', 'safetensors', "
        "'flatbuffers')); "  # not importable
        "import djepa_jax.main, djepa_jax.training.loop, djepa_jax.sampling.model, "
        "djepa_jax.checkpoints.export, djepa_jax.checkpoints.convert.import_weights; "
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
