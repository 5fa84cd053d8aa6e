"""`--mode=search`: samples judged over a grid of guidance, temperature, steps and sampler.

1. Each combination of values, a cell, draws `search.count` samples from one seed: cells are paired.
2. The best cells, and cells halfway to their neighbours, draw `search.fine_count`.
3. After every cell all is written: a search that was killed goes on, a wider one keeps its cells.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import time

import jax
import numpy as np
from etils import epath

from djepa_jax.checkpoints.restore import latest_model, placed_params
from djepa_jax.config.convert import ConfigError, flatten
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.stored import LATER, changes
from djepa_jax.core import sharding
from djepa_jax.data.captions import conditions_to_judge
from djepa_jax.evaluation.evaluate import as_pictures, describe, subject
from djepa_jax.evaluation.judges import open_metric, open_to_judge
from djepa_jax.evaluation.metrics import intervals
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.search_plots import alike, write_plots
from djepa_jax.runtime import storage
from djepa_jax.runtime.progress import Progress
from djepa_jax.runtime.storage import PathError, as_path
from djepa_jax.sampling.generator import Generator, count_of

STEPS = ("num_ar_steps", "num_denoise_steps", "sampler", "cfg_denoise_start")
SCALES = ("cfg_scale", "guide_scale")
AXES = ("cfg_scale", "temperature", *STEPS, "guide_scale")
MAX_CELLS = 2_000
MAX_LISTED = 4  # differences that an error names
# Of what an evaluation is of: what cells differ by, and what does not change them
NOT_COMMON = [f"sample.{key}" for key in ("labels", "count", "seed", "batch_size")]
NOT_COMMON += [f"loss.{key}" for key in ("num_denoise_steps", "sampler")]
NOT_COMMON += ["evaluation.count", "evaluation.preset"]
CAVEAT = "the best of many cells was lucky, too: its interval does not count the choice"


def grid_of(experiment: Experiment) -> list[dict]:
    """The settings of all cells, one temperature where it plays no part; ConfigError for a value
    that `sample` could not have.
    """
    own, tried = vars(experiment.sample), vars(experiment.search)
    if tried["guide_scale"] and not own["guide"]:
        raise ConfigError("config.search.guide_scale needs a weaker model, config.sample.guide.")
    values = [sorted(set(tried[axis] or [own[axis]])) for axis in AXES]
    if (count := math.prod(map(len, values))) > MAX_CELLS:
        raise ConfigError(
            f"config.search has {count:,} combinations, and {MAX_CELLS:,} are the most; leave out "
            "values."
        )
    grid = {}
    for combination in itertools.product(*values):
        settings = dict(zip(AXES, combination, strict=True))
        try:
            cell = with_settings(experiment, settings)
        except ConfigError as error:
            raise ConfigError(str(error).replace("config.sample.", "config.search.")) from error
        if cell.token_loss.noises_per_token == 1:  # none is added, for temperature to scale
            settings["temperature"] = own["temperature"]
        if cell.sampler.halves == 1:  # nothing to lead away from
            settings["cfg_denoise_start"] = own["cfg_denoise_start"]
        grid.setdefault(name_of(settings, 0), settings)
    return list(grid.values())


def with_settings(experiment: Experiment, settings: dict) -> Experiment:
    """An experiment that samples as a cell does."""
    return experiment.updated({f"sample.{axis}": value for axis, value in settings.items()})


def name_of(settings: dict, count: int) -> str:
    """What tells a cell from all others of a search."""
    return " ".join(map(str, (count, *settings.values())))


class Search:
    """Draws and judges the samples of cells, and keeps what was found in a workdir."""

    axes, stem = AXES, "search"  # what cells differ by, and the name of the files

    def __init__(self, experiment: Experiment, source, workdir: str):
        mesh, model = sharding.make_mesh(experiment.mesh), latest_model(experiment, workdir)
        self._params = model.restore(placed_params(experiment, mesh))
        self._experiment, self._source, self._folder = experiment, source, as_path(workdir)
        self._generator, self._program = Generator(experiment, mesh), None
        of = subject(experiment, self._generator, self._params, source, model.step)
        own = (f"sample.{axis}" for axis in self.axes)
        for group, key in (name.split(".") for name in (*NOT_COMMON, *own)):
            of[group].pop(key, None)
        self.of, self.cells, self.caveats = json.loads(json.dumps(of)), [], [CAVEAT]
        self.moved: dict[str, dict[str, np.ndarray]] = {}  # of each cell, as `Metric` has it

    def path(self, suffix: str) -> epath.Path:
        """Where a file of it lies."""
        return self._folder / f"{self.stem}.{suffix}"

    def restore(self, overwrite: bool) -> None:
        """Go on from what an earlier one wrote; PathError if that was of anything else."""
        path, remedy = self.path("json"), "--overwrite begins anew"
        if overwrite:
            path.unlink(missing_ok=True)
        storage.check_ours(path, "cells", remedy)
        if not path.exists():
            return
        try:
            record, self.moved = json.loads(path.read_text()), {}
            differing = changes(flatten(record["of"]), flatten(self.of))
            self.cells, self.caveats = record["cells"], record["caveats"]
            with (
                self.path("npz").open("rb") as file,
                np.load(file, allow_pickle=False) as arrays,
            ):
                figures = dict.fromkeys(key.partition("/")[2] for key in arrays)
                for cell in self.cells:
                    written = name_of(cell["settings"], cell["count"])
                    own = LATER["sample"] | cell["settings"]  # earlier versions knew fewer axes
                    moved = {figure: arrays[f"{written}/{figure}"] for figure in figures}
                    own = cell["settings"] = {axis: own[axis] for axis in self.axes}
                    self.moved[name_of(own, cell["count"])] = moved
        except Exception as error:  # damaged files fail in ways that nobody has listed
            raise PathError(f"{path} or its .npz is damaged ({error!r}); {remedy}.") from error
        if differing:
            differing = "; ".join(differing[:MAX_LISTED])
            raise PathError(f"{path} is of something else ({differing}); {remedy}.")

    def run(self, stage: str, grid: list[dict], count: int) -> list[dict]:
        """Measure the cells that are missing, those of one program in turn; all cells of a grid."""
        varied = [axis for axis in self.axes if len({settings[axis] for settings in grid}) > 1]
        left = [settings for settings in grid if name_of(settings, count) not in self.moved]
        # With a guidance of 1 nothing is guided, by another program
        left.sort(key=lambda own: [*map(own.get, STEPS), *(own[scale] != 1 for scale in SCALES)])
        done = len(grid) - len(left)
        progress = Progress(f"{stage} search:", "cell", len(grid), done)
        progress.every = 0  # each is a line
        with contextlib.closing(progress):
            for number, settings in enumerate(left, done + 1):
                metrics = self._measure(stage, settings, count)
                told = [" ".join(f"{axis} {settings[axis]}" for axis in varied)]
                told += [f"{name} {metrics[name]:.3f}" for name in self.figures().values()]
                progress.show(number, "  ".join(told))
        return [c for c in self.cells if c["count"] == count and c["settings"] in grid]

    def _measure(self, stage: str, settings: dict, count: int) -> dict:
        """Add a cell, and write all; its figures. A program is compiled before the clock starts."""
        experiment, generator = with_settings(self._experiment, settings), self._generator
        autoencoder = generator.autoencoder if generator.decodes else None
        generator = Generator(experiment, generator.mesh, autoencoder)
        metric = open_metric(experiment, self._source, self._folder)
        if not hasattr(metric, "moved"):
            raise self._unranked()
        conditions = conditions_to_judge(experiment, self._source, count)
        what = (self._params, conditions, experiment.evaluation.seed)
        if experiment.sampler != self._program:
            next(generator.batches(*what))
            self._program = experiment.sampler
        seconds, done, start = 0.0, 0, time.perf_counter()
        for arrays in generator.batches(*what):
            seconds += time.perf_counter() - start
            rows = slice(done, done + count_of(arrays))
            arrays = as_pictures(experiment, arrays)
            metric.update(arrays, jax.tree.map(lambda leaf, rows=rows: leaf[rows], conditions))
            done, start = rows.stop, time.perf_counter()
        cell = {"pass": stage, "settings": settings, "count": count, "seconds": seconds}
        cell |= {"ms_per_sample": 1000 * seconds / count, **self.also(experiment)}
        cell["metrics"] = metric.result()
        moved = {name: np.float32(rows) for name, rows in getattr(metric, "moved", {}).items()}
        self.moved[name_of(settings, count)] = moved
        self.cells.append(cell)
        caveats = metric.details()["caveats"] if hasattr(metric, "details") else []
        self.caveats = list(dict.fromkeys([*self.caveats, *caveats]))
        self.write(count)
        return cell["metrics"]

    def also(self, experiment: Experiment) -> dict:
        """What else is measured of a cell."""
        return {}

    def write(self, count: int) -> dict:
        """Write all that there is, with the best of the cells of so many samples; the record."""
        cells = [cell for cell in self.cells if cell["count"] == count]
        best = {what: self._best(ranked(cells, what, f), f) for what, f in self.figures().items()}
        record = {"of": self.of, "cells": self.cells, "best": best, "caveats": self.caveats}
        moved = {f"{cell}/{key}": own[key] for cell, own in self.moved.items() for key in own}
        storage.write_npz(self.path("npz"), moved)
        storage.write_json(self.path("json"), record)
        storage.write_bytes(self.path("csv"), table(self.cells).encode())
        return record

    def figures(self) -> dict[str, str]:
        """The figures that cells are ranked by: "distance", less is better, and "score"."""
        names = next(iter(self.moved.values()))
        distances = [n for n in names if n.startswith(("fid", "fd_", "frechet_distance"))]
        scores = [name for name in ("inception_score", "accuracy") if name in names]
        if not distances + scores:
            raise self._unranked()
        found = {"distance": distances[:1], "score": scores[:1]}
        return {what: figure[0] for what, figure in found.items() if figure}

    def _unranked(self) -> MetricError:
        kind = self._experiment.evaluation.kind
        return MetricError(f'config.evaluation.kind "{kind}" ranks nothing; name another.')

    def finer(self, cells: list[dict], count: int) -> list[dict]:
        """Settings of the `count` best by each figure, and halfway from the best to neighbours."""
        chosen = []
        for what, figure in self.figures().items():
            chosen += [cell["settings"] for cell in ranked(cells, what, figure)[:count]]
        best = chosen[0]
        for axis in ("cfg_scale", "temperature"):
            line = sorted(own["settings"][axis] for own in alike(cells, best, axis))
            place = line.index(best[axis])
            for value in line[max(place - 1, 0) : place + 2]:
                chosen.append({**best, axis: round((best[axis] + value) / 2, 6)})
        return list({name_of(settings, 0): settings for settings in chosen}.values())

    def difference(self, one: dict, other: dict, figure: str) -> tuple[float, float]:
        """The 95 % interval of one cell's figure less another's, of the same seeds."""
        first, second = (self._moved(cell, figure) for cell in (one, other))
        centre = one["metrics"][figure] - other["metrics"][figure]
        return intervals.first_order(centre, first - second, one["count"])

    def _moved(self, cell: dict, figure: str) -> np.ndarray:
        return np.float64(self.moved[name_of(cell["settings"], cell["count"])][figure])

    def _best(self, cells: list[dict], figure: str) -> dict:
        """The first of some cells, and whether the second one differs."""
        values, count = [cell["metrics"][figure] for cell in cells[:2]], cells[0]["count"]
        low, high = intervals.first_order(values[0], self._moved(cells[0], figure), count)
        found = {"metric": figure, "settings": cells[0]["settings"], "value": values[0]}
        found |= {"low": low, "high": high, "count": count, "runner_up": None, "differs": False}
        if len(cells) > 1:
            low, high = self.difference(*cells[:2], figure)
            found["runner_up"] = {"settings": cells[1]["settings"], "value": values[1]}
            found |= {"difference_low": low, "difference_high": high}
            found["differs"] = low > 0 or high < 0
        return found


def ranked(cells: list[dict], what: str, figure: str) -> list[dict]:
    """Cells, the best first, by a "distance" or a "score"."""
    sign = 1 if what == "distance" else -1
    return sorted(cells, key=lambda cell: sign * cell["metrics"][figure])


def table(cells: list[dict]) -> str:
    """A line of CSV for every cell."""
    rows = [{k.rpartition(".")[2]: v for k, v in flatten(cell).items()} for cell in cells]
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(itertools.chain(*rows)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def words_of(best: dict) -> list[str]:
    """The best settings as flags, and whether the next best cell differs."""
    name, settings = best["metric"], best["settings"]
    shown = describe({name: best["value"]} | {f"{name}_{k}": best[k] for k in ("low", "high")})
    flags = " ".join(f"--config.sample.{axis}={value}" for axis, value in settings.items())
    lines = [f"best {shown}: {flags}"]
    if second := best["runner_up"]:
        other = [f"{k} {v}" for k, v in second["settings"].items() if v != settings[k]]
        low, high = best["difference_low"], best["difference_high"]
        verdict = "differs" if best["differs"] else "may be no different"
        lines.append(
            f"  the next, {', '.join(other)} with {second['value']:.3f}, {verdict} (by {low:.3f} "
            f"to {high:.3f})"
        )
    return lines


def run_search(
    experiment: Experiment, workdir: str, overwrite: bool = False
) -> tuple[dict, list[epath.Path]]:
    """Search with the latest checkpoint of a workdir: the record, and the files that have it.

    ConfigError and CheckpointError are those of an evaluation, or of a grid that cannot be sampled;
    PathError tells of a search of other weights, data or settings.
    """
    grid, settings = grid_of(experiment), experiment.search
    experiment, source = open_to_judge(experiment, workdir)
    search, count = Search(experiment, source, workdir), settings.count
    storage.check_writable(workdir)
    search.restore(overwrite)
    coarse = search.run("coarse", grid, count)
    if settings.fine_cells:
        count = settings.fine_count
        search.run("fine", search.finer(coarse, settings.fine_cells), count)
    record, folder = search.write(count), as_path(workdir)
    what, figure = next(iter(search.figures().items()))
    pictures = write_plots(folder, ranked(coarse, what, figure), record["best"])
    return record, [search.path("json"), search.path("csv"), *pictures]
