"""Saves of checkpoints: what is sealed, removed, refused or cut off, and what fits the arrays that
were saved.
"""

import dataclasses
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import count_compilations
from damage import cut, resume
from workdirs import EVERY, arrays, assert_same_arrays, digest, run, steps_in

from djepa_jax.checkpoints import checkpointer, integrity
from djepa_jax.checkpoints.arrays import restore_arrays
from djepa_jax.checkpoints.checkpointer import Checkpoints, check_step, read_meta
from djepa_jax.checkpoints.integrity import MANIFEST_NAME, CheckpointError, DamagedError
from djepa_jax.checkpoints.restore import restore_state
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


def test_no_checkpoint_is_not_an_empty_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.latest_folder()
    assert not (tmp_path / "checkpoints").exists()


def test_a_step_is_saved_once(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    assert read_meta(checkpoints.folder(1)).format == 2
    before = digest(tmp_path)
    with pytest.raises(CheckpointError, match="saving step 1 .* exists already"):
        checkpoints.save(state(1), {}, 0)
    assert digest(tmp_path) == before and checkpoints.poll() is None


def test_a_save_from_several_devices_compiles_nothing(tmp_path, monkeypatch):
    """Orbax would cut arrays among the devices that hold them, with a program for each shape."""
    everywhere = jax.NamedSharding(sharding.make_mesh((8, 1, 1)), jax.P())
    placed, checkpoints = jax.device_put(state(1, rows=24), everywhere), Checkpoints(tmp_path)
    with count_compilations() as compiled:
        checkpoints.save(placed, {}, 0)
        assert checkpoints.wait() == 1 and not compiled
        monkeypatch.setattr(checkpointer, "SLICE_BYTES", 0)
        checkpoints = Checkpoints(tmp_path / "cut")
        checkpoints.save(placed, {}, 0)
        assert checkpoints.wait() == 1 and compiled  # what would be seen


def test_a_workdir_may_look_like_a_pattern(tmp_path, monkeypatch):
    folder = tmp_path / "[1]" / "**?[!a]"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)  # nor is it what the user wrote that counts
    checkpoints = Checkpoints("run")
    save(checkpoints, 1)
    check_step(checkpoints.folder(1))
    found = restore_state(checkpoints.folder(1), state(0), read_meta(checkpoints.folder(1)))
    np.testing.assert_array_equal(found["params"]["table"], state(1).params["table"])


def test_storage_says_nothing_of_what_ends_after_a_failure():
    shown, hook = [], checkpointer._without_closed_loops
    assert sys.unraisablehook is hook
    for text in ("Event loop is closed", "something else"):
        hook(types.SimpleNamespace(exc_value=RuntimeError(text)), show=shown.append)
    assert [str(entry.exc_value) for entry in shown] == ["something else"]


@pytest.mark.parametrize("keep", [1, 3])
def test_older_steps_go_when_a_newer_one_is_sealed(tmp_path, monkeypatch, keep):
    checkpoints, removed = Checkpoints(tmp_path, keep), []
    rmtree = type(checkpoints.directory).rmtree

    def watched(folder):
        check_step(checkpoints.folder(checkpoints.latest_step()))
        removed.append((folder.name, checkpoints.latest_step()))
        rmtree(folder)

    monkeypatch.setattr(type(checkpoints.directory), "rmtree", watched)
    for step in range(1, 6):
        save(checkpoints, step)
        assert steps_in(tmp_path) == [str(old) for old in range(max(1, step - keep + 1), step + 1)]
    assert [pair for pair in removed if pair[0].isdigit()] == [
        (str(step - keep), step) for step in range(keep + 1, 6)
    ]


def test_some_steps_stay_for_good(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1, keep_every=2)
    for step in range(1, 6):
        save(checkpoints, step)
    assert steps_in(tmp_path) == ["2", "4", "5"]


def test_a_removal_that_was_cut_off_is_completed(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 2):
        save(checkpoints, step)
    (checkpoints.folder(1) / MANIFEST_NAME).unlink()
    assert resume(tmp_path) == (2, "")
    save(checkpoints, 3)
    assert steps_in(tmp_path) == ["2", "3"]


