"""Sharpness of the loss while a network trains."""

from typing import Any

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.visits import Visit
from lmc_lightning.landscape.sharpness import sharpness
from lmc_lightning.recording import Measurement, Quantity


class Sharpness(MeasurementCallback):
    """How far the mean training loss rises near θ: in the worst case, under relative changes, and on average.

    The same probe examples before and after, and the same random directions at every visit. Costs ``num_steps``
    gradients and ``2 + num_steps + 2 · num_samples`` losses over the probe set.

    ===========================  ====================================================================================
    ``sharpness/worst_case``     max of L(θ+ε) − L(θ) over ‖ε‖₂ ≤ ρ, from below by gradient ascent (one step is SAM's)
    ``sharpness/adaptive``       the same over ‖ε/abs(θ)‖₂ ≤ ρ, one step: invariant to ReLU rescaling (ASAM's)
    ``sharpness/average``        mean of L(θ+ε) − L(θ) over Gaussian ε, with ``_stderr`` over directions
    ``sharpness/gradient_norm``  ‖∇L(θ)‖₂ of the whole probe set
    ===========================  ====================================================================================

    Sources: Foret et al. (arXiv 2010.01412), Kwon et al. (arXiv 2102.11600).

    Args:
        rho: radius of ``worst_case``, absolute.
        adaptive_rho: radius of ``adaptive``, in relative changes.
        num_steps: ascent steps of ``worst_case``.
        sigma: expected norm of the noise of ``average``, relative to ‖θ‖.
        num_samples: random directions of ``average``, each taken both ways.
        **common: see :class:`MeasurementCallback`.
    """

    kind = "sharpness"

    def __init__(
        self,
        *,
        rho: float = 0.05,
        adaptive_rho: float = 0.5,
        num_steps: int = 1,
        sigma: float = 0.01,
        num_samples: int = 8,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if min(rho, adaptive_rho, sigma) <= 0 or num_steps < 1 or num_samples < 2:
            raise ValueError(
                f"Expected positive rho, adaptive_rho and sigma, num_steps ≥ 1 and num_samples ≥ 2 (for an error), got "
                f"{rho}, {adaptive_rho}, {sigma}, {num_steps} and {num_samples}."
            )
        self.rho, self.adaptive_rho, self.num_steps = rho, adaptive_rho, num_steps
        self.sigma, self.num_samples = sigma, num_samples

    def measure(self, visit: Visit) -> Measurement:
        """The sharpness at this visit."""
        result = sharpness(
            visit.objective,
            visit.theta,
            rho=self.rho,
            adaptive_rho=self.adaptive_rho,
            num_steps=self.num_steps,
            sigma=self.sigma,
            num_samples=self.num_samples,
            generator=visit.generator,
        )
        rises = {"worst_case": result.worst_case, "adaptive": result.adaptive, "average": result.average}
        quantities = [
            Quantity(
                self.key(name),
                rise.value,
                rise.stderr,
                unit="loss",
                evidence={"radius": rise.radius, "stationary": rise.stationary},
            )
            for name, rise in rises.items()
        ]
        return Measurement(
            (*quantities, Quantity(self.key("gradient_norm"), result.gradient_norm)),
            evidence={"num_gradients": result.num_gradients, "num_losses": result.num_losses},
        )
