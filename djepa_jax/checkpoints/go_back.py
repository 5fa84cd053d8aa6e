"""`--restore_from=PATH@STEP`: make a workdir go on from a certain step, of its own or of another
workdir.

The step is copied into the workdir, newer steps are set aside, and a note says that this was done:
the same command, run again after a stop, goes on from where it was and does not go back a second
time.
"""

import json
import os
from collections.abc import Callable

from etils import epath

from djepa_jax.checkpoints.checkpointer import (
    ASIDE_NAME,
    RECORD_NAME,
    Checkpoints,
    check_step,
    step_number,
)
from djepa_jax.checkpoints.integrity import MANIFEST_NAME, copy_folder, move_folder
from djepa_jax.checkpoints.orbax_io import CheckpointError
from djepa_jax.config.experiment import ConfigError
from djepa_jax.runtime.metric_writer import METRICS_NAME
from djepa_jax.runtime.storage import is_remote, write_json

NOTE_NAME = "restored_from.json"
UNFINISHED = "restoring.orbax-checkpoint-tmp"  # as Orbax's own leftovers: removed at the next start


def go_back(
    workdir: str | os.PathLike,
    restore_from: str,
    keep: int,
    check_fits: Callable[[epath.Path], None],
    say: Callable[[str], None] = print,
) -> None:
    """Put the step that `PATH@STEP` names at the top of a workdir's checkpoints, unless that was
    done before.

    Args:
        workdir: the workdir of the training; the caller holds its lock.
        restore_from: a workdir and the number of one of its steps; without "@STEP" its latest one.
        keep: as for `Checkpoints`.
        check_fits: raises an error if training cannot go on from the step in a folder
            (`Start.check_fits`).
        say: is told what was done.

    Raises:
        CheckpointError: there is no such step, or it is damaged; nothing was changed.
        ConfigError: it is of another model than is to be trained; nothing was changed.
    """
    own = Checkpoints(workdir, keep)
    note = own.workdir / NOTE_NAME
    if _noted(note) == restore_from and own.steps():
        say(
            f"--restore_from={restore_from} was done before; going on (to do it again, remove "
            f"{note})"
        )
        return
    source, step = _find(restore_from)
    source.check(step)
    try:
        check_fits(source.folder(step))
    except ConfigError as error:
        raise ConfigError(f'--restore_from "{restore_from}": {error}') from error
    if not _same_place(source.directory, own.directory):
        _copy(source.folder(step), own, step)
    newer = [number for number in own.steps() if number > step]
    if newer:
        _keep_metrics(own, newer[-1])
    for number in newer:
        say(f"step {number} was set aside: {own.set_aside(number)}")
    write_json(own.workdir / RECORD_NAME, {"step": step})
    write_json(note, {"restored_from": restore_from})
    say(f"restored step {step} of {source.workdir}")


def _keep_metrics(own: Checkpoints, step: int) -> None:
    """Copy the metrics up to a step that is going to be set aside; training drops the lines after
    where it goes on.
    """
    metrics, copy = own.workdir / METRICS_NAME, own.workdir / ASIDE_NAME / f"metrics-{step}.jsonl"
    if metrics.exists() and not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        metrics.copy(copy)


def _noted(note: epath.Path) -> str | None:
    try:
        return json.loads(note.read_text())["restored_from"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _find(restore_from: str) -> tuple[Checkpoints, int]:
    path, at, number = restore_from.rpartition("@")
    if not at:
        path, number = restore_from, ""
    elif step_number(number) is None:
        raise CheckpointError(
            f'--restore_from "{restore_from}" is not PATH@STEP, with the number of a step.'
        )
    source = Checkpoints(path)
    if not source.directory.exists():
        raise CheckpointError(
            f'--restore_from "{restore_from}": {source.directory} does not exist; name a workdir.'
        )
    step = int(number) if number else source.latest_step()
    if step is None or step not in source.steps():
        there = ", ".join(map(str, source.steps())) or "no step"
        raise CheckpointError(
            f'--restore_from "{restore_from}": {source.directory} holds {there}; name one that is '
            "there."
        )
    return source, step


def _copy(folder: epath.Path, own: Checkpoints, step: int) -> None:
    """Copy a step; it appears under its number when it is whole."""
    if (
        step in own.steps()
        and _same_manifest(folder, own.folder(step))
        and _whole(own.folder(step))
    ):
        return
    own.directory.mkdir(parents=True, exist_ok=True)
    unfinished = own.directory / UNFINISHED
    if unfinished.exists():
        unfinished.rmtree()
    copy_folder(folder, unfinished)
    check_step(unfinished)
    if step in own.steps():
        own.set_aside(step)
    move_folder(unfinished, own.folder(step))


def _same_place(one: epath.Path, other: epath.Path) -> bool:
    """Whether two paths name one folder, perhaps through a link or in another spelling."""
    if is_remote(one) or is_remote(other):
        return one == other
    return os.path.realpath(one) == os.path.realpath(other)


def _same_manifest(one: epath.Path, other: epath.Path) -> bool:
    try:
        return (one / MANIFEST_NAME).read_text() == (other / MANIFEST_NAME).read_text()
    except OSError:
        return False


def _whole(folder: epath.Path) -> bool:
    try:
        check_step(folder)
    except CheckpointError:
        return False
    return True
