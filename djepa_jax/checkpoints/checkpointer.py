"""The checkpoints of a workdir: saved in the background, sealed, found again.

A step is a folder that Orbax writes: the item `state` (parameters, moving average, optimizer,
counters; pure dicts and arrays) and the item `meta` (format, resolved configuration, examples
consumed). Then a manifest with the sha256 of every file is added: only now the step counts, and
older ones may go. A step that is not as its manifest says is moved to `quarantine/`, never
removed, and the one before is used.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import re
import sys
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from etils import epath

from djepa_jax.checkpoints import integrity
from djepa_jax.checkpoints.integrity import MANIFEST_NAME, CheckpointError, DamagedError
from djepa_jax.config.stored import models_near
from djepa_jax.core.train_step import TrainState
from djepa_jax.runtime.storage import as_path, write_json

FORMAT = 2  # of steps; earlier versions wrote 1, at first without manifests
STEPS_NAME, QUARANTINE_NAME = "checkpoints", "quarantine"
RECORD_NAME = "last_saved.json"  # the step that was saved last, and the one that is being saved
STEP_NAME = re.compile(r"0|[1-9][0-9]*")
TEMPORARY_MARK = ".orbax-checkpoint-tmp"
SAVE_SECONDS = 6 * 3600  # after which Orbax gives up; a slow bucket is no failure
CHUNK_BYTES = 2**22  # of an import's arrays that are written at a time
SLICE_BYTES = 2**20  # of an array that several devices hold; for less, one of them gives all of it
STATE_PARTS = tuple(field.name for field in dataclasses.fields(TrainState))

# What Orbax logs, hundreds of lines after a full disk, it also raises.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno < logging.WARNING or "orbax" not in record.pathname
)


def _without_closed_loops(unraisable, show=sys.unraisablehook) -> None:
    """Leave out what TensorStore says of each read or write that ends after another has failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        show(unraisable)


