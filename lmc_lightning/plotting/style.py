"""The look of all figures: dark ink on opaque white, legible on a 6 × 4 inch card under a light or a dark page."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.legend import Legend
from numpy.typing import ArrayLike, NDArray

FIGURE_SIZE = (6.0, 4.0)
"""Width and height [inches]."""

PANELS_ACROSS = 4
"""Axes in a row, of figures that have many."""

INK = "#222222"
FAINT = "#666666"
BLANK = "#d4d4d4"
"""What is not known."""
BLUE, RED = "#1f5fa8", "#c8321e"
"""Of the first and the second thing that a figure shows."""

_CAPTION_SIZE = 8.0
_CAPTION_COLUMNS = 96
_SETTINGS: dict[Any, Any] = {  # matplotlib's stubs spell out every key, and differ by version
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 10,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults and the settings of this package inside the block, the caller's again afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        with mpl.rc_context(_SETTINGS):
            yield


def new_figure(size: tuple[float, float], layout: Literal["constrained"] | None = "constrained") -> Figure:
    """A figure that pyplot does not know of, so that nobody has to close it."""
    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def new_axes(size: tuple[float, float] = FIGURE_SIZE) -> Axes:
    """The one axes of a new figure."""
    return new_figure(size).add_subplot()


def panels(count: int, size: tuple[float, float], title: str, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    """A new figure of so many axes in rows of four, and the axes."""
    figure = new_figure(size)
    across = min(PANELS_ACROSS, count)
    axes: list[Axes] = list(figure.subplots(-(-count // across), across, squeeze=False, **options).ravel())
    for ax in axes[count:]:
        ax.set_axis_off()
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure, axes


@contextmanager
def drawing(
    ax: Axes | None,
    title: str,
    caption: str,
    *,
    x: str = "",
    y: str = "",
    size: tuple[float, float] = FIGURE_SIZE,
) -> Iterator[Axes]:
    """A block that draws in the style of this package.

    Args:
        ax: where; by default the one axes of a new figure.
        title: of the axes.
        caption: under it, see :func:`set_heading`.
        x: name of the horizontal axis.
        y: of the vertical one.
        size: of a new figure [inches].
    """
    with style():
        ax = new_axes(size) if ax is None else ax
        yield ax
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        set_heading(ax, title, caption)


def shades(count: int, lightest: float = 0.85) -> NDArray[np.float64]:
    """Colours of things in order, dark to light, ``(count, 4)``."""
    return np.asarray(mpl.colormaps["viridis"](np.linspace(0, lightest, count)))


def legend_beside(ax: Axes, **options: Any) -> Legend:
    """The legend to the right of the axes, where it hides nothing."""
    return ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), alignment="left", **options)


def draw_cells(ax: Axes, cells: ArrayLike, **options: Any) -> AxesImage:
    """A table as colours, without a grid or a frame."""
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return ax.imshow(np.ma.masked_invalid(cells), aspect="auto", **options)


def color_map(name: str) -> mpl.colors.Colormap:
    """A colour map of matplotlib's that leaves what is not known grey."""
    return mpl.colormaps[name].with_extremes(bad=BLANK)


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Means of ``width`` consecutive values."""
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def figure_of(ax: Axes) -> Figure:
    """The figure that ``ax`` is part of, to be logged or saved."""
    figure = ax.figure
    while not isinstance(figure, Figure):
        figure = figure.figure
    return figure


def deferred(plot: Callable[..., Axes], *arguments: Any, **options: Any) -> Callable[[], Figure]:
    """The figure of ``plot(*arguments, **options)``, drawn when it is called for."""
    return lambda: figure_of(plot(*arguments, **options))


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """What ``figure`` looks like, ``(height, width, 3)``; costs one rendering."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def set_heading(ax: Axes, title: str, caption: str) -> None:
    """A bold title, and under it what the figure shows: definition, data, policy."""
    lines = [line for part in caption.splitlines() for line in textwrap.wrap(part, _CAPTION_COLUMNS)]
    ax.set_title(title, pad=7 + 1.35 * _CAPTION_SIZE * len(lines))
    text = ax.annotate(
        "\n".join(lines),
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        fontsize=_CAPTION_SIZE,
        color=FAINT,
        verticalalignment="bottom",
        linespacing=1.2,
    )
    text.set_in_layout(False)  # a long line over a colour bar would squeeze the axes; the title makes the room above
