"""Loss and error on a line or a plane through parameter space."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lmc_lightning.core.files import write_atomic
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.structure import digest
from lmc_lightning.landscape.paths.line import BatchStats, Endpoint, endpoint_of
from lmc_lightning.landscape.paths.states import StateEvaluator, StateMetrics
from lmc_lightning.landscape.surface.directions import Directions
from lmc_lightning.types import Progress

NUM_POINTS = 25
_SAVE_EVERY = 25
_SAME_LOSS = 1e-5
"""Relative difference of the loss at the centre that another machine may make."""


@dataclass(frozen=True)
class Mark:
    """A state shown on a slice: where it lies, how far from it, and its own metrics."""

    label: str
    position: tuple[float, ...]
    distance: float
    """From the line or plane, in parameter space."""
    values: Mapping[str, float]
    """Under the slice's BatchNorm policy; under ``"endpoint"``, with the state's own statistics."""


@dataclass(frozen=True)
class Surface:
    """Loss and error on a grid of a line or a plane. Means are over examples, in float64.

    Attributes:
        xs: Coordinates along the first direction, ascending, ``(X,)`` float64.
        ys: Along the second, ``(Y,)``; ``None`` on a line.
        values: By metric, ``"loss"`` and, where the loss tap sees a classification, ``"error"`` (1 − accuracy):
            ``[i, j]`` is that of θ + xs[i]·d₁ + ys[j]·d₂, ``(X, Y)`` or ``(X,)``. Not finite where the loss is not.
        marks: The centre θ, and other states.
        labels: What the coordinates mean.
        description: Of the directions.
        split: Name of the data.
        batch_stats: What BatchNorm normalised with; ``"endpoint"``: the centre's statistics everywhere; ``None``:
            there is no BatchNorm.
        num_examples: In the mean, where they can be counted.
    """

    xs: Tensor
    ys: Tensor | None
    values: Mapping[str, Tensor] = field(repr=False)
    marks: tuple[Mark, ...]
    labels: tuple[str, ...]
    description: str
    split: str = ""
    batch_stats: BatchStats | None = None
    num_examples: int | None = None

    def __repr__(self) -> str:
        points, losses = " × ".join(map(str, self.losses.shape)), self.losses
        of = f"{self.split} loss".strip()
        return f"Surface({points} points, {of} {losses.min():.4g} to {losses.max():.4g}, {self.description})"

    @property
    def losses(self) -> Tensor:
        """The mean loss at each point, ``(X, Y)`` or ``(X,)``."""
        return self.values["loss"]

    @property
    def centre(self) -> Mapping[str, float]:
        """The metrics of θ itself: but for recomputed BatchNorm statistics, L(θ) bit for bit."""
        return self.marks[0].values

    @property
    def rises(self) -> Tensor:
        """L − L(θ) at each point, ``(X, Y)`` or ``(X,)``."""
        return self.losses - self.centre["loss"]

    def curvature(self, axis: int = 0) -> float | None:
        """The second difference of the loss at the centre along a direction, over one step h of the grid.

        (L(h) − 2L(0) + L(−h))/h² → dᵀHd as h → 0, in units of the direction: λ along a unit eigenvector. ``None`` where
        the centre is not a point between two others at equal distances.
        """
        grids = [grid for grid in (self.xs, self.ys) if grid is not None]
        at = [int(grid.abs().argmin()) for grid in grids]
        grid, middle = grids[axis], at[axis]
        if any(g[i] != 0 for g, i in zip(grids, at, strict=True)) or not 0 < middle < len(grid) - 1:
            return None
        step = float(grid[middle + 1])
        if not math.isclose(-float(grid[middle - 1]), step, rel_tol=1e-9):
            return None
        line = self.losses if self.ys is None else self.losses.select(1 - axis, at[1 - axis])
        below, centre, above = line[middle - 1 : middle + 2].tolist()
        return float(above - 2 * centre + below) / step**2

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays that numpy saves without pickles: ``xs``, ``ys``, the metrics, and ``about`` in JSON."""
        about = {
            "marks": [asdict(mark) for mark in self.marks],
            "metrics": list(self.values),
            **{name: getattr(self, name) for name in ("labels", "description", "split", "batch_stats", "num_examples")},
        }
        grids = {"xs": self.xs.numpy()} | ({} if self.ys is None else {"ys": self.ys.numpy()})
        return grids | {name: v.numpy() for name, v in self.values.items()} | {"about": np.array(json.dumps(about))}


