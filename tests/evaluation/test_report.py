"""The report: sections of a made-up workdir, damage, escaping, and how a browser shows it."""

import collections
import html.parser
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from pairs import pairs_config
from PIL import Image
from tiny import TINY, load_config, run, tiny_config

from djepa_jax.config.stored import to_stored
from djepa_jax.evaluation.report import MARK
from djepa_jax.evaluation.report_curves import Curve, binned, chart, log_ticks, smoothed
from djepa_jax.main import main
from djepa_jax.runtime.lock import is_locked, lock_workdir

SETTINGS = {"cfg_scale": 1.5, "temperature": 1.0, "sampler": "euler"}
CELLS = [
    {"pass": "coarse", "settings": SETTINGS | {"cfg_scale": scale}, "count": 100}
    | {"metrics": {"fd_classifier": 2.5, "fd_classifier_low": 2.25, "fd_classifier_high": 2.75}}
    for scale in (1.0, 1.5)
]
BEST = {"distance": {"metric": "fd_classifier", "settings": SETTINGS, "value": 2.5}}
BEST["distance"] |= {"runner_up": {"settings": SETTINGS | {"cfg_scale": 1.25}}, "differs": None}
RECORDS = {
    "evaluation.json": {
        "metrics": {"accuracy": 0.875, "accuracy_low": 0.75, "accuracy_high": 0.9375},
        "step": 3,
        "judged_by": {"network": "a judge", "caveats": ["few samples"]},
    },
    "probe.json": {
        "figures": {"inputs": {"linear": 0.625, "std": 4.0}},
        "loss_per_noise_level": [
            {"from": 0.0, "to": 500.0, "loss": 0.25, "standard_error": 0.03125},
            {"from": 500.0, "to": 1000.0, "loss": 0.75, "standard_error": 0.0625},
        ],
        "caveats": ["one run"],
    },
    "search.json": {"of": {"step": 3}, "cells": CELLS, "best": BEST, "caveats": ["a trend"]},
    "benchmark.json": {
        "train": {"batch_size": 16, "milliseconds": {"median": 7.5}, "images_per_second": 2133.0},
    },
    "starts.jsonl": {"time": "2026-01-02T03:04:05", "devices": "8 x TPU", "commit": "abc123"},
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


def make(folder, *changes, losses=(3.0, None, 1.0, 0.5)):
    """A workdir of a finished run with everything in it."""
    (folder / "samples").mkdir(parents=True)
    config = to_stored(tiny_config("--config.num_steps=8", *changes))
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"step": 2 * i + 2, "loss": loss, "skipped_steps": float(i > 0), "images_per_second": 8.0}
        for i, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for name, record in RECORDS.items():
        (folder / name).write_text(json.dumps(record) + "\n")
    names = ("samples/step_00000004", "samples/step_00000008", "samples/real", "search_accuracy")
    for shade, name in enumerate(names):
        Image.new("RGB", (60, 40), (60 * shade, 90, 200)).save(folder / f"{name}.png")
    return folder


