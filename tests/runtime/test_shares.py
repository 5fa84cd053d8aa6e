"""How processes that share work leave it; two real ones prepare a cache in
`test_prepare_interruptions.py`.
"""

import jax
import pytest

from djepa_jax.runtime import distributed
from djepa_jax.runtime.shares import DONE, FAILED, Shares


@pytest.fixture
def two(tmp_path, monkeypatch) -> Shares:
    """Process 0 of two."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "on_main", lambda function: function())
    monkeypatch.setattr(distributed, "wait_for_all", lambda name: None)
    return Shares(tmp_path)


def test_alone_it_does_nothing(tmp_path):
    with Shares(tmp_path) as shares:
        shares.check()
    assert list(tmp_path.iterdir()) == []


def test_work_ends_when_the_other_has_ended_too(two, tmp_path):
    with two:
        two._mark(1, DONE).touch()
    assert [path.name.rpartition("-")[2] for path in tmp_path.iterdir()] == [DONE], (
        "the other's mark; its own is gone"
    )


def test_failure_of_the_other_is_an_error_here(two):
    with pytest.raises(distributed.HostsError, match="process 1 cannot go on"), two:
        two._mark(1, FAILED).touch()


def test_folder_that_takes_no_mark_is_an_error_and_not_an_end(two, tmp_path):
    """Else this process would go on while the others wait for it."""
    tmp_path.rmdir()
    with pytest.raises(FileNotFoundError), two:
        pass


def test_first_error_comes_through_on_a_folder_that_takes_no_mark(two, tmp_path):
    tmp_path.rmdir()
    with pytest.raises(ValueError, match="the first"), two:
        raise ValueError("the first")
