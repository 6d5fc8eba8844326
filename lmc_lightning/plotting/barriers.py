"""Pictures of barriers: curves on paths between two networks, and tables over branch points and later epochs."""

from collections.abc import Mapping, Sequence
from math import floor, isfinite, isnan, log10
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from numpy.typing import ArrayLike, NDArray

from lmc_lightning.landscape.paths.barrier import Barrier
from lmc_lightning.plotting.style import (
    BLANK,
    BLUE,
    FAINT,
    FIGURE_SIZE,
    INK,
    RED,
    color_map,
    draw_cells,
    drawing,
    legend_beside,
    shades,
)

DEFINITION = "barrier: largest height above the chord"

_MAX_LABELS = 12
_MAX_DETAILED = 6  # more bands and uprights hide the curves
_CELL_WIDTH = 0.5  # [inches]
_PATH_COLORS = (INK, RED, BLUE, "#2b8a57", "#8a5fb0", "#c98a1b")
_POLICIES = {
    "recompute": "BatchNorm recomputed on training data",
    "interpolate": "BatchNorm statistics interpolated",
    "endpoint": "BatchNorm statistics of A",
}


def barrier_caption(barrier: Barrier) -> str:
    """The data and policy behind a barrier in one line."""
    unit = f"{barrier.unit}s" if barrier.unit else "samples"
    samples = f", {barrier.num_samples:,} {unit}" if barrier.num_samples else ""
    parts = [f"{barrier.split or 'data'}{samples}", f"{barrier.num_points} points"]
    if barrier.batch_stats is not None:
        parts.append(_POLICIES[barrier.batch_stats])
    return " · ".join(parts)


def plot_barrier_curves(
    curves: Sequence[tuple[str, Barrier]],
    ax: Axes | None = None,
    *,
    title: str = "",
    ends: tuple[str, str] = ("A", "B"),
) -> Axes:
    """The metric along the paths of several pairs, each with its chord (dashed).

    Up to six curves also show their barrier as an upright line at the peak and their simultaneous confidence band.

    Args:
        curves: label and barrier of each pair, in the order of the colours, e.g. later epochs.
        ax: where to draw; by default in a new figure.
        title: of the figure.
        ends: names of the networks at t = 0 and t = 1.

    Raises:
        ValueError: no curve, or curves of different metrics or splits.
    """
    first = _one_kind([barrier for _, barrier in curves])
    colors = shades(len(curves), lightest=0.8)
    labelled = set(np.linspace(0, len(curves) - 1, _MAX_LABELS).round().astype(int).tolist())
    detailed = len(curves) <= _MAX_DETAILED
    band = " · shaded: 95 % sup-t band over the data" if detailed and isfinite(first.band_quantile) else ""
    caption = f"{DEFINITION} (dashed){band}\n{barrier_caption(first)}"
    heading = title or f"{first.metric.capitalize()} on the line", caption
    with drawing(ax, *heading, x=_t_label(ends), y=f"{first.split} {first.metric}".strip()) as ax:
        for index, (label, barrier) in enumerate(curves):
            _draw_curve(ax, barrier, colors[index], _legend_label(label, barrier) if index in labelled else "_hidden")
            if detailed:
                _draw_evidence(ax, barrier, colors[index])
        ax.set_xlim(0, 1)
        legend_beside(ax, title="barrier ± stderr")
    return ax


