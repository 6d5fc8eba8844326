"""Directions in parameter space along which a loss is looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.core.params import ParameterLayout
from lmc_lightning.core.random_vectors import gaussian
from lmc_lightning.landscape.curvature.spectrum import spectrum
from lmc_lightning.landscape.sharpness.perturbations import filters_of, norm
from lmc_lightning.types import Progress

Kind: TypeAlias = Literal["random", "hessian"]
"""Directions that a point has of itself."""

_PARALLEL = 1e-12
"""Squared sine of an angle that is none."""
_ROUNDING = 8
"""How many roundings of θ a difference of two states may be away from a line and still count as lying on it."""


@dataclass(frozen=True)
class Directions:
    """One or two directions that span a line or a plane.

    Attributes:
        vectors: Rows ``(k, P)``.
        labels: What a coordinate along each of them means.
        description: In words, for a caption.
        evidence: What finding them cost, and eigenvalues where they are eigenvectors.
    """

    vectors: Tensor = field(repr=False)
    labels: tuple[str, ...]
    description: str
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def to(self, theta: Tensor) -> "Directions":
        """The same beside θ, on its device and in its dtype."""
        return replace(self, vectors=self.vectors.to(theta))

    def point(self, theta: Tensor, coordinates: Sequence[float]) -> Tensor:
        """θ + Σ cᵢdᵢ ``(P,)``, at coordinates 0 an exact copy of θ."""
        moved = theta.clone()
        for coordinate, vector in zip(coordinates, self.vectors, strict=True):
            if coordinate:
                moved.add_(vector, alpha=coordinate)
        return moved

    def coordinates(self, displacement: Tensor) -> tuple[tuple[float, ...], float]:
        """The coordinates of the nearest point of the line or plane, and the distance to it."""
        rows, target = self.vectors.double(), displacement.double()
        solved = torch.linalg.solve(rows @ rows.T, rows @ target)
        return tuple(solved.tolist()), norm(target - solved @ rows)


def directions_around(
    which: Kind | Tensor,
    objective: Objective,
    generator: torch.Generator,
    *,
    count: int = 2,
    biases: bool = False,
    progress: Progress | None = None,
) -> Directions:
    """Directions at the objective's own θ: random ones, eigenvectors of the Hessian, or the columns of a tensor."""
    if isinstance(which, Tensor):
        return given_directions(which)
    if which == "hessian":
        return hessian_directions(objective, generator, count=count, progress=progress)
    return random_directions(objective.theta(), objective.layout, generator, count=count, biases=biases)


def given_directions(columns: Tensor) -> Directions:
    """Directions from the columns of a tensor ``(P,)`` or ``(P, k)``, such as principal axes of a trajectory.

    Raises:
        ValueError: not one or two columns, or columns that do not span a line or plane.
    """
    rows = columns.detach().reshape(len(columns), -1).T.contiguous()
    if len(rows) not in (1, 2):
        raise ValueError(f"Expected one or two directions as columns (P, k), got a tensor of {tuple(columns.shape)}.")
    units = nn.functional.normalize(rows.double(), dim=1, eps=torch.finfo(torch.float64).tiny)
    if torch.linalg.det(units @ units.T) < _PARALLEL:
        raise ValueError("The directions are zero or parallel, so they do not span a line or a plane.")
    return Directions(rows, _numbered("direction", len(rows)), "given directions")


def random_directions(
    theta: Tensor, layout: ParameterLayout, generator: torch.Generator, *, count: int = 2, biases: bool = False
) -> Directions:
    """Gaussian directions, orthogonal within each filter and there as long as the filter of θ.

    One unit along a direction changes each filter by its own norm, so that slices do not depend on how layers around a
    ReLU are scaled (Li et al., arXiv 1712.09913). There, directions are orthogonal on average only; here exactly, each
    filter for itself. A filter of a single entry has room for the first direction only, and one that is zero for none.
    Memory: about eight vectors of float64.

    Args:
        theta: the point ``(P,)``.
        layout: which tensors θ is made of.
        generator: source of the directions; equal seeds give equal ones up to their lengths.
        count: 1 or 2.
        biases: also move biases, gains of normalisation layers and other vectors, each entry a filter of its own.

    Raises:
        ValueError: a direction is zero.
    """
    draws = [gaussian(theta.numel(), generator).to(theta.device, torch.float64) for _ in range(count)]
    parts = zip(layout.shapes, theta.double().split(layout.sizes), *(d.split(layout.sizes) for d in draws), strict=True)
    columns = [
        _in_filters([filters_of(d, shape) for d in drawn], filters_of(weight, shape) * (biases or len(shape) > 1))
        for shape, weight, *drawn in parts
    ]
    rows = torch.cat(columns, dim=1).to(theta)
    empty = [number for number, row in enumerate(rows, start=1) if not row.any()]
    if empty:
        raise ValueError(
            f"Random direction {empty[0]} is zero: no filter that moves has as many entries, or all weights are zero. "
            f"Pass biases=True, dimensions=1, or directions of your own, directions=tensor (P, 2)."
        )
    moved = "all parameters" if biases else "weights"
    return Directions(
        rows, _numbered("random direction", count), f"random directions, {moved} filter by filter, 1 = its norm"
    )


