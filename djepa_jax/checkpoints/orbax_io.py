"""What a checkpoint holds, and reading and writing it with Orbax.

A step is a folder with the item `state` (parameters, moving average, optimiser, counters; pure
dicts and arrays), the item `meta` (format number, resolved configuration, examples consumed,
fingerprints of the arrays) and a manifest with the checksum of every file, which is written last.
An imported step may hold less than a whole state: its `meta` names the parts.
"""

import contextlib
import dataclasses
import functools
import logging
import sys
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from djepa_jax.checkpoints.fingerprint import fingerprints, host_fingerprint
from djepa_jax.checkpoints.integrity import MANIFEST_NAME, check_manifest, read_manifest
from djepa_jax.core.optimizer import path_name
from djepa_jax.core.train_step import TrainState
from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.storage import may_pass

FORMAT = 1
CHUNK_BYTES = 2**22  # of imports and exports; what is written at a time
READ_BYTES = 2**26  # of arrays that are read back together
STATE_PARTS = tuple(field.name for field in dataclasses.fields(TrainState))


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged or of another kind; the message says which and what to
    do.
    """


class DamagedError(CheckpointError):
    """A step that cannot be what was written."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """What is stored beside the arrays."""

    format: int
    config: dict
    step: int
    examples: int
    parts: tuple[str, ...] = (
        STATE_PARTS  # of the training state that the step holds; `ema_params` is always one
    )
    fingerprints: dict[str, int] | None = (
        None  # of the arrays, by path; older steps have none, and no manifest
    )

    @property
    def to_be_sealed(self) -> bool:
        """Whether the step counts only with a manifest."""
        return self.fingerprints is not None


def read_meta(folder: epath.Path) -> Meta:
    """What is stored beside the arrays of the step in `folder`.

    Raises:
        DamagedError: it cannot be read, or is not as the step's manifest says.
        CheckpointError: its format is another.
    """
    try:
        if (folder / MANIFEST_NAME).exists():
            check_manifest(
                folder, [name for name in read_manifest(folder) if name.startswith("meta/")]
            )
        with _reader(ocp.JsonCheckpointHandler) as reader:
            stored = reader.restore(folder / "meta")
        if stored["format"] == FORMAT:
            return Meta(**stored | {"parts": tuple(stored.get("parts", STATE_PARTS))})
    except Exception as error:
        raise unreadable(folder, error) from error
    raise CheckpointError(f"{folder} has format {stored['format']}, this version reads {FORMAT}.")


def restore_state(folder: epath.Path, abstract: TrainState, meta: Meta) -> dict:
    """The parts of a training state in a step, by name; `abstract` gives shapes, dtypes and
    shardings.

    Raises:
        CheckpointError: the step does not hold exactly these arrays.
    """
    return _checked(folder, restore_arrays(folder / "state", _parts(abstract, meta)), meta)


def _parts(abstract: TrainState, meta: Meta) -> dict:
    return {name: getattr(abstract, name) for name in meta.parts}


def check_restorable(folder: epath.Path, abstract: TrainState, meta: Meta) -> None:
    """As far as can be told without reading arrays, make sure that `restore_state` will succeed.

    Raises:
        CheckpointError: the step does not hold exactly these arrays, or lacks a fingerprint.
    """
    wanted = _parts(abstract, meta)
    check_arrays(folder / "state", wanted)
    unknown = (
        []
        if meta.fingerprints is None
        else sorted(_by_name(wanted).keys() - meta.fingerprints.keys())
    )
    if unknown:
        raise DamagedError(
            f"{folder} has no fingerprint of the array {unknown[0]}. Nothing was overwritten."
        )


def restore_ema(folder: epath.Path, abstract: dict, meta: Meta) -> dict:
    """The moving average of the parameters alone; `abstract` gives shapes, dtypes and shardings.

    Raises:
        CheckpointError: the step does not hold exactly these arrays.
    """
    return _checked(folder, restore_arrays(folder / "state", {"ema_params": abstract}), meta)[
        "ema_params"
    ]


def _checked(folder: epath.Path, arrays: dict, meta: Meta) -> dict:
    """The arrays, found to have the fingerprints that they were saved with."""
    if meta.fingerprints is not None:
        for name, value in fingerprints(arrays).items():
            if meta.fingerprints.get(name) != value:
                raise DamagedError(
                    f"{folder}: the array {name} is not the one that was saved. Nothing was "
                    "overwritten."
                )
    return arrays


def restore_arrays(folder: epath.Path, abstract: dict) -> dict:
    """Part of the arrays that Orbax wrote into `folder`; `abstract` gives shapes, dtypes and
    shardings.

    Raises:
        DamagedError: they cannot be read.
        CheckpointError: one of them is missing, or has another shape or type.
    """
    check_arrays(folder, abstract)
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return _restore(
        folder,
        ocp.args.PyTreeRestore(item=abstract, partial_restore=True, restore_args=restore_args),
    )


def _reader(handler: type) -> ocp.Checkpointer:
    """Reads with a handler of Orbax; waits for no other process, so that one can read alone, beside
    the training.
    """
    alone = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()})
    return ocp.Checkpointer(handler(), multiprocessing_options=alone)


def _restore(folder: epath.Path, arguments: ocp.args.PyTreeRestore):
    try:
        with _reader(ocp.PyTreeCheckpointHandler) as reader:
            return reader.restore(folder, args=arguments)
    except Exception as error:
        raise unreadable(folder, error) from error


def stored_arrays(folder: epath.Path):
    """The tree of arrays that Orbax wrote into `folder`, shapes and types only."""
    try:
        with _quiet(), _reader(ocp.PyTreeCheckpointHandler) as reader:
            tree = reader.metadata(folder).item_metadata.tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    except Exception as error:
        raise unreadable(folder, error) from error


def _by_name(tree) -> dict:
    """The leaves of a tree by their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def check_arrays(folder: epath.Path, abstract: dict) -> None:
    """Compare shapes and types with what is wanted; Orbax would convert types, and cut or fill
    arrays, without a word.

    Raises:
        CheckpointError: one is missing or differs.
    """
    found = _by_name(stored_arrays(folder))
    for name, leaf in _by_name(abstract).items():
        if name not in found:
            raise CheckpointError(f"{folder} has no array {name}, which the model needs.")
        stored = found[name]
        if (stored.shape, stored.dtype) != (leaf.shape, leaf.dtype):
            raise CheckpointError(
                f"{folder}: the array {name} has shape {stored.shape} and type {stored.dtype}, "
                f"the model has shape {leaf.shape} "
                f"and type {leaf.dtype}."
            )