def plot_gap_curves(
    curves: Sequence[tuple[int, Barrier]],
    ax: Axes | None = None,
    *,
    title: str = "",
    ends: tuple[str, str] = ("A", "B"),
) -> Axes:
    """The gap between a metric and its chord along the paths of one pair of runs, coloured by the later epoch.

    The latest is drawn with its simultaneous confidence band.

    Args:
        curves: total later epoch and barrier, in order.
        ax: where to draw; by default in a new figure.
        title: of the figure.
        ends: names of the networks at t = 0 and t = 1.

    Raises:
        ValueError: no curve, or curves of different metrics or splits.
    """
    first = _one_kind([barrier for _, barrier in curves])
    norm = Normalize(curves[0][0], max(curves[-1][0], curves[0][0] + 1))
    cmap = mpl.colormaps["viridis"]
    band = " · shaded: 95 % sup-t band of the last" if isfinite(curves[-1][1].band_quantile) else ""
    caption = f"{DEFINITION}{band}\n{barrier_caption(first)}"
    heading = title or f"Gap of the {first.metric} on the line", caption
    with drawing(ax, *heading, x=_t_label(ends), y=f"{first.split} {first.metric} − chord".strip()) as ax:
        ax.axhline(0, color=FAINT, linewidth=0.9, linestyle="--", label="_chord")
        for epoch, barrier in curves:
            ax.plot(barrier.ts.numpy(), barrier.gaps.numpy(), color=cmap(norm(epoch)), label=f"epoch {epoch}")
        _draw_band(ax, curves[-1][1].gaps.numpy(), curves[-1][1], cmap(norm(curves[-1][0])))
        ax.set_xlim(0, 1)
        ax.figure.colorbar(mpl.cm.ScalarMappable(norm, cmap), ax=ax, label="later epoch (total)")
    return ax


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
    first = _one_kind([*paths.values()])
    if len(paths) > len(_PATH_COLORS):
        raise ValueError(f"Expected one to six paths, got {len(paths)}.")
    caption = f"{DEFINITION} (dotted)\n{barrier_caption(first)}"
    heading = title or f"{first.metric.capitalize()} on paths", caption
    with drawing(ax, *heading, x=_t_label(ends), y=f"{first.split} {first.metric}".strip()) as ax:
        ax.plot(first.ts.numpy(), first.chord.numpy(), color=FAINT, linestyle=":", linewidth=1.2, label="_chord")
        for (label, path), color in zip(paths.items(), _PATH_COLORS, strict=False):
            ax.plot(path.ts.numpy(), path.values.numpy(), color=color, label=_legend_label(label, path))
            _draw_band(ax, path.values.numpy(), path, color)
        ax.set_xlim(0, 1)
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        ax.legend(loc="upper left", title="barrier ± stderr", alignment="left")
        ax.set_ylim(top=ax.get_ylim()[1] + (0.12 + 0.07 * len(paths)) * np.diff(ax.get_ylim()).item())
    return ax


def _t_label(ends: tuple[str, str]) -> str:
    return f"t  (0 = {ends[0]}, 1 = {ends[1]})"


def _one_kind(barriers: Sequence[Barrier]) -> Barrier:
    kinds = {(b.metric, b.split) for b in barriers}
    if len({metric for metric, _ in kinds}) != 1 or len({split for _, split in kinds if split}) > 1:
        raise ValueError(f"Expected barriers of one metric on one split, got {sorted(kinds) or 'none'}.")
    return barriers[0]


def _legend_label(label: str, barrier: Barrier) -> str:
    stderr = barrier.stderr_data["barrier"]
    spread = "" if isnan(stderr) else f" ± {stderr:.1g}"
    return f"{label}: {barrier.barrier:.3g}{spread}"


def _draw_curve(ax: Axes, barrier: Barrier, color: NDArray[np.float64], label: str) -> None:
    ts = barrier.ts.numpy()
    ax.plot(ts, barrier.values.numpy(), color=color, label=label)
    ax.plot(ts, barrier.chord.numpy(), color=color, linestyle="--", linewidth=0.9, label="_chord")


def _draw_evidence(ax: Axes, barrier: Barrier, color: NDArray[np.float64]) -> None:
    ts, values = barrier.ts.numpy(), barrier.values.numpy()
    _draw_band(ax, values, barrier, color)
    if barrier.barrier > 0 and isfinite(barrier.barrier):
        peak = int(barrier.gaps.argmax())
        bottom, top = float(barrier.chord[peak]), float(values[peak])
        ax.plot([ts[peak]] * 2, [bottom, top], color=color, linewidth=1.0, marker="_", markersize=7, label="_gap")


def _draw_band(ax: Axes, values: NDArray[np.float64], barrier: Barrier, color: Any) -> None:
    half = barrier.band_quantile * barrier.gap_stderr.numpy()
    if np.isfinite(half).any():
        ax.fill_between(barrier.ts.numpy(), values - half, values + half, color=color, alpha=0.15, linewidth=0)


