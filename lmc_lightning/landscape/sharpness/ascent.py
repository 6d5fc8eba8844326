"""Sharpness in the worst case: the largest rise of the loss in a ball or a box around θ, from below by ascent."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmc_lightning.core.objective import Objective
from lmc_lightning.core.random_vectors import sphere
from lmc_lightning.landscape.sharpness.measured import (
    STATIONARY,
    Centre,
    Measured,
    centre_at,
    nonfinite,
    require_positive,
)
from lmc_lightning.landscape.sharpness.perturbations import Radius, lengths, norm
from lmc_lightning.landscape.statistics.bands import stderr_data

KESKAR_STEPS = 10
_OFF_CENTRE = 0.01
"""Where an ascent starts at a stationary point, as a share of the radius."""


def worst_case(
    objective: Objective,
    theta: Tensor,
    rho: float,
    num_steps: int = 1,
    *,
    radius: Radius = "absolute",
    centre: Centre | None = None,
) -> Measured:
    """max over ‖ε‖₂ ≤ ρ of L(θ + ε) − L(θ), from below by normalised gradient ascent.

    The first step is the perturbation of SAM, ε = ρg/‖g‖ (arXiv 2010.01412). Further ones are projected back on the
    ball, one that does not rise is taken back and halved, and the highest point counts. Negative where ρ is too long
    for so few steps. ½ρ²λ_max at a minimum where L is quadratic, ρ‖g‖ where it is linear.

    Invariant to rotations of θ. Not to rescaling around a ReLU, unless ``radius="filter"``.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        rho: Radius.
        num_steps: Ascent steps; each costs a loss and, from the second on, a gradient where the last one rose.
        radius: Unit of ``rho``; with ``"filter"`` the ball is the ellipsoid Σ_f ‖ε_f‖²/‖w_f‖² ≤ ρ².
        centre: Loss and gradient at θ, where known.

    Raises:
        ValueError: ``rho`` or ``num_steps`` is not positive.
    """
    scale = lengths(theta, radius, objective.layout)
    return _highest(objective, theta, _Ball(scale, rho), num_steps, radius, centre)


def adaptive(objective: Objective, theta: Tensor, rho: float, *, centre: Centre | None = None) -> Measured:
    """max over ‖ε/abs(θ)‖₂ ≤ ρ of L(θ + ε) − L(θ), from below by the one step ε = ρ θ²g/‖abs(θ)·g‖.

    Zeros of θ stay. Invariant to rescalings of θ that leave the network's function as it is, such as w₁ → cw₁,
    w₂ → w₂/c around a ReLU (arXiv 2102.11600; ASAM's training step differs: it adds 0.01 to abs(θ)).

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        rho: Radius of the relative changes.
        centre: Loss and gradient at θ, where known.

    Raises:
        ValueError: ``rho`` is not positive.
    """
    return _highest(objective, theta, _Ball(theta.abs(), rho), 1, "weight", centre)


def adaptive_linf(
    objective: Objective, theta: Tensor, rho: float, num_steps: int = 1, *, centre: Centre | None = None
) -> Measured:
    """max over ‖ε/abs(θ)‖_∞ ≤ ρ of L(θ + ε) − L(θ), from below by steps ε = ρ abs(θ)·sign(g) (arXiv 2302.07011).

    Every weight may change by the share ρ of itself at once. Zeros of θ stay; invariant as :func:`adaptive` is.
    ρ Σ abs(θ_i g_i) where L is linear.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        rho: Largest relative change of a weight.
        num_steps: Ascent steps, as in :func:`worst_case`.
        centre: Loss and gradient at θ, where known.

    Raises:
        ValueError: ``rho`` or ``num_steps`` is not positive.
    """
    return _highest(objective, theta, _Box(theta.abs(), rho), num_steps, "weight", centre)


def keskar(
    objective: Objective,
    theta: Tensor,
    epsilon: float = 1e-3,
    num_steps: int = KESKAR_STEPS,
    *,
    centre: Centre | None = None,
) -> Measured:
    """100·(max − L)/(1 + L) [%], the maximum over the box abs(ε_i) ≤ ε(abs(θ_i) + 1) (arXiv 1609.04836).

    From below by steps of signs, projected on the box, where the source runs ten steps of L-BFGS-B. Not invariant to
    rescaling. Undefined where L ≤ −1.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        epsilon: Half the width of the box.
        num_steps: Ascent steps, as in :func:`worst_case`.
        centre: Loss and gradient at θ, where known.

    Raises:
        ValueError: ``epsilon`` or ``num_steps`` is not positive.
    """
    known = centre or centre_at(objective, theta)
    found = _highest(objective, theta, _Box(theta.abs() + 1, epsilon), num_steps, "box", known)
    base = 1 + known.loss
    value = 100 * found.value / base if base > 0 else math.nan
    return Measured(
        value, epsilon, found.num_gradients, found.num_losses, unit="%", flags=found.flags, details=found.details
    )


def m_sharpness(
    objective: Objective, theta: Tensor, rho: float, num_steps: int = 1, *, radius: Radius = "absolute"
) -> Measured:
    """The mean over chunks of the chunk's own :func:`worst_case`, chunks weighted by their examples (arXiv 2010.01412).

    The chunks are those of the objective: ``Objective(…, chunk_size=128)`` gives m = 128. At least as large as
    ``worst_case`` where that is exact, since each chunk chooses its own ε. Invariances are those of ``worst_case``.
    Costs ``num_steps`` gradients and ``1 + num_steps`` losses of the whole set. The standard error is over chunks.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        rho: Radius.
        num_steps: Ascent steps in each chunk.
        radius: Unit of ``rho``.

    Raises:
        ValueError: ``rho`` or ``num_steps`` is not positive.
    """
    require_positive(rho=rho, num_steps=num_steps)
    ball = _Ball(lengths(theta, radius, objective.layout), rho)

    def rise(index: int) -> tuple[float, ...]:
        chunk = _Chunk(objective, index)
        found = _ascend(chunk, Centre(theta, chunk.loss(theta), chunk.grad(theta)), ball, num_steps)
        return found.value, found.num_gradients, STATIONARY in found.flags

    weights, (values, gradients, stationary) = _over_chunks(objective, rise, 3)
    return _mean_over_chunks(
        values,
        weights,
        radius=rho,
        num_gradients=1 + math.ceil(float(gradients.mean())),
        num_losses=1 + num_steps,
        flags=(STATIONARY,) if stationary.any() else (),
        details={"radius_kind": radius, "num_stationary": int(stationary.sum())},
    )


def gradient_norm_rms(objective: Objective, theta: Tensor) -> Measured:
    """√(mean_b ‖g_b‖²), g_b the gradient of one chunk's mean loss, chunks weighted by their examples.

    Above ``gradient_norm`` by the noise of the chunks' gradients; depends on the chunk size. The standard error is over
    chunks, by the delta method. One gradient.
    """
    weights, (squares,) = _over_chunks(objective, lambda i: (norm(objective.chunk_gradient(i, theta)) ** 2,), 1)
    square = _mean_over_chunks(squares, weights)
    value = math.sqrt(square.value) if square.value >= 0 else math.nan
    stderr = None if square.stderr is None or not value > 0 else square.stderr / (2 * value)
    return Measured(value, num_gradients=1, stderr=stderr, num_samples=square.num_samples, unit="", flags=square.flags)


@dataclass(frozen=True)
class _Ball:
    """‖δ‖₂ ≤ ρ in the coordinates δ = ε/scale."""

    scale: Tensor
    rho: float

    def first_order(self, gradient: Tensor) -> float:
        """The rise to the edge if the loss were linear."""
        return self.rho * norm(self.scale * gradient)

    def uphill(self, gradient: Tensor) -> Tensor:
        """The direction of steepest ascent, of length 1."""
        scaled = self.scale * gradient
        return scaled / (norm(scaled) or 1.0)

    def inside(self, delta: Tensor) -> Tensor:
        length = norm(delta)
        return delta * (self.rho / length) if length > self.rho else delta


class _Box(_Ball):
    """abs(δ_i) ≤ ρ in the coordinates δ = ε/scale."""

    def first_order(self, gradient: Tensor) -> float:
        return self.rho * float((self.scale * gradient).abs().sum(dtype=torch.float64))

    def uphill(self, gradient: Tensor) -> Tensor:
        return (self.scale * gradient).sign()

    def inside(self, delta: Tensor) -> Tensor:
        return delta.clamp(-self.rho, self.rho)


@dataclass(frozen=True)
class _Chunk:
    """The loss of one chunk, as a function of θ."""

    objective: Objective
    index: int

    def loss(self, theta: Tensor) -> float:
        return self.objective.chunk_loss(self.index, theta)

    def grad(self, theta: Tensor) -> Tensor:
        return self.objective.chunk_gradient(self.index, theta)


def _highest(
    objective: Objective, theta: Tensor, ball: _Ball, num_steps: int, kind: str, centre: Centre | None
) -> Measured:
    require_positive(rho=ball.rho, num_steps=num_steps)
    found = _ascend(objective, centre or centre_at(objective, theta), ball, num_steps)
    return Measured(
        found.value,
        ball.rho,
        found.num_gradients,
        num_losses=num_steps,
        flags=found.flags,
        details={"radius_kind": kind, "num_steps": num_steps},
    )


def _ascend(surface: Objective | _Chunk, centre: Centre, ball: _Ball, num_steps: int) -> Measured:
    """Projected ascent; the value is the highest rise found, and NaN where no loss on the way was a number."""
    theta, gradient, num_gradients = centre.theta, centre.gradient, 0
    delta, length, height = torch.zeros_like(theta), ball.rho, 0.0
    rises: list[float] = []
    # A rise of first order that drowns in the rounding of the loss gives no direction to go.
    stationary = moved = ball.first_order(gradient) <= torch.finfo(theta.dtype).eps * abs(centre.loss)
    if stationary:
        start = sphere(theta.numel(), torch.Generator().manual_seed(0)).to(theta)
        delta = _OFF_CENTRE * ball.rho * (start.sign() if isinstance(ball, _Box) else start)
    for _ in range(num_steps):
        if moved:
            gradient = surface.grad(theta + ball.scale * delta)
            num_gradients += 1
        trial = ball.inside(delta + length * ball.uphill(gradient))
        rises.append(float(surface.loss(theta + ball.scale * trial)) - centre.loss)
        moved = rises[-1] > height
        if moved:
            delta, height = trial, rises[-1]
        length = min(2 * length, ball.rho) if moved else length / 2
    highest = max((rise for rise in rises if not math.isnan(rise)), default=math.nan)
    flags = ((STATIONARY,) if stationary else ()) + nonfinite(all(map(math.isfinite, rises)))
    return Measured(highest, ball.rho, num_gradients, num_steps, flags=flags)


def _over_chunks(
    objective: Objective, row: Callable[[int], tuple[float, ...]], num_columns: int
) -> tuple[Tensor, Tensor]:
    """The weights ``(B,)`` of the chunks of all processes that count, and what ``row`` gives of each, ``(c, B)``."""
    local = objective.baseline.local_weights.tolist()

    def rows() -> Tensor:
        found = [(weight, *row(index)) for index, weight in enumerate(local) if weight]
        return torch.tensor(found, dtype=torch.float64).reshape(-1, 1 + num_columns)

    table = objective.collective.gather(rows).T
    return table[0], table[1:]


def _mean_over_chunks(values: Tensor, weights: Tensor, **evidence: object) -> Measured:
    flags = (*evidence.pop("flags", ()), *nonfinite(values.isfinite().all()))  # type: ignore[misc]
    return Measured(
        float(values @ weights),
        stderr=stderr_data(values, weights),
        num_samples=len(values),
        flags=flags,
        **evidence,  # type: ignore[arg-type]
    )
