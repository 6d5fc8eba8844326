"""Pictures of whole studies: settings side by side, numbers that go together, volumes against size, where runs end."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmc_lightning.landscape.trajectory.convergence import Convergence
from lmc_lightning.plotting.style import (
    BLUE,
    FAINT,
    INK,
    PANELS_ACROSS,
    color_map,
    draw_cells,
    drawing,
    legend_beside,
    new_figure,
    panels,
    set_heading,
    shades,
    style,
)
from lmc_lightning.plotting.trajectory import plot_convergence


def plot_settings(means: pd.DataFrame) -> Figure:
    """A panel for each number, a row for each setting: the mean over seeds with its standard error.

    Args:
        means: columns setting, value, mean, stderr; see
            :func:`~lmc_lightning.experiments.results.settings.setting_means`.
    """
    names, settings = [*dict.fromkeys(means["value"])], [*dict.fromkeys(means["setting"])]
    rows = -(-len(names) // PANELS_ACROSS)
    size = 9.6 + 0.075 * max(map(len, settings), default=0), 0.6 + rows * (0.75 + 0.2 * len(settings))
    with style():
        figure, axes = panels(len(names), size, "Settings", sharey=True)
        for ax, name in zip(axes, names, strict=False):
            own = means[means["value"] == name].set_index("setting").reindex(settings)
            places = np.arange(len(settings))
            ax.errorbar(own["mean"], places, xerr=own["stderr"], fmt="o", color=BLUE, markersize=4, elinewidth=1.1)
            ax.set_yticks(places, settings, fontsize=8)
            ax.tick_params(axis="x", labelsize=8)
            ax.locator_params(axis="x", nbins=4)
            ax.set_title(name, fontsize=8.5, fontweight="normal")
        axes[0].set_ylim(len(settings) - 0.5, -0.5)
    return figure


def plot_correlations(found: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Correlation coefficients over runs, by number and by target and scope; in bold where the interval leaves 0.

    Args:
        found: from :func:`~lmc_lightning.landscape.statistics.correlations.correlations`, of one method.
        ax: where to draw; by default in a new figure.
    """
    metrics = [*dict.fromkeys(found["metric"])]
    columns = [*dict.fromkeys(zip(found["target"], found["scope"], strict=True))]
    method = str(found["method"].iloc[0]).capitalize()
    text = f"{method}'s coefficient over {int(found['n'].max())} runs; bold: the 95 % interval leaves 0"
    size = (2.8 + 1.05 * len(columns), 1.5 + 0.26 * len(metrics))
    with drawing(ax, "What goes together", text, size=size) as ax:
        table = np.full((len(metrics), len(columns)), np.nan)
        names = found[["metric", "target", "scope"]].to_numpy(str)
        for (metric, *column), (r, low, high) in zip(names, found[["r", "low", "high"]].to_numpy(float), strict=True):
            i, j = metrics.index(metric), columns.index((column[0], column[1]))
            table[i, j] = r
            if np.isfinite(r):
                weight = "bold" if low > 0 or high < 0 else "normal"
                ink = "white" if abs(r) > 0.65 else INK
                ax.text(j, i, f"{r:.2f}", ha="center", va="center", fontsize=8, color=ink, fontweight=weight)
        draw_cells(ax, table, cmap=color_map("RdBu"), vmin=-1, vmax=1)
        ax.set_xticks(range(len(columns)), [f"{t}\n{s.replace('_', ' ')}" for t, s in columns], fontsize=8)
        ax.set_yticks(range(len(metrics)), metrics, fontsize=8)
    return ax


def plot_volume_sizes(found: pd.DataFrame, xlabel: str) -> Figure:
    """Log volume, and the radius of a typical direction, against size, a line for each level.

    Args:
        found: columns size, level, value, mean, stderr, n, in which value is ``"log_volume"`` or ``"mean_log_r"``.
        xlabel: what the size is.
    """
    levels = sorted(dict.fromkeys(found["level"]), key=lambda level: (level.startswith("acc"), level))
    losses = [level for level in levels if level.startswith("tau")]
    colors = dict(zip(losses, shades(len(losses)), strict=True))
    labels: Mapping[str, str] = {"log_volume": "ln volume", "mean_log_r": "mean of ln r over directions"}
    with style():
        figure = new_figure((10.5, 4.2))
        axes = figure.subplots(1, 2)
        for ax, (value, ylabel) in zip(axes, labels.items(), strict=True):
            for level in levels:
                own = found[(found["level"] == level) & (found["value"] == value)].sort_values("size")
                kind, _, number = level.partition("_")
                label = f"loss ≤ {number}" if kind == "tau" else f"accuracy ≥ {number}"
                line = {"color": colors.get(level, FAINT), "linestyle": "-" if kind == "tau" else "--"}
                ax.errorbar(
                    own["size"], own["mean"], own["stderr"], marker="o", markersize=4, capsize=3, label=label, **line
                )
            ax.set_xscale("log")
            sizes = sorted(found["size"].unique())
            ax.set_xticks(sizes, [f"{size:,.0f}" for size in sizes], minor=False)
            ax.minorticks_off()
            ax.set_xlabel(xlabel)
            ax.set_ylabel(ylabel)
        legend_beside(axes[1])
        set_heading(axes[0], "Volumes in one landscape", f"mean ± standard error over {int(found['n'].max())} seeds")
        set_heading(axes[1], " ", "ln r of the first exit along shared random directions")
    return figure


def plot_ends(found: Convergence) -> Figure:
    """The distributions of final loss and, where it is known, final error.

    Args:
        found: of R runs.
    """
    metrics: Sequence[str] = ("loss",) if found.errors is None else ("loss", "error")
    with style():
        figure = new_figure((5.4 * len(metrics), 4.0))
        for metric, ax in zip(metrics, figure.subplots(1, len(metrics), squeeze=False).ravel(), strict=True):
            own = replace(found, metric=metric, threshold=None)  # type: ignore[arg-type]
            plot_convergence(own, ax, title=f"Where the runs end: {metric}")
            ax.locator_params(axis="x", nbins=5)
    return figure
