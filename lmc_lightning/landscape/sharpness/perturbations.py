"""What a radius around θ is measured in: absolute, relative to ‖θ‖, or filter by filter."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lmc_lightning.core.params import ParameterLayout

Radius: TypeAlias = Literal["absolute", "relative", "filter"]
"""``"absolute"``: in units of θ; ``"relative"``: of ‖θ‖; ``"filter"``: of the norm of each filter, see
:func:`filter_norms`."""


def norm(vector: Tensor) -> float:
    """‖v‖₂, summed in float64."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def filters_of(part: Tensor, shape: torch.Size) -> Tensor:
    """A tensor's part of a vector with a row for each of its filters, ``(F, n)``; see :func:`filter_norms`."""
    return part.reshape(shape[0] if len(shape) > 1 else shape.numel(), -1) if part.numel() else part.reshape(0, 1)


def filter_norms(vector: Tensor, layout: ParameterLayout) -> Tensor:
    """The norm of the filter that each entry of a vector belongs to, ``(P,)``.

    A filter is a slice of a weight along its first axis: what feeds one output of a linear layer or of a convolution
    (of a transposed one, what one input feeds). Each entry of a bias or of another vector is a filter of its own.
    """
    parts = []
    for shape, part in zip(layout.shapes, vector.split(layout.sizes), strict=True):
        rows = filters_of(part, shape)
        parts.append(torch.linalg.vector_norm(rows, dim=1, keepdim=True).expand_as(rows).reshape(-1))
    return torch.cat(parts)


def lengths(theta: Tensor, radius: Radius, layout: ParameterLayout) -> Tensor:
    """The unit s of length at each coordinate, ``()`` or ``(P,)``: the ball of radius ρ is ‖ε/s‖ ≤ ρ."""
    if radius == "filter":
        return filter_norms(theta, layout)
    return theta.new_tensor(1.0 if radius == "absolute" else norm(theta))


def deviations(theta: Tensor, radius: Radius, layout: ParameterLayout) -> Tensor:
    """The standard deviation of noise of size 1 at each coordinate, ``()`` or ``(P,)``.

    ``"absolute"`` noise has that deviation itself; ``"relative"`` noise has the expected norm ‖θ‖, and ``"filter"``
    noise that of each filter.
    """
    if radius == "absolute":
        return theta.new_tensor(1.0)
    if radius == "relative":
        return theta.new_tensor(norm(theta) / theta.numel() ** 0.5)
    return filter_norms(theta, layout) / filter_norms(torch.ones_like(theta), layout)


def on_sphere(draw: Tensor, theta: Tensor, radius: Radius, layout: ParameterLayout) -> Tensor:
    """A Gaussian draw ``(P,)`` brought to length 1, to ‖θ‖, or in each filter to the norm of θ's own."""
    if radius != "filter":
        return draw * (lengths(theta, radius, layout) / norm(draw))
    own = filter_norms(draw, layout)
    return draw * (filter_norms(theta, layout) / torch.where(own > 0, own, 1))
