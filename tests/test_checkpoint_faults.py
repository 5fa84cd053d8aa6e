"""Faults of storage, and of the process that saves: what is damaged is noticed, set aside and never used."""

import contextlib
import dataclasses
import json
import pathlib
import random
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import Training
from tiny import tiny_config
from workdirs import EVERY, RUN, STEPS, arrays, assert_same_arrays, compiled, digest, run, steps_in

from djepa_jax import checkpoint, manifest, sharding
from djepa_jax import config as configuration
from djepa_jax.checkpoint import Checkpoints, check_step
from djepa_jax.generate import placed_params
from djepa_jax.main import main
from djepa_jax.manifest import MANIFEST_NAME, write_manifest
from djepa_jax.orbax_io import CheckpointError, DamagedError, read_back, restore_state
from djepa_jax.stored import find_model
from djepa_jax.train_step import TrainState

GOLDEN = pathlib.Path(__file__).parent / "fixtures" / "workdirs"
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


def resume(workdir: pathlib.Path) -> tuple[int | None, str]:
    """The step to resume from, and what was said."""
    said = []
    return Checkpoints(workdir).step_to_resume(said.append), "\n".join(said)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: pathlib.Path, rng: random.Random) -> bytes:
    """Change one byte of a file; what it was before."""
    whole = path.read_bytes()
    place, change = rng.randrange(len(whole)), rng.randrange(1, 256)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
    return whole


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
    """Whatever the manifest says: a flip in the arrays' files is an error, or was in no array that is read."""
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
    """One byte in each 64 of every file, so that no matter where Orbax put the averages, some of them are hit."""
    load, rng = sampler_of(workdir), np.random.default_rng(seed)
    load()
    for path in array_files(newest):
        data = np.fromfile(path, np.uint8)
        data[rng.integers(64) :: 64] ^= rng.integers(1, 256, dtype=np.uint8)
        data.tofile(path)
    write_manifest(newest)
    with pytest.raises(CheckpointError):
        load()


def sampler_of(workdir: pathlib.Path) -> Callable:
    """Loads, on one device, the arrays that a run is sampled from."""
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    abstract = placed_params(configuration.build(tiny_config()), mesh)
    return lambda: jax.device_get(find_model(workdir).restore(abstract))


def test_nothing_is_sampled_or_evaluated_from_other_arrays(workdir, older, newest, capsys):
    """Those of another step are whole by every checksum of Orbax's, and of the manifest that is made for them."""
    shutil.rmtree(newest / "state")
    shutil.copytree(older / "state", newest / "state")
    write_manifest(newest)
    before = digest(workdir)
    for mode in ("sample", "evaluate"):
        flags = (*RUN, "--config.evaluation.kind=small_images", f"--mode={mode}", f"--workdir={workdir}")
        assert main(["djepa_jax", *flags]) == 2
        assert "is not the one that was saved" in capsys.readouterr().err
    assert digest(workdir) == before
    status, output = run(workdir)
    assert status == 2 and "is not the one that was saved" in output and steps_in(workdir) == [str(EVERY), str(STEPS)]


# ---------------------------------------------------------------- damaged steps


def array_files(step: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in files(step / "state") if path.parent.name == "d"]


def largest(step: pathlib.Path) -> pathlib.Path:
    return max(array_files(step), key=lambda path: path.stat().st_size)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


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
    "meta of another step": lambda step, old: shutil.copy(old / "meta" / "metadata", step / "meta" / "metadata"),
    "manifest gone": lambda step, _: (step / MANIFEST_NAME).unlink(),
    "manifest cut": lambda step, _: cut(step / MANIFEST_NAME),
    "manifest of another step": lambda step, old: shutil.copy(old / MANIFEST_NAME, step / MANIFEST_NAME),
    "everything gone": lambda step, _: emptied(step),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_step_is_set_aside_and_an_older_one_used(workdir, older, newest, damage):
    good = digest(older)
    DAMAGE[damage](newest, older)
    damaged = digest(newest)
    step, said = resume(workdir)
    assert step == EVERY and f"WARNING: step {STEPS} is damaged: {newest}" in said and "an older step is used" in said
    assert steps_in(workdir) == [str(EVERY)] and digest(older) == good, "what training goes on from is the same for all damage"
    assert digest(workdir / "set_aside" / str(STEPS)) == damaged


def test_training_after_damage_ends_at_the_same_bits(saved_run, workdir, newest):
    for _ in range(2):
        cut(largest(newest))
        status, output = run(workdir)
        assert status == 0 and f"WARNING: step {STEPS} is damaged" in output and f"going on from step {EVERY}" in output
        assert_same_arrays(arrays(saved_run), arrays(workdir))
        check_step(newest)
    assert sorted(path.name for path in (workdir / "set_aside").iterdir()) == [f"{STEPS}", f"{STEPS}-1"]


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
    assert str(older) in message and str(newest) in message and "--restore_from=PATH@STEP" in message


