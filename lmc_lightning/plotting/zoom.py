"""Pictures of a part of a run that was measured closely: curves under one another over the same steps."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lmc_lightning.plotting.style import BLANK, FIGURE_SIZE, new_figure, set_heading, shades, style

_PANEL = 1.5  # [inches]


def plot_zoom(
    panels: Mapping[str, NDArray[np.float64]], span: tuple[int, int], *, title: str, caption: str = ""
) -> Figure:
    """One panel for each quantity over the optimizer steps, with the measured span shaded.

    Args:
        panels: ``(S, 2)`` steps and values by what they are.
        span: first and last step that were measured.
        title: of the figure.
        caption: how it is known to be the same run.

    Raises:
        ValueError: there is no panel.
    """
    if not panels:
        raise ValueError("Expected at least one curve, got none.")
    colors = shades(len(panels), lightest=0.7)
    with style():
        figure = new_figure((FIGURE_SIZE[0], 1.2 + _PANEL * len(panels)))
        rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for ax, (name, curve), color in zip(rows, panels.items(), colors, strict=True):
            ax.axvspan(span[0], span[1], color=BLANK, alpha=0.35, linewidth=0)
            ax.plot(*curve.T, color=color, marker="o" if len(curve) < 60 else "", markersize=3.5)
            ax.set_ylabel(name.replace("/", "/\n"), fontsize=8.5)
        rows[-1].set_xlabel("optimizer step (shaded: replayed)")
        set_heading(rows[0], title, caption)
    return figure
