"""Waiting for what others do, on a machine of any speed."""

import time
from collections.abc import Callable

LIMIT = 600  # seconds after which something counts as hanging


def wait_until(true: Callable[[], bool], said: Callable[[], str] = str) -> None:
    """Return when something is true; `said` tells what is known where it never comes true."""
    deadline = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < deadline, said()
        time.sleep(0.01)
