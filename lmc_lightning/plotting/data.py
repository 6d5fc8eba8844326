"""The numbers that a figure shows, read off its lines, areas, maps and points."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.collections import Collection, PathCollection, QuadMesh
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle


def figure_data(figure: Figure) -> dict[str, np.ndarray]:
    """Arrays by the labels of what is drawn, with ``text``: title and names of the axes.

    Lines, points and outlines are ``(n, 2)`` in data coordinates, with rows of NaN between pieces; bars ``(n, 4)``: x,
    y, width, height; maps ``(rows, columns)``; all in single precision. Of several axes each has its number in
    front, and of those in three dimensions, whose artists know projections only, there is the text.
    """
    found: dict[str, np.ndarray] = {}
    for number, ax in enumerate(figure.axes):
        place = "" if len(figure.axes) == 1 else f"axes_{number}/"
        found[f"{place}text"] = np.array([ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()])
        for artist in ax.get_children() if ax.name != "3d" else ():
            for kind, values in _arrays_of(artist):
                label = str(artist.get_label()).replace("/", "_")
                of_label = f"{label}_colors" if kind == "colors" else label
                name = kind if not label or label.startswith("_") else of_label
                found[_free(place + name, found)] = values
        bars = [p.get_bbox().bounds for p in ax.patches if isinstance(p, Rectangle)]
        if bars:
            found[f"{place}bars"] = np.array(bars)
    return found


def _arrays_of(artist: Artist) -> Iterator[tuple[str, np.ndarray]]:
    """What an artist shows, by the kind of it."""
    if isinstance(artist, Line2D):
        yield "line", _plain(artist.get_xydata())
    elif isinstance(artist, (AxesImage, QuadMesh)):
        yield "map", _plain(artist.get_array())
    elif isinstance(artist, PathCollection):
        yield "points", _plain(artist.get_offsets())
        if artist.get_array() is not None:
            yield "colors", _plain(artist.get_array())
    elif isinstance(artist, Collection) and not isinstance(artist, ContourSet):  # which is its surface's
        pieces = [p for path in artist.get_paths() for p in (path.vertices, np.full((1, 2), np.nan))]
        if pieces:
            yield "outline", _plain(np.vstack(pieces))


def _plain(values: Any) -> np.ndarray:
    array = np.ma.filled(np.ma.asarray(values), np.nan) if np.ma.isMaskedArray(values) else np.asarray(values)
    return array.astype(np.float32, order="F")  # x after x and y after y: they are compressed to less


def _free(name: str, taken: dict[str, np.ndarray]) -> str:
    names = [name, *(f"{name}_{number}" for number in range(2, len(taken) + 3))]
    return next(n for n in names if n not in taken)
