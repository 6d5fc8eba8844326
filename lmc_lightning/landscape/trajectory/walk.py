"""How a run moves through parameter space, from one recorded state to the next."""

from dataclasses import dataclass, field
from math import nan

import torch
from torch import Tensor

from lmc_lightning.landscape.sharpness.perturbations import norm

_PIECE = 1 << 18
"""Entries that are converted to float64 at a time, few enough to stay in a CPU's cache."""


@dataclass(frozen=True)
class Stride:
    """The way to one recorded state.

    Attributes:
        step: Optimizer steps taken.
        norm: ‖θ_k‖₂.
        distance: ‖θ_k − θ_0‖₂ from the first recorded state.
        path: Σ‖θ_i − θ_{i−1}‖₂ over recorded states: a lower bound of the length of the way, tight at every step.
        length: ‖θ_k − θ_{k−1}‖₂ from the last recorded state; NaN at the first.
        cosine: Of this stride with the one before; NaN at the first two, and where nothing moved.
    """

    step: int
    norm: float
    distance: float
    path: float
    length: float
    cosine: float


@dataclass
class Walk:
    """All strides of a run so far. Keeps three states, and takes one pass over four vectors a stride, in float64."""

    strides: list[Stride] = field(default_factory=list)
    start: Tensor | None = None
    before: Tensor | None = None
    last: Tensor | None = None

    def advance(self, step: int, point: Tensor) -> None:
        """Go to ``point`` ``(D,)``, which is kept."""
        if self.start is None or self.last is None:
            self.strides.append(Stride(step, norm(point), 0.0, 0.0, nan, nan))
            self.start = point
        else:
            self.strides.append(self._stride(step, point, self.start, self.last))
        self.before, self.last = self.last, point

    def _stride(self, step: int, point: Tensor, start: Tensor, last: Tensor) -> Stride:
        before = last if self.before is None else self.before
        squares, both = torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for now, first, one, two in zip(*(v.split(_PIECE) for v in (point, start, last, before)), strict=True):
            now, one = now.double(), one.double()
            moved, away = now - one, now - first
            squares += torch.stack([now @ now, away @ away, moved @ moved])
            both += moved @ (one - two)
        size, distance, length = squares.sqrt().tolist()
        lengths = length * self.strides[-1].length
        cosine = float(both) / lengths if lengths and self.before is not None else nan
        return Stride(step, size, distance, self.strides[-1].path + length, length, cosine)

    def go_on(self, strides: list[Stride], start: Tensor, before: Tensor | None, last: Tensor) -> None:
        """Continue a walk whose first and last two states are known."""
        self.strides, self.start, self.before, self.last = strides, start, before, last

    def at(self, step: int) -> tuple[int, Stride] | None:
        """The number of states up to ``step`` and the stride to it, if that was recorded."""
        return next(((i + 1, s) for i, s in enumerate(self.strides) if s.step == step), None)
