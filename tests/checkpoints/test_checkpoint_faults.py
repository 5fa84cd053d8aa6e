"""Faults of storage, and of the process that saves: what is damaged is noticed, put away and never
used.
"""

import json
import pathlib
import random
import shutil
from collections.abc import Callable

import pytest
from damage import cut, files, flip, largest, resume, sampler_of
from workdirs import EVERY, RUN, STEPS, arrays, assert_same_arrays, digest, run, steps_in

from djepa_jax.checkpoints import integrity
from djepa_jax.checkpoints.checkpointer import Checkpoints, check_step
from djepa_jax.checkpoints.integrity import MANIFEST_NAME, CheckpointError, DamagedError
from djepa_jax.checkpoints.restore import find_model
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


def test_nothing_is_sampled_from_a_step_with_a_flipped_byte(workdir, newest):
    """Whichever file it is in; scale, sampler and class names are among what is checked."""
    load, rng = sampler_of(workdir), random.Random(1)
    load()
    for path in files(newest):
        whole = flip(path, rng)
        with pytest.raises(DamagedError, match=str(newest)):
            load()
        path.write_bytes(whole)
    meta = newest / "meta" / "metadata"
    meta.write_bytes(meta.read_bytes().replace(b'"temperature": 1.0', b'"temperature": 7.0'))
    with pytest.raises(DamagedError, match="meta/metadata differs from its checksum"):
        find_model(workdir)


def test_the_command_line_refuses_a_damaged_step(workdir, newest, capsys):
    flip(largest(newest), random.Random(0))
    before = digest(workdir)
    flags = (f"--workdir={workdir}", "--config.evaluation.kind=small_images")
    for mode in ("sample", "evaluate"):
        assert main(["djepa_jax", *RUN, *flags, f"--mode={mode}"]) == 2
        assert "differs from its checksum" in capsys.readouterr().err and digest(workdir) == before


def test_white_space_of_a_manifest_counts(newest):
    path = newest / MANIFEST_NAME
    path.write_bytes(path.read_bytes().replace(b"\n", b" ", 1))
    with pytest.raises(DamagedError, match="manifest.json is not as it was written"):
        check_step(newest)


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


def test_damaged_newest_step_goes_to_quarantine_and_an_older_one_is_used(saved_run, tmp_path):
    for name, damage in DAMAGE.items():
        workdir = shutil.copytree(saved_run, tmp_path / name)
        older, newest = (workdir / "checkpoints" / str(step) for step in (EVERY, STEPS))
        good = digest(older)
        damage(newest, older)
        damaged = digest(newest)
        step, said = resume(workdir)
        assert step == EVERY, name
        assert said.startswith(f"WARNING: step {STEPS} is damaged: {newest}")
        assert steps_in(workdir) == [str(EVERY)] and digest(older) == good
        assert digest(workdir / "quarantine" / str(STEPS)) == damaged
        assert resume(workdir) == (EVERY, "")


def test_training_after_damage_ends_at_the_same_bits(saved_run, workdir, newest):
    """Again and again; what an earlier version has put away stays where it is."""
    (workdir / "set_aside" / "7").mkdir(parents=True)
    for _ in range(2):
        cut(largest(newest))
        status, output = run(workdir)
        assert status == 0 and f"WARNING: step {STEPS} is damaged" in output
        assert f"going on from step {EVERY}" in output
        assert_same_arrays(arrays(saved_run), arrays(workdir))
        check_step(newest)
    assert {path.name for path in (workdir / "quarantine").iterdir()} == {
        f"{STEPS}",
        f"{STEPS}-1",
    }
    assert (workdir / "set_aside" / "7").is_dir()


def test_a_file_more_does_no_harm(workdir, newest):
    (newest / "note.txt").write_text("good one")
    assert resume(workdir) == (STEPS, "")


def test_without_a_usable_step_nothing_is_changed(saved_run, tmp_path, capsys):
    for name in ("arrays cut", "manifest gone", "everything gone"):
        workdir = shutil.copytree(saved_run, tmp_path / name)
        steps = [workdir / "checkpoints" / str(step) for step in (EVERY, STEPS)]
        for step in steps:
            DAMAGE[name](step, steps[0])
        before = digest(workdir)
        assert main(["djepa_jax", *RUN, f"--workdir={workdir}"]) == 2
        message = capsys.readouterr().err
        assert digest(workdir) == before
        assert all(word in message for word in (*map(str, steps), "--restore_from=PATH@STEP"))


def test_recorded_step_that_is_gone_is_no_fresh_start(workdir):
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(CheckpointError, match=f"{workdir}/checkpoints.* nothing was changed"):
        resume(workdir)


def test_a_record_that_does_not_tell_a_step_is_no_fresh_start(tmp_path):
    """In a workdir without steps it is all that tells of those that were lost."""
    for text in ("{}", "[]", "40", "{", "[" * 100_000):
        (tmp_path / "last_saved.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"{tmp_path}/last_saved.json cannot be read"):
            resume(tmp_path)


def test_folders_of_other_names_are_no_steps(workdir):
    names = ["\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT NINE}9", "099", "-1", "1e3", "note"]
    for name in names:
        (workdir / "checkpoints" / name).mkdir()
    assert Checkpoints(workdir).steps() == [EVERY, STEPS] and resume(workdir) == (STEPS, "")
    assert steps_in(workdir) == sorted([*names, str(EVERY), str(STEPS)])


def test_storage_that_does_not_answer_is_no_damage(workdir, monkeypatch):
    """The step stays where it is, and the next start uses it."""
    before = digest(workdir)
    for error in (TimeoutError("timed out"), PermissionError("not now")):

        def fail(path, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(integrity, "file_sha256", fail)
            with pytest.raises(CheckpointError, match="just now .*nothing was changed"):
                resume(workdir)
        assert digest(workdir) == before
    assert resume(workdir) == (STEPS, "")


# ---------------------------------------------------------------- unfinished steps


def cut_off(workdir: pathlib.Path, step: int | None) -> None:
    """What a process leaves that ends between writing the newest step and sealing it."""
    (workdir / "checkpoints" / str(STEPS) / MANIFEST_NAME).unlink()
    record = {"step": step, "saving": STEPS}
    (workdir / "last_saved.json").write_text(json.dumps(record))


def test_unfinished_step_is_removed(workdir):
    cut_off(workdir, EVERY)
    assert Checkpoints(workdir).latest_step() == EVERY, "who samples meanwhile does not see it"
    assert find_model(workdir).step == EVERY
    step, said = resume(workdir)
    assert step == EVERY and f"step {STEPS} was not finished" in said
    assert steps_in(workdir) == [str(EVERY)] and not (workdir / "quarantine").exists()


def test_unfinished_first_step_is_a_fresh_start(workdir, older):
    shutil.rmtree(older)
    cut_off(workdir, None)
    step, said = resume(workdir)
    assert step is None and "was not finished" in said and steps_in(workdir) == []


def test_unfinished_step_is_no_model(workdir, newest):
    """Not even by its own path."""
    cut_off(workdir, EVERY)
    with pytest.raises(DamagedError, match=f"{newest} has no manifest.json"):
        find_model(newest)


def test_leftovers_of_a_save_are_removed(workdir):
    leftover = workdir / "checkpoints" / f"{STEPS + 1}.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "half").touch()
    step, said = resume(workdir)
    assert step == STEPS and f"removed {leftover.name}" in said
    assert steps_in(workdir) == [str(EVERY), str(STEPS)]
