"""Maps over load and temperature of what the taxonomy of landscapes looks at, with their phases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lmc_lightning.plotting.style import BLANK, FAINT, INK, PANELS_ACROSS, color_map, draw_cells, panels, style

PHASES: Mapping[str, str] = {"I": "#b5432f", "II": "#e3a36f", "III": "#8e6fae", "IV-A": "#a9cfe0", "IV-B": "#3b82a8"}
"""Colours: warm where networks are poorly connected, strong where the landscape is sharp or networks are alike."""

_TITLES: Mapping[str, str] = {
    "test_accuracy": "test accuracy",
    "train_loss": "training loss",
    "lambda_max": "log₁₀ λ_max",
    "trace": "log₁₀ trace",
    "connectivity": "connectivity",
    "similarity": "CKA",
    "distance": "distance ‖Δθ‖",
}
_MAX_TICKS = 7


@dataclass(frozen=True, eq=False)
class PhaseMaps:
    """Numbers over load and temperature.

    Attributes:
        loads: values of the load-like hyper-parameter, in order ``(L,)``.
        temperatures: of the temperature-like one ``(T,)``.
        load: name of the one.
        temperature: name of the other.
        values: by name, ``(T, L)``; NaN is not known.
        phases: ``"I"``, ``"II"``, ``"III"``, ``"IV-A"``, ``"IV-B"`` or ``""`` ``(T, L)``.
        rule: the thresholds in words.
    """

    loads: Sequence[Any]
    temperatures: Sequence[Any]
    load: str
    temperature: str
    values: Mapping[str, NDArray[np.float64]]
    phases: NDArray[Any]
    rule: str = ""


def plot_phases(maps: PhaseMaps) -> Figure:
    """A heat map of each number, and one of the phases, whose borders are drawn on all of them.

    Args:
        maps: see :func:`~lmc_lightning.experiments.phases.phase_maps`.
    """
    rows = -(-(len(maps.values) + 1) // PANELS_ACROSS)
    with style():
        figure, axes = panels(len(maps.values) + 1, (12.5, 0.7 + 2.9 * rows), "Phases over load and temperature")
        for ax, (name, values) in zip(axes, maps.values.items(), strict=False):
            _draw_map(ax, maps, name, values)
        _draw_phases(axes[len(maps.values)], maps)
        figure.supxlabel(maps.rule, fontsize=8.5, color=FAINT, x=0.01, ha="left")
    return figure


def _draw_map(ax: Axes, maps: PhaseMaps, name: str, values: NDArray[np.float64]) -> None:
    known = values[np.isfinite(values)]
    if name == "connectivity":
        top = float(np.abs(known).max()) if known.size and known.any() else 1.0
        norm, cmap = Normalize(-top, top), "RdBu"
    else:
        norm, cmap = Normalize(*((known.min(), known.max()) if known.size else (0, 1))), "viridis"
    image = draw_cells(ax, values, norm=norm, cmap=color_map(cmap), origin="lower")
    ax.figure.colorbar(image, ax=ax)
    _finish(ax, maps, _TITLES.get(name, name))


def _draw_phases(ax: Axes, maps: PhaseMaps) -> None:
    pixels = np.array([[mpl.colors.to_rgb(PHASES.get(p, BLANK)) for p in row] for row in maps.phases])
    draw_cells(ax, pixels, origin="lower")
    for phase in (p for p in PHASES if (maps.phases == p).any()):
        row, column = _innermost(maps.phases == phase)
        dark = phase in ("I", "III", "IV-B")
        colour = "white" if dark else INK
        ax.text(column, row, phase, ha="center", va="center", fontweight="bold", color=colour)
    _finish(ax, maps, "phase")


def _innermost(inside: NDArray[np.bool_]) -> tuple[int, int]:
    """The cell of a region that is farthest from its outside, nearest to its middle."""
    cells, outside = np.argwhere(inside), np.argwhere(~np.pad(inside, 1)) - 1
    depth = np.abs(cells[:, None] - outside[None]).max(2).min(1)
    deepest = cells[depth == depth.max()]
    row, column = deepest[np.abs(deepest - deepest.mean(0)).sum(1).argmin()]
    return int(row), int(column)


def _finish(ax: Axes, maps: PhaseMaps, title: str) -> None:
    for axis, values in ((ax.xaxis, maps.loads), (ax.yaxis, maps.temperatures)):
        every = -(-len(values) // _MAX_TICKS)
        places = range(0, len(values), every)
        shown = [f"{values[i]:g}" if isinstance(values[i], float) else str(values[i]).strip("[]") for i in places]
        axis.set_ticks(places, shown)
    ax.tick_params(labelsize=8)
    ax.set_xlabel(maps.load, fontsize=9)
    ax.set_ylabel(maps.temperature, fontsize=9)
    ax.set_title(title, fontsize=10)
    _draw_borders(ax, maps.phases)


def _draw_borders(ax: Axes, phases: NDArray[Any]) -> None:
    lines = [[(j + 0.5, i - 0.5), (j + 0.5, i + 0.5)] for i, j in np.argwhere(phases[:, 1:] != phases[:, :-1])]
    lines += [[(j - 0.5, i + 0.5), (j + 0.5, i + 0.5)] for i, j in np.argwhere(phases[1:] != phases[:-1])]
    ax.add_collection(mpl.collections.LineCollection(lines, colors=INK, linewidths=1.4))