def test_recorded_step_that_is_gone_is_no_fresh_start(workdir):
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(CheckpointError, match=f"holds no checkpoint, though step {STEPS} was saved there"):
        resume(workdir)


@pytest.mark.parametrize(
    "text", ['{"step": null}', '{"step": true}', '{"step": -1}', '{"step": "40"}', "{}", "[]", "40", "{", "[" * 100_000]
)
def test_a_record_that_does_not_tell_a_step_is_no_fresh_start(tmp_path, text):
    """In a workdir without steps it is all that tells of those that were lost."""
    (tmp_path / "last_saved.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/last_saved.json cannot be read .*; remove it"):
        resume(tmp_path)


@pytest.mark.parametrize("name", ["\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT NINE}9", "099", "-1", "1e3", "note"])
def test_folders_of_other_names_are_no_steps(workdir, name):
    (workdir / "checkpoints" / name).mkdir()
    assert Checkpoints(workdir).steps() == [EVERY, STEPS] and resume(workdir) == (STEPS, "")
    assert name in steps_in(workdir)


# ---------------------------------------------------------------- unfinished steps


def record(workdir: pathlib.Path, step: int) -> None:
    (workdir / "last_saved.json").write_text(json.dumps({"step": step}))


def test_unfinished_step_is_removed(workdir, newest):
    (newest / MANIFEST_NAME).unlink()
    record(workdir, EVERY)
    assert Checkpoints(workdir).latest_step() == EVERY, "who samples meanwhile does not see it"
    assert resume(workdir) == (EVERY, f"step {STEPS} was not finished when its process ended; removed")
    assert steps_in(workdir) == [str(EVERY)] and not (workdir / "set_aside").exists()


def test_unfinished_first_step_is_a_fresh_start(workdir, older, newest):
    shutil.rmtree(older)
    (newest / MANIFEST_NAME).unlink()
    (workdir / "last_saved.json").unlink()
    step, said = resume(workdir)
    assert step is None and "was not finished" in said and "training starts from scratch" in said and steps_in(workdir) == []


def test_leftovers_of_a_save_are_removed(workdir):
    leftover = workdir / "checkpoints" / f"{STEPS + 1}.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "half").touch()
    assert resume(workdir) == (STEPS, f"removed {leftover.name}, left by a save that was cut off")
    assert steps_in(workdir) == [str(EVERY), str(STEPS)]


def test_step_0_may_be_lost_too(tmp_path):
    """An import may be at step 0; it is recorded like any other."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_imported({"ema_params": {"w": np.ones(3, np.float32)}}, {}, 0, 0)
    (checkpoints.folder(0) / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="nothing was changed"):
        checkpoints.step_to_resume()
    save(checkpoints, 1)
    cut(tmp_path / "checkpoints" / "1" / MANIFEST_NAME)
    with pytest.raises(CheckpointError, match="nothing was changed"):
        checkpoints.step_to_resume()
    assert steps_in(tmp_path) == ["0", "1"]


# ---------------------------------------------------------------- saves


def state(step: int, rows: int = 16) -> TrainState:
    """A small state of another kind than any model's."""
    table = step + jnp.arange(rows * 8, dtype=jnp.float32).reshape(rows, 8)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(jnp.int32(step), {"table": table}, {"table": 2 * table}, {"mu": -table}, zero, zero)


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(state(step), {}, 0)
    assert checkpoints.wait() == step


