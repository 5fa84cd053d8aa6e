"""--restore_from: a workdir goes on from a certain step, of its own or of another workdir."""

import functools
import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest
from tiny import tiny_config
from workdirs import EVERY, RUN, STEPS, arrays, assert_same_arrays, digest, run, steps_in

from djepa_jax.checkpoints import checkpointer, integrity
from djepa_jax.checkpoints.checkpointer import Checkpoints, check_step
from djepa_jax.checkpoints.integrity import MANIFEST_NAME, CheckpointError, write_manifest
from djepa_jax.checkpoints.restore import check_same_model, go_back
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.stored import to_stored
from djepa_jax.core.train_step import TrainState, state_shapes
from djepa_jax.main import main

BOTH = [str(EVERY), str(STEPS)]
WIDER = "--config.model.width=32"


@pytest.fixture
def other(saved_run, tmp_path) -> pathlib.Path:
    """Another workdir, with the steps `EVERY` and `STEPS`."""
    return shutil.copytree(saved_run, tmp_path / "other")


@pytest.fixture
def workdir(saved_run, tmp_path) -> pathlib.Path:
    """A workdir with the same steps."""
    return shutil.copytree(saved_run, tmp_path / "run")


@functools.cache
def training(*flags: str) -> tuple[TrainState, Experiment]:
    """Abstract state and configuration of a tiny training, perhaps with further flags."""
    experiment = tiny_config(*flags)
    return state_shapes(experiment.train), experiment


def restored(workdir: pathlib.Path, restore_from: str, *flags: str) -> str:
    """Go back, and look for the step to resume from: what was said."""
    workdir.mkdir(exist_ok=True)
    said = []
    checkpoints = Checkpoints(workdir)
    go_back(checkpoints, restore_from, *training(*flags), said.append)
    checkpoints.step_to_resume(said.append)
    return "\n".join(said)


def rename_step(workdir: pathlib.Path, old: int, new: int) -> None:
    folder = workdir / "checkpoints"
    (folder / str(old)).rename(folder / str(new))
    (workdir / "last_saved.json").write_text(json.dumps({"step": new}))


def in_quarantine(workdir: pathlib.Path) -> list[str]:
    folder = workdir / "quarantine"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_new_workdir_begins_with_a_step_of_another(other, tmp_path):
    before = digest(other)
    for number, step in ((f"@{EVERY}", EVERY), ("", STEPS)):
        fresh, name = tmp_path / f"fresh{step}", f"checkpoints/{step}"
        assert f"restored {other}/{name}" in restored(fresh, f"{other}{number}")
        assert steps_in(fresh) == [str(step)] and Checkpoints(fresh).recorded() == (step, None)
        assert digest(fresh / name) == digest(other / name) and digest(other) == before


def test_a_workdir_goes_back_to_a_step_of_its_own(workdir, tmp_path):
    """Under whatever name; the metrics of the steps that go are kept."""
    (tmp_path / "link").symlink_to(workdir)
    good = digest(workdir / "checkpoints" / str(EVERY))
    metrics = (workdir / "metrics.jsonl").read_text()
    said = restored(workdir, f"{tmp_path / 'link'}@{EVERY}")
    assert f"step {STEPS} was moved to {workdir / 'quarantine' / str(STEPS)}" in said
    assert steps_in(workdir) == [str(EVERY)]
    assert digest(workdir / "checkpoints" / str(EVERY)) == good
    assert in_quarantine(workdir) == [str(STEPS), f"metrics-{STEPS}.jsonl", f"starts-{STEPS}.jsonl"]
    assert (workdir / "quarantine" / f"metrics-{STEPS}.jsonl").read_text() == metrics
    assert Checkpoints(workdir).recorded()[0] == EVERY


def test_a_step_of_the_same_number_and_newer_ones_give_way(workdir, other):
    rename_step(workdir, STEPS, 70)
    rename_step(workdir, EVERY, STEPS)
    different = digest(workdir / "checkpoints" / str(STEPS))
    restored(workdir, f"{other}@{STEPS}")
    assert steps_in(workdir) == [str(STEPS)]
    assert digest(workdir / "checkpoints" / str(STEPS)) == digest(
        other / "checkpoints" / str(STEPS)
    )
    assert digest(workdir / "quarantine" / str(STEPS)) == different
    assert in_quarantine(workdir) == [str(STEPS), "70", "metrics-70.jsonl", "starts-70.jsonl"]


def test_a_good_copy_takes_the_place_of_a_damaged_step(workdir, other):
    for step in BOTH:
        (workdir / "checkpoints" / step / "meta" / "metadata").unlink()
    with pytest.raises(CheckpointError, match="--restore_from=PATH@STEP"):
        Checkpoints(workdir).step_to_resume()
    restored(workdir, f"{other}@{STEPS}")
    check_step(workdir / "checkpoints" / str(STEPS))
    assert in_quarantine(workdir) == [str(STEPS)]


def test_the_same_command_again_goes_on(workdir, other):
    command = f"{other}@{EVERY}"
    restored(workdir, command)
    shutil.copytree(other / "checkpoints" / str(STEPS), workdir / "checkpoints" / str(STEPS))
    assert f"--restore_from={command} was done before" in restored(workdir, command)
    assert steps_in(workdir) == BOTH
    restored(workdir, f"{workdir}@{EVERY}")  # another command goes back again
    assert steps_in(workdir) == [str(EVERY)]


