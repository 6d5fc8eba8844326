"""Pictures of a loss on a line or a plane: contours, reliefs, profiles, and coloured triangles."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from lmc_lightning.landscape.surface.slices import Mark, Surface
from lmc_lightning.plotting.style import BLANK, BLUE, FAINT, FIGURE_SIZE, color_map, drawing, new_figure, style

MARK = "#d7263d"
"""The colour of marked states."""
_CMAP = color_map("viridis")
_LOG_FROM = 20
"""Ratio of largest to smallest value from which colours and heights are logarithmic."""
_LEVELS = 22
_SQUARE = (5.6, 4.5)
"""Of a figure of square axes with a heading and a colour bar [inches]."""
_LABEL_BOX = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
_POLICIES = {"recompute": "BatchNorm recomputed on training data", "endpoint": "BatchNorm statistics of the centre"}

Array = NDArray[np.float64]


def surface_caption(surface: Surface) -> str:
    """The directions, data and BatchNorm policy behind a surface."""
    examples = "" if surface.num_examples is None else f", {surface.num_examples:,} examples"
    points = " × ".join(map(str, surface.losses.shape))
    parts = [f"{surface.split or 'data'}{examples}", f"{points} points"]
    if surface.batch_stats is not None:
        parts.append(_POLICIES.get(surface.batch_stats, surface.batch_stats))
    return f"{surface.description}\n{' · '.join(parts)}"


def common_scale(surfaces: Sequence[Surface], metric: str = "loss") -> Normalize:
    """One colour scale for all, logarithmic for losses that are positive and span more than a factor of 20."""
    values = np.concatenate([_finite(surface.values[metric].numpy()) for surface in surfaces])
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if metric == "loss" and low > 0 and high > _LOG_FROM * low:
        return LogNorm(low, high)
    return Normalize(low, high if high > low else low + (abs(low) or 1.0) * 1e-6)


def plot_contours(
    surface: Surface,
    ax: Axes | None = None,
    *,
    metric: str = "loss",
    scale: Normalize | None = None,
    title: str = "",
    caption: str | None = None,
) -> Axes:
    """A metric on a plane as filled contours, of a loss that spans more than a factor of 20 logarithmically spaced.

    Points where it is not finite stay grey.

    Args:
        surface: on a plane.
        ax: where to draw; by default in a new figure.
        metric: ``"loss"`` or ``"error"``.
        scale: of the colours, where several surfaces share it.
        title: of the figure.
        caption: what it shows; by default directions, data and BatchNorm policy.

    Raises:
        ValueError: the surface is a line.
    """
    xs, ys, values = _plane(surface, metric)
    scale = scale or common_scale([surface], metric)
    heading = _heading(surface, title or f"{metric.capitalize()} surface", caption)
    with drawing(ax, *heading, x=surface.labels[0], y=surface.labels[1], size=_SQUARE) as ax:
        ax.set_facecolor(BLANK)
        ax.grid(visible=False)
        masked, levels = np.ma.masked_invalid(values.T), _levels(scale)
        if masked.count() > 3:
            ax.contourf(xs, ys, masked, levels, norm=scale, cmap=_CMAP)
            ax.contour(xs, ys, masked, levels, colors="white", linewidths=0.4, alpha=0.6)
        for mark in surface.marks:
            ax.plot(
                *mark.position, "o", color=MARK, markeredgecolor="white", markeredgewidth=1.2, markersize=7, zorder=5
            )
            _name(ax, mark, mark.position, 7, bbox=_LABEL_BOX)
        ax.set_xlim(xs[0], xs[-1])
        ax.set_ylim(ys[0], ys[-1])
        ax.set_aspect("equal")
        ax.locator_params(nbins=5)
        _color_bar(ax, scale, f"{surface.split} {metric}".strip())
    return ax


def plot_relief(
    surface: Surface,
    ax: Any | None = None,
    *,
    metric: str = "loss",
    scale: Normalize | None = None,
    azimuth: float = -55.0,
    title: str = "",
) -> Any:
    """A metric on a plane as a figure in three dimensions; heights and colours share the scale of the contours.

    Args:
        surface: on a plane.
        ax: axes with ``projection="3d"``; by default in a new figure.
        metric: ``"loss"`` or ``"error"``.
        scale: of colours and heights, where several surfaces share it.
        azimuth: from where it is seen [degrees].
        title: of the figure.

    Raises:
        ValueError: the surface is a line.
    """
    xs, ys, values = _plane(surface, metric)
    scale = scale or common_scale([surface], metric)
    heights = _heights(values, scale)
    with style():
        ax = _axes_3d() if ax is None else ax
        grid = np.meshgrid(xs, ys, indexing="ij")
        colors = _CMAP(scale(np.where(np.isfinite(values), values, np.nan)))
        edges: dict[str, Any] = {"edgecolor": (1, 1, 1, 0.4), "linewidth": 0.35}
        ax.plot_surface(*grid, heights, facecolors=colors, rstride=1, cstride=1, shade=False, **edges)
        for mark in surface.marks:
            height = float(_heights(np.array([mark.values[metric]]), scale)[0])
            ax.plot(*mark.position, height, "o", color=MARK, markeredgecolor="white", markersize=6, zorder=20)
            ax.text(*mark.position, height + 0.08, mark.label, weight="bold", ha="center", zorder=21, bbox=_LABEL_BOX)
        ax.set_xlim(xs[0], xs[-1])
        ax.set_ylim(ys[0], ys[-1])
        ax.set_zlim(0, 1)
        ax.set_xlabel(surface.labels[0], labelpad=-3, fontsize=9)
        ax.set_ylabel(surface.labels[1], labelpad=-3, fontsize=9)
        ax.set_zlabel(f"{surface.split} {metric}".strip(), labelpad=-3, fontsize=9)
        ax.tick_params(pad=-2, labelsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(5, prune="upper"))  # the ends of both axes meet in one corner
        ax.yaxis.set_major_locator(MaxNLocator(5, prune="lower"))
        ticks = _ticks(scale)
        ax.set_zticks(_heights(np.array(ticks), scale), [f"{tick:g}" for tick in ticks])
        ax.view_init(elev=30, azim=azimuth)
        ax.set_box_aspect((1, 1, 0.66), zoom=1.1)
        _set_figure_heading(ax.figure, *_heading(surface, title or f"{metric.capitalize()} surface"))
    return ax


def plot_profile(
    surface: Surface,
    ax: Axes | None = None,
    *,
    scale: Normalize | None = None,
    title: str = "",
) -> Axes:
    """Loss, and where it is known the error, on a line, with the marked states.

    Args:
        surface: on a line.
        ax: where to draw; by default in a new figure.
        scale: of the loss, where several surfaces share it.
        title: of the figure.

    Raises:
        ValueError: the surface is a plane.
    """
    if surface.ys is not None:
        raise ValueError("Expected a surface on a line. Of one on a plane, draw plot_contours or plot_relief.")
    xs, losses = surface.xs.numpy(), surface.losses.numpy()
    scale = scale or common_scale([surface])
    of_loss = f"{surface.split} loss".strip()
    with drawing(ax, *_heading(surface, title or "Loss on a line"), x=surface.labels[0], y=of_loss) as ax:
        ax.plot(xs, losses, color=BLUE, label="loss")
        if isinstance(scale, LogNorm):
            ax.set_yscale("log")
        else:
            room = 0.06 * (float(scale.vmax or 1) - float(scale.vmin or 0))
            ax.set_ylim(float(scale.vmin or 0) - room, float(scale.vmax or 1) + room)
        for mark in surface.marks:
            place = mark.position[0], mark.values["loss"]
            ax.plot(*place, "o", color=MARK, markersize=6, zorder=5)
            _name(ax, mark, place, 9)
        ax.set_xlim(xs[0], xs[-1])
        ax.yaxis.label.set_color(BLUE)
        if "error" in surface.values:
            beside = ax.twinx()
            beside.plot(xs, surface.values["error"].numpy(), color="#b3541e", linewidth=1.3, linestyle="--")
            beside.set_ylim(-0.03, 1.03)
            beside.grid(visible=False)
            beside.spines["right"].set_visible(True)
            beside.set_ylabel(f"{surface.split} error (dashed)".strip(), color="#b3541e")
    return ax


def mesh_arrays(surface: Surface) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.uint8]]:
    """The loss as triangles: vertices ``(N, 3)``, y up, in about [−1, 1], faces ``(F, 3)``, colours ``(N, 3)``.

    Each marked state is a small red octahedron. Triangles at points where the loss is not finite are left out.

    Raises:
        ValueError: the surface is a line.
    """
    xs, ys, values = _plane(surface, "loss")
    scale = common_scale([surface])
    heights = _heights(values, scale)
    along, across = (2 * (g - g[0]) / (g[-1] - g[0]) - 1 for g in (xs, ys))
    grid = np.meshgrid(along, across, indexing="ij")
    known = np.isfinite(values)
    vertices = np.stack([grid[0], np.where(known, heights, 0) - 0.5, -grid[1]], axis=-1).reshape(-1, 3)
    colors = _CMAP(scale(np.where(known, values, np.nan))).reshape(-1, 4)
    faces = _triangles(values.shape)
    faces = faces[known.reshape(-1)[faces].all(axis=1)]
    for mark in surface.marks:
        height = float(_heights(np.array([mark.values["loss"]]), scale)[0])
        if isfinite(height):
            x, y = (2 * (c - g[0]) / (g[-1] - g[0]) - 1 for c, g in zip(mark.position, (xs, ys), strict=True))
            faces = np.concatenate([faces, _OCTAHEDRON_FACES + len(vertices)])
            vertices = np.concatenate([vertices, np.array([x, height - 0.46, -y]) + 0.04 * _OCTAHEDRON])
            colors = np.concatenate([colors, np.tile(mpl.colors.to_rgba(MARK), (6, 1))])
    return vertices.astype(np.float32), faces.astype(np.int32), (255 * colors[:, :3]).round().astype(np.uint8)


_OCTAHEDRON = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=float)
_OCTAHEDRON_FACES = np.array([[a, b, c] for a in (0, 1) for b in (2, 3) for c in (4, 5)])


def _triangles(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Two for each cell of a grid of vertices, ``(F, 3)``."""
    index = np.arange(shape[0] * shape[1]).reshape(shape)
    a, b, c, d = (part.reshape(-1) for part in (index[:-1, :-1], index[1:, :-1], index[:-1, 1:], index[1:, 1:]))
    return np.concatenate([np.stack([a, b, d], axis=1), np.stack([a, d, c], axis=1)])