class Page(html.parser.HTMLParser):
    """The text and the tags of each section; text of scripts apart."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.text, self.tags = collections.defaultdict(str), collections.defaultdict(list)
        self.scripts, self.section, self.inside = [], "", ""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.section = attributes.get("id", "overview") if tag == "section" else self.section
        self.tags[self.section].append((tag, attributes))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        else:
            self.text[self.section] += data

    def of(self, tag, section=None) -> list[dict]:
        pages = [section] if section else list(self.tags)
        return [attrs for each in pages for name, attrs in self.tags[each] if name == tag]


def report(*workdirs, out=None) -> Page:
    words = [f"--workdir={','.join(map(str, workdirs))}", *([f"--out={out}"] if out else [])]
    assert main(["djepa", "--mode=report", *words]) == 0
    return Page(out or workdirs[0] / "report.html")


def test_every_section_shows_what_the_workdir_has(tmp_path):
    page = report(make(tmp_path / "mine"))
    expected = {
        "overview": ("finished", "8 of 8", "parameters", "8 x TPU", "2026-01-02 03:04", "16 s")
        + ("--mode=sample", "--mode=evaluate", f"--workdir={tmp_path}/mine"),
        "curves": ("loss", "0.5 at step 8", "images_per_second", "1 steps were skipped")
        + ("loss_per_noise_level", "0.75 at time 75"),
        "samples": ("arrow keys", "Real examples"),
        "evaluation": ("Figures of step 3", "0.875 (0.75 to 0.9375)", "a judge", "few samples"),
        "probe": ("inputs", "0.625", "one run", "0.0625"),
        "search": ("2.5 (2.25 to 2.75)", "cfg_scale", "fd_classifier", "a trend", "accuracy")
        + ("runner_up.cfg_scale", "1.25"),
        "benchmark": ("train", "7.5", "2133"),
        "configuration": ("num_steps", "875,000", "abc123", "evaluation.kind"),
    }
    for section, words in expected.items():
        assert [word for word in words if word not in page.text[section]] == [], section
    assert "go on" not in page.text["overview"], "it is finished"
    images = page.of("img")
    assert len(images) == 4 and all(image["alt"] for image in images)
    assert ["hidden" in image for image in images[:2]] == [True, False], "the newest is seen"
    marked = [row for row in page.of("tr", "search") if row.get("class") == "marked"]
    assert len(marked) == 1, "the cell with the best settings"
    bad = [path for path in page.of("path", "curves") if path.get("class") == "bad"]
    assert len(bad) >= 2
    curves = [p["d"] for p in page.of("path", "curves") if p.get("class") == "curve raw c0"]
    assert any(line.count("M") == 2 for line in curves), "where the loss was not finite is a gap"


def test_nothing_is_fetched_from_anywhere(tmp_path):
    page = report(make(tmp_path / "mine"))
    tags = [attrs for section in page.tags.values() for _, attrs in section]
    found = [attrs[key] for attrs in tags for key in ("src", "href") if key in attrs]
    assert found and all(value.startswith(("data:image/", "#")) for value in found)
    assert "url(" not in page.source and "@import" not in page.source
    (policy,) = (m["content"] for m in page.of("meta") if "http-equiv" in m)
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_a_fresh_workdir_and_one_that_is_going_on(tmp_path):
    folder = make(tmp_path / "mine")
    for path in [*folder.glob("*.json*"), *folder.glob("samples/*")]:
        path.unlink() if path.name != "config.json" else None
    page = report(folder)
    assert "0 of 8" in page.text["overview"] and "go on" in page.text["overview"]
    assert "not logged yet" in page.text["curves"] and "no sample grids" in page.text["samples"]
    assert "evaluation" not in page.text and not is_locked(folder)
    with lock_workdir(folder):
        assert is_locked(folder) and "going on" in report(folder).text["overview"]
    assert not is_locked(folder)


@pytest.mark.parametrize("name", ["sound", "pairs"])
def test_what_is_no_picture_is_called_by_its_sizes(name, tmp_path):
    folder, files = make(tmp_path / "mine"), {"pictures": "/x/a.npz", "sounds": "/x/b.npz"}
    sound = load_config("spoken_digits", *TINY, "--config.data.num_classes=10")
    config = sound if name == "sound" else pairs_config(files)
    stored = to_stored(config.updated({"evaluation.kind": "none"}))
    (folder / "config.json").write_text(json.dumps(stored))
    text = report(folder).text["overview"]
    words = ("8192,", "--out=samples.wav", "kind=classifier")
    pairs = ("8 x 8 x 1 and 512,", "--out=samples/", "kind=say_and_draw")
    assert all(word in text for word in (words if name == "sound" else pairs)), text


def test_runs_are_put_side_by_side(tmp_path):
    one = make(tmp_path / "a" / "run")
    two = make(tmp_path / "b" / "run", "--config.seed=7", losses=(2.0, 1.0))
    page = report(one, two, out=tmp_path / "both.html")
    assert f"{one}" in page.text[""] and f"{two}" in page.text[""], "one name, so their paths"
    assert {"curve raw c0", "curve raw c1"} <= {p.get("class") for p in page.of("path", "curves")}
    few = page.text["configuration"].partition("All keys")[0]
    assert "seed" in few and "num_steps" not in few, "what differs comes first"
    assert "2 runs" in page.text[""]


def test_what_runs_are_called_is_text(tmp_path):
    evil = "</script><b>&'\""
    folder = make(tmp_path / "<b>'x", f"--config.data.staging={evil}")
    with open(folder / "metrics.jsonl", "a") as file:
        for step in (4, 8):
            file.write(json.dumps({"step": step, evil: 1.0}) + "\n")
    record = {"metrics": {evil: evil}, evil: {evil: [evil]}, "caveats": [evil]}
    (folder / "evaluation.json").write_text(json.dumps(record))
    page = report(folder)
    assert not page.of("b") and evil in page.text["configuration"]
    assert evil in page.text["evaluation"] and evil in page.text["curves"]
    assert "<b>'x" in page.text[""]
    assert all(json.loads(script) for script in page.scripts[:-1]) and len(page.scripts) == 5


DAMAGE = [b"", b"{", b"[1]", b"\xff\x00"]
DAMAGE += [b'{"metrics": 3, "cells": [1], "best": {"x": 1}, "loss_per_noise_level": [{"to": "x"}]}']


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_told_and_the_rest_is_shown(damage, tmp_path):
    folder = make(tmp_path / "mine")
    paths = [*folder.glob("*.json*"), *folder.glob("samples/*"), *folder.glob("*.png")]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-9] if path.name == "metrics.jsonl" else damage)
    page = report(folder)
    assert "metrics.jsonl: 1 of its lines cannot be read" in page.text["curves"]
    assert "1 at step 6" in page.text["curves"], "what is before the torn line"
    assert "config.json cannot be read" in page.text["configuration"]
    assert "step_00000008.png cannot be read" in page.text["samples"]
    if b"metrics" not in damage:
        assert "evaluation.json cannot be read" in page.text["evaluation"]
    assert "probe.json cannot be read" in page.text["probe"]


def test_own_reports_are_replaced_and_files_of_others_are_not(tmp_path, capsys):
    folder = make(tmp_path / "mine")
    report(folder)
    report(folder)
    out = tmp_path / "foreign.html"
    out.write_text("precious")
    words = ["djepa", "--mode=report", f"--workdir={folder}", f"--out={out}"]
    assert main(words) == 2 and out.read_text() == "precious"
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0 and MARK in out.read_text()


def test_what_cannot_be_reported_is_one_line(tmp_path, capsys, monkeypatch):
    folder = make(tmp_path / "mine")
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text('{"kind": "djepa_jax export"}')
    cases = {
        f"{export}": "is an export",
        f"{tmp_path}/gone": f"does not exist; name that of a training; near it are {export}",
        f"{tmp_path}": "holds no run",
        f"{folder},{folder}/": "twice",
        ",".join(f"{folder}{i}" for i in range(9)): "more than 8",
    }
    for workdir, text in cases.items():
        assert main(["djepa", "--mode=report", f"--workdir={workdir}"]) == 2
        assert text in capsys.readouterr().err
    words = ["--mode=report", f"--workdir={folder}"]
    assert main(["djepa", *words, f"--out={tmp_path}/x.txt"]) == 2
    assert ".html" in capsys.readouterr().err
    assert run(*words) == 2 and "leave out --config" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["djepa", *words]) == 2
    assert 'pip install "djepa_jax[report]"' in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_a_long_curve_has_means_of_its_points():
    values = np.sin(np.arange(10_000) / 700)
    values[5000:6000] = np.nan
    curve = Curve(np.arange(10_000) + 1, values)
    few = binned(curve)
    assert len(few.steps) == 1000 and few.steps[0] == 5.5
    np.testing.assert_allclose(few.values[7], values[70:80].mean())
    assert np.isnan(few.values[500:600]).all() and np.isfinite(few.values).sum() == 900
    lines = chart({0: curve})["scales"][0]["raw"][0]
    assert lines.count("M") == 2 and lines.count("L") == 898


def test_smoothing_follows_a_constant_and_keeps_gaps():
    values = np.full(200, 3.0)
    values[20:30] = np.nan
    np.testing.assert_allclose(smoothed(values), values)
    few = np.array([1.0, 5.0, 2.0])
    np.testing.assert_array_equal(smoothed(few), few)


def test_a_logarithmic_scale_is_for_positive_values():
    names = [
        s["name"] for s in chart({0: Curve(np.arange(3), np.array([-1.0, 0.0, -2.0]))})["scales"]
    ]
    assert names == ["linear"]
    both = chart({0: Curve(np.arange(3), np.array([1.0, 0.0, 100.0]))})["scales"]
    assert both[1]["name"] == "log" and both[1]["raw"][0].count("M") == 2, "0 is a gap on it"
    np.testing.assert_allclose(log_ticks(0.5, 2e3), [1, 10, 100, 1000])


LOOK = """
const seen = () => [...document.querySelectorAll(".grids img")].findIndex((x) => !x.hidden);
const press = (key) => new KeyboardEvent("keydown", { key, bubbles: true });
const width = [document.documentElement.scrollWidth, innerWidth], steps = [seen()];
for (const key of ["ArrowLeft", "ArrowLeft", "ArrowRight"]) {
  document.body.dispatchEvent(press(key));
  steps.push(seen());
}
const svg = document.querySelector(".chart svg"), left = svg.getBoundingClientRect().left;
svg.dispatchEvent(new PointerEvent("pointermove", { clientX: left + 2 }));
const hover = document.querySelector(".chart output").textContent;
const display = () => getComputedStyle(document.querySelector(".scale-linear")).display;
const log = [display()];
for (let i = 0; i < 2; i++) { document.getElementById("log").click(); log.push(display()); }
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
console.log("found " + JSON.stringify({ width, steps, hover, log, dark }));
"""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
FLAGS += ("--hide-scrollbars", "--enable-logging=stderr", "--v=0", "--window-size=1800,900")
WIDTHS = (400, 1400)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to look at pages with")
@pytest.mark.parametrize("is_dark", [False, True])
def test_a_browser_shows_it(is_dark, tmp_path):
    """In frames, since no window is as narrow as a telephone."""
    html = report(make(tmp_path / "mine")).source
    nonce = re.search(r"'nonce-(\w+)'", html)[1]
    page, frames, shot = (tmp_path / name for name in ("page.html", "frames.html", "shot.png"))
    page.write_text(html.replace("</body>", f'<script nonce="{nonce}">{LOOK}</script></body>'))
    style = "color-scheme: light dark; border: 0; float: left; height: 900px"
    frames.write_text(
        '<body style="margin: 0">'
        + "".join(f'<iframe src="page.html" width="{w}" style="{style}"></iframe>' for w in WIDTHS)
    )
    own = [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", frames.as_uri()]
    own += [f"--blink-settings=preferredColorScheme={int(not is_dark)}"]
    command = [CHROMIUM, *FLAGS, *own]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    said = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    found = [json.loads(text) for text in re.findall(r'"found (.*?)", source', "\n".join(said))]
    assert len(found) == len(said) == len(WIDTHS), said
    assert sorted(of["width"] for of in found) == [[width, width] for width in WIDTHS]
    for of in found:
        assert of["dark"] is is_dark
        assert of["steps"] == [1, 0, 0, 1] and of["log"] == ["inline", "none", "inline"]
        assert of["hover"] == "3 at step 2"
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    for part in (pixels[:, :400], pixels[:, 400:]):
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 30, "it is not blank"
        assert (np.median(part) < 100) == is_dark
