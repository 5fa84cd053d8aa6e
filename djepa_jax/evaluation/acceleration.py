"""`--mode=search --config.search.preset=acceleration`: how much work samples need.

A fixed list of ways to sample with less work, each beside the run's own settings with the paper's
100 denoising steps, of the same seeds: figures, and milliseconds a sample, alone and in batches.
"""

import dataclasses
import statistics
import time

import jax
from etils import epath

from djepa_jax.config.experiment import Experiment
from djepa_jax.core.losses.shortcut import Shortcut
from djepa_jax.core.schedules import orders_for
from djepa_jax.evaluation.judges import open_to_judge
from djepa_jax.evaluation.search import AXES, Search, name_of
from djepa_jax.runtime import storage
from djepa_jax.sampling.generator import Generator

PAPER_STEPS = 100  # denoising steps of the paper's samples
REPEATS = 5  # of a sample alone, of which the median counts
# What an exact row may differ in: which tokens are drawn together, not how a token is drawn
EXACT = ("order", "reveal", "num_ar_steps")
# Fewer denoising steps, by the samplers that a loss has; of flow matching these are points
FEWER = {
    "euler": (50, 25, 12, 6),
    "heun": (12, 6),
    "ancestral": (25, 12),
    "ddpm": (50, 25, 12),
    "ddim": (50, 25, 12),
}
OTHERS = (50, 25, 12)  # by samplers of other losses
FEW = (9, 5, 3, 2)  # of a loss whose steps may be long


def ways(experiment: Experiment) -> list[dict]:
    """Settings of all rows, the one that all others are compared with first."""
    own = {axis: getattr(experiment.sample, axis) for axis in Acceleration.axes}
    first = own | {"num_denoise_steps": PAPER_STEPS, "final_denoise_steps": 0}
    samplers, fewer = experiment.token_loss.samplers, own["num_ar_steps"] // 2 or 1
    is_shortcut = isinstance(experiment.token_loss, Shortcut)
    rows = [first, *(first | {"order": name} for name in orders_for(experiment.modality.grid))]
    rows += [first | {"num_ar_steps": steps} for steps in (fewer, fewer // 2 or 1)]
    rows += [first | {"num_ar_steps": fewer, "order": "checkerboard", "reveal": "halves"}]
    few = {name: FEW if is_shortcut else FEWER.get(name, OTHERS) for name in samplers}
    for name, counts in few.items():
        rows += [first | {"sampler": name, "num_denoise_steps": steps} for steps in counts]
    rows += [first | {"num_denoise_steps": few[own["sampler"]][-2], "num_ar_steps": fewer}]
    if not is_shortcut:
        falling = first | {"num_denoise_steps": 50, "final_denoise_steps": 5}
        rows += [falling, falling | {"num_ar_steps": fewer}]
    is_guided = experiment.sampler.halves > 1
    if is_guided:
        rows += [first | {"cfg_start": 0.5}, rows[-1] | {"cfg_start": 0.5}]
    if is_guided and not experiment.sample.guide:
        rows += [first | {"reuse_unconditional": every} for every in (2, 4)]
    return list({name_of(row, 0): row for row in rows}.values())


class Acceleration(Search):
    """A search over a list of ways, which are timed alone, too."""

    axes = (*AXES, "order", "reveal", "final_denoise_steps", "cfg_start", "cfg_stop")
    axes += ("reuse_unconditional",)
    stem = "acceleration"

    def also(self, experiment: Experiment) -> dict:
        """Milliseconds of a sample that is drawn alone; its program is compiled before."""
        sample = dataclasses.replace(experiment.sample, batch_size=1)
        experiment = dataclasses.replace(experiment, sample=sample)
        generator = Generator(experiment, self._generator.mesh)
        condition = experiment.network.conditioner.in_turn(1)
        seconds = []
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(generator.tokens(self._params, condition, 0))
            seconds.append(time.perf_counter() - start)
        return {"ms_alone": 1000 * statistics.median(seconds[1:])}

    def compared(self, cells: list[dict]) -> list[dict]:
        """Each cell beside the first: what differs, how much faster, how much worse at most."""
        first, rows = cells[0], []
        for cell in cells:
            own, others = cell["settings"], first["settings"]
            changed = {axis: value for axis, value in own.items() if value != others[axis]}
            row = {"changed": changed, "exact": changed.keys() <= set(EXACT)}
            for ms in ("ms_per_sample", "ms_alone"):
                row[ms], row[f"{ms}_ratio"] = cell[ms], first[ms] / cell[ms]
            row["no_worse"] = True
            for what, figure in self.figures().items():
                low, high = (0.0, 0.0) if cell is first else self.difference(cell, first, figure)
                row[figure] = cell["metrics"][figure]
                row[f"{figure}_difference"] = [low, high]
                row["no_worse"] &= low <= 0 if what == "distance" else high >= 0
            rows.append(row)
        return rows


def run_acceleration(
    experiment: Experiment, workdir: str, overwrite: bool = False
) -> tuple[dict, list[epath.Path]]:
    """Measure all ways with the latest checkpoint of a workdir: the record, and the files.

    Errors are those of a search.
    """
    rows, count = ways(experiment), experiment.search.count
    experiment, source = open_to_judge(experiment, workdir)
    search = Acceleration(experiment, source, workdir)
    storage.check_writable(workdir)
    search.restore(overwrite)
    cells = {name_of(c["settings"], 0): c for c in search.run("acceleration", rows, count)}
    table = search.compared([cells[name_of(row, 0)] for row in rows])
    fit = [row for row in table if row["no_worse"]]
    recommended = min(fit, key=lambda row: row["ms_per_sample"])
    record = search.write(count) | {"table": table, "recommended": recommended}
    storage.write_json(search.path("json"), record)
    return record, [search.path("json"), search.path("csv")]


def words_of(record: dict) -> list[str]:
    """The table in words: exact rows, then approximate ones, and what is recommended."""
    lines = []
    for exact in (True, False):
        lines.append("the same work for every token:" if exact else "less work for tokens:")
        lines += [f"  {_row(row)}" for row in record["table"] if row["exact"] == exact]
    flags = record["recommended"]["changed"].items()
    told = " ".join(f"--config.sample.{axis}={value}" for axis, value in flags) or "no change"
    return [*lines, f"recommended: {told}, {_row(record['recommended'])}"]


def _row(row: dict) -> str:
    changed = ", ".join(f"{axis} {value}" for axis, value in row["changed"].items())
    parts = [f"{changed or 'as it is, 100 denoising steps':60s}"]
    for key, value in row.items():
        if key.endswith("_difference"):
            name = key.removesuffix("_difference")
            parts.append(f"{name} {row[name]:.3f} ({value[0]:+.3f} to {value[1]:+.3f})")
    for ms, where in (("ms_per_sample", "in batches"), ("ms_alone", "alone")):
        parts.append(f"{row[ms]:.1f} ms {where} ({row[f'{ms}_ratio']:.1f} x)")
    return "  ".join([*parts, "" if row["no_worse"] else "worse"]).rstrip()