def test_a_step_is_saved_once(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    before = digest(tmp_path)
    with pytest.raises(CheckpointError, match="step 1 was not saved: .* exists already"):
        checkpoints.save(state(1), {}, 0)
    assert digest(tmp_path) == before


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_older_steps_go_when_a_newer_one_is_sealed(tmp_path, monkeypatch, keep):
    checkpoints, removed, remove = Checkpoints(tmp_path, keep), [], Checkpoints._remove

    def watched(self, step):
        check_step(self.folder(self.recorded_step()))
        removed.append((step, self.recorded_step()))
        remove(self, step)

    monkeypatch.setattr(Checkpoints, "_remove", watched)
    for step in range(1, 6):
        save(checkpoints, step)
        assert steps_in(tmp_path) == [str(old) for old in range(max(1, step - keep + 1), step + 1)]
    assert removed == [(step - keep, step) for step in range(keep + 1, 6)]


def test_a_removal_that_was_cut_off_is_completed(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 2):
        save(checkpoints, step)
    (checkpoints.folder(1) / MANIFEST_NAME).unlink()
    assert resume(tmp_path) == (2, "")
    save(checkpoints, 3)
    assert steps_in(tmp_path) == ["2", "3"]


def other_arrays(step: pathlib.Path) -> None:
    """Put the arrays of step 1 into another step."""
    shutil.rmtree(step / "state")
    shutil.copytree(step.with_name("1") / "state", step / "state")


def flipped_arrays(step: pathlib.Path) -> None:
    for path in array_files(step):
        flip(path, random.Random(0))


@pytest.mark.parametrize(("fault", "reason"), [(other_arrays, "not read back as it was written"), (flipped_arrays, "restored")])
def test_what_reads_back_otherwise_does_not_count(tmp_path, monkeypatch, fault, reason):
    checkpoints, read_back = Checkpoints(tmp_path), checkpoint.read_back
    save(checkpoints, 1)

    def after_a_fault(folder, marks):
        fault(pathlib.Path(folder))
        read_back(folder, marks)

    monkeypatch.setattr(checkpoint, "read_back", after_a_fault)
    checkpoints.save(state(2), {}, 0)
    with pytest.raises(CheckpointError, match=f"saving step 2 .* failed: .*{reason}"):
        checkpoints.wait()
    assert checkpoints.latest_step() == 1 == checkpoints.recorded_step()
    assert resume(tmp_path) == (1, "step 2 was not finished when its process ended; removed")


def test_a_full_disk_stops_training_at_the_next_step(saved_run, tmp_path):
    status, output = run(tmp_path, full_from=EVERY)
    assert status == 2 and "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"saving step {EVERY} to {tmp_path / 'checkpoints'} failed" in line and "File too large" in line
    made = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(made) <= EVERY + 1
    assert Checkpoints(tmp_path).steps() == [] and not (tmp_path / "last_saved.json").exists()
    status, output = run(tmp_path)
    assert status == 0 and "left by a save that was cut off" in output
    assert_same_arrays(arrays(saved_run), arrays(tmp_path))


# ---------------------------------------------------------------- what fits


@pytest.fixture(scope="module")
def one_step(tmp_path_factory) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path_factory.mktemp("one"))
    save(checkpoints, 1)
    return checkpoints


@pytest.mark.parametrize("change", [{"dtype": jnp.bfloat16}, {"shape": (16, 4)}, {"shape": (8, 16)}])
def test_another_type_or_shape_is_refused(one_step, change):
    abstract = jax.eval_shape(lambda: state(1))
    found = abstract.ema_params["table"]
    wanted = jax.ShapeDtypeStruct(change.get("shape", found.shape), change.get("dtype", found.dtype))
    abstract = dataclasses.replace(abstract, ema_params={"table": wanted})
    with pytest.raises(CheckpointError, match=r"the array ema_params/table has shape \(16, 8\) and type float32, the model has"):
        one_step.restore(abstract, one_step.read_meta())
    with pytest.raises(CheckpointError, match="the array ema_params/table has shape"):
        one_step.restore_ema({"table": wanted})


def test_an_array_that_is_not_there_is_named(one_step):
    abstract = dataclasses.replace(jax.eval_shape(lambda: state(1)), opt_state={"nu": jax.ShapeDtypeStruct((16, 8), jnp.float32)})
    with pytest.raises(CheckpointError, match="has no array opt_state/nu"):
        one_step.restore(abstract, one_step.read_meta())


MESHES = {"8,1,1": (8, 1, 1), "1,8,1": (1, 8, 1), "2,2,2": (2, 2, 2), "one device": (1, 1, 1)}


@pytest.mark.parametrize("shape", MESHES)
def test_another_mesh_gets_the_same_arrays(tmp_path_factory, shape):
    saved, abstract = state(1, rows=4096), jax.eval_shape(lambda: state(1, rows=4096))

    def placed(shape):
        mesh = sharding.make_mesh(shape, jax.devices() if shape != (1, 1, 1) else jax.devices()[:1])
        return sharding.state_shardings(abstract, mesh)

    checkpoints = Checkpoints(tmp_path_factory.mktemp("mesh"))
    checkpoints.save(jax.device_put(saved, placed((1, 8, 1))), {}, 0)
    checkpoints.wait()
    wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed(MESHES[shape]))
    found = TrainState(**restore_state(checkpoints.folder(1), wanted, checkpoints.read_meta()))
    for array, expected, struct in zip(*map(jax.tree.leaves, (found, saved, wanted)), strict=True):
        assert array.sharding == struct.sharding
        np.testing.assert_array_equal(array, expected)


# ---------------------------------------------------------------- earlier versions


