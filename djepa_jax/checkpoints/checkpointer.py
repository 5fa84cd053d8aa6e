"""The checkpoints of a workdir: saved in the background, read back, sealed with checksums, and
found again.

A step counts when it has its manifest (`orbax_io` tells what is in a step). A step without one was
not finished when its process ended. A step that is not as its manifest says is set aside, never
removed, and the next older one is used.
"""

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from etils import epath

from djepa_jax.checkpoints.fingerprint import fingerprints
from djepa_jax.checkpoints.integrity import (
    MANIFEST_NAME,
    ManifestError,
    check_manifest,
    move_folder,
    write_manifest,
)
from djepa_jax.checkpoints.orbax_io import (
    FORMAT,
    CheckpointError,
    DamagedError,
    Meta,
    hide_repetitions,
    read_back,
    read_meta,
    restore_ema,
    restore_state,
    save_sparingly,
)
from djepa_jax.core.train_step import TrainState
from djepa_jax.runtime.storage import as_path, is_remote, write_json

STEPS_NAME = "checkpoints"
ASIDE_NAME = "set_aside"  # folder of a workdir for steps that are not to be used
RECORD_NAME = (
    "last_saved.json"  # names a step that was saved whole, so that lost checkpoints are noticed
)
COMMIT_NAME = "commit_success.txt"  # what Orbax writes last into a step in a bucket
STEP_NAMES = {
    "state",
    "meta",
    "_CHECKPOINT_METADATA",
    COMMIT_NAME,
}  # what Orbax writes there at all
SAVE_SECONDS = (
    6 * 3600
)  # that processes wait for each other in a save; the first one reads everything back meanwhile
UNFINISHED_MARK = ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
        workdir: a folder, local or in a bucket.
        keep: how many of the newest steps stay; older ones go when a newer one is sealed.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2):
        self.workdir = as_path(workdir)
        self.directory = self.workdir / STEPS_NAME
        self._keep = keep
        self._writer: ocp.AsyncCheckpointer | None = None
        self._save: _Save | None = None

    def folder(self, step: int) -> epath.Path:
        """Where a step is."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """All steps whose folders are there, whatever their state; ascending.

        Raises:
            CheckpointError: there is something else where the checkpoints should be.
        """
        if not self.directory.exists():
            return []
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory} is not a folder; move it away, or choose another --workdir."
            )
        return sorted(
            step
            for path in self.directory.iterdir()
            if (step := step_number(path.name)) is not None
        )

    def latest_step(self) -> int | None:
        """The newest step that is finished; None where there is none."""
        return next((step for step in reversed(self.steps()) if self._finished(step)), None)

    def _finished(self, step: int) -> bool:
        return (self.folder(step) / MANIFEST_NAME).exists() or not self._cut_off(step)

    def _cut_off(self, step: int) -> bool:
        """Whether a step without a manifest is one of ours that was being saved; what is not known
        to be so, is not.
        """
        folder, recorded = self.folder(step), self.recorded_step()
        if recorded is not None and step <= recorded:
            return False
        if is_remote(folder) and not (folder / COMMIT_NAME).exists():
            return {path.name for path in folder.iterdir()} <= STEP_NAMES
        try:
            return read_meta(folder).to_be_sealed
        except CheckpointError:
            return False

    def recorded_step(self) -> int | None:
        """The step that was last reported saved; None if none was. CheckpointError: the record does
        not tell.
        """
        try:
            step = json.loads((self.workdir / RECORD_NAME).read_text())["step"]
            if type(step) is not int or step < 0:
                raise ValueError(f"its step is {json.dumps(step)[:50]}, not a number")
            return step
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.workdir / RECORD_NAME} cannot be read ({error}); remove it."
            ) from error

    # ------------------------------------------------------------------ saving

    def save(self, state: TrainState, config: dict, examples: int) -> int:
        """Start saving in the background, when the save before is over.

        Raises:
            CheckpointError: the step exists already, or this or the earlier save failed.
        """
        step = int(state.step)
        self.wait()
        if self.folder(step).exists():
            raise CheckpointError(f"step {step} was not saved: {self.folder(step)} exists already.")
        marks = fingerprints(state)
        meta = dataclasses.asdict(Meta(FORMAT, config, step, examples, fingerprints=marks))
        arrays = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
        )
        hide_repetitions()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._writer = self._writer or ocp.AsyncCheckpointer(
                ocp.CompositeCheckpointHandler(), timeout_secs=SAVE_SECONDS
            )
            self._writer.save(self.folder(step), args=arguments)
        except Exception as error:
            raise self._failed(step, error) from error
        self._save = _Save(step, lambda: self._finish(step, marks))
        self._save.start()
        return step

    def poll(self) -> int | None:
        """The step whose saving has ended well since the last call; None if none has. Never waits.

        Raises:
            CheckpointError: it failed.
        """
        return self.wait() if self._save is not None and not self._save.is_alive() else None

    def wait(self) -> int | None:
        """Wait for the save in progress; its step, or None if there is none.

        Raises:
            CheckpointError: it failed.
        """
        save, self._save = self._save, None
        if save is None:
            return None
        save.join()
        if save.error is not None:
            raise self._failed(save.step, save.error) from save.error
        return save.step

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        reason = (
            (str(error) or type(error).__name__)
            .splitlines()[0]
            .partition(" [tensorstore_spec=")[0]
            .rstrip(".")
        )
        return CheckpointError(
            f"saving step {step} to {self.directory} failed: {reason}. Make room there, or mend "
            "what it names, and run the "
            "same command again: it goes on from the step that was saved before."
        )

    def _finish(self, step: int, marks: dict[str, int]) -> None:
        """In the background: wait for Orbax, read the arrays back, seal, and only then let older
        steps go.
        """
        self._writer.wait_until_finished()
        if jax.process_index() == 0:
            read_back(self.folder(step), marks)
            self._seal(step)
            self._remove_before(step)

    def _remove_before(self, step: int) -> None:
        """Remove all steps but the newest finished ones; also one whose removal was cut off."""
        older = [old for old in self.steps() if old < step]
        first_kept = ([old for old in older if self._finished(old)] + [step])[-self._keep :][0]
        for old in [old for old in older if old < first_kept]:
            self._remove(old)

    def _seal(self, step: int) -> None:
        try:
            write_manifest(self.folder(step))
        except BaseException:
            (self.folder(step) / MANIFEST_NAME).unlink(missing_ok=True)
            raise
        write_json(self.workdir / RECORD_NAME, {"step": step})

    def _remove(self, step: int) -> None:
        """Delete a step; the manifest goes first, so that half a step never counts."""
        (self.folder(step) / MANIFEST_NAME).unlink(missing_ok=True)
        self.folder(step).rmtree()

    def save_imported(self, parts: dict, config: dict, step: int, examples: int) -> epath.Path:
        """Write and seal a step as `orbax_io.save_sparingly` does; returns its folder.

        Raises:
            CheckpointError: it failed.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_sparingly(self.folder(step), parts, config, step, examples)
            self._seal(step)
        except Exception as error:
            raise self._failed(step, error) from error
        return self.folder(step)

    def close(self) -> None:
        """Wait for pending work."""
        try:
            self.wait()
        finally:
            writer, self._writer = self._writer, None
            if writer is not None:
                with contextlib.suppress(Exception):  # of a save that failed, which is told already
                    writer.close()

    # ------------------------------------------------------------------ finding and reading

    def step_to_resume(self, say: Callable[[str], None] = print) -> int | None:
        """The newest step that is as it was saved, or None in a workdir that never had one.

        Newer ones that are damaged are set aside, unfinished ones are removed; `say` is told. Only
        for whoever holds the workdir's lock.

        Raises:
            CheckpointError: steps were saved here and none can be used; nothing was changed.
        """
        unusable: dict[int, DamagedError] = {}
        for step in reversed(self.steps()):
            try:
                self.check(step)
                break
            except DamagedError as error:
                unusable[step] = error
        else:
            step = None
            self._check_nothing_lost(unusable)
        for bad, error in unusable.items():
            self._put_away(bad, error, say)
        if unusable and step is None:
            say("no step was saved whole before; training starts from scratch")
        elif unusable:
            write_json(
                self.workdir / RECORD_NAME, {"step": step}
            )  # those after it will be made, and saved, again
        self._remove_leftovers(say)
        return step

    def check(self, step: int) -> None:
        """As `check_step`."""
        check_step(self.folder(step))

    def _check_nothing_lost(self, unusable: dict[int, DamagedError]) -> None:
        recorded = self.recorded_step()
        if recorded is None and not any(self._finished(step) for step in unusable):
            return
        record = self.workdir / RECORD_NAME
        if not unusable:
            raise CheckpointError(
                f"{self.directory} holds no checkpoint, though step {recorded} was saved there; "
                "put it back, "
                f"or remove {record} to start from scratch."
            )
        reasons = "\n  ".join(str(error) for error in unusable.values())
        raise CheckpointError(
            f"no step in {self.directory} can be used, and nothing was changed:\n  {reasons}\nPut "
            "good copies back, name a step "
            "elsewhere with --restore_from=PATH@STEP, or choose another --workdir."
        )

    def _put_away(self, step: int, error: DamagedError, say: Callable[[str], None]) -> None:
        if not self._finished(step):
            self.folder(step).rmtree()
            say(f"step {step} was not finished when its process ended; removed")
        else:
            say(
                f"WARNING: step {step} is damaged: {error}. It was moved to "
                f"{self.set_aside(step)}; an older step is used."
            )

    def set_aside(self, step: int) -> epath.Path:
        """Move a step out of the way, to be looked at by people; returns where it is now."""
        folder = self.workdir / ASIDE_NAME
        folder.mkdir(parents=True, exist_ok=True)
        taken = {path.name for path in folder.iterdir()} if folder.exists() else set()
        name = next(
            n
            for n in (f"{step}" if i == 0 else f"{step}-{i}" for i in range(10**6))
            if n not in taken
        )
        move_folder(self.folder(step), folder / name)
        return folder / name

    def _remove_leftovers(self, say: Callable[[str], None]) -> None:
        """What a process that was killed in the middle of a save left behind."""
        if not self.directory.exists():
            return
        for path in list(self.directory.iterdir()):
            if UNFINISHED_MARK in path.name:
                path.rmtree()
                say(f"removed {path.name}, left by a save that was cut off")

    def read_meta(self, step: int | None = None) -> Meta:
        """The configuration and position stored with a step (the latest one by default).

        Raises:
            CheckpointError: there is no step, it cannot be read, or its format is another.
        """
        return read_meta(self.folder(self._existing(step)))

    def restore(self, abstract: TrainState, meta: Meta) -> dict:
        """The parts of a training state that a step holds, as `orbax_io.restore_state`."""
        return restore_state(self.folder(meta.step), abstract, meta)

    def restore_ema(self, abstract: dict, step: int | None = None) -> dict:
        """The moving average of the parameters alone, as `orbax_io.restore_ema`."""
        folder = self.folder(self._existing(step))
        return restore_ema(folder, abstract, read_meta(folder))

    def _existing(self, step: int | None) -> int:
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(
                f"{self.directory} holds no checkpoint; train first, or correct --workdir."
            )
        return step


class _Save(threading.Thread):
    """The part of a save that runs beside the training."""

    def __init__(self, step: int, finish: Callable[[], None]):
        super().__init__(name=f"save-{step}", daemon=True)
        self.step, self.error, self._finish = step, None, finish

    def run(self) -> None:
        """Finish, and keep what goes wrong for the main thread."""
        try:
            self._finish()
        except BaseException as error:
            self.error = error


def step_number(name: str) -> int | None:
    """The step whose folder has a name; None if it is no step's, such as "007", or digits that are
    raised or Arabic.
    """
    return int(name) if name.isascii() and name.isdigit() and str(int(name)) == name else None


def check_step(folder: epath.Path) -> None:
    """Compare a step's folder with its manifest; a step of an older version, which has none,
    passes.

    Raises:
        DamagedError: it is damaged, or was never finished.
        CheckpointError: its format is another.
    """
    try:
        if (folder / MANIFEST_NAME).exists():
            check_manifest(folder)
        elif read_meta(folder).to_be_sealed:
            raise DamagedError(f"{folder} has no {MANIFEST_NAME}")
    except ManifestError as error:
        raise DamagedError(str(error)) from error
    read_meta(folder)
