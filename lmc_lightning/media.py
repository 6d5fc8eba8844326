"""Pictures and arrays as files of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lmc_lightning.core.files import name_at, write_atomic
from lmc_lightning.loggers import png
from lmc_lightning.plotting.data import figure_data
from lmc_lightning.plotting.style import pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMALL = 2**20
"""Bytes."""


@dataclass(frozen=True)
class Picture:
    """A figure that was drawn once, for all who show or keep it."""

    pixels: np.ndarray
    """``(height, width, 3)`` uint8."""
    data: Mapping[str, np.ndarray]
    """The numbers in it, by label."""


def draw(figure: "Callable[[], Figure]") -> Picture:
    """The picture of a figure; costs one rendering."""
    drawn = figure()
    return Picture(pixels(drawn), figure_data(drawn))


def save_picture(directory: Path, picture: Picture, key: str, step: int) -> None:
    """Write ``<directory>/figures/<key>_<step>.png``."""
    path = directory / "figures" / name_at(key, step, "png")
    write_atomic(path, lambda file: file.write(png(picture.pixels)))


def save_arrays(directory: Path, arrays: Mapping[str, np.ndarray], key: str, step: int) -> None:
    """Write ``<directory>/arrays/<key>_<step>.npz``: plain arrays, compressed where that takes no time."""
    path = directory / "arrays" / name_at(key, step, "npz")
    save = np.savez_compressed if sum(a.nbytes for a in arrays.values()) < _SMALL else np.savez
    write_atomic(path, lambda file: save(file, **arrays))  # type: ignore[arg-type]
