"""Pictures of what an intervention does to a curve: child − trunk over the steps."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from lmc_lightning.plotting.style import FAINT, drawing, legend_beside, running_mean, shades

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
