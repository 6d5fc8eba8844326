"""What all measures of sharpness share: the point θ that they look around, and what they report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.sharpness.perturbations import norm
from lmc_lightning.landscape.statistics.bands import student_quantile

STATIONARY = "stationary"
"""Flag: the gradient at θ was too small to give a direction, so that an ascent started slightly off θ."""
NONFINITE = "nonfinite"
"""Flag: a loss that the number is made of was NaN or infinite."""


@dataclass(frozen=True)
class Centre:
    """The point θ around which sharpness is measured, with what all measures share."""

    theta: Tensor = field(repr=False)
    loss: float
    gradient: Tensor = field(repr=False)
    """∇L(θ) ``(P,)``."""
    error: float | None = None
    """1 − accuracy, of classifiers."""

    @property
    def gradient_norm(self) -> float:
        """‖∇L(θ)‖₂ of the whole probe set."""
        return norm(self.gradient)


def centre_at(objective: Objective, theta: Tensor) -> Centre:
    """Loss and gradient at θ, for several measures to share; one loss and one gradient."""
    evaluation = objective.evaluate(theta)
    return Centre(theta, evaluation.loss, objective.grad(theta), evaluation.error)


@dataclass(frozen=True)
class Measured:
    """One measure of sharpness at θ, with its evidence. Costs are beside those of the shared :class:`Centre`."""

    value: float
    """NaN where the measure is undefined; ``flags`` says why."""
    radius: float | None = None
    """As it was given; ``details["radius_kind"]`` says in which unit."""
    num_gradients: int = 0
    """Gradients of the whole probe set."""
    num_losses: int = 0
    """Losses of the whole probe set."""
    stderr: float | None = None
    """Over random directions; of ``m_sharpness`` and ``gradient_norm_rms``, over chunks."""
    num_samples: int | None = None
    """How many directions or chunks the mean is over."""
    unit: str = "loss"
    flags: tuple[str, ...] = ()
    converged: bool = True
    """Whether the search that gave the value came to its end."""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % Student interval with n − 1 degrees of freedom, from n = 8 samples on."""
        if self.stderr is None or self.num_samples is None:
            return None
        half = student_quantile(self.num_samples) * self.stderr
        return None if math.isnan(half) else (self.value - half, self.value + half)

    def evidence(self) -> dict[str, Any]:
        """What a record says of the number beside its value and error."""
        return {
            "radius": self.radius,
            "flags": list(self.flags),
            "own_gradients": self.num_gradients,
            "own_losses": self.num_losses,
            "num_samples": self.num_samples,
            "interval": self.interval,
            **self.details,
        }


def mean_of(samples: Tensor, **evidence: Any) -> Measured:
    """The mean of independent samples ``(n,)`` with its standard error, from two on."""
    size = len(samples)
    stderr = float(samples.std()) / math.sqrt(size) if size > 1 else None
    return Measured(
        float(samples.mean()), stderr=stderr, num_samples=size, flags=nonfinite(samples.isfinite().all()), **evidence
    )


def nonfinite(all_finite: bool | Tensor) -> tuple[str, ...]:
    """The flag of numbers of which some are not finite, if it applies."""
    return () if all_finite else (NONFINITE,)


def gradient_norm(objective: Objective, theta: Tensor, *, centre: Centre | None = None) -> Measured:
    """‖∇L(θ)‖₂ of the whole probe set. Not invariant to rescaling around a ReLU; one gradient."""
    value = centre.gradient_norm if centre else norm(objective.grad(theta))
    return Measured(value, num_gradients=0 if centre else 1, unit="", flags=nonfinite(math.isfinite(value)))


def require_positive(**values: float) -> None:
    """Refuse radii and numbers that are not positive.

    Raises:
        ValueError: one is not.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
