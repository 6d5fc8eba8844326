"""The look of all figures: dark ink on opaque white, legible on a 6 × 4 inch card under a light or a dark page."""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

FIGURE_SIZE = (6.0, 4.0)
"""Width and height [inches]."""

INK = "#222222"
FAINT = "#666666"
BLANK = "#d4d4d4"
"""What is not known."""

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


def new_axes(size: tuple[float, float] = FIGURE_SIZE) -> Axes:
    """The one axes of a new figure that pyplot does not know of, so that nobody has to close it."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


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
