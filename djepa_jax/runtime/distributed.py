"""Processes that train together: what one of them does for all, and when they stop (`meeting`: how
they find each other).
"""

import contextlib
import os
import signal
import time
import zlib
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from djepa_jax.runtime.errors import UserError

# What a signal leads to, while a training reads its checkpoint; while it trains; when the last step
# is saved.
STARTING = "stopping as soon as the checkpoint is read"
SAVING = "saving a checkpoint, then stopping"
SAVED = "everything is saved; leaving out samples and evaluation that are not made yet"
SHARED_SECONDS = 5.0  # that a file may take to be seen by all processes


class HostsError(UserError, ValueError):
    """Processes that cannot work together; the message says why."""


def alone() -> bool:
    """Whether there are no other processes; asks no device, so that it can be asked before JAX has
    found any.
    """
    return not jax.distributed.is_initialized()


def is_main() -> bool:
    """Whether this process is the one that writes logs and pictures."""
    return jax.process_index() == 0


def on_main(function: Callable[[], int | None]) -> int | None:
    """Call a function in process 0 alone and tell every process its result, a number or None.

    Raises:
        HostsError: it failed in process 0, where its own exception is raised.
    """
    if jax.process_count() == 1:
        return function()
    result, error = None, None
    if is_main():
        try:
            result = function()
        except Exception as caught:
            error = caught
    mark = 2 if error else int(result is None)
    mark, value = multihost_utils.broadcast_one_to_all(
        np.array([mark, result or 0], np.int32)
    ).tolist()
    if error:
        raise error
    if mark == 2:
        raise HostsError("process 0 cannot go on; what it printed says why.")
    return None if mark == 1 else value


@contextlib.contextmanager
def held_by_main(context: contextlib.AbstractContextManager):
    """Enter a context in process 0 alone; every process fails if that fails."""
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(context) and None)
        yield


def check_shared(folder: epath.Path) -> None:
    """Make sure that all processes see the same folder.

    Raises:
        HostsError: in all processes: one of them does not see what process 0 wrote there.
    """
    if jax.process_count() == 1:
        return
    number = on_main(lambda: int.from_bytes(os.urandom(3)))
    mark = folder / f".shared-{number}"  # a new name, which no file system remembers as missing
    on_main(lambda: mark.write_text("") and None)
    deadline = time.monotonic() + SHARED_SECONDS
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    all_see = multihost_utils.process_allgather(np.array(seen)).all()
    on_main(lambda: mark.unlink(missing_ok=True))
    if not all_see:
        raise HostsError(
            f'"{folder}" is not the same folder for all processes; name one that they share, such '
            "as gs://BUCKET/RUN."
        )


def check_same(text: str, what: str) -> None:
    """Make sure that all processes have the same text.

    Raises:
        HostsError: in all processes: one of them has another than process 0; the message names
            `what`.
    """
    if jax.process_count() == 1:
        return
    numbers = multihost_utils.process_allgather(np.array(zlib.crc32(text.encode()), np.uint32))
    others = np.flatnonzero(numbers != numbers[0]).tolist()
    if others:
        raise HostsError(
            f"{what} of process {others[0]} is not that of process 0; start all of them with the "
            "same command."
        )


def largest(number: int) -> int:
    """The largest of all processes' numbers, for all of them."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.array(number, np.int32)).max())


def wait_for_all(name: str) -> None:
    """Wait for the other processes; `name` says where, and must be the same for all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request to save and stop; a second SIGINT ends the
    process at once.

    With several processes, a signal to any of them stops all of them after the same question
    (`requested`), which is why all of them have to ask the same questions in the same order.

    Attributes:
        caught: whether this process has seen a signal; with several processes, SIGINT only.
        answer: what is going to be done about it, for people.
    """

    def __init__(self):
        self.caught, self.answer = False, SAVING
        self._together = jax.process_count() > 1
        self._questions = 0
        self._agreed = False
        self._previous: dict = {}

    def __enter__(self):
        numbers = (
            (signal.SIGINT,) if self._together else (signal.SIGINT, signal.SIGTERM)
        )  # SIGTERM is JAX's there
        for number in numbers:
            try:
                self._previous[number] = signal.signal(number, self._catch)
            except ValueError:  # not the main thread: signals are somebody else's business
                break
        return self

    def __exit__(self, *_):
        for (
            number,
            handler,
        ) in (
            self._previous.items()
        ):  # with several, JAX keeps SIGTERM: one that is done waits for the others
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to stop now, with `step` steps made; once it was so, it stays so."""
        if not self._together:
            return self.caught
        # not the step: JAX stops at the question after the last one, and a step may be the last
        self._questions += 1
        if not self._agreed and multihost_utils.reached_preemption_sync_point(self._questions):
            self._agreed = True
            if is_main():
                print(f"a process was asked to stop, at step {step}: {self.answer}", flush=True)
        return self._agreed

    def _catch(self, number, frame):
        """What must not fail comes first; nothing raises, for it would be raised wherever the
        training is.
        """
        del frame
        self.caught = True
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # at once: not after what Python waits for, a save or another process
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
        text = (
            f"\n{signal.Signals(number).name}: {self.answer}; press Ctrl-C again to stop at once.\n"
        )
        with contextlib.suppress(OSError):  # nobody may be listening any more
            os.write(1, text.encode())  # not by print, which may be what the signal has interrupted
