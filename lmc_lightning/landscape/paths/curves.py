"""Curved paths between two states of a network: Bezier curves and polygonal chains of low loss."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import comb, isfinite, nan
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature.dynamics import chunk_step
from lmc_lightning.landscape.paths.batchnorm import has_batch_norm
from lmc_lightning.landscape.paths.line import Path
from lmc_lightning.landscape.sharpness.measured import require_positive
from lmc_lightning.types import Progress

CurveKind: TypeAlias = Literal["bezier", "polychain"]

MakeOptimizer: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]

_GAUSS_NODES = 8
_PIECES = 32


@dataclass(frozen=True, eq=False)
class CurvedPath:
    """γ(t) = (1−t)θ_A + tθ_B + Σ_j c_j(t) δ_j, a path whose ends are those of the straight line.

    c_j are the Bernstein polynomials of degree n + 1 for ``"bezier"`` and hat functions for ``"polychain"``, both
    without those of the two ends. As either reproduces the line, the inner control points are w_j = θ(j/(n+1)) + δ_j, j
    = 1 … n, and δ = 0 is the straight line bit for bit.

    Attributes:
        line: the straight line, which also says what the buffers are at t.
        offsets: δ ``(n, P)``, of the inner control points from the straight line.
        kind: ``"bezier"`` or ``"polychain"``.
        losses: mean training loss on the curve in each epoch of its training, ``(E,)``.
        diverged: whether its training ended early because the loss was not finite.
    """

    line: Path = field(repr=False)
    offsets: Tensor = field(repr=False)
    kind: CurveKind
    losses: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64), repr=False)
    diverged: bool = False

    def __call__(self, t: float) -> tuple[Tensor, "dict[str, Tensor]"]:
        """γ(t) ``(P,)`` and the buffers there."""
        theta, buffers = self.line(t)
        return theta + _mixed(self.offsets, bend_weights(self.kind, self.num_bends, t)), dict(buffers)

    @property
    def num_bends(self) -> int:
        """The number n of inner control points."""
        return len(self.offsets)

    @property
    def length(self) -> float:
        """∫‖γ′(t)‖ dt, in units of θ; the straight line has ‖θ_B − θ_A‖."""
        return float(self.arc_length(torch.tensor([0.0, 1.0]))[-1])

    def arc_length(self, ts: Tensor) -> Tensor:
        """The length of the curve from t = 0 to each of ascending ``ts`` that begin at 0, ``(T,)`` float64.

        Gauss–Legendre on pieces that end at the bends; exact for polygonal chains.
        """
        chord = (self.line(1.0)[0] - self.line(0.0)[0]).double()
        rows = torch.cat([chord[None], self.offsets.double()])
        gram = (rows @ rows.T).cpu().numpy()
        points = ts.double().cpu().numpy()
        knots = np.arange(self.num_bends + 2) / (self.num_bends + 1)
        grid = np.unique(np.concatenate([points, knots, np.arange(_PIECES + 1) / _PIECES]))
        nodes, weights = np.polynomial.legendre.leggauss(_GAUSS_NODES)
        half = np.diff(grid) / 2
        inner = (grid[:-1] + half)[:, None] + half[:, None] * nodes
        slopes = [np.concatenate([[1.0], _bend_slopes(self.kind, self.num_bends, float(t))]) for t in inner.ravel()]
        squares = np.einsum("ti,ij,tj->t", slopes, gram, slopes).clip(min=0).reshape(inner.shape)
        total = np.concatenate([[0.0], np.cumsum((np.sqrt(squares) * weights).sum(1) * half)])
        return torch.from_numpy(total[np.searchsorted(grid, points)])


def bend_weights(kind: CurveKind, num_bends: int, t: float) -> list[float]:
    """c_j(t) of the n inner control points."""
    degree = num_bends + 1
    if kind == "polychain":
        return [max(0.0, 1 - abs(t * degree - j)) for j in range(1, degree)]
    return [_bernstein(degree, j, t) for j in range(1, degree)]


def _bend_slopes(kind: CurveKind, num_bends: int, t: float) -> list[float]:
    """c_j′(t), inside the pieces of a chain."""
    degree = num_bends + 1
    if kind == "polychain":
        distances = [t * degree - j for j in range(1, degree)]
        return [0.0 if abs(d) >= 1 else (degree if d < 0 else -degree) for d in distances]
    return [degree * (_bernstein(num_bends, j - 1, t) - _bernstein(num_bends, j, t)) for j in range(1, degree)]


def _bernstein(degree: int, j: int, t: float) -> float:
    return comb(degree, j) * t**j * (1 - t) ** (degree - j)


def _mixed(offsets: Tensor, weights: list[float]) -> Tensor:
    return offsets.new_tensor(weights) @ offsets


def flat_then_linear(done: float) -> float:
    """Factor of the learning rate when a share ``done`` of the training is: 1 to 50 %, 1 % from 90 %, a line between.

    The schedule of Garipov et al.
    """
    return 1 - 0.99 * min(1.0, max(0.0, (done - 0.5) / 0.4))


@dataclass(frozen=True)
class CurveTraining:
    """How the inner points of a curve are found; the defaults are those of Garipov et al. (arXiv 1802.10026).

    Attributes:
        kind: ``"bezier"`` or ``"polychain"``.
        num_bends: inner control points; 1 is a quadratic Bezier curve or a chain of two segments. (The authors' program
            counts the ends too: its default of 3 "bends" is 1 here.)
        num_epochs: passes over the chunks of the objective.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: coefficient λ of ½λ‖γ(t)‖², added to the loss.
        schedule: factor of the learning rate by the share of the training that is done.
        optimizer: ``[δ] -> optimizer`` in place of SGD; without a weight decay of its own, which would be on δ.
    """

    kind: CurveKind = "bezier"
    num_bends: int = 1
    num_epochs: int = 50
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Callable[[float], float] = flat_then_linear
    optimizer: MakeOptimizer | None = None

    def __post_init__(self) -> None:
        """Refuse what is no curve or no training.

        Raises:
            ValueError: an unknown kind, or a number that is not positive.
        """
        if self.kind not in get_args(CurveKind):
            raise ValueError(f"Expected kind to be one of 'bezier', 'polychain', got {self.kind!r}.")
        require_positive(num_bends=self.num_bends, num_epochs=self.num_epochs, lr=self.lr)

    def optimizer_of(self, offsets: Tensor) -> torch.optim.Optimizer:
        """What moves δ."""
        if self.optimizer is not None:
            return self.optimizer([offsets])
        return torch.optim.SGD([offsets], lr=self.lr, momentum=self.momentum)


def train_curve(
    objective: Objective,
    line: Path,
    training: CurveTraining | None = None,
    *,
    generator: torch.Generator,
    start: CurvedPath | None = None,
    progress: Progress | None = None,
) -> CurvedPath:
    """A curve of low loss between the ends of ``line``: SGD on E_t L(γ(t)), t uniform on [0, 1] and one t per batch.

    The ends stay; the inner points start on the line. Batches are the chunks of ``objective``, in a new order each
    epoch; with ``mode="train"`` BatchNorm normalises with their own statistics, and dropout is off in either mode.
    Costs ``num_epochs`` gradients of the objective and n + 3 vectors of the size of θ. Source: Garipov et al., arXiv
    1802.10026, §3; there dropout stays as the module has it.

    Args:
        objective: the module on training examples only, cut to the batch size wanted (``chunk_size``).
        line: the straight line between the two states.
        training: kind of curve and how it is trained.
        generator: source of the order of batches and of t.
        start: a trained curve to go on from, with as many bends.
        progress: told after each epoch.

    Raises:
        ValueError: the module has BatchNorm and ``objective`` is in eval mode, or ``start`` is another kind of curve.
    """
    training = training or CurveTraining()
    _check(objective, training, start)
    first = line(0.0)[0]
    offsets = first.new_zeros(training.num_bends, len(first)) if start is None else start.offsets.detach().clone()
    walk = _Walk(objective, line, offsets, training)
    means: list[float] = []
    for epoch in range(training.num_epochs):
        means.append(walk.epoch(epoch, generator))
        if not isfinite(means[-1]):
            break
        if progress is not None:
            progress(epoch + 1, training.num_epochs, "epochs of a curve")
    losses = torch.tensor(means, dtype=torch.float64)
    return CurvedPath(line, offsets.detach(), training.kind, losses, diverged=not isfinite(means[-1]))


class _Walk:
    """SGD on the inner points of a curve."""

    def __init__(self, objective: Objective, line: Path, offsets: Tensor, training: CurveTraining) -> None:
        self.objective, self.line, self.offsets, self.training = objective, line, offsets, training
        self.optimizer = training.optimizer_of(offsets)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def epoch(self, number: int, generator: torch.Generator) -> float:
        """One pass over the chunks: their mean loss, NaN or infinite if the walk had to stop."""
        num_chunks, losses = len(self.objective.batches), list[float]()
        order = torch.randperm(num_chunks, generator=generator).tolist()
        ts = torch.rand(num_chunks, generator=generator, dtype=torch.float64).tolist()
        for position, (index, t) in enumerate(zip(order, ts, strict=True)):
            self._set_rate((number + position / num_chunks) / self.training.num_epochs)
            loss = self._step(index, t)
            if loss is not None:
                losses.append(loss)
            if not isfinite(sum(losses)):
                return nan
        return sum(losses) / len(losses) if losses else nan

    def _set_rate(self, done: float) -> None:
        factor = self.training.schedule(done)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _step(self, index: int, t: float) -> float | None:
        weights = self.offsets.new_tensor(bend_weights(self.training.kind, self.training.num_bends, t))
        theta = self.line(t)[0] + weights @ self.offsets
        found = chunk_step(self.objective, index, theta)
        if found is None:
            return None
        loss, gradient = found
        if not bool(gradient.isfinite().all()):
            return nan
        self.offsets.grad = torch.outer(weights, gradient.add(theta, alpha=self.training.weight_decay))
        self.optimizer.step()
        return loss


def _check(objective: Objective, training: CurveTraining, start: CurvedPath | None) -> None:
    if objective.mode != "train" and has_batch_norm(objective.module_at(objective.theta())):
        raise ValueError(
            "A module with BatchNorm has no running statistics on the curve while that is trained. Make the Objective "
            "with mode='train'."
        )
    if start is not None and (start.kind, start.num_bends) != (training.kind, training.num_bends):
        raise ValueError(
            f"Expected a start with kind={training.kind!r} and {training.num_bends} bends, got {start.kind!r} with "
            f"{start.num_bends}."
        )
