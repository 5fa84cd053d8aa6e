"""Saves of checkpoints: what is sealed, removed, refused or cut off, and what fits the arrays that
were saved.
"""

import dataclasses
import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import array_files, cut, flip, resume
from workdirs import EVERY, arrays, assert_same_arrays, digest, run, steps_in

from djepa_jax.checkpoints import checkpointer
from djepa_jax.checkpoints.checkpointer import Checkpoints, check_step
from djepa_jax.checkpoints.integrity import MANIFEST_NAME
from djepa_jax.checkpoints.orbax_io import CheckpointError, restore_state
from djepa_jax.core import sharding
from djepa_jax.core.train_step import TrainState


def state(step: int, rows: int = 16) -> TrainState:
    """A small state of another kind than any model's."""
    table = step + jnp.arange(rows * 8, dtype=jnp.float32).reshape(rows, 8)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        jnp.int32(step), {"table": table}, {"table": 2 * table}, {"mu": -table}, zero, zero
    )


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


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(other_arrays, "not read back as it was written"), (flipped_arrays, "restored")],
)
def test_what_reads_back_otherwise_does_not_count(tmp_path, monkeypatch, fault, reason):
    checkpoints, read_back = Checkpoints(tmp_path), checkpointer.read_back
    save(checkpoints, 1)

    def after_a_fault(folder, marks):
        fault(pathlib.Path(folder))
        read_back(folder, marks)

    monkeypatch.setattr(checkpointer, "read_back", after_a_fault)
    checkpoints.save(state(2), {}, 0)
    with pytest.raises(CheckpointError, match=f"saving step 2 .* failed: .*{reason}"):
        checkpoints.wait()
    assert checkpoints.latest_step() == 1 == checkpoints.recorded_step()
    assert resume(tmp_path) == (1, "step 2 was not finished when its process ended; removed")


def test_a_full_disk_stops_training_at_the_next_step(saved_run, tmp_path):
    status, output = run(tmp_path, full_from=EVERY)
    assert status == 2 and "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert (
        f"saving step {EVERY} to {tmp_path / 'checkpoints'} failed" in line
        and "File too large" in line
    )
    made = [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(made) <= EVERY + 1
    assert Checkpoints(tmp_path).steps() == [] and not (tmp_path / "last_saved.json").exists()
    status, output = run(tmp_path)
    assert status == 0 and "left by a save that was cut off" in output
    assert_same_arrays(arrays(saved_run), arrays(tmp_path))


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


# ---------------------------------------------------------------- what fits


@pytest.fixture(scope="module")
def one_step(tmp_path_factory) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path_factory.mktemp("one"))
    save(checkpoints, 1)
    return checkpoints


@pytest.mark.parametrize(
    "change", [{"dtype": jnp.bfloat16}, {"shape": (16, 4)}, {"shape": (8, 16)}]
)
def test_another_type_or_shape_is_refused(one_step, change):
    abstract = jax.eval_shape(lambda: state(1))
    found = abstract.ema_params["table"]
    wanted = jax.ShapeDtypeStruct(
        change.get("shape", found.shape), change.get("dtype", found.dtype)
    )
    abstract = dataclasses.replace(abstract, ema_params={"table": wanted})
    with pytest.raises(
        CheckpointError,
        match=r"the array ema_params/table has shape \(16, 8\) and type float32, the model has",
    ):
        one_step.restore(abstract, one_step.read_meta())
    with pytest.raises(CheckpointError, match="the array ema_params/table has shape"):
        one_step.restore_ema({"table": wanted})


def test_an_array_that_is_not_there_is_named(one_step):
    abstract = dataclasses.replace(
        jax.eval_shape(lambda: state(1)),
        opt_state={"nu": jax.ShapeDtypeStruct((16, 8), jnp.float32)},
    )
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
    wanted = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        placed(MESHES[shape]),
    )
    found = TrainState(**restore_state(checkpoints.folder(1), wanted, checkpoints.read_meta()))
    for array, expected, struct in zip(*map(jax.tree.leaves, (found, saved, wanted)), strict=True):
        assert array.sharding == struct.sharding
        np.testing.assert_array_equal(array, expected)
