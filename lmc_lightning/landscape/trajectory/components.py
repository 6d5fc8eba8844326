"""The way of the weights through parameter space: its principal plane, its share of all variance, the loss there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import pi
from typing import Literal

import torch
from torch import Tensor

from lmc_lightning.core.objective import Objective

_BLOCK = 1 << 22
"""Entries of the snapshots that are converted to float64 at a time."""

_RANK_TOLERANCE = 1e-12
"""Least variance of a component, relative to the first: below, snapshots of float32 hold rounding only."""

MARGIN = 0.2
"""Part of the extent of the trajectories that is added on each side."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """States of one run.

    Attributes:
        points: The weights, or their sketches, one row a state, ``(T, D)``.
        steps: Optimizer steps taken at each.
        name: Of the run.
    """

    points: Tensor = field(repr=False)
    steps: Sequence[int]
    name: str = ""

    def __repr__(self) -> str:
        states, size = self.points.shape
        name = f"{self.name!r}, " if self.name else ""
        return f"Trajectory({name}{states} states of {size:,} numbers, steps {self.steps[0]} to {self.steps[-1]})"


@dataclass(frozen=True, eq=False)
class Components:
    """Principal components of the snapshots of one or several runs.

    Attributes:
        trajectories: What they are of.
        centre: What coordinates are relative to, ``(D,)``.
        coordinates: Of each run's snapshots ``(T, k)``, float64.
        shares: Explained variance of each of all components, descending, summing to 1; see :func:`random_walk_shares`.
        distances: Of each run's snapshots from the plane of the k components ``(T,)``.
    """

    trajectories: Sequence[Trajectory]
    centre: Tensor = field(repr=False)
    coordinates: Sequence[Tensor] = field(repr=False)
    shares: Tensor = field(repr=False)
    distances: Sequence[Tensor] = field(repr=False)
    _weights: Tensor = field(repr=False)
    """Of the snapshots in each direction, ``(N, k)``."""

    def __repr__(self) -> str:
        count, states = self.coordinates[0].shape[1], sum(len(run.points) for run in self.trajectories)
        share = float(self.shares[:count].sum())
        return f"Components({count} of {states} states of {len(self.trajectories)} runs, {share:.1%} of the variance)"

    @cached_property
    def directions(self) -> Tensor:
        """Orthonormal directions ``(D, k)``; a snapshot in the plane is ``centre + directions @ coordinates``."""
        pieces = [block.T @ self._weights for block in _blocks(self.trajectories, self.centre)]
        return torch.cat(pieces).to(self.centre.dtype)


def principal_components(
    trajectories: Sequence[Trajectory], num_components: int = 2, *, about: Literal["mean", "last"] = "mean"
) -> Components:
    """Principal components of all snapshots together, from their Gram matrix.

    The N×N Gram matrix of N snapshots has the eigenvalues of the D×D covariance, so D may be millions; N²D operations
    in float64 and memory for a block of columns. Signs are such that coordinates of the first run grow.

    Args:
        trajectories: of runs of one architecture, all weights or all sketches of one seed.
        num_components: k at most; fewer where the snapshots span fewer dimensions.
        about: the ``"mean"`` of all snapshots, or the ``"last"`` of the last run (arXiv 1712.09913, §7.2), which is
            then the centre bit for bit.

    Raises:
        ValueError: no snapshots, snapshots of different length, or all of them equal.
    """
    sizes = {t.points.shape[1] for t in trajectories}
    if len(sizes) != 1:
        raise ValueError(f"Expected trajectories of one architecture, got points of lengths {sorted(sizes)}.")
    last, total = trajectories[-1].points[-1], sum(len(t.points) for t in trajectories)
    mean = sum(t.points.sum(0, dtype=torch.float64) for t in trajectories) / total
    centre = last.clone() if about == "last" else torch.as_tensor(mean).to(last)
    gram = sum(block @ block.T for block in _blocks(trajectories, centre))
    values, vectors = torch.linalg.eigh(torch.as_tensor(gram))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    rank = int((values > _RANK_TOLERANCE * values[0]).sum()) if values[0] > 0 else 0
    if not rank:
        raise ValueError("All snapshots are equal, so they span no plane.")
    k, lengths = min(num_components, rank), [len(t.points) for t in trajectories]
    squares = torch.arange(lengths[0], dtype=torch.float64).square()  # orthogonal to no component of a random walk
    slopes = (squares - squares.mean()) @ vectors[: lengths[0]].cpu()
    vectors = vectors * torch.where(slopes < 0, -1.0, 1.0).to(vectors)
    amplitudes = vectors * values.sqrt()
    return Components(
        trajectories,
        centre,
        amplitudes[:, :k].split(lengths),
        values / values.sum(),
        amplitudes[:, k:].norm(dim=1).split(lengths),
        vectors[:, :k] / values[:k].sqrt(),
    )


def _blocks(trajectories: Sequence[Trajectory], centre: Tensor) -> Iterator[Tensor]:
    """All snapshots relative to the centre in float64, ``(N, some of D)`` at a time."""
    num_points = sum(len(t.points) for t in trajectories)
    width = max(1, _BLOCK // num_points)
    for start in range(0, len(centre), width):
        part = slice(start, start + width)
        yield torch.cat([t.points[:, part].double() for t in trajectories]) - centre[part].double()


def pca_plane(
    trajectories: Trajectory | Sequence[Trajectory], *, about: Literal["mean", "last"] = "mean"
) -> Components:
    """The plane of the two principal components; see :func:`principal_components`.

    Raises:
        ValueError: all snapshots lie on one line.
    """
    given = [trajectories] if isinstance(trajectories, Trajectory) else list(trajectories)
    found = principal_components(given, 2, about=about)
    if found.coordinates[0].shape[1] < 2:
        total = sum(len(t.points) for t in given)
        raise ValueError(f"The {total} snapshots lie on one line, which spans no plane. Record more of them.")
    return found


def random_walk_shares(num_components: int) -> Tensor:
    """Explained variance 6/(π²j²) of component j = 1, 2, … of a long random walk in high dimension ``(k,)``.

    What a trajectory without any structure shows: 0.61 and 0.15 for the first two (arXiv 1806.08805, eq. 5).
    """
    return 6 / (pi * torch.arange(1, num_components + 1, dtype=torch.float64)) ** 2


def tsne(trajectories: Sequence[Trajectory]) -> list[Tensor]:
    """Coordinates ``(T, 2)`` of each run's snapshots by t-SNE of scikit-learn, on at most 50 principal components.

    Distances between groups and axes mean nothing; neighbours do. The perplexity is 30, or a quarter of the snapshots
    if fewer.

    Args:
        trajectories: of runs of one architecture.

    Raises:
        ValueError: fewer than four snapshots.
    """
    from sklearn.manifold import TSNE  # slow to import

    reduced = torch.cat([*principal_components(trajectories, 50).coordinates])
    if len(reduced) < 4:
        raise ValueError(f"Expected at least 4 snapshots for t-SNE, got {len(reduced)}.")
    perplexity, init = min(30.0, len(reduced) / 4), "pca" if reduced.shape[1] > 1 else "random"
    method = TSNE(2, perplexity=perplexity, init=init, random_state=0)
    found = torch.from_numpy(method.fit_transform(reduced.numpy()))
    return list(found.double().split([len(t.points) for t in trajectories]))


@dataclass(frozen=True, eq=False)
class PlaneLosses:
    """The true loss on a grid in a plane.

    Attributes:
        xs: First coordinates ``(X,)``.
        ys: Second coordinates ``(Y,)``.
        losses: Mean losses ``(Y, X)``, float64.
    """

    xs: Tensor
    ys: Tensor
    losses: Tensor = field(repr=False)


def plane_losses(objective: Objective, plane: Components, *, num_points: int = 25) -> PlaneLosses:
    """The loss at ``num_points²`` states of the plane, a fifth of the runs' extent beyond them on each side.

    Buffers are the objective's own at every state, so BatchNorm has the statistics of its module. One forward pass over
    the probe set a state.

    Args:
        objective: of the parameters that the plane is of.
        plane: of weights, not of sketches.
        num_points: on each axis.

    Raises:
        ValueError: the plane is of sketches, or of other parameters.
    """
    theta = objective.theta()
    if plane.centre.shape != theta.shape:
        raise ValueError(
            f"Expected a plane of {len(theta)} parameters, got {len(plane.centre)}. The loss is known at "
            f"weights, not at their sketches: record them with dimension=None."
        )
    coordinates = torch.cat([*plane.coordinates])[:, :2]
    low, high = coordinates.min(0).values, coordinates.max(0).values
    margin = MARGIN * (high - low)
    xs, ys = (torch.linspace(float((low - margin)[i]), float((high + margin)[i]), num_points).double() for i in (0, 1))
    centre, first, second = (t.to(theta) for t in (plane.centre, *plane.directions[:, :2].T))
    losses = [[objective.evaluate(centre + x * first + y * second).loss for x in xs.tolist()] for y in ys.tolist()]
    return PlaneLosses(xs, ys, torch.tensor(losses, dtype=torch.float64))
