"""--restore_from: a workdir goes on from a certain step, of its own or of another workdir."""

import functools
import json
import pathlib
import shutil

import numpy as np
import pytest
from djepa_jax.config.experiment.experiment import ConfigError
from tiny import tiny_config
from workdirs import EVERY, RUN, STEPS, arrays, assert_same_arrays, digest, run, steps_in

from djepa_jax.checkpoints import go_back as restoring
from djepa_jax.checkpoints.checkpointer import Checkpoints, check_step
from djepa_jax.checkpoints.go_back import UNFINISHED, go_back
from djepa_jax.checkpoints.integrity import MANIFEST_NAME, write_manifest
from djepa_jax.checkpoints.orbax_io import CheckpointError
from djepa_jax.config.experiment import experiment as configuration
from djepa_jax.core import sharding
from djepa_jax.main import main
from djepa_jax.training.initial_state import Start

BOTH = [str(EVERY), str(STEPS)]


@pytest.fixture
def other(saved_run, tmp_path) -> pathlib.Path:
    """Another workdir, with the steps `EVERY` and `STEPS`."""
    return shutil.copytree(saved_run, tmp_path / "other")


@pytest.fixture
def workdir(saved_run, tmp_path) -> pathlib.Path:
    """A workdir with the same steps."""
    return shutil.copytree(saved_run, tmp_path / "run")


@functools.cache
def start(*flags: str) -> Start:
    """That of a training of the tiny model, perhaps with further flags."""
    config = tiny_config(*flags)
    return Start(
        config,
        config,
        sharding.make_mesh((-1, 1, 1)),
        Checkpoints("unused"),
        print,
    )


def restore(workdir: pathlib.Path, restore_from: str, *flags: str) -> str:
    """What is said by it, and by looking for the step to resume from."""
    workdir.mkdir(exist_ok=True)
    said = []
    go_back(workdir, restore_from, 2, start(*flags).check_fits, said.append)
    Checkpoints(workdir).step_to_resume(said.append)
    return "\n".join(said)


def rename_step(workdir: pathlib.Path, old: int, new: int) -> None:
    folder = workdir / "checkpoints"
    (folder / str(old)).rename(folder / str(new))
    (workdir / "last_saved.json").write_text(json.dumps({"step": new}))


def set_aside(workdir: pathlib.Path) -> list[str]:
    """Names of the steps that were set aside; beside them are copies of the metrics."""
    folder = workdir / "set_aside"
    return (
        sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []
    )


@pytest.mark.parametrize(
    ("number", "step"), [(f"@{EVERY}", EVERY), (f"@{STEPS}", STEPS), ("", STEPS)]
)
def test_a_new_workdir_begins_with_a_step_of_another(other, tmp_path, number, step):
    before, fresh = digest(other), tmp_path / "fresh"
    assert f"restored step {step} of {other}" in restore(fresh, f"{other}{number}")
    assert steps_in(fresh) == [str(step)] and Checkpoints(fresh).recorded_step() == step
    assert digest(fresh / "checkpoints" / str(step)) == digest(other / "checkpoints" / str(step))
    assert digest(other) == before


@pytest.mark.parametrize("link", [False, True])
def test_a_workdir_goes_back_to_a_step_of_its_own(workdir, tmp_path, link):
    (tmp_path / "link").symlink_to(workdir)
    good = digest(workdir / "checkpoints" / str(EVERY))
    said = restore(workdir, f"{tmp_path / 'link' if link else workdir}@{EVERY}")
    assert f"step {STEPS} was set aside: {workdir / 'set_aside' / str(STEPS)}" in said
    assert (
        steps_in(workdir) == [str(EVERY)] and digest(workdir / "checkpoints" / str(EVERY)) == good
    )
    assert set_aside(workdir) == [str(STEPS)] and Checkpoints(workdir).recorded_step() == EVERY