def read_back(folder: epath.Path, expected: dict[str, int]) -> None:
    """Read all arrays of a step from storage and compare their fingerprints; little memory is
    needed.

    Raises:
        DamagedError: an array is missing, cannot be read, or is not the one that was to be written.
    """
    tree = stored_arrays(folder / "state")
    found = _by_name(tree)
    if found.keys() != expected.keys():
        raise DamagedError(f"{folder} does not hold the arrays that were saved")
    for names in _groups(found):
        for name, array in _read_some(folder / "state", tree, names).items():
            if host_fingerprint(array) != expected[name]:
                raise DamagedError(
                    f"{folder}: the array {name} does not read back as it was written; the "
                    "storage is at fault"
                )


def _read_some(folder: epath.Path, tree, names: set[str]) -> dict[str, np.ndarray]:
    """Some arrays of the tree in `folder`, in the host's memory."""
    chosen = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path_name(path) in names else ocp.PLACEHOLDER, tree
    )
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), chosen)
    arguments = ocp.args.PyTreeRestore(item=chosen, restore_args=restore_args)
    return {
        name: np.asarray(array)
        for name, array in _by_name(_restore(folder, arguments)).items()
        if name in names
    }


def _groups(arrays: dict[str, jax.ShapeDtypeStruct]) -> Iterator[set[str]]:
    """Names of arrays that together have about `READ_BYTES`."""
    group, size = set(), 0
    for name, array in arrays.items():
        group, size = group | {name}, size + array.size * array.dtype.itemsize
        if size >= READ_BYTES:
            yield group
            group, size = set(), 0
    if group:
        yield group


def save_arrays(folder: epath.Path, arrays: dict) -> None:
    """Write arrays with Orbax into a new folder."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(folder, args=ocp.args.PyTreeSave(arrays))


def save_sparingly(folder: epath.Path, parts: dict, config: dict, step: int, examples: int) -> None:
    """Write a new step that holds only some parts of a training state, with little memory beside
    them.

    The arrays are not read back: that takes a few hundred MB more. Whoever loads the step compares
    their fingerprints.

    Args:
        folder: of the step.
        parts: values of `TrainState` fields by name; `ema_params` must be one.
        config: the resolved configuration.
        step: number of the step.
        examples: examples that were consumed before it.
    """
    marks = {name: host_fingerprint(np.asarray(array)) for name, array in _by_name(parts).items()}
    meta = dataclasses.asdict(Meta(FORMAT, config, step, examples, tuple(parts), marks))
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), parts)
    arguments = ocp.args.Composite(
        state=ocp.args.PyTreeSave(parts, save_args=chunks), meta=ocp.args.JsonSave(meta)
    )
    handler = ocp.CompositeCheckpointHandler(
        state=_sparing_handler(parts), meta=ocp.JsonCheckpointHandler()
    )
    with _quiet(), ocp.Checkpointer(handler) as writer:
        writer.save(folder, args=arguments)


def _sparing_handler(arrays: dict) -> ocp.PyTreeCheckpointHandler:
    """One that has only as many bytes in flight as the largest array needs.

    One file per chunk instead of Orbax's common data files, which are put together in memory.
    """
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    gigabytes = (largest + CHUNK_BYTES) / 1e9
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, save_concurrent_gb=gigabytes, save_device_host_concurrent_gb=gigabytes
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warnings that files are not there which it was told not to write."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@functools.cache
def hide_repetitions() -> None:
    """From now on, do not print what follows a failed save hundreds of times, or what Orbax raises
    anyway.
    """
    shown = sys.unraisablehook

    def show(told):
        if not (
            told.exc_type is RuntimeError and str(told.exc_value) == "Event loop is closed"
        ):  # of TensorStore's threads
            shown(told)

    sys.unraisablehook = show
    logging.getLogger("absl").addFilter(
        lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
    )


def unreadable(folder: epath.Path, error: Exception) -> CheckpointError:
    """What to say of a step that cannot be read: that it is damaged, unless it may be read another
    time.
    """
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
    if may_pass(error):
        return CheckpointError(
            f"{folder} cannot be read just now ({reason}). Nothing was changed; run the same "
            "command again."
        )
    return DamagedError(
        f"{folder} cannot be restored ({reason}). Nothing was overwritten. Move that folder away "
        "to go on from an older step."
    )
