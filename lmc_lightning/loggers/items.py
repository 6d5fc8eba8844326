"""What there is to show, as values that no logger has a hand in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np


@dataclass(frozen=True)
class Scalars:
    """The numbers of one visit."""

    values: Mapping[str, float]
    """By key."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Standard errors, by the key of the value with ``_stderr`` (over probes) or ``_stderr_data`` (over examples)."""
    bands: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Lower and upper end of those values for which somebody draws a band."""


@dataclass(frozen=True)
class Chart:
    """Some numbers in one chart."""

    title: str
    tags: tuple[str, ...]
    """Regular expressions of whole keys."""


@dataclass(frozen=True)
class Band:
    """One number with its error: value ± 2 standard errors."""

    title: str
    key: str


Layout: TypeAlias = Mapping[str, Sequence[Chart | Band]]
"""Charts by the heading that they stand under."""


@dataclass(frozen=True)
class Mesh:
    """A coloured triangle mesh; TensorBoard's viewer has y up and wants coordinates of about [−1, 1]."""

    vertices: np.ndarray
    """``(N, 3)`` float, at most 65,536 of them."""
    faces: np.ndarray
    """``(F, 3)`` int, indices of vertices."""
    colors: np.ndarray
    """``(N, 3)`` uint8."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Camera, lights and material, as three.js has them."""


@dataclass(frozen=True)
class Embedding:
    """Points with named columns of metadata, for TensorBoard's projector."""

    points: np.ndarray
    """``(N, D)`` float."""
    columns: Sequence[str]
    """Names of the columns; ``__next__`` holds the index of the following row and draws lines."""
    rows: Sequence[Sequence[Any]]
    """``N`` rows of metadata."""
