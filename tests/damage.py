"""What happens to the files of a step, and what reads them after it."""

import pathlib
import random
from collections.abc import Callable

import jax
from tiny import tiny_config

from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.checkpoints.restore import find_model, placed_params
from djepa_jax.config import experiment as configuration
from djepa_jax.core import sharding


def resume(workdir: pathlib.Path) -> tuple[int | None, str]:
    """The step to resume from, and what was said."""
    said = []
    return Checkpoints(workdir).step_to_resume(said.append), "\n".join(said)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def array_files(step: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in files(step / "state") if path.parent.name == "d"]


def largest(step: pathlib.Path) -> pathlib.Path:
    return max(array_files(step), key=lambda path: path.stat().st_size)


def flip(path: pathlib.Path, rng: random.Random) -> bytes:
    """Change one byte of a file; what it was before."""
    whole = path.read_bytes()
    place, change = rng.randrange(len(whole)), rng.randrange(1, 256)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
    return whole


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def sampler_of(workdir: pathlib.Path) -> Callable:
    """Loads, on one device, the arrays that a run is sampled from."""
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    abstract = placed_params(configuration.build(tiny_config()), mesh)
    return lambda: jax.device_get(find_model(workdir).restore(abstract))
