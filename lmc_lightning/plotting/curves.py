"""Pictures of paths between two networks: the straight line and curves that were trained."""

from collections.abc import Mapping
from math import isnan

import numpy as np
from matplotlib.axes import Axes

from lmc_lightning.landscape.paths.barrier import Barrier
from lmc_lightning.plotting.barriers import DEFINITION, barrier_caption
from lmc_lightning.plotting.style import FAINT, INK, new_axes, set_heading, style

_COLORS = (INK, "#c8321e", "#1f5fa8", "#2b8a57", "#8a5fb0", "#c98a1b")


def plot_paths(
    paths: Mapping[str, Barrier],
    ax: Axes | None = None,
    *,
    title: str = "",
    ends: tuple[str, str] = ("A", "B"),
) -> Axes:
    """One metric along several paths between the same two networks, with their common chord (dotted).

    Args:
        paths: by label, the straight line first; all of one metric on one split, where they name one.
        ax: where to draw; by default in a new figure.
        title: of the figure.
        ends: names of the networks at t = 0 and t = 1.

    Raises:
        ValueError: no path, more than six, or paths of different metrics or splits.
    """
    metrics = sorted({path.metric for path in paths.values()})
    splits = sorted({path.split for path in paths.values() if path.split})
    if len(metrics) != 1 or len(splits) > 1 or len(paths) > len(_COLORS):
        kinds = f"{', '.join(metrics)} on {', '.join(splits) or 'unnamed data'}"
        raise ValueError(f"Expected one to six paths of one metric on one split, got {len(paths)} of {kinds}.")
    first = next(iter(paths.values()))
    with style():
        ax = ax if ax is not None else new_axes()
        ax.plot(first.ts.numpy(), first.chord.numpy(), color=FAINT, linestyle=":", linewidth=1.2, label="_chord")
        for (label, path), color in zip(paths.items(), _COLORS, strict=False):
            ts, values = path.ts.numpy(), path.values.numpy()
            ax.plot(ts, values, color=color, label=f"{label}: {_height(path)}")
            half = path.band_quantile * path.gap_stderr.numpy()
            if np.isfinite(half).any():
                ax.fill_between(ts, values - half, values + half, color=color, alpha=0.12, linewidth=0)
        ax.set_xlim(0, 1)
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        ax.set_xlabel(f"t  (0 = {ends[0]}, 1 = {ends[1]})")
        ax.set_ylabel(f"{first.split} {first.metric}".strip())
        ax.legend(loc="upper left", title="barrier ± stderr", alignment="left")
        ax.set_ylim(top=ax.get_ylim()[1] + (0.12 + 0.07 * len(paths)) * np.diff(ax.get_ylim()).item())
        caption = f"{DEFINITION} (dotted)\n{barrier_caption(first)}"
        set_heading(ax, title or f"{first.metric.capitalize()} on paths", caption)
    return ax


def _height(path: Barrier) -> str:
    stderr = path.stderr_data["barrier"]
    return f"{path.barrier:.3g}" + ("" if isnan(stderr) else f" ± {stderr:.1g}")
