"""The lock of a workdir: on a disk, and in a bucket (an `ObjectStore` in this process)."""

import os
import socket
import threading
import time
import types

import pytest
from buckets import WORKDIR
from processes import CONTEXT, start
from waiting import LIMIT, wait_until

from djepa_jax.runtime import lock
from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.storage import PathError

THIS = f"process {os.getpid()} on {socket.gethostname()}"
LEFT = b"process 7 on a machine that is gone\ntoken\n"


def refused(workdir) -> str:
    """What somebody else is told."""
    with pytest.raises(PathError, match="is in use by") as error, lock_workdir(workdir):
        pass
    return str(error.value)


# ---------------------------------------------------------------- on a disk


def hold(workdir: str, pipe) -> None:
    with lock_workdir(workdir):
        pipe.send("held")
        time.sleep(LIMIT)


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = start(hold, str(tmp_path), theirs)
    assert ours.recv() == "held"
    assert f'--workdir "{tmp_path}"' in refused(tmp_path)
    assert f"process {process.pid} on {socket.gethostname()};" in refused(tmp_path)
    process.kill()
    process.join()
    with lock_workdir(tmp_path):
        assert THIS in refused(tmp_path)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", fail)
    with (
        pytest.raises(PathError, match="cannot be locked .*Function not.*another"),
        lock_workdir(tmp_path),
    ):
        pass


# ---------------------------------------------------------------- in a bucket


@pytest.fixture
def fast(empty, monkeypatch):
    """The empty bucket; sets the times of its locks: fast(renew, stale)."""

    def set_times(renew: float = 0.05, stale: float = 0.4):
        monkeypatch.setattr(lock, "RENEW_SECONDS", renew)
        monkeypatch.setattr(lock, "STALE_SECONDS", stale)
        return empty

    return set_times


def test_an_owner_that_renews_keeps_others_out(fast):
    store = fast(stale=LIMIT)
    with lock_workdir(WORKDIR):
        assert store.objects["run/.lock"].decode().startswith(THIS)
        assert f"in use by {THIS}; wait for it" in refused(WORKDIR)
        with store.refused_uploads("run/.lock"):  # away for a moment
            seen = len(store.requests)
            wait_until(lambda: sum(r.startswith("POST") for r in store.requests[seen:]) > 2)
        assert THIS in refused(WORKDIR)
    assert not store.objects


def test_a_lock_that_nobody_renews_is_taken_over(fast, capsys):
    store = fast()
    store.objects["run/.lock"] = LEFT
    with lock_workdir(WORKDIR):
        assert store.objects["run/.lock"].decode().startswith(THIS)
    assert "names process 7 on a machine that is gone; waiting up to" in capsys.readouterr().out
    assert not store.objects


def test_a_lock_that_is_given_back_meanwhile_is_free(fast):
    store = fast(stale=LIMIT)
    store.objects["run/.lock"] = LEFT
    threading.Timer(0.2, store.objects.clear).start()
    with lock_workdir(WORKDIR):
        assert store.objects["run/.lock"].decode().startswith(THIS)


@pytest.mark.parametrize("left", [{}, {"run/.lock": LEFT}])
def test_of_several_that_come_at_once_one_gets_it(fast, monkeypatch, left):
    store, now, waiting, got, refusals = fast(stale=LIMIT), [0.0], set(), [], []
    store.objects.update(left)

    def sleep(seconds: float) -> None:
        waiting.add(threading.get_ident())
        time.sleep(0.02)

    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(lock, "time", clock)
    done = threading.Event()

    def come():
        try:
            with lock_workdir(WORKDIR):
                got.append(True)
                done.wait(LIMIT)
        except PathError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(waiting) == 4 or got)
    now[0] = LIMIT + 1.0 if left else 0.0  # nobody has renewed what was left
    wait_until(lambda: len(got) + len(refusals) == 4)
    done.set()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and THIS in refusals[0] and not store.objects


def test_a_lock_whose_answer_was_lost_is_had(fast):
    """The bucket has stored it, so that it refuses it when it is sent again."""
    store = fast(renew=60)

    def store_and_fail(name: str, data: bytes) -> int:
        store.objects[name], store.before_upload = data, None
        return 503

    store.before_upload = store_and_fail
    with lock_workdir(WORKDIR):
        assert store.objects["run/.lock"].decode().startswith(THIS)
    assert not store.objects


def test_an_owner_that_was_away_too_long_leaves_the_other_alone(fast, caplog):
    store = fast()
    with lock_workdir(WORKDIR):
        store.objects["run/.lock"] = LEFT
        wait_until(lambda: "names another process" in caplog.text)
    assert store.objects == {"run/.lock": LEFT}