def test_workdir_of_the_first_version_trains_on(tmp_path):
    kept = digest(GOLDEN)
    old = shutil.copytree(GOLDEN / "v1", tmp_path / "run")
    status, output = run(old, "--config.keep_checkpoints=3", simple=False)
    assert status == 0 and f"going on from step 2 of {STEPS}" in output, output
    assert steps_in(old) == ["2", str(EVERY), str(STEPS)]
    assert digest(old / "checkpoints" / "2") == digest(GOLDEN / "v1" / "checkpoints" / "2")
    check_step(old / "checkpoints" / str(STEPS))
    before, after = arrays(old, 2), arrays(old)
    assert before.keys() == after.keys() and after["step"] == STEPS and after["skipped_steps"] == 0
    assert digest(GOLDEN) == kept


def test_workdir_of_the_first_version_is_sampled(tmp_path):
    kept = digest(GOLDEN)
    old = shutil.copytree(GOLDEN / "v1", tmp_path / "run")
    few = ("--config.sample.count=1", "--config.sample.num_ar_steps=1", "--config.sample.num_denoise_steps=2")
    arguments = (*RUN, *few, "--mode=sample", f"--workdir={old}", f"--out={tmp_path / 'a.png'}")
    status, output = Training(compiled(), *arguments).finish()
    assert status == 0, output
    with np.load(tmp_path / "a.npz") as file:
        assert json.loads(str(file["settings"]))["step"] == 2 and file["arr_0"].shape == (1, 8, 8, 1)
    assert digest(old) == digest(GOLDEN / "v1") and digest(GOLDEN) == kept


def test_damaged_workdir_of_the_first_version_is_never_removed(tmp_path):
    """Not even where it has no record of what was saved."""
    old = shutil.copytree(GOLDEN / "v1", tmp_path / "run")
    (old / "last_saved.json").unlink()
    cut(old / "checkpoints" / "2" / "meta" / "metadata")
    before = digest(old)
    with pytest.raises(CheckpointError, match="nothing was changed"):
        resume(old)
    assert digest(old) == before


def test_sealed_workdir_of_an_earlier_version_holds_what_it_says(tmp_path):
    """Its checksums and its fingerprints, on the host and on devices, are still those that this version computes."""
    kept = digest(GOLDEN)
    old = shutil.copytree(GOLDEN / "v2", tmp_path / "run")
    step, checkpoints = old / "checkpoints" / "2", Checkpoints(old)
    assert resume(old) == (2, "")
    meta = checkpoints.read_meta()
    assert (meta.format, meta.step, meta.examples, len(meta.fingerprints)) == (1, 2, 32, len(arrays(old, 2)))
    read_back(checkpoints.folder(2), meta.fingerprints)
    sampler_of(old)()
    path = largest(step)
    flip(path, random.Random(0))
    damaged = digest(old)
    with pytest.raises(CheckpointError, match=f"nothing was changed:\n.*{path.name} differs from its checksum"):
        resume(old)
    assert digest(old) == damaged and digest(GOLDEN) == kept


def test_sealed_workdir_of_an_earlier_version_trains_on(tmp_path):
    old = shutil.copytree(GOLDEN / "v2", tmp_path / "run")
    status, output = run(old, "--config.keep_checkpoints=3")
    assert status == 0 and f"going on from step 2 of {STEPS}" in output and "WARNING" not in output, output
    assert steps_in(old) == ["2", str(EVERY), str(STEPS)]
    assert digest(old / "checkpoints" / "2") == digest(GOLDEN / "v2" / "checkpoints" / "2")
    assert arrays(old)["step"] == STEPS and arrays(old).keys() == arrays(old, 2).keys()


@pytest.mark.parametrize("error", [TimeoutError("timed out"), PermissionError("not now"), ConnectionResetError("reset")])
def test_storage_that_does_not_answer_is_no_damage(workdir, newest, monkeypatch, error):
    """The step stays where it is, and the next start uses it."""

    def fail(path):
        raise error

    before = digest(workdir)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "file_sha256", fail)
        with pytest.raises(OSError, match="cannot be read just now .* nothing was changed"):
            Checkpoints(workdir).step_to_resume()
    assert digest(workdir) == before
    assert Checkpoints(workdir).step_to_resume() == int(newest.name)


def test_a_config_that_changed_in_a_step_is_not_used(workdir, newest):
    """Sampling and `djepa_jax.load` take scale, sampler and class names from there."""
    path = newest / "meta" / "metadata"
    path.write_bytes(path.read_bytes().replace(b'"temperature": 1.0', b'"temperature": 7.0'))
    with pytest.raises(CheckpointError, match="meta/metadata differs from its checksum"):
        find_model(workdir)
