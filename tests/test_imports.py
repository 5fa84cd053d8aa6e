"""Who may import what, and that importing the package touches no device and needs no framework but JAX."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "djepa_jax"
CORE = {"jax", "flax", "optax", "einops", "numpy", "djepa_jax"}
CORE_MODULES = [
    "models",
    "losses",
    "masking.py",
    "optimizer.py",
    "sharding.py",
    "train_step.py",
    "sample.py",
    "flops.py",
    "modalities",
]
# package -> the only places that may import it
OWNERS = {
    "grain": ["data"],
    "tensorflow_datasets": ["data"],
    "orbax": ["checkpoint.py", "orbax_io.py"],
    "clu": ["logs.py"],
    "tensorboardX": ["logs.py"],
    "sklearn": ["data", "evaluation"],
    "safetensors": ["interop"],
    "torch": ["interop"],
    "tqdm": ["generate.py"],
    "ml_collections": ["main.py"],
    "absl": ["main.py", "benchmark.py", "json_config.py"],
}
FORBIDDEN = {
    "losses": {"djepa_jax.models", "djepa_jax.sample", "djepa_jax.train"},
    "models": {"djepa_jax.losses", "djepa_jax.config", "djepa_jax.train_step"},
    "train_step.py": {"djepa_jax.train", "djepa_jax.main", "djepa_jax.generate"},
}


def imports(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(place: str) -> list[pathlib.Path]:
    path = PACKAGE / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("place", CORE_MODULES)
def test_core_needs_only_a_bare_accelerator_image(place):
    standard = set(sys.stdlib_module_names)
    for path in files(place):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= CORE | standard, f"{path.name} imports {roots - CORE - standard}"


@pytest.mark.parametrize("package", OWNERS)
def test_heavy_packages_have_one_owner(package):
    for path in PACKAGE.rglob("*.py"):
        if any(name.split(".")[0] == package for name in imports(path)):
            assert path.relative_to(PACKAGE).parts[0] in OWNERS[package], f"{path} imports {package}"


@pytest.mark.parametrize("place", FORBIDDEN)
def test_layers_point_downwards(place):
    for path in files(place):
        found = {name for name in imports(path) if any(name.startswith(f) for f in FORBIDDEN[place])}
        assert not found, f"{path} imports {found}"


def test_nothing_imports_tensorflow():
    for path in PACKAGE.rglob("*.py"):
        assert "tensorflow" not in {name.split(".")[0] for name in imports(path)}, path


def test_importing_touches_no_device():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'tensorflow', 'safetensors', 'flatbuffers')); "  # not importable
        "import djepa_jax.main, djepa_jax.train, djepa_jax.api, djepa_jax.export, djepa_jax.interop.importing; "
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
