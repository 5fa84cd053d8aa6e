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
from tiny import CONFIG, CONFIGS
from waiting import LIMIT
from workdirs import RUN, STEPS, arrays, assert_same_arrays, compiled

import djepa_jax
from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.checkpoints.integrity import DamagedError
from djepa_jax.checkpoints.restore import find_model, go_back
from djepa_jax.config.flags import read_config
from djepa_jax.core import sharding
from djepa_jax.runtime import lock
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.storage import PathError, as_path
from djepa_jax.training.initial_state import abstract_state

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
    """What the same command did until it was through, then what sampling did."""

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
        assert is_held.wait(LIMIT)
        owner = f"process {training.process.pid} on {socket.gethostname()}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lock, "STALE_SECONDS", LIMIT)  # it is alive, however slow
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


def test_a_refused_checkpoint_ends_the_run_with_one_line_and_refused_metrics_do_not(life):
    status, said, objects = dataclasses.astuple(life.refused)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 2 and "Traceback" not in said and f"step {REFUSED}" in line
    assert json.loads(objects["run/last_saved.json"]) == {"step": 10, "saving": REFUSED}
    assert not {f"run/checkpoints/{REFUSED}/manifest.json", "run/.lock"} & set(objects)
    assert f"{WORKDIR}/metrics.jsonl was not written" in said
    lines = [json.loads(line) for line in objects["run/metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines][: REFUSED - 3] == list(range(1, REFUSED - 2))


def test_the_same_command_goes_on_when_the_lock_of_a_killed_process_is_old(life):
    assert "going on from step 10 of 40" in life.killed.said
    assert f"saved step {REFUSED} in" in life.killed.said
    assert f'--workdir "{WORKDIR}" is in use by {life.owner};' in life.in_use
    assert life.killed.status == -9 and life.owner in life.killed.objects["run/.lock"].decode()
    assert f"{WORKDIR}/.lock names {life.owner}; waiting up to 6 s" in life.finished.said
    assert life.finished.status == 0 and "run/.lock" not in life.finished.objects
    assert f"going on from step {REFUSED} of 40" in life.finished.said


def test_a_save_that_was_cut_off_leaves_nothing(life):
    cut = below(life.killed.objects, f"run/checkpoints/{HELD}/")
    assert cut and not cut.keys() & {"manifest.json", "commit_success.txt", "state/manifest.ocdbt"}
    assert steps_in(life.finished.objects) == {OLDER, NEWEST}
    for step in (OLDER, NEWEST):
        files = below(life.finished.objects, f"run/checkpoints/{step}/")
        listed = json.loads(files["manifest.json"])["files"].keys()
        assert files.keys() - {"manifest.json"} == listed


def test_what_is_in_the_bucket_in_the_end(life):
    objects = life.finished.objects
    names = {name for name in objects if not name.startswith("run/checkpoints/")}
    grid = f"run/samples/step_{STEPS:08d}"
    events = {name for name in names if name.startswith("run/events.out.tfevents.")}
    kept = "config.json evaluation.json grad_accumulation.json last_saved.json metrics.jsonl"
    kept += " parameters.txt samples/real.png starts.jsonl"
    records = {f"run/{name}" for name in kept.split()}
    assert names == records | events | {f"{grid}.png", f"{grid}.npz"} and len(events) == 3
    assert json.loads(objects["run/last_saved.json"]) == {"step": NEWEST}
    assert json.loads(objects["run/evaluation.json"])["step"] == STEPS
    lines = [json.loads(line) for line in objects["run/metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))


def test_samples_are_pictures(life):
    made = set(life.sampled.objects) - set(life.finished.objects)
    assert life.sampled.status == 0 and made == {"run/samples/sample.png", "run/samples/sample.npz"}
    Image.open(io.BytesIO(life.sampled.objects["run/samples/sample.png"])).load()
    with np.load(io.BytesIO(life.sampled.objects["run/samples/sample.npz"])) as file:
        assert file["arr_0"].shape == (10, 8, 8, 1)


def test_arrays_in_the_end_are_those_of_an_undisturbed_run_on_a_disk(bucket, saved_run):
    assert_same_arrays(arrays(saved_run), arrays(as_path(WORKDIR)))
    assert djepa_jax.load(WORKDIR).step == STEPS


# ---------------------------------------------------------------- steps that do not count


def resume() -> tuple[int | None, str]:
    """The step to resume from, and what was said."""
    said = []
    return Checkpoints(WORKDIR).step_to_resume(said.append), "\n".join(said)


def test_a_step_that_is_not_sealed_never_counts(bucket, life):
    record = {"step": OLDER, "saving": NEWEST}  # as a save leaves it that was cut off
    for missing in (["manifest.json"], ["manifest.json", "commit_success.txt"]):
        bucket.objects.update(life.finished.objects)
        for name in missing:
            del bucket.objects[f"run/checkpoints/{NEWEST}/{name}"]
        bucket.objects["run/last_saved.json"] = json.dumps(record).encode()
        older = below(bucket.objects, f"run/checkpoints/{OLDER}/")
        assert find_model(WORKDIR).step == OLDER and Checkpoints(WORKDIR).latest_step() == OLDER
        assert resume()[0] == OLDER and steps_in(bucket.objects) == {OLDER}
        assert below(bucket.objects, f"run/checkpoints/{OLDER}/") == older


def test_a_damaged_step_is_set_aside_and_the_one_before_used(bucket):
    folder = f"run/checkpoints/{NEWEST}/"
    states = [name for name in bucket.objects if name.startswith(folder + "state/")]
    name = max(states, key=lambda name: len(bucket.objects[name]))
    data = bytearray(bucket.objects[name])
    data[len(data) // 2] ^= 1
    bucket.objects[name] = bytes(data)
    damaged = below(bucket.objects, folder)
    step, said = resume()
    assert step == OLDER and f"gs://bucket/{name} differs from its checksum" in said
    assert steps_in(bucket.objects) == {OLDER}
    others = {n.split(f"/{NEWEST}/", 1)[1] for n in bucket.objects if f"/{NEWEST}/" in n}
    assert others == damaged.keys(), "it is still there, elsewhere"
    assert resume() == (OLDER, "")


def test_a_sealed_step_that_lacks_a_file_is_not_used(bucket):
    del bucket.objects[f"run/checkpoints/{NEWEST}/state/commit_success.txt"]
    with pytest.raises(DamagedError, match=f"checkpoints/{NEWEST}"):
        djepa_jax.load(WORKDIR)
    step, said = resume()
    assert step == OLDER and f"{NEWEST}/state/commit_success.txt" in said


def test_a_step_of_another_workdir_can_be_restored_from(bucket):
    said = []
    experiment, new = read_config(CONFIG, None, RUN[1:]), Checkpoints("gs://bucket/new")
    abstract = abstract_state(experiment, sharding.make_mesh((1, 1, 1), jax.devices()[:1]))
    go_back(new, f"{WORKDIR}@{OLDER}", abstract, experiment, said.append)
    old, copy = (below(bucket.objects, f"{name}/checkpoints/{OLDER}/") for name in ("run", "new"))
    assert old == copy
    assert new.step_to_resume(said.append) == OLDER and len(said) == 1


# ---------------------------------------------------------------- what is for disks


def test_what_a_bucket_cannot_be_used_for_is_one_line(bucket, capsys):
    line = refusal(capsys, f"--workdir={WORKDIR}", "--mode=export", "--out=gs://bucket/export")
    assert '--out "gs://bucket/export" is not a local path' in line
    prepare = (f"--config={CONFIGS / 'djepa_b.py'}", "--mode=prepare", "--workdir=gs://bucket/x")
    assert '--workdir "gs://bucket/x" is not a local path' in refusal(capsys, *prepare)
    sample = (f"--config={CONFIG}", "--workdir=gs://bucket/empty", "--mode=sample")
    assert "gs://bucket/empty/checkpoints holds no checkpoint" in refusal(capsys, *sample)
