"""Curves of runs as inline SVG: one chart per metric, on a linear and on a logarithmic scale."""

import dataclasses
import math

import numpy as np
from scipy.signal import lfilter

MAX_POINTS = 1000
AXES = {"left": 54, "right": 398, "top": 10, "bottom": 196}  # of a chart of 420 x 220
DECAY = 0.9  # of smoothing, per point; of few points less, or nothing
TICKS = 6  # at most


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric over the steps of one run."""

    steps: np.ndarray  # [n]
    values: np.ndarray  # [n], NaN where it is not finite
    marks: tuple[int, ...] = ()  # steps that were not finite
    over: str = "step"  # what stands in for a step


def binned(curve: Curve) -> Curve:
    """At most `MAX_POINTS` points, each the mean of as many neighbours as the others."""
    count = min(MAX_POINTS, len(curve.steps))
    steps, parts = (np.array_split(x, count) for x in (curve.steps, curve.values))
    means = [x[np.isfinite(x)].mean() if np.isfinite(x).any() else np.nan for x in parts]
    return Curve(np.array([part.mean() for part in steps]), np.array(means), curve.marks)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The exponential average of points, corrected for its start; gaps stay."""
    decay, finite = min(DECAY, 1 - 10 / max(len(values), 10)), np.isfinite(values)
    numbers = (np.where(finite, values, 0.0), finite.astype(float))
    average, weight = (lfilter([1 - decay], [1, -decay], x) for x in numbers)
    return np.where(finite, average / np.maximum(weight, 1e-9), np.nan)


def even_ticks(low: float, high: float) -> np.ndarray:
    """Round numbers between two others."""
    power = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step = next(k * power for k in (1, 2, 5, 10) if (high - low) / (k * power) <= TICKS)
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def log_ticks(low: float, high: float) -> np.ndarray:
    """Powers of ten between two positive numbers; round numbers if there are hardly any."""
    powers = 10.0 ** np.arange(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    return powers[:: -(-len(powers) // TICKS)] if len(powers) > 1 else even_ticks(low, high)


def path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path data through points; one that is not finite is a gap, one alone a dot."""
    words, before = [], False
    for column, row, is_finite in zip(x, y, np.isfinite(y), strict=True):
        if is_finite:
            words.append(f"L{column:.1f} {row:.1f}" if before else f"M{column:.1f} {row:.1f}h0")
        before = is_finite
    return "".join(words)


def limits(arrays: list[np.ndarray]) -> tuple[float, float]:
    """Least and greatest of finite values, with some room; apart from each other."""
    values = np.concatenate([array[np.isfinite(array)] for array in arrays])
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    room = 0.04 * (high - low)
    if not room > 1e-9 * max(abs(low), abs(high)):
        room = 0.1 * abs(high) or 1.0
    return float(low - room), float(high + room)


def draw(curves: dict[int, Curve], columns: dict[int, np.ndarray], is_log: bool) -> dict:
    """Ticks and paths on one of the scales."""
    transform = np.log10 if is_log else np.asarray
    values = {run: curve.values for run, curve in curves.items()}
    if is_log:
        values = {run: np.log10(np.where(x > 0, x, np.nan)) for run, x in values.items()}
    low, high = limits([*values.values()])
    ticks = log_ticks(10**low, 10**high) if is_log else even_ticks(low, high)

    def rows(x):
        share = (np.asarray(x) - low) / (high - low)
        return AXES["bottom"] + share * (AXES["top"] - AXES["bottom"])

    return {
        "name": "log" if is_log else "linear",
        "ticks": [(f"{rows(transform(tick)):.1f}", f"{tick + 0.0:.4g}") for tick in ticks],
        "raw": {run: path(columns[run], rows(x)) for run, x in values.items()},
        "smooth": {run: path(columns[run], rows(smoothed(x))) for run, x in values.items()},
    }


def by_time(bins: list[dict]) -> Curve:
    """The token loss in bins of time, as a probe has it, over per cent of the time."""
    middles = [50 * (each["from"] + each["to"]) / bins[-1]["to"] for each in bins]
    return Curve(np.array(middles), np.array([each["loss"] for each in bins]), over="time")


def chart(full: dict[int, Curve]) -> dict:
    """What the template draws of a metric, given its curves by the number of the run."""
    curves = {run: binned(curve) for run, curve in full.items()}
    over = next(iter(full.values())).over
    first, last = limits([curve.steps for curve in full.values()])
    first, last = max(first, 0.0), max(curve.steps[-1] for curve in full.values())

    def column(steps):
        share = (np.asarray(steps) - first) / max(last - first, 1)
        return AXES["left"] + share * (AXES["right"] - AXES["left"])

    columns = {run: column(curve.steps) for run, curve in curves.items()}
    marks = {step for curve in full.values() for step in curve.marks if first <= step <= last}
    positive = any((curve.values > 0).any() for curve in curves.values())
    ends = {run: np.flatnonzero(np.isfinite(curve.values))[-1:] for run, curve in full.items()}
    return {
        "scales": [draw(curves, columns, is_log) for is_log in ([False, True][: 1 + positive])],
        "ticks": [(f"{column(t):.1f}", f"{t:,.0f}") for t in even_ticks(first, last) if t % 1 == 0],
        "marks": {f"{column(step):.0f}": step for step in sorted(marks)},
        "ends": {
            run: f"{full[run].values[i]:.4g} at {over} {full[run].steps[i]:,}"
            for run, places in ends.items()
            for i in places
        },
        "per_point": max(-(-len(curve.steps) // MAX_POINTS) for curve in full.values()),
        "data": {
            "over": over,
            "range": [float(first), float(last)],
            "steps": {run: np.round(curve.steps).tolist() for run, curve in curves.items()},
            "values": {
                run: [float(f"{x:.5g}") if np.isfinite(x) else None for x in curve.values]
                for run, curve in curves.items()
            },
        },
    }
