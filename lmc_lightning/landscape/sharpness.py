"""Sharpness of a mean loss at one point: how far it rises nearby, in the worst case and on average."""

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmc_lightning.core.objective import Objective
from lmc_lightning.core.random_vectors import gaussian, sphere

_OFF_CENTRE = 0.01
"""Where an ascent starts at a stationary point, as a share of the radius."""


@dataclass(frozen=True)
class Centre:
    """The point θ around which sharpness is measured, with what all measures share."""

    theta: Tensor = field(repr=False)
    loss: float
    gradient: Tensor = field(repr=False)
    """∇L(θ) ``(P,)``."""
    confidence: float | None
    """Mean largest predicted probability, of classifiers."""

    @property
    def gradient_norm(self) -> float:
        """‖∇L(θ)‖₂ of the whole probe set."""
        return _norm(self.gradient)


@dataclass(frozen=True)
class Rise:
    """A rise L(θ + ε) − L(θ) of the mean loss near θ [loss]."""

    value: float
    radius: float
    """What bounds ε (ρ), or the standard deviation of its entries (σ); absolute."""
    num_gradients: int
    """Gradients of the whole probe set spent beside that at θ."""
    num_losses: int
    """Losses of the whole probe set spent beside that at θ."""
    stderr: float | None = None
    """Over random directions, from two on."""
    stationary: bool = False
    """Whether the gradient at θ was too small to give a direction, so that the ascent started off θ."""


@dataclass(frozen=True)
class SharpnessResult:
    """Four measures of sharpness at one θ, on the same probe set and from one shared gradient.

    Attributes:
        worst_case: Largest rise in a ball.
        adaptive: Largest rise in a ball of relative changes.
        average: Mean rise under Gaussian noise.
        gradient_norm: ‖∇L(θ)‖₂.
        loss: L(θ); with ``confidence`` the state in which sharpness was taken.
        confidence: Mean largest predicted probability, of classifiers.
        num_gradients: Gradients of the whole probe set, all of them.
        num_losses: Losses of the whole probe set, all of them.
        seconds: Wall-clock time [s].
    """

    worst_case: Rise
    adaptive: Rise
    average: Rise
    gradient_norm: float
    loss: float
    confidence: float | None
    num_gradients: int
    num_losses: int
    seconds: float


def sharpness(
    objective: Objective,
    theta: Tensor,
    *,
    rho: float = 0.05,
    adaptive_rho: float = 0.5,
    num_steps: int = 1,
    sigma: float = 0.01,
    num_samples: int = 8,
    generator: torch.Generator,
) -> SharpnessResult:
    """``worst_case``, ``adaptive``, ``average`` and ``gradient_norm`` at θ.

    Cost: up to ``num_steps`` gradients and ``2 + num_steps + 2 · num_samples`` losses. Equal seeds of ``generator``
    compare points under common random directions.

    Raises:
        ValueError: A radius or a number that is not positive.
    """
    began = time.perf_counter()
    centre = centre_at(objective, theta)
    rises = (
        average(objective, theta, sigma, num_samples, generator, centre=centre),
        worst_case(objective, theta, rho, num_steps, centre=centre),
        adaptive(objective, theta, adaptive_rho, centre=centre),
    )
    return SharpnessResult(
        average=rises[0],
        worst_case=rises[1],
        adaptive=rises[2],
        gradient_norm=centre.gradient_norm,
        loss=centre.loss,
        confidence=centre.confidence,
        num_gradients=1 + sum(rise.num_gradients for rise in rises),
        num_losses=1 + sum(rise.num_losses for rise in rises),
        seconds=time.perf_counter() - began,
    )


def centre_at(objective: Objective, theta: Tensor) -> Centre:
    """Loss and gradient at θ, for several measures to share."""
    evaluation = objective.evaluate(theta)
    return Centre(theta, evaluation.loss, objective.grad(theta), evaluation.confidence)


def gradient_norm(objective: Objective, theta: Tensor) -> float:
    """‖∇L(θ)‖₂ of the whole probe set."""
    return _norm(objective.grad(theta))


