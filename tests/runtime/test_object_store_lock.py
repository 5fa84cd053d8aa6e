"""The lock of a workdir in a bucket: held, given back, left behind, taken over, lost.

The bucket is an `ObjectStore` in this process, on loopback.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from buckets import WORKDIR

from djepa_jax.runtime import lock
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.storage import PathError

THIS = f"process {os.getpid()} on {socket.gethostname()}"


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
        with (
            pytest.raises(PathError, match=f"is in use by {THIS}; wait for it"),
            lock_workdir(WORKDIR, say=str),
        ):
            pass
    assert not empty.objects


def test_lock_that_nobody_renews_is_taken_over(empty, monkeypatch):
    fast(monkeypatch)
    empty.objects["run/.lock"] = lease("process 7 on a machine that is gone")
    said, start = [], time.monotonic()
    with lock_workdir(WORKDIR, say=said.append):
        assert time.monotonic() - start > lock.STALE_SECONDS
        assert json.loads(empty.objects["run/.lock"])["owner"] == THIS
    assert said == [
        f"{WORKDIR}/.lock names process 7 on a machine that is gone; waiting up to 0 s to see "
        "whether it is alive"
    ]


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
            wait_until(
                lambda: got
            )  # the second one's write arrives when the first one has the lock for long
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
    code = (
        "from djepa_jax import lock; lock._give_way('gs://bucket/run/.lock', 'process 7'); "
        "print('goes on')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert (
        "gs://bucket/run/.lock was not renewed in time and now names process 7; this process ends."
        in ended.stderr
    )


def test_lock_outlives_storage_that_is_away_for_a_moment(empty, monkeypatch):
    fast(monkeypatch)
    with lock_workdir(WORKDIR):
        with empty.refused_uploads("run/.lock"):
            before, seen = empty.objects["run/.lock"], len(empty.requests)
            wait_until(
                lambda: sum(request.startswith("POST") for request in empty.requests[seen:]) > 3
            )
            assert empty.objects["run/.lock"] == before
        wait_until(lambda: empty.objects["run/.lock"] != before)
