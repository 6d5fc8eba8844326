"""How a run moves through parameter space, from one recorded state to the next."""

from dataclasses import dataclass, field
from math import nan

import torch
from torch import Tensor


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
    """All strides of a run so far. Keeps three vectors and costs four passes over P numbers a state."""

    strides: list[Stride] = field(default_factory=list)
    start: Tensor | None = None
    last: Tensor | None = None
    _moved: Tensor | None = None

    def advance(self, step: int, point: Tensor) -> None:
        """Go to ``point`` ``(D,)``, which is kept."""
        if self.start is None or self.last is None:
            self.start, self.last = point, point
            self.strides.append(Stride(step, _norm(point), 0.0, 0.0, nan, nan))
            return
        moved = point - self.last
        length, cosine = _norm(moved), nan
        if self._moved is not None:
            both = length * self.strides[-1].length
            cosine = float((moved * self._moved).sum(dtype=torch.float64)) / both if both else nan
        path, distance = self.strides[-1].path + length, _norm(point - self.start)
        self.strides.append(Stride(step, _norm(point), distance, path, length, cosine))
        self.last, self._moved = point, moved

    def go_on(self, strides: list[Stride], start: Tensor, before: Tensor | None, last: Tensor) -> None:
        """Continue a walk whose first and last two states are known."""
        self.strides, self.start, self.last = strides, start, last
        self._moved = None if before is None else last - before

    def at(self, step: int) -> tuple[int, Stride] | None:
        """The number of states up to ``step`` and the stride to it, if that was recorded."""
        return next(((i + 1, s) for i, s in enumerate(self.strides) if s.step == step), None)


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
