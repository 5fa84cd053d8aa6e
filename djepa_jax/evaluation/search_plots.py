"""Pictures of a search: every figure over guidance and temperature, and along each axis."""

import io
import itertools
import math
import textwrap

import numpy as np
from etils import epath

from djepa_jax.runtime.progress import say
from djepa_jax.runtime.storage import write_bytes

MAP_AXES = ("temperature", "cfg_scale")  # across, upwards
MARKS = {"distance": "o", "score": "*"}
COLUMNS, PANEL = 3, (4.6, 3.6)  # inches
LINE = 80  # characters of a panel's title
BEHIND = {"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 1}  # numbers on any colour
NOT_SHOWN = ("_low", "_high", "_std")


def alike(cells: list[dict], settings: dict, *axes: str) -> list[dict]:
    """The cells that have some settings, whatever they have along some axes."""
    wanted = {axis: value for axis, value in settings.items() if axis not in axes}.items()
    return [cell for cell in cells if cell["settings"].items() >= wanted]


def write_plots(folder: epath.Path, cells: list[dict], best: dict) -> list[epath.Path]:
    """Write `search_<figure>.png` of a grid's cells, the best first; none without matplotlib.

    It has a map for each combination of the other axes, and a curve along each axis of more than
    two values, on which the others are those of the first cell.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say('note: there are no plots without matplotlib: pip install "djepa_jax[plots]"')
        return []
    names = list(cells[0]["settings"])
    axes = {axis: sorted({cell["settings"][axis] for cell in cells}) for axis in names}
    others = [axis for axis in names if axis not in MAP_AXES]
    is_map = min(len(axes[axis]) for axis in MAP_AXES) > 1
    maps = list(itertools.product(*(axes[axis] for axis in others))) if is_map else []
    curves = [axis for axis, values in axes.items() if len(values) > 2]
    shown = [name for name in cells[0]["metrics"] if not name.endswith(NOT_SHOWN)]
    columns = min(COLUMNS, count := len(maps) + len(curves))
    paths = []
    for name in shown if count else ():
        rows = math.ceil(count / columns)
        figure = Figure(figsize=(columns * PANEL[0], rows * PANEL[1]), layout="constrained")
        figure.suptitle(f"{name} of {cells[0]['count']:,} samples")
        panels = (figure.add_subplot(rows, columns, 1 + place) for place in range(count))
        for each in maps:
            _draw_map(next(panels), name, cells, dict(zip(others, each, strict=True)), axes, best)
        for axis in curves:
            _draw_curve(next(panels), name, alike(cells, cells[0]["settings"], axis), axis)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=110)
        paths.append(folder / f"search_{name}.png")
        write_bytes(paths[-1], data.getvalue())
    return paths


def _draw_map(panel, name: str, cells: list[dict], others: dict, axes: dict, best: dict) -> None:
    """A figure over guidance and temperature; the best of each kind is marked, or its place."""
    across, upwards = (axes[axis] for axis in MAP_AXES)
    values = np.full((len(upwards), len(across)), np.nan)
    for cell in alike(cells, others):
        column, row = (axes[axis].index(cell["settings"][axis]) for axis in MAP_AXES)
        values[row, column] = value = cell["metrics"][name]
        panel.text(column, row - 0.3, f"{value:.3g}", ha="center", fontsize=7, bbox=BEHIND)
    image = panel.imshow(values, origin="lower", aspect="auto")
    panel.figure.colorbar(image, ax=panel)
    for what, own in best.items():
        if own["settings"].items() >= others.items():
            place = [  # may be between cells of the grid
                np.interp(own["settings"][axis], axes[axis], range(len(axes[axis])))
                for axis in MAP_AXES
            ]
            mark = {"mfc": "none", "mec": "red", "ms": 12, "label": f"best {what}"}
            panel.plot(*place, MARKS[what], **mark)
            panel.legend(fontsize=7, markerscale=0.5)
    panel.set_xticks(range(len(across)), across)
    panel.set_yticks(range(len(upwards)), upwards)
    _label(panel, others, *MAP_AXES)


def _draw_curve(panel, name: str, cells: list[dict], axis: str) -> None:
    """A figure along an axis, with its intervals."""
    cells = sorted(cells, key=lambda cell: cell["settings"][axis])
    across = [cell["settings"][axis] for cell in cells]
    panel.plot(across, [cell["metrics"][name] for cell in cells], "o-")
    if f"{name}_low" in cells[0]["metrics"]:
        bounds = ([cell["metrics"][f"{name}_{end}"] for cell in cells] for end in ("low", "high"))
        panel.fill_between(across, *bounds, alpha=0.2)
    _label(panel, {k: v for k, v in cells[0]["settings"].items() if k != axis}, axis, name)


def _label(panel, others: dict, across: str, upwards: str) -> None:
    panel.set(xlabel=across, ylabel=upwards)
    title = ", ".join(f"{key} {value}" for key, value in others.items())
    panel.set_title(textwrap.fill(title, LINE), fontsize=6)