def plot_barrier_heatmap(
    values: ArrayLike,
    k1s: Sequence[int | str],
    later_epochs: Sequence[int],
    ax: Axes | None = None,
    *,
    title: str,
    caption: str = "",
) -> Axes:
    """A number for each branch point and later epoch, as colour and in figures; what is NaN stays grey.

    Args:
        values: ``(K, E)``.
        k1s: branch points of the rows.
        later_epochs: of the columns.
        ax: where to draw; by default in a new figure.
        title: of the figure.
        caption: definition, data, policy.

    Raises:
        ValueError: ``values`` is not of shape ``(K, E)``.
    """
    cells = np.asarray(values, dtype=float)
    if cells.shape != (len(k1s), len(later_epochs)):
        raise ValueError(
            f"Expected values of shape ({len(k1s)}, {len(later_epochs)}), a row per k1 and a column per later epoch, "
            f"got {cells.shape}."
        )
    norm, cmap = _color_scale(cells)
    rows = "branch point k₁ [epochs]" if all(str(k).isdecimal() for k in k1s) else "branch point k₁"
    size = max(FIGURE_SIZE[0], 2 + _CELL_WIDTH * len(later_epochs)), FIGURE_SIZE[1]
    with drawing(ax, title, caption, x="later epoch (total)", y=rows, size=size) as ax:
        image = draw_cells(ax, cells, norm=norm, cmap=cmap)
        ax.set_facecolor(BLANK)
        ax.set_xticks(range(len(later_epochs)), [str(e) for e in later_epochs])
        ax.set_yticks(range(len(k1s)), [str(k) for k in k1s])
        _draw_borders(ax, cells.shape)
        ax.figure.colorbar(image, ax=ax)
        _write_cells(ax, cells, norm, cmap)
    return ax


def plot_barrier_map(cells: Mapping[tuple[str, int], Sequence[Barrier]], ax: Axes | None = None, *, title: str) -> Axes:
    """The mean barrier of the pairs of each branch point and later epoch.

    Args:
        cells: barriers by the label of the branch point, ``k1_005`` or ``k1_step_000500``, and the later epoch.
        ax: where to draw; by default in a new figure.
        title: of the figure.
    """
    points = list(dict.fromkeys(label for label, _ in cells))
    epochs = sorted({epoch for _, epoch in cells})
    values = np.full((len(points), len(epochs)), np.nan)
    for (label, epoch), results in cells.items():
        values[points.index(label), epochs.index(epoch)] = np.mean([result.barrier for result in results])
    most = max(map(len, cells.values()))
    over = f", mean of {most} pairs" if most > 1 else ""
    caption = f"{DEFINITION}{over}\n{barrier_caption(next(iter(cells.values()))[0])}"
    return plot_barrier_heatmap(values, [_branch_point(p) for p in points], epochs, ax, title=title, caption=caption)


def _branch_point(label: str) -> str:
    """``5`` of ``k1_005``, ``step 500`` of ``k1_step_000500``."""
    number = label.rsplit("_", 1)[-1]
    return f"step {int(number)}" if "_step_" in label else str(int(number))


def _draw_borders(ax: Axes, shape: tuple[int, ...]) -> None:
    ax.set_xticks(np.arange(shape[1] + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(shape[0] + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.set_axisbelow(False)
    ax.tick_params(which="both", length=0)


def _color_scale(cells: NDArray[np.float64]) -> tuple[Normalize, mpl.colors.Colormap]:
    known = cells[np.isfinite(cells)]
    top = float(np.abs(known).max()) if known.size and known.any() else 1.0
    if (known < 0).any():
        return Normalize(-top, top), color_map("RdBu_r")
    return Normalize(0, top), color_map("YlOrRd")


def _write_cells(ax: Axes, cells: NDArray[np.float64], norm: Normalize, cmap: mpl.colors.Colormap) -> None:
    decimals = _decimals(float(norm.vmax or 1.0))
    texts = {(i, j): _number(v, decimals) for (i, j), v in np.ndenumerate(cells) if not isnan(v)}
    size = _font_size(max(map(len, texts.values()), default=1), cells.shape[1])
    for (row, column), text in texts.items():
        value = cells[row, column]
        red, green, blue, _ = cmap(norm(value)) if isfinite(value) else (1, 1, 1, 1)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55  # perceived lightness (ITU-R BT.601)
        ax.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if dark else INK)


def _decimals(largest: float) -> int | None:
    """Digits behind the point for three significant ones in the largest number; ``None`` where that is no help."""
    return min(5, max(0, 2 - floor(log10(largest)))) if 1e-3 <= largest < 1e6 else None


def _number(value: float, decimals: int | None) -> str:
    if value == 0 or not isfinite(value):
        return "0" if value == 0 else "∞"
    if decimals is None:
        return f"{value:.1e}"
    text = f"{value:.{decimals}f}"
    return text if float(text) else f"{value:.1g}"


def _font_size(num_characters: int, num_columns: int) -> float:
    """The size [points] at which the longest number fits its cell."""
    cell = 72 * max(_CELL_WIDTH, 0.7 * FIGURE_SIZE[0] / num_columns)
    return min(10.0, 0.9 * cell / (0.62 * num_characters))
