"""What processes that share a piece of work tell one another of it, through files in a folder that
all of them see.

Their shares may take hours more or less than one another, for which collective operations would not
wait.
"""

import contextlib
import os
import pathlib
import time

import jax

from djepa_jax.runtime import distributed

PREFIX = ".share-"
POLL_SECONDS = 0.2
DONE, FAILED, STOPPED = STATES = "done", "failed", "stopped"  # stopped: because another has failed


class Shares:
    """A context for the work of one of several processes, which all of them leave together; alone,
    it does nothing.

    If one fails, the others end at their next `check`.

    Args:
        folder: that all processes see.

    Raises:
        HostsError: on leaving, if another process has failed.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder, self._count = folder, jax.process_count()
        self._number = distributed.run_on_main(self._clear)

    def _clear(self) -> int:
        """Remove what killed processes have left; a new number, so that no file system remembers
        the names as missing.
        """
        for leftover in self._folder.glob(f"{PREFIX}*"):
            leftover.unlink(missing_ok=True)
        return int.from_bytes(os.urandom(3))

    def _mark(self, index: int, state: str) -> pathlib.Path:
        return self._folder / f"{PREFIX}{self._number}-{index}-{state}"

    def _state(self, index: int) -> str | None:
        return next((state for state in STATES if self._mark(index, state).exists()), None)

    def check(self) -> None:
        """Raise HostsError if another process has failed."""
        failed = next((index for index in range(self._count) if self._state(index) == FAILED), None)
        if self._count > 1 and failed is not None:
            raise distributed.HostsError(
                f"process {failed} cannot go on; what it printed says why."
            )

    def __enter__(self) -> "Shares":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._count == 1 or not isinstance(error, Exception | None):
            return
        state = (
            DONE
            if error is None
            else STOPPED
            if isinstance(error, distributed.HostsError)
            else FAILED
        )
        mark = self._mark(jax.process_index(), state)
        with (
            contextlib.suppress(OSError) if error is not None else contextlib.nullcontext()
        ):  # the first error is what matters
            self._leave(mark, error is None)

    def _leave(self, mark: pathlib.Path, well: bool) -> None:
        """Say that this process has ended, and wait for the others; JAX ends it if one of them
        dies.

        Raises:
            HostsError: this process has ended well, another has not.
            OSError: the folder cannot be used; this process, going on, would end the others.
        """
        mark.touch()
        while not all(self._state(index) for index in range(self._count)):
            time.sleep(POLL_SECONDS)
        try:
            if well:
                self.check()
        finally:
            distributed.wait_for_all("shares have ended")
            mark.unlink(missing_ok=True)
