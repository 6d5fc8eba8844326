"""Pictures of a family of runs: barriers and distances over branch points and steps, and who left whom."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from lmc_lightning.plotting.style import FAINT, FIGURE_SIZE, INK, drawing, legend_beside, shades

Points = Sequence[tuple[float, float, float]]
"""x, y and the standard error of y, NaN where there is none."""

_ROW = 0.32  # [inches]


def plot_lines(
    lines: Mapping[str, Points],
    ax: Axes | None = None,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    caption: str = "",
    legend: str = "",
    threshold: float | None = None,
) -> Axes:
    """Points with error bars, joined in the order given; a line for each label, dark to light.

    Args:
        lines: points by label, e.g. barrier against branch point by later epoch.
        ax: where to draw; by default in a new figure.
        title: of the figure.
        xlabel: with unit.
        ylabel: with unit.
        caption: definition, data, policy.
        legend: what the labels are.
        threshold: a level to be marked.

    Raises:
        ValueError: there is no finite point.
    """
    known = {label: [p for p in points if isfinite(p[0] + p[1])] for label, points in lines.items()}
    known = {label: points for label, points in known.items() if points}
    if not known:
        raise ValueError(f"There is nothing to draw: {len(lines)} lines without a finite point.")
    with drawing(ax, title, caption, x=xlabel, y=ylabel) as ax:
        for (label, points), color in zip(known.items(), shades(len(known)), strict=True):
            _draw_line(ax, label, np.array(points), color)
        if threshold is not None:
            ax.axhline(threshold, color=FAINT, linestyle=":", linewidth=1.2, label=f"{threshold:g}")
        if len(known) > 1 or threshold is not None:
            legend_beside(ax, title=legend)
    return ax


def _draw_line(ax: Axes, label: str, points: NDArray[np.float64], color: Any) -> None:
    x, y, stderr = points.T
    ax.plot(x, y, color=color, marker="o", markersize=4.5, label=label)
    bars = np.isfinite(stderr) & (stderr > 0)
    if bars.any():
        ax.errorbar(x[bars], y[bars], stderr[bars], fmt="none", ecolor=color, elinewidth=1.2, capsize=2.5)


def plot_family_tree(
    runs: Sequence[tuple[str, int, int, str]],
    ax: Axes | None = None,
    *,
    marks: Sequence[int] = (),
    caption: str = "",
) -> Axes:
    """The trunk as the lowest line, and above it each child from the step at which it left.

    Args:
        runs: name, first and last step, and what is unusual about it, the trunk first.
        ax: where to draw; by default in a new figure.
        marks: steps at which weights were kept.
        caption: what was the same for all.

    Raises:
        ValueError: there is no run.
    """
    if not runs:
        raise ValueError("Expected at least the trunk, got no runs.")
    starts = sorted({start for _, start, _, _ in runs[1:]})
    palette = dict(zip(starts, shades(len(starts)), strict=True))
    size = (FIGURE_SIZE[0], max(FIGURE_SIZE[1], 1.6 + _ROW * len(runs)))
    with drawing(ax, "Family", caption, x="optimizer step", size=size) as ax:
        for row, (name, start, end, note) in enumerate(runs):
            color = palette[start] if row else INK
            ax.plot([start, end], [row, row], color=color, linestyle="--" if note else "-", label=name)
            kept = [step for step in marks if start <= step <= end]
            ax.plot(kept, [row] * len(kept), color=color, marker="o", markersize=3.5, linestyle="none", label="_kept")
            if row:
                ax.plot([start, start], [0, row], color=color, linewidth=0.8, alpha=0.6, label="_fork")
        ax.set_yticks(range(len(runs)), [f"{name} ({note})" if note else name for name, _, _, note in runs])
        ax.grid(axis="y", visible=False)
    return ax
