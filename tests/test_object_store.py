"""Workdirs in a bucket: a whole life with faults, steps that do not count, the lock, and what is said when storage refuses.

The bucket is an `ObjectStore` in this process, on loopback.
"""

import dataclasses
import importlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from buckets import reached
from object_store import ObjectStore
from PIL import Image
from processes import Training
from tiny import CONFIG, CONFIGS
from workdirs import RUN, STEPS, arrays, assert_same_arrays, compiled

import djepa_jax
from djepa_jax import lock, logs
from djepa_jax.checkpoint import Checkpoints
from djepa_jax.lock import lock_workdir
from djepa_jax.main import main
from djepa_jax.optimizer import path_name
from djepa_jax.orbax_io import DamagedError, read_meta
from djepa_jax.paths import PathError, as_path, check_writable
from djepa_jax.prepare import PUBLISH
from djepa_jax.restoring import go_back
from djepa_jax.stored import find_model

WORKDIR = "gs://bucket/run"
COMMAND = (*RUN, "--config.checkpoint_every=10", "--config.evaluation.kind=small_images", f"--workdir={WORKDIR}")
REFUSED, HELD = 20, 30  # steps whose saving fails, and is cut off
NEWEST, OLDER = STEPS, STEPS - 10  # that are there in the end
THIS = f"process {os.getpid()} on {socket.gethostname()}"


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """A bucket whose objects may be read and written, and that tells nothing about itself; for this process, too."""
    with ObjectStore() as store, reached(store):
        store.bucket_readable = False
        yield store


@pytest.fixture(autouse=True)
def never_ends_the_tests(monkeypatch):
    monkeypatch.setattr(lock, "_give_way", lambda path, owner: 1 / 0)


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
def bucket(store, life) -> ObjectStore:
    """The bucket with the finished run."""
    store.objects.clear()
    store.objects.update(life.finished.objects)
    store.requests.clear()
    return store


@pytest.fixture
def empty(store) -> ObjectStore:
    store.objects.clear()
    store.requests.clear()
    return store


def steps_in(objects: dict[str, bytes]) -> set[int]:
    return {int(name.split("/")[2]) for name in objects if name.startswith("run/checkpoints/")}


