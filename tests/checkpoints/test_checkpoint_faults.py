"""Faults of storage, and of the process that saves: what is damaged is noticed, set aside and never
used.
"""

import contextlib
import json
import pathlib
import random
import shutil
from collections.abc import Callable

import jax
import numpy as np
import pytest
from damage import array_files, cut, files, flip, largest, resume, sampler_of
from workdirs import EVERY, RUN, STEPS, arrays, assert_same_arrays, digest, run, steps_in

from djepa_jax.checkpoints import integrity
from djepa_jax.checkpoints.checkpointer import Checkpoints, check_step
from djepa_jax.checkpoints.integrity import MANIFEST_NAME, write_manifest
from djepa_jax.checkpoints.orbax_io import CheckpointError, DamagedError
from djepa_jax.checkpoints.stored import find_model
from djepa_jax.main import main

FLIPS = 200


@pytest.fixture
def workdir(saved_run, tmp_path) -> pathlib.Path:
    """A copy of a finished run with the steps `EVERY` and `STEPS`."""
    return shutil.copytree(saved_run, tmp_path / "run")


@pytest.fixture
def older(workdir) -> pathlib.Path:
    return workdir / "checkpoints" / str(EVERY)


@pytest.fixture
def newest(workdir) -> pathlib.Path:
    return workdir / "checkpoints" / str(STEPS)


# ---------------------------------------------------------------- flipped bytes


def test_every_flipped_byte_is_noticed(newest):
    """In each file once, in the manifest often, elsewhere in proportion to the files' sizes."""
    rng, paths = random.Random(0), files(newest)
    chosen = paths + [newest / MANIFEST_NAME] * 50
    chosen += rng.choices(paths, [path.stat().st_size for path in paths], k=FLIPS - len(chosen))
    for path in chosen:
        whole = flip(path, rng)
        with pytest.raises(DamagedError, match=str(newest)):
            check_step(newest)
        path.write_bytes(whole)
    check_step(newest)


@pytest.mark.parametrize("other", [b"\t", b"\r", b" "])
def test_white_space_of_a_manifest_counts(newest, other):
    path = newest / MANIFEST_NAME
    path.write_bytes(path.read_bytes().replace(b"\n", other, 1))
    with pytest.raises(DamagedError, match="manifest.json is not as it was written"):
        check_step(newest)


def test_no_wrong_array_is_ever_sampled_from(workdir, newest):
    """Whatever the manifest says: a flip in the arrays' files is an error, or was in no array that
    is read.
    """
    load, rng, paths = sampler_of(workdir), random.Random(0), array_files(newest)
    good = load()
    for path in rng.choices(paths, [path.stat().st_size for path in paths], k=20):
        whole = flip(path, rng)
        write_manifest(newest)
        with contextlib.suppress(CheckpointError):
            jax.tree.map(np.testing.assert_array_equal, good, load())
        path.write_bytes(whole)


@pytest.mark.parametrize("seed", range(3))
def test_damage_all_over_the_arrays_is_an_error_of_sampling(workdir, newest, seed):
    """One byte in each 64 of every file, so that no matter where Orbax put the averages, some of
    them are hit.
    """
    load, rng = sampler_of(workdir), np.random.default_rng(seed)
    load()
    for path in array_files(newest):
        data = np.fromfile(path, np.uint8)
        data[rng.integers(64) :: 64] ^= rng.integers(1, 256, dtype=np.uint8)
        data.tofile(path)
    write_manifest(newest)
    with pytest.raises(CheckpointError):
        load()


def test_nothing_is_sampled_or_evaluated_from_other_arrays(workdir, older, newest, capsys):
    """Those of another step are whole by every checksum of Orbax's, and of the manifest that is
    made for them.
    """
    shutil.rmtree(newest / "state")
    shutil.copytree(older / "state", newest / "state")
    write_manifest(newest)
    before = digest(workdir)
    for mode in ("sample", "evaluate"):
        flags = (
            *RUN,
            "--config.evaluation.kind=small_images",
            f"--mode={mode}",
            f"--workdir={workdir}",
        )
        assert main(["djepa_jax", *flags]) == 2
        assert "is not the one that was saved" in capsys.readouterr().err
    assert digest(workdir) == before
    status, output = run(workdir)
    assert (
        status == 2
        and "is not the one that was saved" in output
        and steps_in(workdir) == [str(EVERY), str(STEPS)]
    )


def test_a_config_that_changed_in_a_step_is_not_used(workdir, newest):
    """Sampling and `djepa_jax.load` take scale, sampler and class names from there."""
    path = newest / "meta" / "metadata"
    path.write_bytes(path.read_bytes().replace(b'"temperature": 1.0', b'"temperature": 7.0'))
    with pytest.raises(CheckpointError, match="meta/metadata differs from its checksum"):
        find_model(workdir)


# ---------------------------------------------------------------- damaged steps