BAD = {
    "@7": "holds 20, 40; write PATH@STEP",
    "@newest": "names no step",
    "@\N{SUPERSCRIPT TWO}": "names no step",
    "/nothing@20": "nothing/checkpoints holds none",
    "/nothing": "nothing/checkpoints holds none",
    f"@{STEPS}": f"{STEPS}.*meta.*cannot be read",
}


def test_what_cannot_be_restored_changes_nothing(workdir, other):
    (other / "checkpoints" / str(STEPS) / "meta" / "metadata").unlink()
    before = digest(workdir)
    for name, words in BAD.items():
        with pytest.raises(CheckpointError, match=words):
            restored(workdir, f"{other}{name}")
    assert digest(workdir) == before


def only_average(workdir: pathlib.Path) -> None:
    """Replace the step `STEPS` by one whose arrays are not those that its configuration needs."""
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    average = {"ema_params": {"w": np.ones(3, np.float32)}}
    Checkpoints(workdir).save_imported(average, to_stored(tiny_config()), STEPS, 0)


def later_format(workdir: pathlib.Path) -> None:
    path = workdir / "checkpoints" / str(STEPS) / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))
    write_manifest(path.parents[1])


UNFIT = {
    "another model": (lambda other: None, "model.width: 16 -> 32"),
    "other arrays": (only_average, "has no array ema_params/"),
    "another format": (later_format, "has format 9"),
}


def test_a_step_that_training_cannot_go_on_from_changes_nothing(saved_run, tmp_path):
    """Neither of another workdir nor of its own; without the flag the same training goes on."""
    for own, (fault, (spoil, reason)) in itertools.product((True, False), UNFIT.items()):
        workdir = shutil.copytree(saved_run, tmp_path / f"{fault}, own {own}")
        rename_step(workdir, EVERY, STEPS + 1)
        source = workdir if own else shutil.copytree(saved_run, tmp_path / f"{fault}, other")
        spoil(source)
        before = digest(workdir)
        with pytest.raises((CheckpointError, ConfigError), match=reason):
            restored(workdir, f"{source}@{STEPS}", *([WIDER] if fault == "another model" else []))
        assert digest(workdir) == before
        assert Checkpoints(workdir).step_to_resume() == STEPS + 1


def test_a_class_that_was_added_is_named():
    names = ("apple", "pear", "plum", "quince")
    now = tiny_config().updated({"data.num_classes": 4, "data.class_names": names})
    before = now.updated({"data.num_classes": 3, "data.class_names": ("apple", "pear", "quince")})
    with pytest.raises(ConfigError, match="num_classes: 3 -> 4, new classes: 2 plum.*--init_from"):
        check_same_model(before, now)


def test_the_command_line_refuses_a_step_of_another_model(workdir, other, capsys):
    before, command = digest(workdir), f"--restore_from={other}@{EVERY}"
    assert main(["djepa_jax", *RUN, WIDER, f"--workdir={workdir}", command]) == 2
    error = capsys.readouterr().err
    assert f'--restore_from "{other}@{EVERY}": the checkpoint is of another model' in error
    assert "16 -> 32" in error and digest(workdir) == before


class Killed(BaseException):
    """As if the process ended here."""


# Where it is cut off: the owner and the name of the function that does not return.
PLACES = [
    (integrity, "copy_folder"),
    (integrity, "move_folder"),
    (Checkpoints, "quarantine"),
    (checkpointer, "write_json"),
]


@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[name for _, name in PLACES])
def test_one_that_was_cut_off_is_repeated(workdir, other, monkeypatch, owner, name):
    """By the same command; without --restore_from the workdir can be used, too."""
    rename_step(workdir, STEPS, 70)
    function = getattr(owner, name)

    def cut_off(*arguments):
        if name == "copy_folder":
            function(*arguments)
            next((arguments[1] / "state").iterdir()).unlink(missing_ok=True)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, cut_off)
        restored(workdir, f"{other}@{STEPS}")
    without = shutil.copytree(workdir, workdir.with_name("without"))
    assert Checkpoints(without).step_to_resume() in (STEPS, 70)
    assert not any("tmp" in name for name in steps_in(without))
    restored(workdir, f"{other}@{STEPS}")
    assert steps_in(workdir) == BOTH and "70" in in_quarantine(workdir)
    assert digest(workdir / "checkpoints") == digest(other / "checkpoints")


def test_damage_while_copying_is_noticed(workdir, other, monkeypatch):
    copy = integrity.copy_folder

    def bad_copy(source, target):
        copy(source, target)
        (target / MANIFEST_NAME).write_bytes(b"{}")

    rename_step(workdir, STEPS, 70)
    monkeypatch.setattr(integrity, "copy_folder", bad_copy)
    with pytest.raises(CheckpointError, match="manifest.json cannot be read"):
        restored(workdir, f"{other}@{STEPS}")
    assert Checkpoints(workdir).step_to_resume() == 70 and in_quarantine(workdir) == []


def test_training_goes_on_from_a_restored_step(saved_run, tmp_path):
    """A stop and the same command again included."""
    fresh, command = tmp_path / "fresh", f"--restore_from={saved_run}@{EVERY}"
    status, output = run(fresh, command, "--config.num_steps=30")
    assert status == 0 and f"going on from step {EVERY} of 30" in output, output
    status, output = run(fresh, command)
    assert status == 0 and "was done before" in output
    assert f"going on from step 30 of {STEPS}" in output
    assert_same_arrays(arrays(saved_run), arrays(fresh))
    lines = (fresh / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(EVERY + 1, STEPS + 1))