def worst_case(
    objective: Objective, theta: Tensor, rho: float, num_steps: int = 1, *, centre: Centre | None = None
) -> Rise:
    """max over ‖ε‖₂ ≤ ρ of L(θ + ε) − L(θ), from below by normalised gradient ascent.

    The first step is the perturbation of SAM, ε = ρg/‖g‖ (arXiv 2010.01412). Further ones are projected back on the
    ball, one that does not rise is taken back and halved, and the highest point counts. Negative where ρ is too long
    for so few steps.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        rho: Radius, absolute.
        num_steps: Ascent steps; each costs a loss and, from the second on, a gradient where the last one rose.
        centre: Loss and gradient at θ, where known.

    Raises:
        ValueError: ``rho`` or ``num_steps`` is not positive.
    """
    return _ascent(objective, centre or centre_at(objective, theta), torch.ones_like(theta), rho, num_steps)


def adaptive(objective: Objective, theta: Tensor, rho: float, *, centre: Centre | None = None) -> Rise:
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
    return _ascent(objective, centre or centre_at(objective, theta), theta.abs(), rho, num_steps=1)


def average(
    objective: Objective,
    theta: Tensor,
    sigma: float,
    num_samples: int,
    generator: torch.Generator,
    *,
    centre: Centre | None = None,
) -> Rise:
    """E L(θ + ε) − L(θ) over ε ~ N(0, s²I) with s = σ‖θ‖/√P: noise of a given share of the norm of θ.

    Every direction is taken both ways, which cancels the slope; the standard error is over the pairs. Near a point
    where L is quadratic the value is ½ s² tr H.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        sigma: Expected norm of ε relative to ‖θ‖.
        num_samples: Independent directions, two losses each.
        generator: Source of the directions; equal seeds give common random numbers.
        centre: Loss at θ, where known.

    Raises:
        ValueError: ``sigma`` or ``num_samples`` is not positive.
    """
    _require_positive(sigma=sigma, num_samples=num_samples)
    loss = centre.loss if centre else objective.evaluate(theta).loss
    scale = sigma * _norm(theta) / math.sqrt(theta.numel())
    rises = torch.zeros(num_samples, dtype=torch.float64)
    for index in range(num_samples):
        noise = scale * gaussian(theta.numel(), generator, device=theta.device, dtype=theta.dtype)
        rises[index] = (objective.loss(theta + noise) + objective.loss(theta - noise)) / 2 - loss
    stderr = float(rises.std()) / math.sqrt(num_samples) if num_samples > 1 else None
    return Rise(float(rises.mean()), scale, num_gradients=0, num_losses=2 * num_samples, stderr=stderr)


def _ascent(objective: Objective, centre: Centre, scale: Tensor, rho: float, num_steps: int) -> Rise:
    """Projected ascent in the coordinates δ = ε/scale on the ball ‖δ‖ ≤ ρ."""
    _require_positive(rho=rho, num_steps=num_steps)
    theta, gradient, num_gradients = centre.theta, centre.gradient, 0
    delta, length, height, highest = torch.zeros_like(theta), rho, 0.0, -math.inf
    # A rise of first order that drowns in the rounding of the loss gives no direction to go.
    stationary = moved = rho * _norm(scale * gradient) <= torch.finfo(theta.dtype).eps * abs(centre.loss)
    if stationary:
        delta = _OFF_CENTRE * rho * sphere(theta.numel(), torch.Generator().manual_seed(0)).to(theta)
    for _ in range(num_steps):
        if moved:
            gradient = objective.grad(theta + scale * delta)
            num_gradients += 1
        trial = _projected(delta + length * _direction(scale * gradient), rho)
        rise = float(objective.loss(theta + scale * trial)) - centre.loss
        highest, moved = max(highest, rise), rise > height
        if moved:
            delta, height = trial, rise
        length = min(2 * length, rho) if moved else length / 2
    return Rise(highest, rho, num_gradients, num_losses=num_steps, stationary=stationary)


def _direction(vector: Tensor) -> Tensor:
    norm = _norm(vector)
    return vector / norm if norm else vector


def _projected(vector: Tensor, radius: float) -> Tensor:
    norm = _norm(vector)
    return vector * (radius / norm) if norm > radius else vector


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
