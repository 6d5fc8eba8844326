"""Pictures of spectra."""

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from lmc_lightning.plotting.style import new_axes, set_heading, style

_CURVE = "#1f5fa8"
_MARKS = "#c8321e"


def plot_density(
    grid: ArrayLike,
    density: ArrayLike,
    ax: Axes | None = None,
    *,
    eigenvalues: ArrayLike | None = None,
    title: str = "Eigenvalue density of the Hessian",
    caption: str = "",
    floor: float = 1e-8,
) -> Axes:
    """Spectral density over eigenvalues, on a logarithmic axis.

    Args:
        grid: eigenvalues ``(n,)``.
        density: at each, ``(n,)``, integrating to 1.
        ax: where to draw; by default in a new figure.
        eigenvalues: computed ones, drawn as ticks on the axis ``(k,)``.
        title: of the figure.
        caption: operator, data, bandwidth, probes.
        floor: the axis ends at this share of the highest value: the tails of a smoothed density fall without end.
    """
    heights = np.asarray(density, dtype=float)
    positive = np.where(heights > 0, heights, np.nan)
    with style():
        ax = ax if ax is not None else new_axes()
        ax.set_yscale("log")
        ax.plot(np.asarray(grid, dtype=float), positive, color=_CURVE)
        if np.isfinite(positive).any():
            top = float(np.nanmax(positive))
            ax.set_ylim(floor * top, 3 * top)
        if eigenvalues is not None:
            marks = np.asarray(eigenvalues, dtype=float)
            along = ax.get_xaxis_transform()
            ax.vlines(marks, 0, 0.05, transform=along, color=_MARKS, linewidth=1.5, label="computed eigenvalues")
            ax.legend(loc="upper right")
        ax.set_xlabel("eigenvalue λ")
        ax.set_ylabel("density")
        set_heading(ax, title, caption)
    return ax
