"""SIGKILL at any moment, again and again: the run ends at the same bits, and little is lost each
time.
"""

import dataclasses
import pathlib
import random
import re
import statistics
import time

import pytest
from processes import Training
from waiting import LIMIT
from workdirs import RUN, arrays, assert_same_arrays, compiled, run

from djepa_jax.checkpoints.checkpointer import Checkpoints, check_step
from djepa_jax.checkpoints.integrity import MANIFEST_NAME, CheckpointError

INTERVAL = 2  # steps between saves
PACE = 0.02  # seconds that a step takes at least
# Where a process is killed: while it starts; up to 0.4 s after it began to save; with arrays but no
# manifest; when there is one step too many, which is about to be removed.
PLACES = ("start", "save", "save", "seal", "removal")


@dataclasses.dataclass
class Life:
    """One process."""

    place: str
    made: int  # steps that are saved now and were not before
    lost: int  # steps that it had made, as far as it said, and that have to be made again
    to_first_step: float | None  # seconds
    blocked: list[float]  # seconds that training waited for saves


class Folder:
    """What is in a workdir just now."""

    def __init__(self, workdir: pathlib.Path):
        self.workdir, self.steps = workdir, workdir / "checkpoints"

    def names(self) -> set[str]:
        return {path.name for path in self.steps.iterdir()} if self.steps.exists() else set()

    def newest_usable(self) -> int:
        for step in sorted(map(int, filter(str.isdigit, self.names())), reverse=True):
            try:
                check_step(Checkpoints(self.workdir).folder(step))
                return step
            except CheckpointError:
                continue
        return 0

    def reached(self, place: str, before: set[str]) -> bool:
        """Whether a process that found or made the names `before` is now at one of `PLACES`."""
        new = self.names() - before
        if place == "save":
            return bool(new)
        new = {name for name in new if name.isdigit()}
        if place == "seal":
            return any(not (self.steps / name / MANIFEST_NAME).exists() for name in new)
        return any((self.steps / name / MANIFEST_NAME).exists() for name in new)


def live(workdir: pathlib.Path, rng: random.Random, simple: bool) -> tuple[Life | None, str]:
    """Start the command and kill it somewhere; no life if it was complete before that."""
    folder, place, saves, delay = (
        Folder(workdir),
        rng.choice(PLACES),
        rng.randrange(3),
        rng.uniform(0, 0.4),
    )
    before, usable = folder.names(), folder.newest_usable()
    flags = (f"--config.checkpoint_every={INTERVAL}", f"--workdir={workdir}")
    training = Training(compiled(), *RUN, *flags, pace=PACE, simple=simple)
    begun, to_first_step, deadline = (
        time.monotonic(),
        None,
        time.monotonic() + (5 * delay if place == "start" else LIMIT),
    )
    while training.process.is_alive() and time.monotonic() < deadline:
        if to_first_step is None and "images/s" in training.output:
            to_first_step = time.monotonic() - begun
        if training.output.count("saved step") < saves:
            before = folder.names()
        elif place != "start" and folder.reached(place, before):
            deadline = min(deadline, time.monotonic() + (delay if place == "save" else 0))
        time.sleep(0.002)
    status, output = training.kill()
    assert "damaged" not in output, "what a kill leaves is unfinished, and nothing else"
    if status == 0:
        return None, output
    assert status == -9, output
    left = folder.newest_usable()
    check_reports(workdir, output, left)
    last = max(
        (int(step) for step in re.findall(r"^step (\d+)/", output, re.MULTILINE)), default=left
    )
    blocked = [float(seconds) for seconds in re.findall(r"training waited ([\d.]+) s", output)]
    return Life(place, left - usable, max(last - left, 0), to_first_step, blocked), output


def check_reports(workdir: pathlib.Path, output: str, usable: int) -> None:
    """What was reported saved, is."""
    recorded, _ = Checkpoints(workdir).recorded()
    assert recorded is None or recorded <= usable, "a step that cannot be used was recorded"
    if recorded is not None:
        check_step(Checkpoints(workdir).folder(recorded))
    said = [int(line.split()[2]) for line in output.splitlines() if line.startswith("saved step ")]
    assert max(said, default=0) <= usable


def survive(folder: pathlib.Path, expected: dict, kills: int, simple: bool) -> None:
    """Kill runs until that was done often enough; those that come to their end have the expected
    arrays.
    """
    rng, lives, complete = random.Random(0), [], 0
    while len(lives) < kills:
        life, output = live(folder / str(complete), rng, simple)
        if life is None:
            assert_same_arrays(expected, arrays(folder / str(complete)))
            complete += 1
        else:
            print(life)
            assert life.lost <= 2 * INTERVAL and life.made >= 0, output
            lives.append(life)
    status, output = Training(
        compiled(), *RUN, f"--workdir={folder / str(complete)}", simple=simple
    ).finish()
    assert status == 0, output
    assert_same_arrays(expected, arrays(folder / str(complete)))
    assert sum(life.made for life in lives) > 0
    summarise(lives)


def summarise(lives: list[Life]) -> None:
    """Print what was measured, for who runs this with -s."""
    lost = [life.lost for life in lives]
    print(
        f"{len(lives)} kills; steps lost: {statistics.mean(lost):.1f} on average, {max(lost)} at "
        "most"
    )
    first = [life.to_first_step for life in lives if life.to_first_step is not None]
    blocked = [seconds for life in lives for seconds in life.blocked]
    for name, seconds in (("first step after", first), ("a save blocks", blocked)):
        if seconds:  # else each was killed before that
            print(f"{name} {statistics.median(seconds):.2f} s")


def test_killed_runs_end_at_the_same_bits(saved_run, tmp_path):
    survive(tmp_path, arrays(saved_run), kills=6, simple=True)


@pytest.mark.slow
def test_runs_killed_often_end_at_the_same_bits(tmp_path):
    """The same with the training step as it is."""
    status, output = run(tmp_path / "whole", simple=False)
    assert status == 0, output
    survive(tmp_path, arrays(tmp_path / "whole"), kills=30, simple=False)
