"""By which route second derivatives are taken in a run: the self-check, made once, and what follows from it."""

from dataclasses import asdict
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.core.chunks import first_examples
from lmc_lightning.core.collective import InterruptedMeasurementError
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.selfcheck import NUM_EXAMPLES, SelfCheck, self_check, self_check_outputs
from lmc_lightning.recording import Status


class SecondOrder:
    """Gives the objective of each visit of a callback, by autograd or by finite differences of gradients.

    Args:
        callback: whose objectives, and in whose name warnings are given.
        of_outputs: whether only derivatives of the network's outputs are taken, for Gauss–Newton matrices.
    """

    def __init__(self, callback: MeasurementCallback, *, of_outputs: bool = False) -> None:
        self.check: SelfCheck | None = None
        self._callback, self._method = callback, self_check_outputs if of_outputs else self_check

    def objective(self, visit: Visit) -> Objective:
        """The objective of this visit, by the route to second derivatives that the self-check of this run found."""
        if self.check is None or visit.trainer is None:  # without a trainer, every module is another one
            self.check = self._self_check(visit)
            if self.check.verdict != "exact":
                where = f" Look at {self.check.suspect}." if self.check.suspect else ""
                who = type(self._callback).__name__
                rank_zero_warn(f"{who}, self-check: {self.check.verdict}, {self.check.reason}.{where}")
        if self.check.verdict != "finite_differences":
            return visit.objective
        return visit.loss_on(visit.objective.batches, dtype=torch.float64, second_order="finite_differences")

    def evidence(self, objective: Objective) -> dict[str, Any]:
        """What the check of this run has found, and the route that was taken."""
        found = None if self.check is None else asdict(self.check)
        return {"self_check": found, "second_order": objective.second_order}

    def status(self, converged: bool) -> Status:
        """Of a number that has converged, or not."""
        if self.check is not None and self.check.verdict == "no_hessian":
            return "unreliable"
        return "ok" if converged else "not_converged"

    def _self_check(self, visit: Visit) -> SelfCheck:
        try:
            few = first_examples(visit.objective.batches[0], NUM_EXAMPLES)
            check = visit.loss_on([few], dtype=torch.float64)
            return visit.objective.collective.agree(lambda: self._method(check, self._callback.seed))
        except InterruptedMeasurementError:
            raise
        except Exception as error:
            return SelfCheck("unchecked", f"the step does not run in float64 ({type(error).__name__}: {error})")
