"""The Python interface in a fresh interpreter: what it needs installed, and where compiled programs
are kept.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).parents[2]
NEEDED = {"jax", "flax", "optax", "orbax-checkpoint", "etils", "einops", "numpy", "pillow"}
NEEDED |= {"tqdm"}
MODULES = {"scikit-learn": "sklearn"}  # of distributions that are imported under another name
NEVER = {"torch", "tensorflow", "tensorflow_datasets", "pytest"}

PROGRAM = """
import json, sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    '''Finds what is installed, but for some packages.'''

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        is_blocked = name.partition(".")[0] in {blocked!r}
        return None if is_blocked else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Installed if finder is PathFinder else finder for finder in sys.meta_path]
import djepa_jax, jax
cache = {{"hits": 0, "misses": 0}}

def listen(event, **_):
    for name in cache:
        cache[name] += event == f"/jax/compilation_cache/cache_{{name}}"

jax.monitoring.register_event_listener(listen)
m = djepa_jax.load({path!r})
result = {{"encode": m.encode(jax.numpy.zeros((3, 8, 8, 1), "uint8"), labels=[3, 3, 7]).shape}}
if {sample!r}:
    result["sample"] = m.sample([3, 3, 7], seed=0, cfg_scale=2.0, num_ar_steps=2).shape
    result["stream"] = next(m.stream([3, 3, 7], seed=0, num_ar_steps=2)).shape
result |= {{"cache": cache, "folder": jax.config.jax_compilation_cache_dir}}
result["imported"] = sorted({blocked!r} & sys.modules.keys())
print(json.dumps(result))
"""


def blocked() -> set[str]:
    """Everything in requirements.txt that the interface does without, by the name it is imported
    under.
    """
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    distributions = {re.match(r"[\w.-]+", line)[0] for line in lines}
    assert distributions >= NEEDED
    return {MODULES.get(name, name.replace("-", "_")) for name in distributions - NEEDED} | NEVER


def run(workdir: str, sample: bool, **environment) -> dict:
    """What the program printed, run with an environment that says nothing else about caches."""
    program = PROGRAM.format(blocked=blocked(), path=workdir, sample=sample)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))
    }
    always = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    always |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | always | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_blocked_can_be_found_otherwise():
    """A misspelt name would block nothing."""
    assert {"grain", "sklearn", "safetensors", "tensorboardX", "ml_collections"} <= blocked()
    for name in blocked() - NEVER:
        __import__(name)


def test_few_packages_are_needed_and_programs_are_kept(trained, tmp_path):
    """In the user's cache folder, or in the one that JAX was given: with what is there already,
    nothing is compiled again.
    """
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir(), other.mkdir()
    folder = home / "djepa_jax" / f"jax-{jax.__version__}"
    first = run(trained, sample=True, XDG_CACHE_HOME=str(home))
    assert first["sample"] == first["stream"] == [3, 8, 8, 1]
    assert first["encode"] == [3, 16, 16] and first["imported"] == []
    assert first["folder"] == str(folder) and first["cache"]["misses"] > 0
    assert any(folder.iterdir())
    given = {"XDG_CACHE_HOME": str(other), "JAX_COMPILATION_CACHE_DIR": str(folder)}
    second = run(trained, sample=False, **given)
    assert second["folder"] == str(folder) and not any(other.iterdir())
    assert second["cache"]["misses"] == 0 and second["cache"]["hits"] > 0
