"""Arrays in folders, as Orbax writes and reads them: of the shapes and types that are wanted."""

import dataclasses

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from djepa_jax.checkpoints import integrity
from djepa_jax.checkpoints.integrity import CheckpointError, DamagedError
from djepa_jax.core.sharding import path_name
from djepa_jax.runtime.storage import as_path


def restore_arrays(folder: epath.Path, abstract: dict) -> dict:
    """Part of the arrays that Orbax wrote; `abstract` gives shapes, dtypes and shardings.

    Raises:
        CheckpointError: an array is missing, or has another shape or type; JAX makes 32 bits of 64
            before types are compared.
        DamagedError: they cannot be read.
    """
    integrity.check_storable(folder)
    how = ocp.checkpoint_utils.construct_restore_args(abstract)
    how = jax.tree.map(lambda args: dataclasses.replace(args, dtype=None), how)  # as it is stored
    names = jax.tree.map(lambda _: 0, abstract)  # no arrays: Orbax would convert to their types
    arguments = ocp.args.PyTreeRestore(names, restore_args=how, partial_restore=True)
    try:
        with integrity.reading(folder), _reader() as reader:
            found = reader.restore(folder, args=arguments)
    except DamagedError:
        check_arrays(folder, abstract)  # perhaps nothing is damaged, and these are other arrays
        raise
    if _kinds(found) != _kinds(abstract):
        check_arrays(folder, abstract)
        raise CheckpointError(f"{folder} gives other arrays than the model needs.")
    return found


def _kinds(tree) -> list[tuple]:
    """Shapes and types of arrays; no type for what is not one."""
    return [(jnp.shape(leaf), getattr(leaf, "dtype", None)) for leaf in jax.tree.leaves(tree)]


def check_arrays(folder: epath.Path, abstract: dict) -> None:
    """Raise CheckpointError unless arrays in `folder` have the shapes and types that are wanted.

    Orbax would convert types, and leave out what is missing, without a word. This opens every array
    once, which takes as long as to read small ones.
    """
    with integrity.reading(folder), _reader() as reader:
        found = by_path(reader.metadata(folder).item_metadata.tree)
    for path, leaf in by_path(abstract).items():
        if path not in found:
            raise CheckpointError(f"{folder} has no array {path}, which the model needs.")
        shape, dtype = found[path].shape, found[path].dtype
        if (shape, dtype) != (leaf.shape, leaf.dtype):
            raise CheckpointError(
                f"{folder}: the array {path} has shape {shape} and type {dtype}, the model has "
                f"shape {leaf.shape} and type {leaf.dtype}."
            )


def save_arrays(folder: epath.Path, arrays: dict) -> None:
    """Write arrays with Orbax into a new folder."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(as_path(folder), args=ocp.args.PyTreeSave(arrays))


def _reader() -> ocp.Checkpointer:
    """Waits for no other process, so that one can read alone, beside the training."""
    alone = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()})
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=alone)


def by_path(tree) -> dict:
    """Leaves by their paths, as error messages name them."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