def emptied(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


# What happens to the newest step, given the one before.
DAMAGE: dict[str, Callable[[pathlib.Path, pathlib.Path], object]] = {
    "arrays gone": lambda step, _: largest(step).unlink(),
    "arrays cut": lambda step, _: cut(largest(step)),
    "arrays empty": lambda step, _: largest(step).write_bytes(b""),
    "arrays of another step": lambda step, old: shutil.copy(largest(old), largest(step)),
    "description gone": lambda step, _: (step / "state" / "_METADATA").unlink(),
    "state gone": lambda step, _: shutil.rmtree(step / "state"),
    "meta gone": lambda step, _: shutil.rmtree(step / "meta"),
    "meta of another step": lambda step, old: shutil.copy(
        old / "meta" / "metadata", step / "meta" / "metadata"
    ),
    "manifest gone": lambda step, _: (step / MANIFEST_NAME).unlink(),
    "manifest cut": lambda step, _: cut(step / MANIFEST_NAME),
    "manifest of another step": lambda step, old: shutil.copy(
        old / MANIFEST_NAME, step / MANIFEST_NAME
    ),
    "everything gone": lambda step, _: emptied(step),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_step_is_set_aside_and_an_older_one_used(workdir, older, newest, damage):
    good = digest(older)
    DAMAGE[damage](newest, older)
    damaged = digest(newest)
    step, said = resume(workdir)
    assert (
        step == EVERY
        and f"WARNING: step {STEPS} is damaged: {newest}" in said
        and "an older step is used" in said
    )
    assert steps_in(workdir) == [str(EVERY)] and digest(older) == good, (
        "what training goes on from is the same for all damage"
    )
    assert digest(workdir / "set_aside" / str(STEPS)) == damaged


def test_training_after_damage_ends_at_the_same_bits(saved_run, workdir, newest):
    for _ in range(2):
        cut(largest(newest))
        status, output = run(workdir)
        assert (
            status == 0
            and f"WARNING: step {STEPS} is damaged" in output
            and f"going on from step {EVERY}" in output
        )
        assert_same_arrays(arrays(saved_run), arrays(workdir))
        check_step(newest)
    assert sorted(path.name for path in (workdir / "set_aside").iterdir()) == [
        f"{STEPS}",
        f"{STEPS}-1",
    ]


def test_a_file_more_does_no_harm(workdir, newest):
    (newest / "note.txt").write_text("good one")
    assert resume(workdir) == (STEPS, "")


@pytest.mark.parametrize("damage", ["arrays cut", "manifest gone", "everything gone"])
def test_without_a_usable_step_nothing_is_changed(workdir, older, newest, damage, capsys):
    for step in (older, newest):
        DAMAGE[damage](step, older)
    before = digest(workdir)
    assert main(["djepa_jax", *RUN, f"--workdir={workdir}"]) == 2
    message = capsys.readouterr().err
    assert digest(workdir) == before
    assert (
        str(older) in message and str(newest) in message and "--restore_from=PATH@STEP" in message
    )


def test_recorded_step_that_is_gone_is_no_fresh_start(workdir):
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(
        CheckpointError, match=f"holds no checkpoint, though step {STEPS} was saved there"
    ):
        resume(workdir)


@pytest.mark.parametrize(
    "text",
    [
        '{"step": null}',
        '{"step": true}',
        '{"step": -1}',
        '{"step": "40"}',
        "{}",
        "[]",
        "40",
        "{",
        "[" * 100_000,
    ],
)
def test_a_record_that_does_not_tell_a_step_is_no_fresh_start(tmp_path, text):
    """In a workdir without steps it is all that tells of those that were lost."""
    (tmp_path / "last_saved.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=f"{tmp_path}/last_saved.json cannot be read .*; remove it"
    ):
        resume(tmp_path)


@pytest.mark.parametrize(
    "name", ["\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT NINE}9", "099", "-1", "1e3", "note"]
)
def test_folders_of_other_names_are_no_steps(workdir, name):
    (workdir / "checkpoints" / name).mkdir()
    assert Checkpoints(workdir).steps() == [EVERY, STEPS] and resume(workdir) == (STEPS, "")
    assert name in steps_in(workdir)


@pytest.mark.parametrize(
    "error", [TimeoutError("timed out"), PermissionError("not now"), ConnectionResetError("reset")]
)
def test_storage_that_does_not_answer_is_no_damage(workdir, newest, monkeypatch, error):
    """The step stays where it is, and the next start uses it."""

    def fail(path):
        raise error

    before = digest(workdir)
    with monkeypatch.context() as patch:
        patch.setattr(integrity, "file_sha256", fail)
        with pytest.raises(OSError, match="cannot be read just now .* nothing was changed"):
            Checkpoints(workdir).step_to_resume()
    assert digest(workdir) == before
    assert Checkpoints(workdir).step_to_resume() == int(newest.name)


# ---------------------------------------------------------------- unfinished steps


def record(workdir: pathlib.Path, step: int) -> None:
    (workdir / "last_saved.json").write_text(json.dumps({"step": step}))


def test_unfinished_step_is_removed(workdir, newest):
    (newest / MANIFEST_NAME).unlink()
    record(workdir, EVERY)
    assert Checkpoints(workdir).latest_step() == EVERY, "who samples meanwhile does not see it"
    assert resume(workdir) == (
        EVERY,
        f"step {STEPS} was not finished when its process ended; removed",
    )
    assert steps_in(workdir) == [str(EVERY)] and not (workdir / "set_aside").exists()


def test_unfinished_first_step_is_a_fresh_start(workdir, older, newest):
    shutil.rmtree(older)
    (newest / MANIFEST_NAME).unlink()
    (workdir / "last_saved.json").unlink()
    step, said = resume(workdir)
    assert (
        step is None
        and "was not finished" in said
        and "training starts from scratch" in said
        and steps_in(workdir) == []
    )


def test_leftovers_of_a_save_are_removed(workdir):
    leftover = workdir / "checkpoints" / f"{STEPS + 1}.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "half").touch()
    assert resume(workdir) == (STEPS, f"removed {leftover.name}, left by a save that was cut off")
    assert steps_in(workdir) == [str(EVERY), str(STEPS)]
