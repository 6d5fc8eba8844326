"""Two small measuring callbacks: what every real one does at a visit, and whether it is the truth."""

import torch

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.bridge.objectives import replacements
from lmc_lightning.callbacks.bridge.step import step_function
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.core.objective import Objective, SecondOrder
from lmc_lightning.core.selfcheck import self_check
from lmc_lightning.recording import Measurement, Quantity

STEP = torch.finfo(torch.float64).eps ** (1 / 3)


class Probe(MeasurementCallback):
    """Loss, gradient norm and one Hessian product."""

    kind = "probe"

    def measure(self, visit: Visit) -> Measurement:
        objective, theta = visit.objective, visit.theta
        vector = torch.randn(theta.shape, generator=visit.generator, dtype=theta.dtype)
        with objective.hvp(theta) as hvp:
            product = hvp(vector)
        found = {
            "loss": objective.baseline.loss,
            "gradient_norm": objective.grad(theta).norm(),
            "form": vector @ product,
        }
        quantities = tuple(Quantity(self.key(name), float(value)) for name, value in found.items())
        return Measurement(quantities, evidence={"num_matvecs": 1, "num_gradients": 1})


class Truth(MeasurementCallback):
    """Relative errors of gradient and Hessian product in float64 against central differences along one direction.

    Products are taken by the route that the self-check advises; its verdict is in the evidence.
    """

    kind = "truth"

    def measure(self, visit: Visit) -> Measurement:
        check = self_check(self._in_float64(visit))
        objective = self._in_float64(
            visit, "finite_differences" if check.verdict == "finite_differences" else "autograd"
        )
        theta = objective.theta()
        u, v = (torch.randn(theta.shape, generator=visit.generator, dtype=theta.dtype) for _ in range(2))
        gradient = objective.grad(theta)
        hvp = objective.hvp(theta)
        hu, hv = hvp(u), hvp(v)
        slope = (objective.loss(theta + STEP * v) - objective.loss(theta - STEP * v)) / (2 * STEP)
        difference = (objective.grad(theta + STEP * v) - objective.grad(theta - STEP * v)) / (2 * STEP)
        found = {
            "gradient_error": (gradient @ v - slope).abs() / gradient.norm(),
            "product_error": (hv - difference).norm() / difference.norm(),
            "asymmetry": (u @ hv - v @ hu).abs() / hv.norm() / u.norm(),
            "noise": (objective.hvp(theta)(v) - hv).norm(),
        }
        quantities = tuple(Quantity(self.key(name), float(value)) for name, value in found.items())
        return Measurement(quantities, evidence={"verdict": check.verdict})

    def _in_float64(self, visit: Visit, second_order: SecondOrder = "autograd") -> Objective:
        return Objective(
            visit.module,
            visit.objective.batches,
            step_function(visit.module, self.loss_fn),
            parameters=self.parameters,
            mode=self.mode,
            dtype=torch.float64,
            second_order=second_order,
            keep_batches=True,
            replacements=replacements(visit.module, visit.trainer),
        )
