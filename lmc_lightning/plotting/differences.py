"""Pictures of what an intervention does to a curve: child − trunk over the steps."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from lmc_lightning.plotting.style import FAINT, drawing, legend_beside, running_mean, shades

if TYPE_CHECKING:
    import pandas as pd

_WINDOWS = 40
"""A running mean is over this part of a long curve."""
_SPIKE = 10.0
"""How far the largest difference may stand out from most of them before the axis is compressed."""


def plot_differences(
    curves: Mapping[str, NDArray[np.float64]],
    ax: Axes | None = None,
    *,
    title: str,
    ylabel: str,
    caption: str = "",
    forks: Sequence[float] = (),
) -> Axes:
    """Differences against the optimizer step around a line at zero.

    Long curves are faint, under their running mean. Where a few differences dwarf most, the axis is linear around zero
    and logarithmic beyond.

    Args:
        curves: ``(S, 2)`` steps and values by label.
        ax: where to draw; by default in a new figure.
        title: of the figure.
        ylabel: with unit.
        caption: what was the same for both.
        forks: the step at which each curve left the trunk.

    Raises:
        ValueError: there is no curve.
    """
    if not curves:
        raise ValueError("Expected at least one curve of differences, got none.")
    sizes = np.abs(np.concatenate([curve[:, 1] for curve in curves.values()]))
    most = float(np.nanquantile(sizes, 0.8))
    compressed = 0 < _SPIKE * most < float(np.nanmax(sizes))
    ylabel = f"{ylabel} (log beyond ±{most:.1g})" if compressed else ylabel
    xlabel = "optimizer step (dotted: the fork)" if forks else "optimizer step"
    with drawing(ax, title, caption, x=xlabel, y=ylabel) as ax:
        ax.axhline(0.0, color=FAINT, linewidth=1.0)
        for index, ((label, curve), color) in enumerate(zip(curves.items(), shades(len(curves)), strict=True)):
            steps, values = curve.T
            width = len(values) // _WINDOWS
            if width > 1:
                ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                steps, values = running_mean(steps, width), running_mean(values, width)
            ax.plot(steps, values, color=color, label=label, marker="o" if len(values) < 30 else "", markersize=4)
            if index < len(forks):
                ax.axvline(forks[index], color=color, linestyle=":", linewidth=1.2)
        if compressed:
            ax.set_yscale("symlog", linthresh=most)
        if len(curves) > 1:
            legend_beside(ax)
    return ax


def plot_effect(table: "pd.DataFrame", ax: Axes | None = None) -> Axes:
    """The differences of one quantity under one intervention.

    Args:
        table: rows of ``paired_differences``.
        ax: where to draw; by default in a new figure.
    """
    first: Any = table.iloc[0]
    curves: dict[str, NDArray[np.float64]] = {}
    forks: list[float] = []
    for run, rows in table.groupby("run", sort=False):
        forks.append(float(rows["branch_step"].iloc[0]))
        child = str(run).rpartition("_child_")[2]
        label = f"after {forks[-1]:.0f} steps" + (f", child {child}" if child != "0" else "")
        curves[label] = rows[["step", "difference"]].to_numpy(dtype=float)
    paired = "same batches and noise as the trunk" if table["paired"].all() else "noise of its own: not paired"
    return plot_differences(
        curves,
        ax,
        forks=forks,
        title=f"Effect of {first.intervention} on {first.quantity}",
        ylabel=f"{first.quantity}, child − trunk",
        caption=f"child − trunk at each step, {paired}",
    )