def load_surface(path: str | Path) -> Surface:
    """A surface from its file: ``arrays/*.npz`` of a run, or the ``path`` of :func:`surface`.

    Raises:
        ValueError: the file is the beginning of a surface only.
    """
    with np.load(path, allow_pickle=False) as arrays:
        if "done" in arrays and not arrays["done"].all():
            raise ValueError(
                f"{path} has {int(arrays['done'].sum())} of {arrays['done'].size} points. Call the same function again "
                f"with this path to compute the others."
            )
        about = json.loads(str(arrays["about"]))
        marks = tuple(Mark(**{**mark, "position": tuple(mark["position"])}) for mark in about.pop("marks"))
        return Surface(
            xs=torch.from_numpy(arrays["xs"]),
            ys=torch.from_numpy(arrays["ys"]) if "ys" in arrays else None,
            values={name: torch.from_numpy(arrays[name]) for name in about.pop("metrics")},
            marks=marks,
            **about | {"labels": tuple(about["labels"])},
        )


def centred_grid(span: float, num_points: int = NUM_POINTS) -> Tensor:
    """Equally spaced coordinates in [−span, span], ``(n,)`` float64; 0 is one of them.

    Raises:
        ValueError: an even number of points, fewer than 3, or no width.
    """
    if num_points < 3 or num_points % 2 == 0 or not 0 < span < math.inf:
        raise ValueError(
            f"Expected an odd num_points of at least 3, so that the centre is one of them, and a positive span, got "
            f"{num_points} and {span}."
        )
    return span * (2 * torch.arange(num_points, dtype=torch.float64) / (num_points - 1) - 1)


def window(positions: Sequence[Sequence[float]], num_points: int = NUM_POINTS, *, span: float = 0.75) -> list[Tensor]:
    """Grids of a square window around positions, one for each coordinate, ``(n,)`` float64.

    ``span`` is half its width, in units of the largest extent of the positions.
    """
    columns = list(zip(*positions, strict=True))
    extent = max(max(c) - min(c) for c in columns)
    return [(max(c) + min(c)) / 2 + centred_grid(span * extent, num_points) for c in columns]


def surface(
    objective: Objective,
    directions: Directions,
    xs: Tensor,
    ys: Tensor | None = None,
    *,
    centre: Endpoint | None = None,
    label: str = "θ",
    marks: Mapping[str, Endpoint] | None = None,
    split: str = "",
    batch_stats: Literal["endpoint", "recompute"] | None = None,
    stats_objective: Objective | None = None,
    path: str | Path | None = None,
    progress: Progress | None = None,
) -> Surface:
    """Loss and error at θ + x·d₁ + y·d₂ for all x of ``xs`` and y of ``ys``.

    Costs a forward pass over the probe set for each point and mark; ``"recompute"`` adds one over the training batches.

    Args:
        objective: the mean loss.
        directions: one or two, as many as there are coordinates.
        xs: coordinates along the first, ascending, ``(X,)``.
        ys: along the second, ``(Y,)``.
        centre: θ and its buffers; by default the objective's own.
        label: of the centre.
        marks: further states to be shown, by label.
        split: name of the data.
        batch_stats: ``"endpoint"`` (default with BatchNorm) normalises with the centre's running statistics
            everywhere, ``"recompute"`` with those of the batches of ``stats_objective`` at each point.
        stats_objective: the module on training batches, with ``mode="train"``.
        path: a file that holds all points so far, and from which an interrupted computation goes on.
        progress: told after each point.

    Raises:
        ValueError: coordinates and directions differ in number, ``"recompute"`` has no ``stats_objective``, or the
            file belongs to another surface.
    """
    grids = [xs.double().cpu()] + ([] if ys is None else [ys.double().cpu()])
    if len(grids) != len(directions.vectors):
        raise ValueError(f"Expected a grid for each of {len(directions.vectors)} directions, got {len(grids)}.")
    centre = endpoint_of(objective) if centre is None else centre
    directions = directions.to(centre.theta)
    states = StateEvaluator({split: objective}, batch_stats=batch_stats or "endpoint", stats_objective=stats_objective)
    ends = {label: centre, **(marks or {})}
    marked = tuple(_mark(name, end, states, directions, centre) for name, end in ends.items())
    shape = tuple(map(len, grids))
    values = {name: torch.full(shape, math.nan, dtype=torch.float64) for name in marked[0].values}
    found = Surface(
        grids[0],
        None if ys is None else grids[1],
        values,
        marked,
        directions.labels,
        directions.description,
        split,
        states.batch_stats,
        objective.num_examples,
    )
    statistics = stats_objective if states.batch_stats == "recompute" else None
    known = "" if path is None else _identity(found, objective, directions, centre, statistics)
    file = _File(None if path is None else Path(path), known, found)
    done = file.resume()
    due = [index for index in product(*map(range, shape)) if not done[index]]
    points = (directions.point(centre.theta, [float(g[i]) for g, i in zip(grids, at, strict=True)]) for at in due)
    try:
        for index, metrics in zip(due, _evaluated(states, points, centre.buffers), strict=True):
            for name in values:
                values[name][index] = metrics[name]
            done[index] = True
            file.save(done, every=_SAVE_EVERY)
            if progress is not None:
                progress(int(done.sum()), done.numel(), "points")
    finally:
        file.save(done)
    return found


