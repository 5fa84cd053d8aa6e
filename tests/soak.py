"""Train digits for a while and do to the run whatever can be done to it; then say what was lost.

    bash launch/soak.sh [--minutes=60] [--folder=DIR] [--seed=0] [--report=FILE.md]

Every life of the run is the same command on another number of devices (8, 4, 1, 8, ...), and ends
by SIGKILL, SIGTERM, Ctrl-C or a full disk; between lives files of the newest checkpoint are
damaged. What must hold: a life goes on from the step that was reported saved last, or from the one
before if that was damaged; signals lose nothing; the log has every step once. Exit status 1 if
anything does not hold.

On a file system of less than 1 GiB a disk is really filled; elsewhere the process may write no
larger files. For the first:

    mount -t tmpfs -o size=200m tmpfs DIR
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).parents[1]
DEVICES = (8, 4, 1, 8)
ENDINGS = (
    "kill",
    "kill",
    "kill",
    "term",
    "interrupt",
    "full disk",
    "damage",
)  # "damage": a kill, then the newest step is hurt
TRAINING = (
    "num_steps=1000000",
    "batch_size=32",
    "checkpoint_every=20",
    "log_every=1",
    "sample_every=0",
    "evaluation.kind=none",
)
MODEL = (
    "width=32",
    "encoder_depth=1",
    "predictor_depth=1",
    "denoiser_depth=1",
    "denoiser_width=32",
    "scan_unroll=1",
)
FLAGS = [*(f"--config.{flag}" for flag in TRAINING), *(f"--config.model.{flag}" for flag in MODEL)]
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # compiles sooner
# bytes by which the log may grow when the disk is about to be full; less than a checkpoint has
ROOM = 30_000
SMALL = 2**30  # bytes of a file system that may be filled


@dataclasses.dataclass
class Life:
    """What one process said."""

    ending: str
    devices: int
    resumed: int = 0  # step it went on from
    fallback: bool = False  # it said that a step was damaged
    last: int = 0  # newest step that it logged
    saved: int = 0  # newest step that it reported saved
    status: int | None = None
    error: str = ""
    to_first_step: float | None = None  # seconds
    to_end: float | None = None  # seconds from the signal to the end
    lasted: float = 0.0  # seconds
    blocked: list[float] = dataclasses.field(
        default_factory=list
    )  # seconds that saves took from training


class Child:
    """A training process, and a thread that reads what it says."""

    def __init__(self, folder: pathlib.Path, ending: str, devices: int):
        self.life, self._begin = Life(ending, devices), time.monotonic()
        flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
        settings = {
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [
            sys.executable,
            "-u",
            "-m",
            "djepa_jax.main",
            "--config=configs/digits.py",
            f"--workdir={folder / 'run'}",
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(
            [*command, *FLAGS], cwd=ROOT, env=os.environ | settings, **pipes
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        life = self.life
        for line in self.process.stdout:
            if found := re.match(r"going on from step (\d+)", line):
                life.resumed = life.last = int(found[1])
            elif found := re.match(r"step (\d+)/", line):
                life.last = int(found[1])
                life.to_first_step = life.to_first_step or time.monotonic() - self._begin
            elif found := re.match(r"saved step (\d+) .*waited ([\d.]+) s", line):
                life.saved = int(found[1])
                life.blocked.append(float(found[2]))
            elif line.startswith("WARNING: step"):
                life.fallback = True
            elif line.startswith("error: "):
                life.error = line.strip()

    def wait_for_steps(self, count: int, seconds: float) -> None:
        """Return when so many steps were made, or the time is up, or the process has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.life.to_first_step is not None and self.life.last >= self.life.resumed + count:
                return
            time.sleep(0.02)

    def end(self, number: signal.Signals | None, seconds: float = 120) -> Life:
        """Send a signal, if any, and wait for the end."""
        start = time.monotonic()
        if number is not None:
            self.process.send_signal(number)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.life.error = f"did not end within {seconds:.0f} s"
        self._reader.join()
        self.life.status, self.life.to_end = self.process.returncode, time.monotonic() - start
        self.life.lasted = start - self._begin  # to the signal
        return self.life


def live(folder: pathlib.Path, ending: str, devices: int, rng: random.Random) -> Life:
    """One life, from its start to its end."""
    child = Child(folder, ending, devices)
    if ending in ("kill", "damage"):
        if rng.random() < 0.25:  # at any time, start and restore included
            time.sleep(rng.uniform(0, 15))
        else:
            child.wait_for_steps(rng.randint(1, 90), 120)
            time.sleep(rng.uniform(0, 0.3))
        return child.end(signal.SIGKILL)
    child.wait_for_steps(rng.randint(1, 60), 120)
    if ending == "full disk" and shutil.disk_usage(folder).total < SMALL:
        with ballast(folder, rng.randrange(ROOM)):
            return child.end(None)
    if ending == "full disk":
        log = folder / "run" / "metrics.jsonl"
        limit = ROOM + (log.stat().st_size if log.exists() else 0)
        if child.process.poll() is None:
            resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        return child.end(None)
    return child.end(signal.SIGTERM if ending == "term" else signal.SIGINT)


@contextlib.contextmanager
def ballast(folder: pathlib.Path, left: int):
    """Fill a small file system but for `left` bytes, and keep it so until the end of the
    context.
    """
    path, stop = folder / "ballast", threading.Event()

    def fill():
        with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while not stop.wait(0.05):  # again and again: what the process removes is filled, too
                file.write(bytes(max(0, shutil.disk_usage(folder).free - left)))

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink()


