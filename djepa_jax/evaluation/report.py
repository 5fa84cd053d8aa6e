"""`--mode=report`: what workdirs hold, in one HTML file that needs no network."""

import base64
import contextlib
import datetime
import functools
import io
import json
import pathlib
import secrets
import shlex
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from PIL import Image

from djepa_jax.checkpoints.restore import is_export
from djepa_jax.config import files
from djepa_jax.config.convert import flatten
from djepa_jax.config.flags import program
from djepa_jax.config.stored import FILE_NAME, from_stored, models_near, upgrade
from djepa_jax.core.modalities import made_by
from djepa_jax.core.models.djepa import split_model
from djepa_jax.evaluation.report_curves import AXES, Curve, by_time, chart
from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.lock import is_locked
from djepa_jax.runtime.metric_writer import METRICS_NAME, STARTS_NAME, read_lines
from djepa_jax.runtime.progress import format_seconds
from djepa_jax.runtime.storage import PathError, as_path, check_writable, reason, write_bytes

MARK = '<meta name="generator" content="djepa_jax report">'  # what tells our files from others
ASSETS = pathlib.Path(__file__).with_name("assets")
MAX_RUNS = 8  # as many colours can be told apart
LONG = 100  # points from which on curves are shown smoothed
MAX_PICTURES = 24  # of a kind
MAX_BYTES, MAX_SIDE = 500_000, 1280  # of a picture; larger ones are shrunk
RECORDS = {"evaluation": "evaluation.json", "probe": "probe.json", "search": "search.json"}
RECORDS |= {"benchmark": "benchmark*.json"}
BY_TIME = "loss_per_noise_level"  # of a probe
# A judge of what a model makes, and a place for it; of clips there is none for all
USUAL = {"images": ("efficientnet_lite0", "samples.png"), "clips": ("", "samples.png")}
USUAL |= {"sound": ("classifier", "samples.wav"), "pairs": ("say_and_draw", "samples/")}
PICTURES = {"grids": "samples/step_*.png", "real": "samples/real.png", "search": "search_*.png"}


class Run:
    """One workdir. `notes` say, by section, what cannot be read, and what to bear in mind.

    Raises:
        PathError: it is no workdir of a run.
    """

    def __init__(self, workdir: str):
        self.path, self.notes = as_path(workdir), {}
        self.name, self.values, self.experiment = self.path.name, {}, None
        if is_export(self.path):
            raise PathError(f'"{workdir}" is an export; name the workdir that it was made of.')
        if not any((self.path / name).exists() for name in (FILE_NAME, METRICS_NAME)):
            found = "holds no run" if self.path.exists() else "does not exist"
            near = models_near(self.path)
            raise PathError(f'--workdir "{workdir}" {found}; name that of a training{near}.')
        with self.noting("configuration", FILE_NAME):
            stored = json.loads((self.path / FILE_NAME).read_bytes())
            self.values = flatten(upgrade(stored))
            self.experiment = from_stored(stored)
        self.starts = [flatten(line) for line in self._lines(STARTS_NAME, "configuration")]
        self.curves = self._curves()
        self.step = max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)
        self.records = {name: self._records(name) for name in RECORDS}
        self.pictures = {name: self._pictures(name) for name in PICTURES}
        with self.noting("probe", RECORDS["probe"]):
            if bins := self.records["probe"].get("probe", {}).get(BY_TIME):
                self.curves[BY_TIME] = by_time(bins)

    @contextlib.contextmanager
    def noting(self, section: str, name: str) -> Iterator[None]:
        """Note that a file is damaged, in place of an error of whatever kind."""
        try:
            yield
        except Exception as error:  # files are damaged in ways that nobody has listed
            self.note(section, f"{name} cannot be read ({reason(error)}).")

    def note(self, section: str, text: str) -> None:
        """Have a section say something of this run."""
        self.notes.setdefault(section, []).append(text)

    def _lines(self, name: str, section: str) -> list[dict]:
        lines, broken = [], 0
        with self.noting(section, name):
            lines, broken = read_lines(self.path / name)
        if broken:
            self.note(section, f"{name}: {broken} of its lines cannot be read.")
        return lines

    def _curves(self) -> dict[str, Curve]:
        """Every metric over the steps; marked where updates were left out."""
        points = {}
        for line in self._lines(METRICS_NAME, "curves"):
            for name, value in line.items() if type(line.get("step")) is int else ():
                is_number = type(value) in (int, float) and np.isfinite(value)
                points.setdefault(name, {})[line["step"]] = value if is_number else np.nan
        skipped, before, bad = points.get("skipped_steps", {}), 0, set()
        for step in sorted(skipped):
            bad |= {step} if skipped[step] > before else set()
            before = skipped[step]
        if bad:
            self.note("curves", f"{before:,.0f} steps were skipped, for they were not finite.")
        curves = {}
        for name in sorted(points.keys() - {"step"}):
            steps, values = np.array(sorted(points[name].items()), float).T
            marks = bad | set(steps[np.isnan(values)].astype(int).tolist())
            curves[name] = Curve(steps.astype(int), values, tuple(sorted(marks)))
        return curves

    def _records(self, section: str) -> dict[str, dict]:
        found = {}
        for path in sorted(self.path.glob(RECORDS[section])):
            with self.noting(section, path.name):
                found[path.stem] = dict(json.loads(path.read_bytes()))
        return found

    def _pictures(self, section: str) -> dict[str, str]:
        """Pictures by name, as addresses that hold them; of many some, evenly chosen."""
        paths, found = sorted(self.path.glob(PICTURES[section])), {}
        if len(paths) > MAX_PICTURES:
            self.note(section, f"{MAX_PICTURES} of {len(paths)} pictures, evenly chosen.")
            paths = [paths[round(i)] for i in np.linspace(0, len(paths) - 1, MAX_PICTURES)]
        for path in paths:
            with self.noting(section, path.name):
                found[path.stem] = data_address(path)
        return found

    @functools.cached_property
    def state(self) -> str:
        """Whether it is training now, and whether it came to its end."""
        if is_locked(self.path):
            return "going on"
        return "finished" if self.step >= self.values.get("num_steps", np.inf) else "stopped"

    def facts(self) -> dict[str, str]:
        """What stands at the top."""
        facts = {"step": f"{self.step:,} of {text_of(self.values.get('num_steps', '?'))}"}
        if self.experiment is not None:
            _, abstract = split_model(self.experiment.network)
            count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
            facts["model"] = f"{self.experiment.model.size}, {count:,} parameters"
            data, modality = self.experiment.data, self.experiment.modality
            parts = getattr(modality, "parts", [modality])
            shapes = (" x ".join(map(str, part.example_shape)) for part in parts)
            place = f"{data.source} {epath.Path(data.path).name}".strip()
            facts["data"] = f"{place}, {' and '.join(shapes)}, {data.num_classes} classes"
        if rate := self.curves.get("images_per_second"):
            images = np.diff(rate.steps, prepend=0) * self.values.get("batch_size", np.nan)
            seconds = np.nansum(images / np.where(rate.values > 0, rate.values, np.nan))
            facts["trained for"] = format_seconds(float(seconds))
        if self.starts:
            facts["begun"] = str(self.starts[0].get("time", "")).replace("T", " ")[:16]
            facts["devices"] = str(self.starts[-1].get("devices", ""))
        if (self.path / METRICS_NAME).exists():
            when = datetime.datetime.fromtimestamp((self.path / METRICS_NAME).stat().mtime)
            facts["last metrics"] = f"{when:%Y-%m-%d %H:%M}"
        return facts

    def commands(self) -> dict[str, str]:
        """What to do next, as commands to be pasted."""
        judged = self.values.get("evaluation.kind", "none") != "none"
        made = made_by(self.experiment.modality) if self.experiment else "images"
        judge, out = USUAL[made]
        if made == "sound" and self.values.get("model.condition") == "text":
            judge = "speech"
        words = {"go on": []} if self.state == "stopped" else {}
        words |= {"sample": ["--mode=sample", f"--out={out}"]}
        if judged or judge:
            kind = [] if judged else [f"--config.evaluation.kind={judge}"]
            words |= {"evaluate": ["--mode=evaluate", *kind]}
        own = [*program(), f"--workdir={self.path}"]
        return {name: shlex.join([*own, *extra]) for name, extra in words.items()}