def _plane(surface: Surface, metric: str) -> tuple[Array, Array, Array]:
    if surface.ys is None:
        raise ValueError("Expected a surface on a plane. Of one on a line, draw plot_profile.")
    return surface.xs.numpy(), surface.ys.numpy(), surface.values[metric].numpy()


def _finite(values: Array) -> Array:
    return values[np.isfinite(values)]


def _heights(values: Array, scale: Normalize) -> Array:
    """Where values lie on a scale from 0 to 1; NaN where they are not finite."""
    return np.asarray(np.ma.filled(scale(np.ma.masked_invalid(values)), np.nan), dtype=float)


def _levels(scale: Normalize) -> Array:
    return np.asarray(scale.inverse(np.linspace(0, 1, _LEVELS + 1)), dtype=float)


def _ticks(scale: Normalize) -> list[float]:
    """A few round values on a scale."""
    low, high = float(scale.vmin or 0), float(scale.vmax or 1)
    if not isinstance(scale, LogNorm):
        ticks = MaxNLocator(5).tick_values(low, high)
    else:
        decades = np.log10(high / low)
        ticks = LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 4 else (1,)).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high]


def _color_bar(ax: Any, scale: Normalize, label: str) -> None:
    bar = ax.figure.colorbar(mpl.cm.ScalarMappable(scale, _CMAP), ax=ax, label=label)
    ticks = _ticks(scale)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _name(ax: Axes, mark: Mark, place: Any, above: float, **options: Any) -> None:
    """The label of a mark, so many points above its place."""
    style = {"textcoords": "offset points", "ha": "center", "weight": "bold", **options}
    ax.annotate(mark.label, place, (0, above), **style)


def _heading(surface: Surface, title: str, caption: str | None = None) -> tuple[str, str]:
    return title, surface_caption(surface) if caption is None else caption


def _axes_3d() -> Any:
    figure = new_figure(FIGURE_SIZE, layout=None)
    figure.subplots_adjust(left=0.0, right=1.0, bottom=0.03, top=0.93)
    return figure.add_subplot(projection="3d")


def _set_figure_heading(figure: Figure, title: str, caption: str) -> None:
    """As :func:`set_heading`, at the top of the figure: axes in three dimensions have no edge to hold on to."""
    figure.text(0.03, 0.97, title, fontsize=11, weight="bold", verticalalignment="top")
    figure.text(0.03, 0.915, caption, fontsize=8, color=FAINT, verticalalignment="top", linespacing=1.2)
