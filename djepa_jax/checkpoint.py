"""Checkpoints with Orbax: asynchronous saves, restore onto a mesh, and what a workdir may be used for.

A step holds the item `state` (parameters, moving average, optimiser, counters; pure dicts and arrays) and the
item `meta` (format number, resolved configuration, examples consumed). An imported step may hold less than a whole
state: its `meta` names the parts.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp

from djepa_jax.train_step import TrainState

FORMAT = 1
CHUNK_BYTES = 2**22  # of imports and exports; what is written at a time
LOCK_NAME = ".lock"
STATE_PARTS = tuple(field.name for field in dataclasses.fields(TrainState))
RECORD_NAME = "last_saved.json"  # names a step that was saved whole, so that lost checkpoints are noticed


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another kind; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """What is stored beside the arrays."""

    format: int
    config: dict
    step: int
    examples: int
    parts: tuple[str, ...] = STATE_PARTS  # of the training state that the step holds; `ema_params` is always one


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: str | os.PathLike, keep: int = 1):
        self.workdir = pathlib.Path(workdir).absolute()
        self.directory = self.workdir / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=False)
        self._options = options
        self._open_manager, self._saving = None, False

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._open_manager is None:
            self._open_manager = ocp.CheckpointManager(self.directory, options=self._options)
        return self._open_manager

    def latest_step(self) -> int | None:
        """The newest finished step, or None where nothing has been saved.

        Raises:
            CheckpointError: there is something else where the checkpoints should be.
        """
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is not a folder; move it away, or choose another --workdir.")
        return self._manager.latest_step() if self.directory.is_dir() else None

    def step_to_resume(self) -> int | None:
        """The newest finished step, or None in a workdir that never had one.

        Raises:
            CheckpointError: steps were saved here and none is left: never a silent start from scratch.
        """
        step, record = self.latest_step(), self.workdir / RECORD_NAME
        if step is None and record.exists():
            raise CheckpointError(
                f"{self.directory} holds no checkpoint, though {record.read_text().strip()} was saved there; put it back, "
                f"or remove {record} to start from scratch."
            )
        return step

    def _record(self) -> None:
        step = self.latest_step()
        if step is not None:
            write_json(self.workdir / RECORD_NAME, {"step": step})

    def save(self, state: TrainState, config: dict, examples: int) -> int:
        """Start saving in the background; an earlier save that failed is reported here.

        Raises:
            CheckpointError: the step exists already, or an earlier save failed.
        """
        step = int(state.step)
        self.directory.mkdir(parents=True, exist_ok=True)
        meta = dataclasses.asdict(Meta(FORMAT, config, step, examples))
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(_as_dict(state)), meta=ocp.args.JsonSave(meta))
        try:
            saved = self._manager.save(step, args=arguments)
        except Exception as error:
            raise CheckpointError(f"saving step {step} to {self.directory} failed: {error}") from error
        self._record()  # of an earlier save, which is finished when a new one has begun
        self._saving = True
        if not saved:
            raise CheckpointError(f"step {step} was not saved: {self.directory} already holds step {self.latest_step()}.")
        return step

    def wait(self) -> None:
        """Wait for the save in progress, and raise CheckpointError if it failed."""
        if self._saving:
            try:
                self._manager.wait_until_finished()
                self._record()
                self._saving = False
            except Exception as error:
                raise CheckpointError(f"saving to {self.directory} failed: {error}") from error

    def read_meta(self, step: int | None = None) -> Meta:
        """The configuration and position stored with a step (the latest one by default).

        Raises:
            CheckpointError: there is no step, it cannot be read, or its format is another.
        """
        return read_meta(self.directory / str(self._existing(step)))

    def restore(self, abstract: TrainState, meta: Meta) -> dict:
        """The parts of a training state that a step holds, by name; `abstract` gives shapes, dtypes and shardings.

        Raises:
            CheckpointError: the step does not hold exactly these arrays.
        """
        wanted = {name: getattr(abstract, name) for name in meta.parts}
        try:
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
            return self._manager.restore(meta.step, args=arguments)["state"]
        except Exception as error:
            raise _damaged(self.directory / str(meta.step), error) from error

    def restore_ema(self, abstract: dict, step: int | None = None) -> dict:
        """The moving average of the parameters alone; `abstract` gives shapes, dtypes and shardings.

        Raises:
            CheckpointError: there is no step, or it does not hold exactly these arrays.
        """
        return restore_ema(self.directory / str(self._existing(step)), abstract)

    def close(self) -> None:
        """Wait for pending work and release the manager."""
        if self._open_manager is not None:
            self.wait()
            self._open_manager.close()
            self._open_manager = None

    def _existing(self, step: int | None) -> int:
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.directory} holds no checkpoint; train first, or correct --workdir.")
        return step


def read_meta(folder: pathlib.Path) -> Meta:
    """What is stored beside the arrays of the step in `folder`.

    Raises:
        CheckpointError: it cannot be read, or its format is another.
    """
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            stored = reader.restore(folder / "meta")
        meta = Meta(**stored | {"parts": tuple(stored.get("parts", STATE_PARTS))})
    except Exception as error:
        raise _damaged(folder, error) from error
    if meta.format != FORMAT:
        raise CheckpointError(f"{folder} has format {meta.format}, this version reads {FORMAT}.")
    return meta


def restore_ema(folder: pathlib.Path, abstract: dict) -> dict:
    """The moving average in the step in `folder`, as `Checkpoints.restore_ema`."""
    return restore_arrays(folder / "state", {"ema_params": abstract})["ema_params"]


def restore_arrays(folder: pathlib.Path, abstract: dict) -> dict:
    """Part of the arrays that Orbax wrote into `folder`; `abstract` gives shapes, dtypes and shardings.

    Raises:
        CheckpointError: one of them is missing, damaged or of another shape.
    """
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    arguments = ocp.args.PyTreeRestore(item=abstract, partial_restore=True, restore_args=restore_args)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(folder, args=arguments)
    except Exception as error:
        raise _damaged(folder, error) from error
    for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        if found.shape != expected.shape:
            raise CheckpointError(f"{folder}: shape {found.shape}, the model has {expected.shape}.")
    return restored


def save_arrays(folder: pathlib.Path, arrays: dict) -> None:
    """Write arrays with Orbax into a new folder."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(folder, args=ocp.args.PyTreeSave(arrays))


