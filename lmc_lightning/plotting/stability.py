"""Pictures of training at the edge of stability."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from lmc_lightning.plotting.style import BLUE, INK, RED, drawing, legend_beside


@dataclass(frozen=True)
class StabilityCurve:
    """Curvature in units of the optimizer's threshold, by step."""

    values: Mapping[int, float]
    stderrs: Mapping[int, float]
    """Where there are any."""


def plot_stability(
    curves: Mapping[str, StabilityCurve],
    ax: Axes | None = None,
    *,
    small_batch_limit: float | None = None,
    caption: str = "",
) -> Axes:
    """Curvature in units of the optimizer's threshold against steps, with the limits that theory knows.

    Args:
        curves: by label; whiskers are two standard errors.
        ax: where to draw; by default in a new figure.
        small_batch_limit: where the curvature along gradients of small batches is expected to saturate.
        caption: data, batch size, mode.
    """
    limits = {"full-batch limit": 1.0}
    if small_batch_limit is not None and small_batch_limit != 1:
        limits["small-batch limit"] = small_batch_limit
    title = "Curvature over the optimizer's threshold"
    with drawing(ax, title, caption, x="optimizer steps", y="λ / threshold") as ax:
        for (label, limit), dashes in zip(limits.items(), ("--", ":"), strict=False):
            ax.axhline(limit, color=INK, linestyle=dashes, linewidth=1.1, label=f"{label}, {limit:.3g}")
        for (label, curve), color in zip(curves.items(), (BLUE, RED), strict=False):
            steps = sorted(curve.values)
            values = [curve.values[step] for step in steps]
            whiskers = [2 * curve.stderrs.get(step, 0.0) for step in steps]
            ax.errorbar(steps, values, whiskers, color=color, marker=".", elinewidth=0.9, label=label)
        drawn = [v for curve in curves.values() for v in curve.values.values()]
        ax.set_ylim(min(0.0, np.min(drawn, initial=0.0)), 1.15 * max(1.0, np.max(drawn, initial=1.0)))
        legend_beside(ax)
    return ax