def test_newer_steps_of_the_workdir_are_set_aside(workdir, other):
    rename_step(workdir, STEPS, 70)
    assert "step 70 was set aside" in restore(workdir, f"{other}@{STEPS}")
    assert steps_in(workdir) == BOTH and set_aside(workdir) == ["70"]


def test_a_step_of_the_same_number_gives_way(workdir, other):
    """Unless it is the same one."""
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    rename_step(workdir, EVERY, STEPS)
    different = digest(workdir / "checkpoints" / str(STEPS))
    restore(workdir, f"{other}@{STEPS}")
    assert digest(workdir / "checkpoints") == {
        name: value
        for name, value in digest(other / "checkpoints").items()
        if name.startswith(str(STEPS))
    }
    assert digest(workdir / "set_aside" / str(STEPS)) == different
    (workdir / restoring.NOTE_NAME).unlink()
    restore(workdir, f"{other}@{STEPS}")
    assert set_aside(workdir) == [str(STEPS)]


def test_a_good_copy_takes_the_place_of_a_damaged_step(workdir, other):
    for step in BOTH:
        (workdir / "checkpoints" / step / "meta" / "metadata").unlink()
    with pytest.raises(CheckpointError, match="--restore_from=PATH@STEP"):
        Checkpoints(workdir).step_to_resume()
    restore(workdir, f"{other}@{STEPS}")
    check_step(workdir / "checkpoints" / str(STEPS))
    assert set_aside(workdir) == [str(STEPS)]


def test_the_same_command_again_goes_on(workdir, other):
    command = f"{other}@{EVERY}"
    restore(workdir, command)
    shutil.copytree(other / "checkpoints" / str(STEPS), workdir / "checkpoints" / str(STEPS))
    assert f"--restore_from={command} was done before; going on" in restore(workdir, command)
    assert steps_in(workdir) == BOTH
    assert f"restored step {EVERY}" in restore(workdir, f"{workdir}@{EVERY}"), (
        "another command goes back again"
    )
    assert steps_in(workdir) == [str(EVERY)]


