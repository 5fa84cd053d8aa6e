"""Workdirs that earlier versions have written: verified where they can be, sampled, trained on."""

import json
import pathlib
import random
import shutil

import numpy as np
import pytest
from damage import cut, flip, largest, resume, sampler_of
from processes import Training
from workdirs import EVERY, RUN, STEPS, arrays, compiled, digest, run, steps_in

from djepa_jax.checkpoints.checkpointer import Checkpoints, check_step, read_meta
from djepa_jax.checkpoints.integrity import MANIFEST_NAME, CheckpointError, DamagedError

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "workdirs"


@pytest.fixture
def golden(request, tmp_path) -> pathlib.Path:
    """A copy of a workdir that a version has written: before there were manifests, or with one."""
    before = digest(GOLDEN)
    yield shutil.copytree(GOLDEN / request.param, tmp_path / "run")
    assert digest(GOLDEN) == before


both = pytest.mark.parametrize("golden", ["v1", "v2"], indirect=True)
first = pytest.mark.parametrize("golden", ["v1"], indirect=True)
sealed = pytest.mark.parametrize("golden", ["v2"], indirect=True)


@pytest.mark.parametrize(("golden", "simple"), [("v1", False), ("v2", True)], indirect=["golden"])
def test_workdir_of_an_earlier_version_trains_on(golden, simple):
    kept = digest(golden / "checkpoints" / "2")
    status, output = run(golden, "--config.keep_checkpoints=3", simple=simple)
    assert status == 0 and f"going on from step 2 of {STEPS}" in output, output
    assert "WARNING" not in output and steps_in(golden) == ["2", str(EVERY), str(STEPS)]
    assert digest(golden / "checkpoints" / "2") == kept
    check_step(golden / "checkpoints" / str(STEPS))
    before, after = arrays(golden, 2), arrays(golden)
    assert before.keys() == after.keys() and after["step"] == STEPS and after["skipped_steps"] == 0


@both
def test_workdir_of_an_earlier_version_is_sampled(golden, tmp_path):
    kept = digest(golden)
    few = ("count=1", "num_ar_steps=1", "num_denoise_steps=2")
    flags = (*(f"--config.sample.{flag}" for flag in few), f"--out={tmp_path / 'a.png'}")
    status, output = Training(
        compiled(), *RUN, *flags, "--mode=sample", f"--workdir={golden}"
    ).finish()
    assert status == 0, output
    with np.load(tmp_path / "a.npz") as file:
        assert json.loads(str(file["settings"]))["step"] == 2
        assert file["arr_0"].shape == (1, 8, 8, 1)
    assert digest(golden) == kept


@first
def test_damaged_step_without_a_manifest_is_never_removed(golden):
    """Not even where there is no record of what was saved."""
    (golden / "last_saved.json").unlink()
    cut(golden / "checkpoints" / "2" / "meta" / "metadata")
    before = digest(golden)
    with pytest.raises(CheckpointError, match="nothing was changed"):
        resume(golden)
    assert digest(golden) == before


@sealed
def test_sealed_step_holds_what_it_says(golden):
    step = Checkpoints(golden).latest_folder()
    meta = read_meta(step)
    assert (meta.format, meta.step, meta.examples) == (1, 2, 32) and resume(golden) == (2, "")
    path = largest(pathlib.Path(step))
    whole = flip(path, random.Random(0))
    damaged = digest(golden)
    for use in (resume, lambda workdir: sampler_of(workdir)()):
        with pytest.raises(CheckpointError, match=f"{path.name} differs from its checksum"):
            use(golden)
    assert digest(golden) == damaged
    path.write_bytes(whole)
    (step / MANIFEST_NAME).unlink()
    with pytest.raises(DamagedError, match="has no manifest.json"):
        check_step(step)  # it was being saved when its process ended


@sealed
def test_step_of_a_later_version_is_refused_and_left_alone(golden):
    path = golden / "checkpoints" / "2" / "meta" / "metadata"
    path.write_text(path.read_text().replace('"format": 1', '"format": 3, "later": true'))
    (path.parents[1] / MANIFEST_NAME).unlink()
    before = digest(golden)
    with pytest.raises(CheckpointError, match="has format 3, this version reads 2"):
        resume(golden)
    assert digest(golden) == before