def _evaluated(
    states: StateEvaluator, points: Iterable[Tensor], buffers: Mapping[str, Tensor]
) -> Iterator[dict[str, float]]:
    """The metrics of many states: the one place where the points of a surface are evaluated."""
    drawn = iter(points)
    while block := list(islice(drawn, _SAVE_EVERY)):
        yield from map(_metrics, states.along([(theta, buffers) for theta in block]))


def _metrics(by_split: Mapping[str, StateMetrics]) -> dict[str, float]:
    (found,) = (measured.evaluation for measured in by_split.values())
    return {"loss": found.loss} | ({} if found.error is None else {"error": found.error})


def _mark(label: str, end: Endpoint, states: StateEvaluator, directions: Directions, centre: Endpoint) -> Mark:
    at = (0.0,) * len(directions.vectors), 0.0
    if end is not centre:
        at = directions.coordinates(end.theta.double() - centre.theta.double())
    return Mark(label, *at, _metrics(states.end(end)))


def _identity(
    found: Surface, objective: Objective, directions: Directions, centre: Endpoint, stats: Objective | None
) -> str:
    """The sha256 of all that a surface depends on, but for code."""
    state = objective.module_at(centre.theta, buffers=centre.buffers).state_dict()
    data = [state, centre.buffers, directions.vectors, found.xs, found.ys, objective.batches]
    words = [found.batch_stats, objective.mode, objective.seed, list(found.values)]
    tensors = digest([data, () if stats is None else stats.batches])
    return hashlib.sha256(json.dumps([words, tensors]).encode()).hexdigest()


@dataclass
class _File:
    """The points of a surface so far, on disk, if there is a place for them."""

    path: Path | None
    identity: str
    found: Surface
    unsaved: int = 0

    def resume(self) -> Tensor:
        """Take over the points of an earlier attempt; which they are."""
        done = torch.zeros(self.found.losses.shape, dtype=torch.bool)
        if self.path is None or not self.path.is_file():
            return done
        with np.load(self.path, allow_pickle=False) as arrays:
            (centre, *_) = json.loads(str(arrays["about"]))["marks"]
            losses = centre["values"]["loss"], self.found.centre["loss"]
            same = bool(np.isclose(*losses, rtol=_SAME_LOSS, atol=0, equal_nan=True))
            if str(arrays.get("identity")) != self.identity or not same:
                raise ValueError(
                    f"{self.path} belongs to another surface: weights, data, loss, directions, grid or BatchNorm "
                    f"policy differ. Give a path of its own, or remove that file."
                )
            for name, values in self.found.values.items():
                values.copy_(torch.from_numpy(arrays[name]))
            return torch.from_numpy(arrays["done"])

    def save(self, done: Tensor, *, every: int = 1) -> None:
        """Write them, if so many are new."""
        self.unsaved += 1
        if self.path is None or self.unsaved < every:
            return
        self.unsaved = 0
        arrays: dict[str, Any] = self.found.to_arrays() | {"done": done.numpy(), "identity": np.array(self.identity)}
        write_atomic(self.path, lambda file: np.savez(file, **arrays))