BAD = {
    "@7": "holds 20, 40; name one that is there",
    "@newest": "is not PATH@STEP",
    "@\N{SUPERSCRIPT TWO}": "is not PATH@STEP",
    "/nothing@20": "checkpoints does not exist; name a workdir",
    "/nothing": "checkpoints does not exist; name a workdir",
    f"@{STEPS}": f"{STEPS}.*meta.*is missing",
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_restored_changes_nothing(workdir, other, name):
    (other / "checkpoints" / str(STEPS) / "meta" / "metadata").unlink()
    before = digest(workdir)
    with pytest.raises(CheckpointError, match=BAD[name]):
        restore(workdir, f"{other}{name}")
    assert digest(workdir) == before


WIDER = "--config.model.width=32"


def change_meta(workdir: pathlib.Path, change) -> None:
    """Change what the step `STEPS` says of itself, and seal it again."""
    path = workdir / "checkpoints" / str(STEPS) / "meta" / "metadata"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    write_manifest(path.parents[1])


def only_average(workdir: pathlib.Path) -> None:
    """Replace the step `STEPS` by one whose arrays are not those that its configuration needs."""
    config = configuration.resolved(tiny_config())
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    Checkpoints(workdir).save_imported(
        {"ema_params": {"w": np.ones(3, np.float32)}}, config, STEPS, 0
    )


UNFIT = {
    "another model": (lambda other: None, "model.width: 16 -> 32"),
    "other arrays": (only_average, "has no array ema_params/"),
    "a fingerprint is missing": (
        lambda other: change_meta(other, lambda meta: meta["fingerprints"].pop("step")),
        "has no fingerprint of the array step",
    ),
    "another format": (
        lambda other: change_meta(other, lambda meta: meta.update(format=9)),
        "has format 9",
    ),
}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("fault", UNFIT)
def test_a_step_that_training_cannot_go_on_from_changes_nothing(workdir, other, fault, own):
    """Neither of another workdir nor of its own; without --restore_from the same training goes
    on.
    """
    spoil, reason = UNFIT[fault]
    rename_step(workdir, EVERY, STEPS + 1)
    source = workdir if own else other
    spoil(source)
    before = digest(workdir)
    with pytest.raises((CheckpointError, ConfigError), match=reason):
        restore(workdir, f"{source}@{STEPS}", *([WIDER] if fault == "another model" else []))
    assert digest(workdir) == before
    assert Checkpoints(workdir).step_to_resume() == STEPS + 1


def test_the_command_line_refuses_a_step_of_another_model_before_anything_is_moved(
    workdir, other, capsys
):
    before = digest(workdir)
    assert (
        main(["djepa_jax", *RUN, WIDER, f"--workdir={workdir}", f"--restore_from={other}@{EVERY}"])
        == 2
    )
    error = capsys.readouterr().err
    assert (
        f'--restore_from "{other}@{EVERY}": the checkpoint is of another model' in error
        and "16 -> 32" in error
    )
    assert digest(workdir) == before


def test_metrics_of_the_steps_that_are_set_aside_are_kept(workdir):
    metrics = (workdir / "metrics.jsonl").read_text()
    restore(workdir, f"{workdir}@{EVERY}")
    assert (workdir / "set_aside" / f"metrics-{STEPS}.jsonl").read_text() == metrics


class Killed(BaseException):
    """As if the process ended here."""


@pytest.mark.parametrize(
    "place", ["copy_folder", "check_step", "move_folder", "set_aside", "write_json"]
)
@pytest.mark.parametrize("again", [True, False])
def test_one_that_was_cut_off_is_repeated(workdir, other, monkeypatch, place, again):
    """By the same command; without --restore_from the workdir can be used, too."""
    rename_step(workdir, STEPS, 70)
    owner = Checkpoints if place == "set_aside" else restoring
    function = getattr(owner, place)

    def cut_off(*arguments):
        if place == "copy_folder":
            function(*arguments)
            next((arguments[1] / "state").iterdir()).unlink(missing_ok=True)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, place, cut_off)
        restore(workdir, f"{other}@{STEPS}")
    if again:
        restore(workdir, f"{other}@{STEPS}")
        assert steps_in(workdir) == BOTH and set_aside(workdir) == ["70"]
        assert digest(workdir / "checkpoints") == digest(other / "checkpoints")
        return
    assert Checkpoints(workdir).step_to_resume() in (STEPS, 70)
    assert not (workdir / "checkpoints" / UNFINISHED).exists()


def test_damage_while_copying_is_noticed(workdir, other, monkeypatch):
    copy = restoring.copy_folder

    def bad_copy(source, target):
        copy(source, target)
        (target / MANIFEST_NAME).write_bytes(b"{}")

    rename_step(workdir, STEPS, 70)
    monkeypatch.setattr(restoring, "copy_folder", bad_copy)
    with pytest.raises(CheckpointError, match="manifest.json cannot be read"):
        restore(workdir, f"{other}@{STEPS}")
    assert Checkpoints(workdir).step_to_resume() == 70 and set_aside(workdir) == []


def test_training_goes_on_from_a_restored_step(saved_run, tmp_path):
    """A stop and the same command again included."""
    fresh, command = tmp_path / "fresh", f"--restore_from={saved_run}@{EVERY}"
    status, output = run(fresh, command, "--config.num_steps=30")
    assert status == 0 and f"going on from step {EVERY} of 30" in output, output
    status, output = run(fresh, command)
    assert (
        status == 0
        and "was done before" in output
        and f"going on from step 30 of {STEPS}" in output
    )
    assert_same_arrays(arrays(saved_run), arrays(fresh))
    steps = [
        json.loads(line)["step"] for line in (fresh / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(EVERY + 1, STEPS + 1))