def _in_filters(draws: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Draws ``(F, n)`` orthogonal within each filter and as long as the weight's own, in rows ``(k, F·n)``."""
    units: list[Tensor] = []
    for draw in draws:
        found = draw if draw.shape[1] > len(units) else torch.zeros_like(draw)
        for unit in units * 2:  # twice, as what is left may be small
            found = found - (found * unit).sum(1, keepdim=True) * unit
        length = torch.linalg.vector_norm(found, dim=1, keepdim=True)
        units.append(found / torch.where(length > 0, length, 1))
    norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return torch.stack([(unit * norms).reshape(-1) for unit in units])


def hessian_directions(
    objective: Objective, generator: torch.Generator, *, count: int = 2, progress: Progress | None = None
) -> Directions:
    """The eigenvectors of the largest eigenvalues of the Hessian, of length 1, so that the second derivative is λ.

    Their signs make the largest entry positive. Costs up to 64 Hessian products.
    """
    theta = objective.theta()
    found = spectrum(
        objective,
        theta,
        num_eigenvalues=count,
        num_negative=0,
        num_probes=0,
        generator=generator,
        progress=progress,
    )
    assert found.eigenpairs is not None
    rows = found.eigenpairs.eigenvectors[:count]
    signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    evidence = {
        "eigenvalues": found.eigenvalues.tolist(),
        "residuals": found.residuals.tolist(),
        "directions_converged": found.converged,
        "num_matvecs": found.num_matvecs,
        "num_gradients": found.num_gradients,
    }
    values = ", ".join(f"{value:.3g}" for value in found.eigenvalues.tolist())
    return Directions(
        (rows * signs).to(theta),
        _numbered("eigenvector", count),
        f"top Hessian eigenvector{'s' * (count > 1)}, λ = {values}",
        evidence,
    )


def line_direction(first: Tensor, second: Tensor) -> Directions:
    """The line from one state ``(P,)``, at 0, to another, at 1.

    Raises:
        ValueError: they are the same.
    """
    towards = _displacement(first, second, "The two states are the same point and span no line.")
    return Directions(
        towards[None].to(first), ("t  (0 = A, 1 = B)",), f"line through A and B, ‖B − A‖ = {_length(towards)}"
    )


def plane_directions(first: Tensor, second: Tensor, third: Tensor) -> Directions:
    """The plane through three states ``(P,)``: A at (0, 0), B at (1, 0), C somewhere above.

    Both directions have the length ‖B − A‖ and are orthogonal, so that the plane is not distorted.

    Raises:
        ValueError: the three lie on one line, within the rounding of their entries.
    """
    towards = _displacement(first, second, "A and B are the same point, so that the three span no plane.")
    aside = _aside(third.double() - first.double(), towards)
    if norm(aside) <= _ROUNDING * _rounding(first, second, third):
        raise ValueError(
            "The three states lie on one line and span no plane. Take another one, or the line through two of them."
        )
    return _square(towards, aside, first, ("along B − A", "across, towards C"), "plane through A, B and C")


def plane_beside(
    first: Tensor, second: Tensor, layout: ParameterLayout, generator: torch.Generator, *, biases: bool = False
) -> Directions:
    """A plane through two states ``(P,)``: A at (0, 0), B at (1, 0), across a random direction as long as B − A.

    The latter is :func:`random_directions`' at A, made orthogonal to B − A.

    Raises:
        ValueError: the two are the same, or nothing is orthogonal to their line.
    """
    towards = _displacement(first, second, "The two states are the same point and span no plane.")
    drawn = random_directions(first, layout, generator, count=1, biases=biases).vectors[0].double()
    aside = _aside(drawn, towards)
    if norm(aside) <= _ROUNDING * torch.finfo(first.dtype).eps * norm(drawn):
        raise ValueError("No direction is orthogonal to the line of the two states. Pass dimensions=1.")
    return _square(towards, aside, first, ("along B − A", "across, random"), "plane through A and B")


def _displacement(first: Tensor, second: Tensor, refusal: str) -> Tensor:
    towards = second.double() - first.double()
    if not towards.any():
        raise ValueError(refusal)
    return towards


def _aside(vector: Tensor, towards: Tensor) -> Tensor:
    """The part of a vector that is orthogonal to another one."""
    for _ in range(2):
        vector = vector - (vector @ towards) / (towards @ towards) * towards
    return vector


def _rounding(*states: Tensor) -> float:
    return max(torch.finfo(state.dtype).eps * norm(state) for state in states)


def _square(towards: Tensor, aside: Tensor, like: Tensor, labels: tuple[str, str], what: str) -> Directions:
    length = norm(towards)
    rows = torch.stack([towards, aside * (length / norm(aside))])
    return Directions(rows.to(like), labels, f"{what}, 1 = ‖B − A‖ = {_length(towards)}")


def _length(vector: Tensor) -> str:
    return f"{norm(vector):.3g}"


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name} {number}" for number in range(1, count + 1))
