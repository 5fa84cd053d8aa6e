"""Small finished runs of the tiny config, and what tests look at in a workdir."""

import hashlib
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from processes import Training
from tiny import CONFIG, TINY

from djepa_jax.core.sharding import path_name

STEPS, EVERY = 40, 20
# All runs have these, so that they share one compiled step.
RUN = (f"--config={CONFIG}", *TINY, f"--config.num_steps={STEPS}", "--config.evaluation.kind=none")


def compiled() -> str:
    """The folder of compiled programs that all processes of a test run share."""
    return jax.config.jax_compilation_cache_dir


def run(workdir: pathlib.Path, *arguments: str, **troubles) -> tuple[int, str]:
    """Train in a process of its own to the end: exit status and output. It saves every `EVERY`
    steps.
    """
    return Training(
        compiled(),
        *RUN,
        f"--config.checkpoint_every={EVERY}",
        f"--workdir={workdir}",
        *arguments,
        **troubles,
    ).finish()


def arrays(workdir: pathlib.Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Every array of a step, by path."""
    folder = workdir / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restore_args = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            reader.metadata(folder).item_metadata.tree,
        )
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=restore_args))
    return {
        path_name(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_arrays(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        np.testing.assert_array_equal(other[name], value, err_msg=name)


def digest(folder: pathlib.Path) -> dict[str, str]:
    """Every file and folder below one, but for the lock's file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def steps_in(workdir: pathlib.Path) -> list[str]:
    """Names of what is among the checkpoints."""
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())