def damage(run: pathlib.Path, rng: random.Random) -> int | None:
    """Hurt a file of the newest sealed step; returns the step before it, or None where there are
    not two.
    """
    steps = sorted(int(path.parent.name) for path in run.glob("checkpoints/*/manifest.json"))
    if len(steps) < 2:
        return None
    path = rng.choice(
        sorted(path for path in (run / "checkpoints" / str(steps[-1])).rglob("*") if path.is_file())
    )
    data = bytearray(path.read_bytes())
    how = rng.choice(("flip", "cut", "remove"))
    if how == "remove" or not data:
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    return steps[-2]


def check(life: Life, known: int) -> list[str]:
    """What does not hold of a life; `known` is the newest step that was saved and not damaged
    since.
    """
    wrong = []
    if life.to_first_step is not None and life.resumed != known:
        wrong.append(
            f"went on from step {life.resumed}, though step {known} was the newest good one"
        )
    if life.ending in ("term", "interrupt") and (life.status != 0 or life.saved < life.last):
        wrong.append(
            f"ended with status {life.status} at step {life.last}, step {life.saved} saved: "
            f"{life.error}"
        )
    if life.ending == "full disk" and (life.status != 2 or "make room" not in life.error.lower()):
        wrong.append(f"a full disk ended with status {life.status}: {life.error}")
    return wrong


def soak(
    folder: pathlib.Path, minutes: float, seed: int, say=print
) -> tuple[list[Life], list[str]]:
    """Live until the time is up, then once more in peace; the lives, and what did not hold."""
    rng, lives, wrong, known, run = random.Random(seed), [], [], 0, folder / "run"
    deadline, ending = time.monotonic() + 60 * minutes, ""
    while ending != "last":
        ending = rng.choice(ENDINGS) if time.monotonic() < deadline else "last"
        life = live(folder, ending.replace("last", "term"), DEVICES[len(lives) % len(DEVICES)], rng)
        found = check(life, known)
        if (
            life.to_first_step is not None or life.saved
        ):  # one killed before that may not have met the damage
            known = recorded(run)
        if life.saved > known:
            found.append(f"step {life.saved} was reported saved, {known} is on record")
        what = (
            f"{life.ending}, {life.devices} devices, steps {life.resumed} to {life.last}, saved "
            f"{known}"
        )
        say(f"life {len(lives) + 1}: {what}", *found, flush=True)
        wrong += [f"life {len(lives) + 1}: {text}" for text in found]
        lives.append(life)
        if ending == "damage":
            known = damage(run, rng) or known
    return lives, wrong + check_log(run, known)


def recorded(run: pathlib.Path) -> int:
    """The step that the workdir says was saved last."""
    try:
        return json.loads((run / "last_saved.json").read_text())["step"] or 0
    except OSError:
        return 0


def check_log(run: pathlib.Path, last: int) -> list[str]:
    """Every step up to the last saved one must be in the log once, in order, with a finite loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["step"] <= last]
    complete = steps == list(range(1, last + 1))
    wrong = (
        []
        if complete
        else [f"the log of {last} saved steps has {len(steps)} lines, or another order"]
    )
    return wrong + [
        f"step {line['step']} has no finite loss" for line in lines if line["loss"] is None
    ]


def describe(lives: list[Life], wrong: list[str], minutes: float) -> str:
    """The report as Markdown."""
    counts = {
        ending: sum(life.ending == ending for life in lives) for ending in dict.fromkeys(ENDINGS)
    }
    lost = [
        max(0, a.last - b.resumed)
        for a, b in zip(lives, lives[1:], strict=False)
        if b.to_first_step and a.ending == "kill"
    ]
    first = [life.to_first_step for life in lives if life.to_first_step]
    blocked = [seconds for life in lives for seconds in life.blocked]
    ended = [life.to_end for life in lives if life.ending in ("term", "interrupt")]
    idle = sum(blocked) + sum(ended) + sum(life.to_first_step or life.lasted for life in lives)
    rows = {
        "minutes": f"{minutes:.0f}",
        "lives": f"{len(lives)} "
        f"({', '.join(f'{count} {ending}' for ending, count in counts.items())})",
        "devices": f"{' -> '.join(map(str, DEVICES))}, in turn",
        "steps of the run at the end": f"{max(life.last for life in lives):,}",
        "promises broken": f"{len(wrong)}",
        "steps lost by a kill (a step is saved every 20)": _spread(lost, "{:.0f}"),
        "seconds from the command to the first step": _spread(first, "{:.1f}"),
        "seconds that a save kept training waiting": _spread(blocked, "{:.2f}"),
        "seconds from SIGTERM or Ctrl-C to the end": _spread(ended, "{:.1f}"),
        "share of the time not spent training": f"{idle / (60 * minutes):.0%} (starts, saves, "
        "ends)",
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join([*table, *(f"- {text}" for text in wrong)]) + "\n"


def _spread(values: list[float], form: str) -> str:
    if not values:
        return "none"
    median, worst = form.format(statistics.median(values)), form.format(max(values))
    return f"median {median}, largest {worst} (of {len(values)})"


def main() -> int:
    """Read the flags, soak, write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=pathlib.Path)
    values = parser.parse_args()
    if (values.folder / "run").exists():
        parser.error(f"{values.folder / 'run'} exists; remove it, or name another --folder")
    values.folder.mkdir(parents=True, exist_ok=True)
    lives, wrong = soak(values.folder.absolute(), values.minutes, values.seed)
    text = describe(lives, wrong, values.minutes)
    print(text)
    if values.report:
        values.report.write_text(text)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
