"""What keeps a run, in a process of its own, from going on: places where it is held, and a source
that fails.
"""

import os
import time

from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.runtime.distributed import StopSignals
from djepa_jax.training import loop
from djepa_jax.training.reporting import Reporter

STEPS = 40  # of the small runs (`workdirs`)


class FailingSource:
    """A source whose examples cannot be read any more after some time."""

    def __init__(self, source, reads: int):
        self._source, self._left = source, reads
        self.class_names, self.labels = source.class_names, source.labels

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        self._left -= 1
        if self._left < 0:
            raise OSError(f"example {index} cannot be read")
        return self._source[index]


# Places where a process can be held besides steps: what it is about to call there.
PLACES = {
    "restoring": (loop, "restore_or_initialise"),
    "saving": (Checkpoints, "_finish"),
    "sampling": (Reporter, "final_grid"),
    "evaluating": (Reporter, "final_evaluation"),
}


def hold_at(place: str | int, gate: str | None) -> None:
    """Let the process say that it is at a place and wait there: until it was asked to stop, or the
    file `gate` is there.

    Places are `PLACES`, where "saving" is that of the last step, in the background; and numbers of
    steps. All of several processes have to be held at the same place.
    """
    entered, enter = [], StopSignals.__enter__
    StopSignals.__enter__ = lambda self: entered.append(self) or enter(self)
    owner, name = PLACES.get(place, (loop._Run, "_between_steps"))
    function, step = getattr(owner, name), STEPS if place == "saving" else place

    def held(*arguments):
        if place in ("restoring", "sampling", "evaluating") or arguments[1] == step:
            print(f"holding at {place}", flush=True)
            number = step if isinstance(step, int) else STEPS
            while not (os.path.exists(gate) if gate else entered[-1].requested(number)):
                time.sleep(0.01)
        return function(*arguments)

    setattr(owner, name, held)