sys.unraisablehook = _without_closed_loops


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a step holds beside the arrays; `parts` are the fields of `TrainState` that it has."""

    config: dict
    step: int
    examples: int
    parts: tuple[str, ...] = STATE_PARTS
    format: int = FORMAT


def read_meta(folder: epath.Path) -> Meta:
    """What the step in `folder` says of itself; DamagedError if it cannot be trusted."""
    sealed = (folder / MANIFEST_NAME).exists()
    with integrity.reading(folder):
        if sealed:
            integrity.check_manifest(folder, below="meta/")
        stored = json.loads((folder / "meta" / "metadata").read_text())
        number, fingerprints = stored["format"], stored.pop("fingerprints", None)
        if number not in (1, FORMAT):
            raise CheckpointError(
                f"{folder} has format {number}, this version reads {FORMAT}; use a later one."
            )
        if not sealed and (number == FORMAT or fingerprints):  # which came with the manifests
            raise DamagedError(f"{folder} has no {MANIFEST_NAME}; use another step.")
        return Meta(**stored | {"parts": tuple(stored.get("parts", STATE_PARTS))})


def check_step(folder: epath.Path) -> None:
    """Raise DamagedError unless all files of the step in `folder` are what was written."""
    read_meta(folder)
    if (folder / MANIFEST_NAME).exists():  # which the first versions did not write
        integrity.check_manifest(folder)


class Checkpoints:
    """The checkpoints of one workdir, local or in a bucket.

    The `keep` newest ones stay, and those of steps that `keep_every` divides, unless it is 0.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2, keep_every: int = 0):
        self.workdir = as_path(workdir)
        integrity.check_storable(self.workdir)
        self.directory = self.workdir / STEPS_NAME
        self._record = self.workdir / RECORD_NAME
        self._keep, self._keep_every = keep, keep_every
        self._writer: ocp.AsyncCheckpointer | None = None
        self._background = concurrent.futures.ThreadPoolExecutor(1, "save")
        self._saving: tuple[int, concurrent.futures.Future] | None = None

    def folder(self, step: int) -> epath.Path:
        """Where a step is."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """All steps whose folders are there, whatever their state; ascending."""
        paths = self.directory.iterdir() if self.directory.exists() else []
        return sorted(int(path.name) for path in paths if STEP_NAME.fullmatch(path.name))

    def latest_step(self) -> int | None:
        """The newest step that is not just being saved; None where there is none."""
        return next((step for step in reversed(self.steps()) if self._is_finished(step)), None)

    def latest_folder(self) -> epath.Path:
        """The folder of the latest step; CheckpointError where there is none."""
        step = self.latest_step()
        if step is None:
            raise CheckpointError(
                f"{self.directory} holds no checkpoint; train first, or correct --workdir"
                f"{models_near(self.workdir)}."
            )
        return self.folder(step)

    def recorded(self) -> tuple[int | None, int | None]:
        """The steps that were last reported saved, and last begun to be saved, if any."""
        if not self._record.exists():
            return None, None
        with integrity.reading(self._record):
            record = json.loads(self._record.read_text())
            return record["step"], record.get("saving")

    def _is_finished(self, step: int) -> bool:
        return (self.folder(step) / MANIFEST_NAME).exists() or step != self.recorded()[1]

    # ------------------------------------------------------------------ saving

    def save(self, state: TrainState, config: dict, examples: int) -> int:
        """Start saving a new step in the background, when the save before is over."""
        self.wait()
        step = int(state.step)
        arrays = ocp.args.PyTreeSave({name: getattr(state, name) for name in STATE_PARTS})
        with self._errors_of(step):
            self._begin(step)
            if self._writer is None:
                self._writer = ocp.AsyncCheckpointer(_handler(), timeout_secs=SAVE_SECONDS)
            items = _items(arrays, Meta(config, step, examples))
            self._writer.save(self.folder(step), args=items)
        self._saving = step, self._background.submit(self._finish, step)
        return step

    def _begin(self, step: int) -> None:
        if self.folder(step).exists():
            raise FileExistsError(f"{self.folder(step)} exists already")
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self._record, {"step": self.recorded()[0], "saving": step})

    def _finish(self, step: int) -> None:
        """In the background: wait for Orbax, seal, and only then let older steps go."""
        self._writer.wait_until_finished()
        if jax.process_index() != 0:
            return
        self._seal(step)
        older = [old for old in self.steps() if old < step]
        finished, every = [*filter(self._is_finished, older), step], self._keep_every
        kept = finished[-self._keep :] + [old for old in finished if every and old % every == 0]
        for old in older:
            if old not in kept:
                # The manifest goes first, so that half a step never counts.
                (self.folder(old) / MANIFEST_NAME).unlink(missing_ok=True)
                self.folder(old).rmtree()

    def _seal(self, step: int) -> None:
        integrity.write_manifest(self.folder(step))
        write_json(self._record, {"step": step})

    def poll(self) -> int | None:
        """As `wait` for a save that is over, well or not; None, at once, for any other."""
        return self.wait() if self._saving is not None and self._saving[1].done() else None

    def wait(self) -> int | None:
        """Wait for the save in progress: its step, None if there is none; an error if it failed."""
        if self._saving is None:
            return None
        (step, ended), self._saving = self._saving, None
        with self._errors_of(step):
            # In turns: a signal that comes just before a long wait would be answered after it.
            while not concurrent.futures.wait([ended], timeout=1).done:
                pass
            ended.result()
        return step

    close = wait  # for `contextlib.closing`

    @contextlib.contextmanager
    def _errors_of(self, step: int):
        """Raise what goes wrong in a save as one line."""
        try:
            yield
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            reason = reason.partition(" [tensorstore_spec=")[0].rstrip(".")
            raise CheckpointError(
                f"saving step {step} to {self.directory} failed: {reason}. Make room there, or "
                "mend what it names, and run the same command again: it goes on from the step "
                "that was saved before."
            ) from error

    def save_imported(self, parts: dict, config: dict, step: int, examples: int) -> epath.Path:
        """Write and seal a step of some fields of `TrainState`, with little memory beside them."""
        # One file per chunk: Orbax's common data files would be put together in memory.
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), parts)
        gigabytes = (max(leaf.nbytes for leaf in jax.tree.leaves(parts)) + CHUNK_BYTES) / 1e9
        limits = {"save_concurrent_gb": gigabytes, "save_device_host_concurrent_gb": gigabytes}
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(use_ocdbt=False, **limits),
            meta=ocp.JsonCheckpointHandler(),
        )
        with self._errors_of(step), ocp.Checkpointer(handler) as writer:
            self._begin(step)
            arrays = ocp.args.PyTreeSave(parts, save_args=chunks)
            items = _items(arrays, Meta(config, step, examples, tuple(parts)))
            writer.save(self.folder(step), args=items)
            self._seal(step)
        return self.folder(step)

    # ------------------------------------------------------------------ finding

    def step_to_resume(self, say: Callable[[str], None] = print) -> int | None:
        """The newest step that is as it was saved, or None in a workdir that never had one.

        Newer ones that are damaged go to quarantine, unfinished ones are removed; `say` is told.
        Only for whoever holds the workdir's lock.

        Raises:
            CheckpointError: steps were saved here and none can be used; nothing was changed.
        """
        step, unusable = None, {}
        for candidate in reversed(self.steps()):
            try:
                check_step(self.folder(candidate))
                step = candidate
                break
            except DamagedError as error:
                unusable[candidate] = error
        damaged = [bad for bad in unusable if self._is_finished(bad)]
        if step is None and (damaged or self.recorded()[0] is not None):
            reasons = " ".join(map(str, unusable.values())) or "it holds none."
            raise CheckpointError(
                f"steps were saved in {self.directory}, none can be used, and nothing was "
                f"changed: {reasons} Put good copies back, name a step elsewhere with "
                "--restore_from=PATH@STEP, or choose another --workdir."
            )
        for bad, error in unusable.items():
            if bad in damaged:
                place = self.quarantine(bad)
                say(f"WARNING: step {bad} is damaged: {error} It was moved to {place}.")
            else:
                self.folder(bad).rmtree()
                say(f"step {bad} was not finished when its process ended; removed")
        if damaged:  # those after the step will be made, and saved, again
            write_json(self._record, {"step": step})
        for path in list(self.directory.iterdir()) if self.directory.exists() else []:
            if TEMPORARY_MARK in path.name:
                path.rmtree()
                say(f"removed {path.name}, left by a save that was cut off")
        return step

    def adopt(self, folder: epath.Path, say: Callable[[str], None] = print) -> None:
        """Make a step that was checked, of this workdir or of another, the newest of this one."""
        step = int(folder.name)
        if os.path.realpath(folder) != os.path.realpath(self.folder(step)):
            unfinished = self.directory / f"adopting{TEMPORARY_MARK}"  # removed at the next start
            unfinished.rmtree(missing_ok=True)
            integrity.copy_folder(folder, unfinished)
            check_step(unfinished)
            if self.folder(step).exists():
                self.quarantine(step)
            integrity.move_folder(unfinished, self.folder(step))
        newer = [number for number in self.steps() if number > step]
        for path in list(self.workdir.iterdir()) if newer else []:
            if path.suffix == ".jsonl":  # metrics: training will drop what is after the step
                copy = self.workdir / QUARANTINE_NAME / f"{path.stem}-{newer[-1]}.jsonl"
                copy.parent.mkdir(exist_ok=True)
                path.copy(copy, overwrite=True)
        for number in newer:
            say(f"step {number} was moved to {self.quarantine(number)}")
        write_json(self._record, {"step": step})
        say(f"restored {folder}")

    def quarantine(self, step: int) -> epath.Path:
        """Move a step out of the way, to be looked at by people; returns where it is now."""
        place, copies = self.workdir / QUARANTINE_NAME / str(step), 0
        place.parent.mkdir(parents=True, exist_ok=True)
        while place.exists():
            copies += 1
            place = place.with_name(f"{step}-{copies}")
        integrity.move_folder(self.folder(step), place)
        return place


def _handler() -> ocp.CompositeCheckpointHandler:
    """As Orbax writes by default, but that it cuts no small arrays.

    Each cut is a program to compile and a call per device: seconds in which no step is made.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    return ocp.CompositeCheckpointHandler(state=state, meta=ocp.JsonCheckpointHandler())


def _items(state: ocp.args.CheckpointArgs, meta: Meta) -> ocp.args.Composite:
    return ocp.args.Composite(state=state, meta=ocp.args.JsonSave(dataclasses.asdict(meta)))
