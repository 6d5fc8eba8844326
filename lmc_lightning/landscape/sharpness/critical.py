"""Critical sharpness: the step length along an update at which the loss stops falling."""

import math

import torch
from scipy.optimize import brentq
from torch import Tensor

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.sharpness.measured import Centre, Measured, centre_at, nonfinite, require_positive
from lmc_lightning.landscape.sharpness.perturbations import norm

UNDEFINED = "undefined"
"""Flag: the loss does not fall along the direction, gᵀΔ ≤ 0."""
CENSORED = "censored"
"""Flag: the loss does not rise up to η_max, and the value is its bound 2/η_max from above."""
UNRESOLVED = "unresolved"
"""Flag: the loss does not fall by more than its own rounding."""

RATIO = 1.25
"""Between steps that are tried one after another."""
_FIRST_STEP = 1e-3
_LONGEST_STEP = 10.0
_TRIALS = 40


def critical_sharpness(
    objective: Objective,
    theta: Tensor,
    direction: Tensor | None = None,
    *,
    eta_max: float | None = None,
    tolerance: float = 1e-3,
    centre: Centre | None = None,
) -> Measured:
    """2/η_c, η_c the smallest η > 0 with L(θ − ηΔ) > L(θ) (arXiv 2601.16979).

    ΔᵀHΔ/(gᵀΔ) where L is quadratic: a curvature along the update, at most λ_max where Δ is the gradient. Steps are
    tried from one of a thousandth of ‖θ‖, or below it one at which the loss falls as its slope says (by half of ηgᵀΔ at
    least), each longer by a quarter, until the loss has risen; Brent's method finds the crossing between the last two.
    η_c is the smallest one up to that resolution: a rise between two steps that is over before the second is not seen.

    Costs 10 to 40 losses. Multiplied by c under L → cL + d; invariant to rotations; not to rescaling around a ReLU.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        direction: Δ ``(P,)``, of which a step subtracts η; the gradient by default.
        eta_max: Longest step; by default ten times ‖θ‖ long. The value is censored where the loss does not rise.
        tolerance: Relative, of η_c.
        centre: Loss and gradient at θ, where known.

    Raises:
        ValueError: ``eta_max`` or ``tolerance`` is not positive.
    """
    require_positive(eta_max=1 if eta_max is None else eta_max, tolerance=tolerance)
    centre = centre or centre_at(objective, theta)
    ray = _Ray(objective, centre, centre.gradient if direction is None else direction)
    if not ray.slope > 0 or not math.isfinite(ray.slope):
        return ray.report(math.nan, UNDEFINED)
    size = (norm(theta) or 1.0) / ray.length
    longest = _LONGEST_STEP * size if eta_max is None else eta_max
    lower = _falling(ray, min(max(_FIRST_STEP * size, ray.resolvable), longest))
    if lower is None:
        return ray.report(math.nan, UNRESOLVED)
    while True:
        upper = min(RATIO * lower, longest)
        if ray.rise(upper) > 0:
            break
        if upper == longest:
            return ray.report(longest, CENSORED)
        lower = upper
    critical = brentq(ray.rise, lower, upper, xtol=tolerance * lower)
    return ray.report(float(critical))


class _Ray:
    """The loss on θ − ηΔ beyond that at θ, each η evaluated once."""

    def __init__(self, objective: Objective, centre: Centre, direction: Tensor) -> None:
        self._objective, self._centre, self._direction = objective, centre, direction
        self._rounding = torch.finfo(centre.theta.dtype).eps * abs(centre.loss)
        self._known: dict[float, float] = {}
        self._diverged = False
        self.slope = float(torch.dot(centre.gradient.double(), direction.double()))
        self.length = norm(direction)

    def rise(self, eta: float) -> float:
        """L(θ − ηΔ) − L(θ) less what may be rounding; a loss that is no number counts as a rise."""
        if eta not in self._known:
            loss = self._objective.evaluate(self._centre.theta - eta * self._direction).loss
            finite = math.isfinite(loss)
            self._diverged |= not finite
            rise = loss - self._centre.loss if finite else self.slope * eta
            self._known[eta] = rise - self._rounding
        return self._known[eta]

    def falls(self, eta: float) -> bool:
        """Whether the loss falls as its slope says, by half at least."""
        return self.rise(eta) <= -self.slope * eta / 2

    @property
    def resolvable(self) -> float:
        """The step at which the fall that the slope says stands out of the rounding of the loss."""
        return 4 * self._rounding / self.slope

    def vertex(self, eta: float) -> float:
        """Where the parabola through θ, its slope there and the loss at η has risen again."""
        curvature = 2 * (self.rise(eta) + self.slope * eta) / eta**2
        return 2 * self.slope / curvature if curvature > 0 else math.inf

    def report(self, eta: float, *flags: str) -> Measured:
        """The value for a critical step η, and how it was found."""
        return Measured(
            2 / eta,
            num_losses=len(self._known),
            unit="1/step",
            flags=(*flags, *nonfinite(not self._diverged)),
            converged=CENSORED not in flags,
            details={"critical_step": eta, "resolution": RATIO, "slope": self.slope},
        )


def _falling(ray: _Ray, eta: float) -> float | None:
    """A step at which the loss falls as its slope says, a quarter of the expected crossing if possible."""
    for _ in range(_TRIALS):
        if eta < ray.resolvable:
            return None
        if ray.falls(eta):
            return eta
        eta = min(ray.vertex(eta), eta) / 4
    return None
