"""Pictures of what a curvature is made of: the examples that carry most of it, and the share of each class."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from lmc_lightning.plotting.style import BLANK, BLUE, FIGURE_SIZE, RED, drawing, figure_of

_COLUMNS = 4
_MAX_CLASSES = 20


def plot_attribution(
    shares: ArrayLike,
    *,
    by_class: Mapping[int, tuple[float, float]] | None = None,
    images: ArrayLike | None = None,
    labels: Sequence[str] = (),
    title: str = "Which examples carry the curvature",
    caption: str = "",
) -> Figure:
    """The share of each class in a curvature beside its share of the examples, and the examples of the largest shares.

    Where there are no classes, the share that so many examples carry together.

    Args:
        shares: of each example ``(N,)``, summing to 1.
        by_class: share of the curvature and of the examples, by class; the twenty of the largest shares are drawn.
        images: of the examples of the largest shares, descending, ``(k, H, W)`` or ``(k, C, H, W)``.
        labels: of these images.
        title: of the figure.
        caption: operator, data.
    """
    descending = np.sort(np.asarray(shares, dtype=float))[::-1]
    size = FIGURE_SIZE if images is None else (1.6 * FIGURE_SIZE[0], FIGURE_SIZE[1])
    names = ("share", "class") if by_class else ("share of the examples, the largest first", "share of the curvature")
    with drawing(None, title, caption, x=names[0], y=names[1], size=size) as ax:
        figure = figure_of(ax)
        if images is not None:
            _draw_images(figure, ax, np.asarray(images), descending, labels)
        if by_class:
            _draw_classes(ax, by_class)
        else:
            _draw_concentration(ax, descending)
    return figure


def _draw_images(
    figure: Figure, ax: Axes, images: NDArray[np.float64], shares: NDArray[np.float64], labels: Sequence[str]
) -> None:
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.1))
    ax.set_subplotspec(grid[0, 0])
    cells = grid[0, 1].subgridspec(rows, columns)
    for index, image in enumerate(images):
        cell = figure.add_subplot(cells[divmod(index, columns)])
        cell.imshow(_pixels(image), cmap="gray", interpolation="nearest")
        cell.set_axis_off()
        label = f"{labels[index]}: " if index < len(labels) else ""
        cell.set_title(f"{label}{shares[index]:.1%}", fontsize=8, fontweight="normal", loc="center", pad=2)


def _pixels(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """An image with channels last, stretched to [0, 1]."""
    image = np.asarray(image, dtype=float)
    if image.ndim == 3:
        image = np.moveaxis(image, 0, -1) if len(image) in (3, 4) else image.mean(0)
    low, high = float(image.min()), float(image.max())
    return (image - low) / (high - low) if high > low else np.zeros_like(image)


def _draw_classes(ax: Axes, by_class: Mapping[int, tuple[float, float]]) -> None:
    shown = sorted(by_class, key=lambda c: by_class[c][0], reverse=True)[:_MAX_CLASSES]
    places = np.arange(len(shown))
    ax.barh(places, [by_class[c][0] for c in shown], color=BLUE, label="of the curvature")
    marks: dict[str, Any] = {
        "marker": "|",
        "markersize": 11,
        "markeredgewidth": 2,
        "color": RED,
        "label": "of the examples",
    }
    ax.plot([by_class[c][1] for c in shown], places, linestyle="none", **marks)
    ax.set_yticks(places, [str(c) for c in shown])
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(loc="lower right")


def _draw_concentration(ax: Axes, descending: NDArray[np.float64]) -> None:
    count = len(descending)
    ax.plot(np.arange(count + 1) / count, np.concatenate([[0], descending.cumsum()]), color=BLUE)
    ax.plot([0, 1], [0, 1], color=BLANK, linestyle="--")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.0%}")