def below(objects: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {name.removeprefix(folder): data for name, data in objects.items() if name.startswith(folder)}


# ---------------------------------------------------------------- a whole life


def test_refused_checkpoint_ends_the_run_with_one_line(life):
    (line,) = [line for line in life.refused.said.splitlines() if line.startswith("error: ")]
    assert life.refused.status == 2 and "Traceback" not in life.refused.said
    assert (
        line.startswith(f"error: saving step {REFUSED} to {WORKDIR}/checkpoints failed: ")
        and "run the same command again" in line
    )
    assert json.loads(life.refused.objects["run/last_saved.json"]) == {"step": 10}
    assert f"run/checkpoints/{REFUSED}/manifest.json" not in life.refused.objects
    assert "run/.lock" not in life.refused.objects


def test_refused_metrics_stop_nothing_and_arrive_later(life):
    (line,) = [line for line in life.refused.said.splitlines() if line.startswith("WARNING: ")]
    assert line.startswith(f"WARNING: {WORKDIR}/metrics.jsonl was not written") and line.endswith("it is tried again later")
    lines = [json.loads(line) for line in life.refused.objects["run/metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines][: REFUSED - 3] == list(range(1, REFUSED - 2))


def test_same_command_goes_on_from_the_last_step_that_was_sealed(life):
    assert "going on from step 10 of 40" in life.killed.said and f"saved step {REFUSED} in" in life.killed.said
    assert f"going on from step {REFUSED} of 40" in life.finished.said


def test_lock_of_a_live_process_holds_and_that_of_a_killed_one_is_taken_over(life):
    assert life.in_use == f'--workdir "{WORKDIR}" is in use by {life.owner}; wait for it, stop it, or choose another folder.'
    assert life.killed.status == -9 and life.owner in json.loads(life.killed.objects["run/.lock"])["owner"]
    assert f"{WORKDIR}/.lock names {life.owner}; waiting up to 6 s" in life.finished.said
    assert "run/.lock" not in life.finished.objects


def test_save_that_was_cut_off_leaves_nothing(life):
    cut = below(life.killed.objects, f"run/checkpoints/{HELD}/")
    assert cut and not cut.keys() & {"manifest.json", "commit_success.txt", "state/manifest.ocdbt"}
    assert f"step {HELD} was not finished when its process ended; removed" in life.finished.said
    assert steps_in(life.finished.objects) == {OLDER, NEWEST}
    for step in (OLDER, NEWEST):
        files = below(life.finished.objects, f"run/checkpoints/{step}/")
        assert files.keys() - {"manifest.json"} == json.loads(files["manifest.json"])["files"].keys()


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
    assert life.finished.status == 0 and json.loads(objects["run/last_saved.json"]) == {"step": NEWEST}
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
            assert file["arr_0"].shape == (10, 8, 8, 1) and json.loads(str(file["settings"]))["step"] == STEPS


def test_trained_model_can_be_loaded(bucket):
    model = djepa_jax.load(WORKDIR)
    assert model.step == STEPS
    stored = arrays(as_path(WORKDIR))
    loaded = {"ema_params/" + path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)}
    assert_same_arrays({name: stored[name] for name in loaded}, {name: np.asarray(leaf) for name, leaf in loaded.items()})


# ---------------------------------------------------------------- steps that do not count


def resume() -> tuple[int | None, str]:
    """The step to resume from, and what was said."""
    said = []
    return Checkpoints(WORKDIR).step_to_resume(said.append), "\n".join(said)


def cut_off(bucket: ObjectStore, *missing: str) -> None:
    """What a process leaves that is killed while it saves the newest step."""
    for name in missing:
        del bucket.objects[f"run/checkpoints/{NEWEST}/{name}"]
    bucket.objects["run/last_saved.json"] = json.dumps({"step": OLDER}).encode()


@pytest.mark.parametrize("missing", [["manifest.json"], ["manifest.json", "commit_success.txt"]])
def test_step_that_is_not_sealed_never_counts(bucket, missing):
    cut_off(bucket, *missing)
    older = below(bucket.objects, f"run/checkpoints/{OLDER}/")
    assert find_model(WORKDIR).step == OLDER and Checkpoints(WORKDIR).latest_step() == OLDER
    assert resume() == (OLDER, f"step {NEWEST} was not finished when its process ended; removed")
    assert steps_in(bucket.objects) == {OLDER} and below(bucket.objects, f"run/checkpoints/{OLDER}/") == older


@pytest.mark.parametrize("missing", ["commit_success.txt", "state/commit_success.txt", "state/_METADATA"])
def test_sealed_step_that_lacks_a_file_is_set_aside(bucket, missing):
    del bucket.objects[f"run/checkpoints/{NEWEST}/{missing}"]
    step, said = resume()
    assert step == OLDER and f"{missing} is missing" in said and steps_in(bucket.objects) == {OLDER}


def test_step_without_its_mark_is_not_loaded(bucket):
    del bucket.objects[f"run/checkpoints/{NEWEST}/state/commit_success.txt"]
    with pytest.raises(DamagedError, match=f"checkpoints/{NEWEST}"):
        djepa_jax.load(WORKDIR)


def test_flipped_byte_is_noticed_and_the_step_set_aside(bucket):
    folder = f"run/checkpoints/{NEWEST}/"
    name = max(
        (name for name in bucket.objects if name.startswith(folder + "state/")), key=lambda name: len(bucket.objects[name])
    )
    data = bytearray(bucket.objects[name])
    data[len(data) // 2] ^= 1
    bucket.objects[name] = bytes(data)
    damaged = below(bucket.objects, folder)
    step, said = resume()
    assert step == OLDER and said.startswith(f"WARNING: step {NEWEST} is damaged: gs://bucket/{name} differs from its checksum")
    assert f"It was moved to {WORKDIR}/set_aside/{NEWEST}; an older step is used." in said
    assert steps_in(bucket.objects) == {OLDER} and below(bucket.objects, f"run/set_aside/{NEWEST}/") == damaged
    assert resume() == (OLDER, "")


def test_step_of_another_workdir_in_the_bucket_can_be_restored_from(bucket):
    said = []
    go_back("gs://bucket/new", f"{WORKDIR}@{OLDER}", 2, read_meta, said.append)
    assert said == [f"restored step {OLDER} of {WORKDIR}"]
    assert below(bucket.objects, f"new/checkpoints/{OLDER}/") == below(bucket.objects, f"run/checkpoints/{OLDER}/")
    assert Checkpoints("gs://bucket/new").step_to_resume(said.append) == OLDER and len(said) == 1


# ---------------------------------------------------------------- the lock


def fast(monkeypatch, renew: float = 0.05, stale: float = 0.5) -> None:
    for name, value in (("RENEW_SECONDS", renew), ("STALE_SECONDS", stale)):
        monkeypatch.setattr(lock, name, value)


def wait_until(true) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lease(owner: str) -> bytes:
    return json.dumps({"owner": owner, "token": owner, "renewed": "once"}).encode()


def test_lock_is_there_while_it_is_held(empty, monkeypatch):
    fast(monkeypatch, stale=30)
    with lock_workdir(WORKDIR):
        first = empty.objects["run/.lock"]
        assert json.loads(first)["owner"] == THIS
        wait_until(lambda: empty.objects["run/.lock"] != first)
        with pytest.raises(PathError, match=f"is in use by {THIS}; wait for it"), lock_workdir(WORKDIR, say=str):
            pass
    assert not empty.objects


def test_lock_that_nobody_renews_is_taken_over(empty, monkeypatch):
    fast(monkeypatch)
    empty.objects["run/.lock"] = lease("process 7 on a machine that is gone")
    said, start = [], time.monotonic()
    with lock_workdir(WORKDIR, say=said.append):
        assert time.monotonic() - start > lock.STALE_SECONDS
        assert json.loads(empty.objects["run/.lock"])["owner"] == THIS
    assert said == [f"{WORKDIR}/.lock names process 7 on a machine that is gone; waiting up to 0 s to see whether it is alive"]


def test_lock_that_is_given_back_meanwhile_is_free(empty, monkeypatch):
    fast(monkeypatch, stale=60, renew=0.2)
    empty.objects["run/.lock"] = lease("process 7")
    with lock_workdir(WORKDIR, say=lambda text: empty.objects.pop("run/.lock")):
        assert json.loads(empty.objects["run/.lock"])["owner"] == THIS


@pytest.mark.parametrize("left", [{}, {"run/.lock": lease("process 7")}])
def test_of_two_that_find_it_free_or_left_behind_one_gets_it(empty, monkeypatch, left):
    """However long one takes to write what it has decided."""
    fast(monkeypatch, renew=60, stale=0.2)
    empty.objects.update(left)
    decided, both, got, refused, done = [], threading.Event(), [], [], threading.Event()

    def wait_for_the_other(name: str, data: bytes) -> int | None:
        decided.append(name)
        if len(decided) == 2:
            both.set()
            wait_until(lambda: got)  # the second one's write arrives when the first one has the lock for long
        both.wait(30)

    def hold():
        try:
            with lock_workdir(WORKDIR, say=str):
                got.append(True)
                done.wait(30)
        except PathError as error:
            refused.append(str(error))

    monkeypatch.setattr(empty, "before_upload", wait_for_the_other)
    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(got) + len(refused) == 2)
    done.set()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and f"is in use by {THIS}" in refused[0] and not empty.objects


def test_lock_whose_answer_was_lost_is_had(empty, monkeypatch):
    """The bucket has stored it, so that it refuses it when it is sent again."""
    fast(monkeypatch, renew=60)

    def store_and_fail(name: str, data: bytes) -> int:
        empty.objects[name] = data
        empty.before_upload = None
        return 503

    monkeypatch.setattr(empty, "before_upload", store_and_fail)
    with lock_workdir(WORKDIR):
        assert json.loads(empty.objects["run/.lock"])["owner"] == THIS
    assert not empty.objects


def test_owner_that_was_away_too_long_gives_way(empty, monkeypatch):
    fast(monkeypatch)
    gave_way = threading.Event()

    def give_way(path, owner):
        gave_way.owner = owner
        gave_way.set()
        raise OSError  # what comes after the end of the process is not done

    monkeypatch.setattr(lock, "_give_way", give_way)
    with lock_workdir(WORKDIR):
        empty.objects["run/.lock"] = lease("process 7")
        assert gave_way.wait(30) and gave_way.owner == "process 7"
    assert empty.objects == {"run/.lock": lease("process 7")}


def test_owner_whose_lock_was_taken_and_given_back_gives_way_too(empty, monkeypatch):
    """What it knows of the workdir may no longer be so."""
    fast(monkeypatch)
    told = []
    monkeypatch.setattr(lock, "_give_way", lambda path, owner: told.append(owner))
    with lock_workdir(WORKDIR):
        del empty.objects["run/.lock"]
        wait_until(lambda: told)
    assert told[0] == "nobody" and not empty.objects


def test_giving_way_ends_the_process():
    code = "from djepa_jax import lock; lock._give_way('gs://bucket/run/.lock', 'process 7'); print('goes on')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "gs://bucket/run/.lock was not renewed in time and now names process 7; this process ends." in ended.stderr


def test_lock_outlives_storage_that_is_away_for_a_moment(empty, monkeypatch):
    fast(monkeypatch)
    with lock_workdir(WORKDIR):
        with empty.refused_uploads("run/.lock"):
            before, seen = empty.objects["run/.lock"], len(empty.requests)
            wait_until(lambda: sum(request.startswith("POST") for request in empty.requests[seen:]) > 3)
            assert empty.objects["run/.lock"] == before
        wait_until(lambda: empty.objects["run/.lock"] != before)


# ---------------------------------------------------------------- metrics


def test_copies_are_made_up_for(empty, capsys):
    writer = logs.MetricWriter(as_path(WORKDIR))
    with empty.refused_uploads("run/metrics.jsonl"):
        writer.write_scalars(1, {"loss": 1.0})
        writer.flush()
        assert "run/metrics.jsonl" not in empty.objects
    assert capsys.readouterr().out.startswith(f"WARNING: {WORKDIR}/metrics.jsonl was not written (")
    writer.write_scalars(2, {"loss": 0.5})
    writer.close()
    assert [json.loads(line)["step"] for line in empty.objects["run/metrics.jsonl"].splitlines()] == [1, 2]
    assert any("tfevents" in name for name in empty.objects) and not writer.folder.exists() and not capsys.readouterr().out


@pytest.fixture
def unreachable(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """Nobody answers where the bucket should be; waiting for another attempt takes no time."""

    async def no_time(seconds: float) -> None:
        pass

    with socket.socket() as closed, monkeypatch.context() as patch:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        retry = importlib.import_module("gcsfs.retry")  # not above: gcsfs looks at the environment when it is imported
        patch.setattr(retry, "asyncio", types.SimpleNamespace(sleep=no_time))
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{closed.getsockname()[1]}")
        yield patch


def test_copies_are_made_up_for_when_the_storage_is_back(empty, unreachable, capsys):
    with unreachable.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", empty.url)
        writer = logs.MetricWriter(as_path(WORKDIR))
    writer.write_scalars(1, {"loss": 1.0})
    writer.flush()
    first, second = capsys.readouterr().out.splitlines()
    assert not empty.objects and first.startswith(f"WARNING: {WORKDIR}/events.out.tfevents.") and "Cannot connect" in first
    assert second.startswith(f"WARNING: {WORKDIR}/metrics.jsonl was not written (") and "tried again later" in second
    unreachable.setenv("STORAGE_EMULATOR_HOST", empty.url)
    writer.write_scalars(2, {"loss": 0.5})
    writer.close()
    assert [json.loads(line)["step"] for line in empty.objects["run/metrics.jsonl"].splitlines()] == [1, 2]
    assert not writer.folder.exists() and not capsys.readouterr().out


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_storage_that_cannot_be_reached_is_one_line(empty, unreachable, mode, capsys):
    line = refusal(capsys, f"--config={CONFIG}", f"--workdir={WORKDIR}", f"--mode={mode}")
    assert line.startswith("error: ") and "Cannot connect to host 127.0.0.1" in line and not empty.objects
    assert mode == "sample" or f'--workdir "{WORKDIR}" cannot be written (' in line


def test_what_could_not_be_copied_is_kept(empty, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with empty.refused_uploads():
        writer = logs.MetricWriter(as_path(WORKDIR))
        writer.write_scalars(1, {"loss": 1.0})
        writer.close()
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and last == f"WARNING: what could not be written to {WORKDIR} is kept in {writer.folder}"
    assert json.loads((writer.folder / "metrics.jsonl").read_text())["step"] == 1


def test_copies_wait_until_they_are_due(empty, monkeypatch):
    monkeypatch.setattr(logs, "MIRROR_SECONDS", 3600.0)
    writer = logs.MetricWriter(as_path(WORKDIR))
    writer.write_scalars(1, {"loss": 1.0})
    assert not empty.objects
    writer.close()
    assert empty.objects


# ---------------------------------------------------------------- storage that cannot be used


def refusal(capsys, *arguments: str) -> str:
    """The one line that the command line ends with."""
    assert main(["djepa_jax", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bucket_that_does_not_exist_is_named_and_not_made(empty, capsys):
    line = refusal(capsys, f"--config={CONFIG}", "--workdir=gs://no-bucket/run")
    assert '--workdir "gs://no-bucket/run" cannot be written' in line and "check the bucket's name and your access" in line
    assert not any(request.startswith("POST") and request.endswith("/b") for request in empty.requests)


def test_refused_access_is_said_before_anything_is_computed(empty, capsys):
    with empty.refused_uploads():
        line = refusal(capsys, f"--config={CONFIG}", f"--workdir={WORKDIR}")
    assert f'--workdir "{WORKDIR}" cannot be written (' in line and "your access (roles/storage.objectUser)" in line
    assert not empty.objects


@pytest.fixture
def without_gcsfs(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    known = importlib.import_module("fsspec.registry")._registry
    for name in ("gs", "gcs"):
        monkeypatch.delitem(known, name, raising=False)


@pytest.mark.parametrize("mode", ["train", "sample", "evaluate"])
def test_missing_package_is_named(without_gcsfs, mode, capsys):
    line = refusal(capsys, f"--config={CONFIG}", f"--workdir={WORKDIR}", f"--mode={mode}")
    assert line == f'error: "{WORKDIR}" needs the package gcsfs: pip install gcsfs.'


@pytest.mark.parametrize("mode", ["train", "sample"])
@pytest.mark.parametrize("workdir", ["s3://bucket/run", "https://bucket/run", "gs://"])
def test_other_addresses_are_refused(workdir, mode, capsys):
    line = refusal(capsys, f"--config={CONFIG}", f"--workdir={workdir}", f"--mode={mode}")
    assert line.startswith(f'error: "{workdir}" ') and "gs://BUCKET/FOLDER" in line


def test_exports_and_latents_are_for_disks(bucket, capsys):
    line = refusal(capsys, f"--workdir={WORKDIR}", "--mode=export", "--out=gs://bucket/export")
    assert line == 'error: --out "gs://bucket/export" is not a local path; name one.'
    line = refusal(capsys, f"--config={CONFIGS / 'djepa_b.py'}", "--mode=prepare", "--workdir=gs://bucket/latents")
    assert line == f'error: --workdir "gs://bucket/latents" is not a local path; {PUBLISH}.'


def test_bucket_without_a_checkpoint_is_told(empty, capsys):
    line = refusal(capsys, f"--config={CONFIG}", f"--workdir={WORKDIR}", "--mode=sample")
    assert re.match(f"error: {WORKDIR}/checkpoints holds no checkpoint; train first", line)


def test_check_leaves_nothing(empty):
    check_writable(WORKDIR)
    assert not empty.objects
