"""Pictures of spectra."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from lmc_lightning.plotting.style import new_axes, set_heading, style

_CURVE = "#1f5fa8"
_MARKS = "#c8321e"
_LEGEND_ROW, _HALF_WIDTH, _WIDTH = 0.075, 28, 64
"""Share of the height of the axes, and letters in half of a row and in all of it."""


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


def plot_densities(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ax: Axes | None = None,
    *,
    title: str = "Eigenvalue densities of the diagonal blocks",
    caption: str = "",
    floor: float = 1e-6,
) -> Axes:
    """Spectral densities of several matrices over one axis of eigenvalues.

    It runs linearly near 0 and logarithmically beyond, since blocks differ by orders of magnitude.

    Args:
        curves: name -> eigenvalues ``(n,)`` and the density at each ``(n,)``.
        ax: where to draw; by default in a new figure.
        title: of the figure.
        caption: operator, data, bandwidth, probes.
        floor: the axis ends at this share of the highest value.
    """
    lines = {name: (np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for name, (x, y) in curves.items()}
    widest = max((float(np.abs(x).max()) for x, _ in lines.values()), default=0.0)
    highest = max((float(y.max()) for _, y in lines.values()), default=0.0)
    columns = 2 if max(map(len, lines), default=0) <= _HALF_WIDTH else 1
    with style():
        ax = ax if ax is not None else new_axes()
        ax.set_yscale("log")
        ax.set_xscale("symlog", linthresh=10.0 ** np.ceil(np.log10(max(1e-3 * widest, 1e-12))))  # where a tick is
        for name, (x, y) in lines.items():
            ax.plot(x, np.where(y > 0, y, np.nan), label=name if len(name) <= _WIDTH else f"…{name[1 - _WIDTH :]}")
        if highest > 0:
            room = _LEGEND_ROW * -(-len(lines) // columns)  # above the curves, which fill all of the axes below
            ax.set_ylim(floor * highest, highest * (1 / floor) ** (0.03 + room / (1 - room)))
        ax.set_xlabel("eigenvalue λ")
        ax.set_ylabel("density")
        ax.legend(loc="upper left", ncols=columns)
        set_heading(ax, title, caption)
    return ax