def data_address(path: epath.Path) -> str:
    """A picture as an address that holds it; a large one is shrunk."""
    data, kind = path.read_bytes(), "png"
    image = Image.open(io.BytesIO(data))
    image.load()  # raises if it is damaged
    if len(data) > MAX_BYTES:
        buffer, kind = io.BytesIO(), "jpeg"
        image = image.convert("RGB")
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        image.save(buffer, "JPEG", quality=88)
        data = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def charts_of(runs: list[Run]) -> dict[str, dict]:
    """A chart for every metric of which one of the runs has two points."""
    charts = {}
    for name in sorted({name for run in runs for name in run.curves}):
        curves = {i: run.curves[name] for i, run in enumerate(runs) if name in run.curves}
        if any(len(curve.steps) > 1 for curve in curves.values()):
            charts[name] = chart(curves)
    return charts


def text_of(value) -> str:
    """A value as people read it."""
    if type(value) in (int, float):
        return f"{value:,}" if type(value) is int else f"{value:.4g}"
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def run_report(workdirs: str, out: str = "", overwrite: bool = False) -> epath.Path:
    """Write the report of a workdir, or of several with commas between them; its path.

    Raises:
        UserError: jinja2 is not installed.
        PathError: no runs, too many, or a file of others is in the way and not to be overwritten.
    """
    try:
        import jinja2
    except ImportError as error:
        text = '--mode=report needs the package jinja2: pip install "djepa_jax[report]".'
        raise UserError(text) from error
    names = [workdirs] if as_path(workdirs).exists() else workdirs.split(",")
    if not all(names) or not len({*map(as_path, names)}) == len(names) <= MAX_RUNS:
        text = f"names none, one twice, or more than {MAX_RUNS}; name each once, as A,B"
        raise PathError(f'--workdir "{workdirs}" {text}.')
    runs = [Run(name) for name in names]
    path = check_out(as_path(out or as_path(names[0]) / "report.html"), overwrite)
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.path)
    loader, strict = jinja2.FileSystemLoader(ASSETS), jinja2.StrictUndefined
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True)
    pages.filters |= {"text": text_of, "flatten": flatten}
    html = pages.get_template("report.html.j2").render(
        runs=runs,
        nonce=secrets.token_hex(16),
        mark=MARK,
        **AXES,
        charts=charts_of(runs),
        is_long=any(len(curve.steps) > LONG for run in runs for curve in run.curves.values()),
        default=flatten(files.builtin("default").get_config().to_dict()),
    )
    write_bytes(path, html.encode(errors="backslashreplace"))
    return path


def check_out(path: epath.Path, overwrite: bool, mark: str = MARK) -> epath.Path:
    """The path to write; PathError unless it is free, or holds a file with the mark."""
    if path.suffix != ".html" or path.is_dir():
        raise PathError(f'--out "{path}" is to be a file that ends in .html; name one.')
    check_writable(path.parent, "--out")
    if path.exists() and not overwrite and mark.encode() not in path.read_bytes()[:1000]:
        raise PathError(f'"{path}" is a file of others; name another --out, or add --overwrite.')
    return path
