"""Workdirs that earlier versions have written: verified where they can be, sampled, and trained
on.
"""

import json
import pathlib
import random
import shutil

import numpy as np
import pytest
from damage import cut, flip, largest, resume, sampler_of
from processes import Training
from workdirs import EVERY, RUN, STEPS, arrays, compiled, digest, run, steps_in

from djepa_jax.checkpoints.checkpointer import Checkpoints, check_step
from djepa_jax.checkpoints.orbax_io import CheckpointError, read_back

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "workdirs"


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
    few = (
        "--config.sample.count=1",
        "--config.sample.num_ar_steps=1",
        "--config.sample.num_denoise_steps=2",
    )
    arguments = (*RUN, *few, "--mode=sample", f"--workdir={old}", f"--out={tmp_path / 'a.png'}")
    status, output = Training(compiled(), *arguments).finish()
    assert status == 0, output
    with np.load(tmp_path / "a.npz") as file:
        assert json.loads(str(file["settings"]))["step"] == 2 and file["arr_0"].shape == (
            1,
            8,
            8,
            1,
        )
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
    """Its checksums and its fingerprints, on the host and on devices, are still those that this
    version computes.
    """
    kept = digest(GOLDEN)
    old = shutil.copytree(GOLDEN / "v2", tmp_path / "run")
    step, checkpoints = old / "checkpoints" / "2", Checkpoints(old)
    assert resume(old) == (2, "")
    meta = checkpoints.read_meta()
    assert (meta.format, meta.step, meta.examples, len(meta.fingerprints)) == (
        1,
        2,
        32,
        len(arrays(old, 2)),
    )
    read_back(checkpoints.folder(2), meta.fingerprints)
    sampler_of(old)()
    path = largest(step)
    flip(path, random.Random(0))
    damaged = digest(old)
    with pytest.raises(
        CheckpointError, match=f"nothing was changed:\n.*{path.name} differs from its checksum"
    ):
        resume(old)
    assert digest(old) == damaged and digest(GOLDEN) == kept


def test_sealed_workdir_of_an_earlier_version_trains_on(tmp_path):
    old = shutil.copytree(GOLDEN / "v2", tmp_path / "run")
    status, output = run(old, "--config.keep_checkpoints=3")
    assert (
        status == 0 and f"going on from step 2 of {STEPS}" in output and "WARNING" not in output
    ), output
    assert steps_in(old) == ["2", str(EVERY), str(STEPS)]
    assert digest(old / "checkpoints" / "2") == digest(GOLDEN / "v2" / "checkpoints" / "2")
    assert arrays(old)["step"] == STEPS and arrays(old).keys() == arrays(old, 2).keys()