def save_imported(workdir: str | os.PathLike, parts: dict, config: dict, step: int, examples: int) -> pathlib.Path:
    """Write a step that holds only some parts of a training state, with little memory beside them.

    Args:
        workdir: a workdir without checkpoints.
        parts: values of `TrainState` fields by name; `ema_params` must be one.
        config: the resolved configuration.
        step: number of the step.
        examples: examples that were consumed before it.

    Returns:
        the folder of the step.
    """
    directory = pathlib.Path(workdir).absolute() / "checkpoints"
    directory.mkdir(parents=True, exist_ok=True)
    meta = dataclasses.asdict(Meta(FORMAT, config, step, examples, tuple(parts)))
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), parts)
    arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(parts, save_args=chunks), meta=ocp.args.JsonSave(meta))
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=False)
    handlers = {"state": _sparing_handler(parts), "meta": ocp.JsonCheckpointHandler()}
    try:
        with _quiet(), ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
            manager.save(step, args=arguments)
    except Exception as error:
        raise CheckpointError(f"saving step {step} to {directory} failed: {error}") from error
    write_json(directory.parent / RECORD_NAME, {"step": step})
    return directory / str(step)


def _sparing_handler(arrays: dict) -> ocp.PyTreeCheckpointHandler:
    """One that has only as many bytes in flight as the largest array needs.

    One file per chunk instead of Orbax's common data files, which are put together in memory.
    """
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    gigabytes = (largest + CHUNK_BYTES) / 1e9
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, save_concurrent_gb=gigabytes, save_device_host_concurrent_gb=gigabytes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warning that files of the form it was told not to write are not there."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _damaged(folder: pathlib.Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder} cannot be restored ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}). "
        f"Nothing was overwritten. Move that folder away to go on from an older step."
    )


def _as_dict(state: TrainState) -> dict:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def check_writable(folder: str | os.PathLike, flag: str = "--workdir") -> None:
    """Make sure that the folder a flag names can be written, before anything is computed; creates it.

    Raises:
        CheckpointError: it is a file, or may not be created or written.
    """
    path = pathlib.Path(folder)
    if not str(folder) or "://" in str(folder):
        raise CheckpointError(f'{flag} "{folder}" is not a local folder; name one.')
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f'{flag} "{folder}" cannot be written ({error.strerror}); choose another folder.') from error


@contextlib.contextmanager
def lock_workdir(workdir: str | os.PathLike, name: str = LOCK_NAME) -> Iterator[None]:
    """Hold a workdir for this process; the lock goes with the process, however it ends.

    Raises:
        CheckpointError: another process holds it, named by host and process id.
    """
    path = pathlib.Path(workdir) / name
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise CheckpointError(
                f'--workdir "{workdir}" is in use by {owner}; wait for it, stop it, or choose another folder.'
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def write_json(path: pathlib.Path, value: dict) -> None:
    """Write a JSON file so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
