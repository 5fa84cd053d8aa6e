"""Workdirs in a bucket: a whole life with faults, steps that do not count, and what is for disks.

The bucket is an `ObjectStore` in this process, on loopback.
"""

import dataclasses
import io
import json
import socket

import jax
import numpy as np
import pytest
from buckets import WORKDIR, refusal
from object_store import ObjectStore
from PIL import Image
from processes import Training
from tiny import CONFIGS, tiny_config
from workdirs import RUN, STEPS, arrays, assert_same_arrays, compiled

import djepa_jax
from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.checkpoints.integrity import DamagedError
from djepa_jax.checkpoints.restore import find_model, go_back
from djepa_jax.config import experiment as configuration
from djepa_jax.core.optimizer import path_name
from djepa_jax.core.train_step import init_state
from djepa_jax.data.prepare_latents import PUBLISH
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.storage import PathError, as_path

COMMAND = (
    *RUN,
    "--config.checkpoint_every=10",
    "--config.evaluation.kind=small_images",
    f"--workdir={WORKDIR}",
)
REFUSED, HELD = 20, 30  # steps whose saving fails, and is cut off
NEWEST, OLDER = STEPS, STEPS - 10  # that are there in the end


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit status, what it said, and the bucket as it left it."""

    status: int
    said: str
    objects: dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Life:
    """What the same command did again and again, until it was through; then what sampling did."""

    refused: Ended
    killed: Ended
    finished: Ended
    sampled: Ended
    owner: str  # of the lock, while `killed` was alive
    in_use: str  # what somebody else was told then


@pytest.fixture(scope="module")
def life(store, tmp_path_factory) -> Life:
    storage = store.environment | {"TMPDIR": str(tmp_path_factory.mktemp("temporary"))}

    def train(*arguments: str) -> Training:
        return Training(compiled(), *COMMAND, *arguments, storage=storage, pictures=True)

    def ended(training: Training, kill: bool = False) -> Ended:
        status, said = training.kill() if kill else training.finish()
        return Ended(status, said, dict(store.objects))

    refusals = []

    def refuse(name: str, data: bytes) -> int | None:
        first_metrics = name == "run/metrics.jsonl" and name not in refusals
        refusals.append(name)
        return 403 if first_metrics or name.startswith(f"run/checkpoints/{REFUSED}/") else None

    store.objects.clear()
    store.before_upload = refuse
    refused = ended(train())
    store.before_upload = None
    with store.held_uploads(f"run/checkpoints/{HELD}/state/manifest.ocdbt") as is_held:
        training = train()
        assert is_held.wait(120)
        owner = f"process {training.process.pid} on {socket.gethostname()}"
        with pytest.raises(PathError) as error, lock_workdir(WORKDIR):
            pass
        killed = ended(training, kill=True)
    finished = ended(train())
    return Life(refused, killed, finished, ended(train("--mode=sample")), owner, str(error.value))


@pytest.fixture
def bucket(empty, life) -> ObjectStore:
    """The bucket with the finished run."""
    empty.objects.update(life.finished.objects)
    return empty


def steps_in(objects: dict[str, bytes]) -> set[int]:
    return {int(name.split("/")[2]) for name in objects if name.startswith("run/checkpoints/")}


def below(objects: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {
        name.removeprefix(folder): data for name, data in objects.items() if name.startswith(folder)
    }


# ---------------------------------------------------------------- a whole life


def test_refused_checkpoint_ends_the_run_with_one_line(life):
    (line,) = [line for line in life.refused.said.splitlines() if line.startswith("error: ")]
    assert life.refused.status == 2 and "Traceback" not in life.refused.said
    assert (
        line.startswith(f"error: saving step {REFUSED} to {WORKDIR}/checkpoints failed: ")
        and "run the same command again" in line
    )
    assert json.loads(life.refused.objects["run/last_saved.json"])["step"] == 10
    assert f"run/checkpoints/{REFUSED}/manifest.json" not in life.refused.objects
    assert "run/.lock" not in life.refused.objects


def test_refused_metrics_stop_nothing_and_arrive_later(life):
    (line,) = [line for line in life.refused.said.splitlines() if line.startswith("WARNING: ")]
    assert line.startswith(f"WARNING: {WORKDIR}/metrics.jsonl was not written") and line.endswith(
        "it is tried again later"
    )
    lines = [json.loads(line) for line in life.refused.objects["run/metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines][: REFUSED - 3] == list(range(1, REFUSED - 2))


def test_same_command_goes_on_from_the_last_step_that_was_sealed(life):
    assert (
        "going on from step 10 of 40" in life.killed.said
        and f"saved step {REFUSED} in" in life.killed.said
    )
    assert f"going on from step {REFUSED} of 40" in life.finished.said


def test_lock_of_a_live_process_holds_and_that_of_a_killed_one_is_taken_over(life):
    assert (
        life.in_use
        == f'--workdir "{WORKDIR}" is in use by {life.owner}; wait for it, stop it, or choose '
        "another folder."
    )
    assert (
        life.killed.status == -9
        and life.owner in json.loads(life.killed.objects["run/.lock"])["owner"]
    )
    assert f"{WORKDIR}/.lock names {life.owner}; waiting up to 6 s" in life.finished.said
    assert "run/.lock" not in life.finished.objects


def test_save_that_was_cut_off_leaves_nothing(life):
    cut = below(life.killed.objects, f"run/checkpoints/{HELD}/")
    assert cut and not cut.keys() & {"manifest.json", "commit_success.txt", "state/manifest.ocdbt"}
    assert f"step {HELD} was not finished when its process ended; removed" in life.finished.said
    assert steps_in(life.finished.objects) == {OLDER, NEWEST}
    for step in (OLDER, NEWEST):
        files = below(life.finished.objects, f"run/checkpoints/{step}/")
        assert (
            files.keys() - {"manifest.json"} == json.loads(files["manifest.json"])["files"].keys()
        )


def test_nothing_else_is_left_in_the_bucket(life):
    names = {name for name in life.finished.objects if not name.startswith("run/checkpoints/")}
    grid = f"run/samples/step_{STEPS:08d}"
    events = {name for name in names if name.startswith("run/events.out.tfevents.")}
    records = {"run/config.json", "run/evaluation.json", "run/last_saved.json", "run/metrics.jsonl"}
    assert names == records | events | {f"{grid}.png", f"{grid}.npz"} and len(events) == 3


def test_arrays_in_the_end_are_those_of_an_undisturbed_run_on_a_disk(bucket, saved_run):
    assert_same_arrays(arrays(saved_run), arrays(as_path(WORKDIR)))


def test_metrics_have_every_step_once(life):
    lines = [json.loads(line) for line in life.finished.objects["run/metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))


def test_records_can_be_read(life):
    objects = life.finished.objects
    assert life.finished.status == 0 and json.loads(objects["run/last_saved.json"]) == {
        "step": NEWEST
    }
    assert json.loads(objects["run/config.json"])["num_steps"] == STEPS
    assert json.loads(objects["run/evaluation.json"])["step"] == STEPS
    assert f"Samples:  {WORKDIR}/samples/step_{STEPS:08d}.png" in life.finished.said


def test_samples_are_pictures(life):
    assert life.sampled.status == 0 and f"wrote {WORKDIR}/samples/sample.png" in life.sampled.said
    made = set(life.sampled.objects) - set(life.finished.objects)
    assert made == {"run/samples/sample.png", "run/samples/sample.npz"}
    for name in (f"run/samples/step_{STEPS:08d}", "run/samples/sample"):
        Image.open(io.BytesIO(life.sampled.objects[f"{name}.png"])).load()
        with np.load(io.BytesIO(life.sampled.objects[f"{name}.npz"])) as file:
            assert (
                file["arr_0"].shape == (10, 8, 8, 1)
                and json.loads(str(file["settings"]))["step"] == STEPS
            )


def test_trained_model_can_be_loaded(bucket):
    model = djepa_jax.load(WORKDIR)
    assert model.step == STEPS
    stored = arrays(as_path(WORKDIR))
    loaded = {
        "ema_params/" + path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
    }
    assert_same_arrays(
        {name: stored[name] for name in loaded},
        {name: np.asarray(leaf) for name, leaf in loaded.items()},
    )


# ---------------------------------------------------------------- steps that do not count


def resume() -> tuple[int | None, str]:
    """The step to resume from, and what was said."""
    said = []
    return Checkpoints(WORKDIR).step_to_resume(said.append), "\n".join(said)


def cut_off(bucket: ObjectStore, *missing: str) -> None:
    """What a process leaves that is killed while it saves the newest step."""
    for name in missing:
        del bucket.objects[f"run/checkpoints/{NEWEST}/{name}"]
    bucket.objects["run/last_saved.json"] = json.dumps({"step": OLDER, "saving": NEWEST}).encode()


@pytest.mark.parametrize("missing", [["manifest.json"], ["manifest.json", "commit_success.txt"]])
def test_step_that_is_not_sealed_never_counts(bucket, missing):
    cut_off(bucket, *missing)
    older = below(bucket.objects, f"run/checkpoints/{OLDER}/")
    assert find_model(WORKDIR).step == OLDER and Checkpoints(WORKDIR).latest_step() == OLDER
    assert resume() == (OLDER, f"step {NEWEST} was not finished when its process ended; removed")
    assert (
        steps_in(bucket.objects) == {OLDER}
        and below(bucket.objects, f"run/checkpoints/{OLDER}/") == older
    )


@pytest.mark.parametrize(
    "missing", ["commit_success.txt", "state/commit_success.txt", "state/_METADATA"]
)
def test_sealed_step_that_lacks_a_file_goes_to_quarantine(bucket, missing):
    del bucket.objects[f"run/checkpoints/{NEWEST}/{missing}"]
    step, said = resume()
    assert step == OLDER and f"{missing} cannot be read (FileNotFoundError" in said
    assert steps_in(bucket.objects) == {OLDER}


def test_step_without_its_mark_is_not_loaded(bucket):
    del bucket.objects[f"run/checkpoints/{NEWEST}/state/commit_success.txt"]
    with pytest.raises(DamagedError, match=f"checkpoints/{NEWEST}"):
        djepa_jax.load(WORKDIR)


def test_flipped_byte_is_noticed_and_the_step_goes_to_quarantine(bucket):
    folder = f"run/checkpoints/{NEWEST}/"
    name = max(
        (name for name in bucket.objects if name.startswith(folder + "state/")),
        key=lambda name: len(bucket.objects[name]),
    )
    data = bytearray(bucket.objects[name])
    data[len(data) // 2] ^= 1
    bucket.objects[name] = bytes(data)
    damaged = below(bucket.objects, folder)
    step, said = resume()
    assert step == OLDER and said.startswith(
        f"WARNING: step {NEWEST} is damaged: gs://bucket/{name} differs from its checksum"
    )
    assert f"It was moved to {WORKDIR}/quarantine/{NEWEST}." in said
    assert (
        steps_in(bucket.objects) == {OLDER}
        and below(bucket.objects, f"run/quarantine/{NEWEST}/") == damaged
    )
    assert resume() == (OLDER, "")


def test_step_of_another_workdir_in_the_bucket_can_be_restored_from(bucket):
    said = []
    config = tiny_config()
    abstract = jax.eval_shape(lambda: init_state(configuration.build(config).train))
    checkpoints = Checkpoints("gs://bucket/new")
    go_back(checkpoints, f"{WORKDIR}@{OLDER}", abstract, config, said.append)
    assert said == [f"restored {WORKDIR}/checkpoints/{OLDER}"]
    assert below(bucket.objects, f"new/checkpoints/{OLDER}/") == below(
        bucket.objects, f"run/checkpoints/{OLDER}/"
    )
    assert checkpoints.step_to_resume(said.append) == OLDER and len(said) == 1


# ---------------------------------------------------------------- what is for disks


def test_exports_and_latents_are_for_disks(bucket, capsys):
    line = refusal(capsys, f"--workdir={WORKDIR}", "--mode=export", "--out=gs://bucket/export")
    assert line == 'error: --out "gs://bucket/export" is not a local path; name one.'
    line = refusal(
        capsys,
        f"--config={CONFIGS / 'djepa_b.py'}",
        "--mode=prepare",
        "--workdir=gs://bucket/latents",
    )
    assert line == f'error: --workdir "gs://bucket/latents" is not a local path; {PUBLISH}.'