def test_a_step_that_cannot_be_sealed_does_not_count(tmp_path, monkeypatch):
    """The error comes with the next question; older steps stay."""
    checkpoints = Checkpoints(tmp_path, 1)
    save(checkpoints, 1)

    def fail(folder):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "write_manifest", fail)
        checkpoints.save(state(2), {}, 0)
        checkpoints._saving[1].exception()  # which waits for the end
        with pytest.raises(CheckpointError, match="saving step 2 .* failed: no space left"):
            checkpoints.poll()
    assert checkpoints.poll() is None and checkpoints.latest_step() == 1
    step, said = resume(tmp_path)
    assert step == 1 and "step 2 was not finished" in said and steps_in(tmp_path) == ["1"]


def test_a_full_disk_stops_training_at_the_next_step(saved_run, tmp_path):
    status, output = run(tmp_path, full_from=EVERY)
    assert status == 2 and "Traceback" not in output and "Event loop" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"saving step {EVERY} to {tmp_path / 'checkpoints'} failed" in line
    assert "File too large" in line and "run the same command again" in line
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in lines) <= EVERY + 1
    assert Checkpoints(tmp_path).steps() == [] and Checkpoints(tmp_path).recorded()[0] is None
    status, output = run(tmp_path)
    assert status == 0 and "left by a save that was cut off" in output
    assert_same_arrays(arrays(saved_run), arrays(tmp_path))


def test_step_0_may_be_lost_too(tmp_path):
    """An import may be at step 0; it is recorded like any other."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_imported({"ema_params": {"w": np.ones(3, np.float32)}}, {}, 0, 0)
    assert read_meta(checkpoints.folder(0)).parts == ("ema_params",)
    (checkpoints.folder(0) / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="nothing was changed"):
        checkpoints.step_to_resume()
    save(checkpoints, 1)
    cut(tmp_path / "checkpoints" / "1" / MANIFEST_NAME)
    with pytest.raises(CheckpointError, match="nothing was changed"):
        checkpoints.step_to_resume()
    assert steps_in(tmp_path) == ["0", "1"]


def test_an_import_that_fails_is_one_error(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match=f"saving step 0 to {tmp_path}/checkpoints failed"):
        Checkpoints(tmp_path).save_imported({"ema_params": {"w": np.ones(3)}}, {}, 0, 0)


# ---------------------------------------------------------------- what fits


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """The folder of a step."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("one"))
    save(checkpoints, 1)
    return checkpoints.folder(1)


def one_device() -> jax.sharding.Sharding:
    return sharding.replicated(sharding.make_mesh((1, 1, 1), jax.devices()[:1]))


@pytest.mark.parametrize("place", [None, one_device])
def test_another_type_or_shape_is_refused(one_step, place):
    """And nothing is said to be damaged, for such a step would be set aside."""
    place = place and place()
    for shape, dtype in (
        ((16, 8), jnp.bfloat16),
        ((16, 4), jnp.float32),
        ((8, 16), jnp.float32),
    ):
        wanted = {"ema_params": {"table": jax.ShapeDtypeStruct(shape, dtype, sharding=place)}}
        with pytest.raises(
            CheckpointError,
            match=r"array ema_params/table has shape \(16, 8\) and type float32, the model has",
        ) as error:
            restore_arrays(one_step / "state", wanted)
        assert not isinstance(error.value, DamagedError)


def test_an_array_that_is_not_there_is_named(one_step):
    abstract = dataclasses.replace(
        jax.eval_shape(lambda: state(1)),
        opt_state={"nu": jax.ShapeDtypeStruct((16, 8), jnp.float32)},
    )
    with pytest.raises(CheckpointError, match="has no array opt_state/nu"):
        restore_state(one_step, abstract, read_meta(one_step))


def test_another_mesh_gets_the_same_arrays(tmp_path):
    """Of a step that eight devices have saved together."""
    saved = state(1, rows=4096)
    checkpoints, mesh = Checkpoints(tmp_path), sharding.make_mesh((1, 8, 1))
    checkpoints.save(jax.device_put(saved, sharding.state_shardings(saved, mesh)), {}, 0)
    checkpoints.wait()
    step, abstract = checkpoints.folder(1), jax.eval_shape(lambda: saved)
    for shape in ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 1)):
        mesh = sharding.make_mesh(shape, jax.devices()[: math.prod(shape)])
        shardings = sharding.state_shardings(abstract, mesh)
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        found = TrainState(**restore_state(step, wanted, read_meta(step)))
        leaves = map(jax.tree.leaves, (found, saved, wanted))
        for array, expected, struct in zip(*leaves, strict=True):
            assert array.sharding == struct.sharding
            np.testing.assert_array_equal(array, expected)
