"""Training at the edge of stability: the curvature that the optimizer meets, in units of what it bears."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.spectrum.stability import draw_stability, not_reported, stability_quantities
from lmc_lightning.callbacks.visits.common import Common, Unpack
from lmc_lightning.callbacks.visits.last_step import LastSteps
from lmc_lightning.callbacks.visits.second_order import SecondOrder
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.core.chunks import equal_batches
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.structure import leading_size
from lmc_lightning.landscape.curvature.dynamics import batch_statistics, update_prediction
from lmc_lightning.landscape.curvature.memory_plan import memory_plan
from lmc_lightning.landscape.curvature.stability import GUARD_PAIRS, Stability, stability
from lmc_lightning.landscape.paths.batchnorm import has_batch_norm
from lmc_lightning.loggers import Band, Chart
from lmc_lightning.recording import Measurement


class EdgeOfStability(MeasurementCallback):
    """Curvature over the threshold at which the optimizer's steps diverge, of the whole probe set and of batches.

    The probe set is cut into batches of the training's size. With BatchNorm everything is measured in ``mode="train"``,
    each batch by its own statistics, dropout off, as the optimizer sees it; the evidence says so. Costs about 10 to 20
    Hessian products for the first key, one for ``batch_sharpness``, one for ``update_prediction``, at 2 to 4 gradients
    each, and a copy of θ before each step that is visited.

    ==================================  =============================================================================
    ``stability/full_batch``            top curvature over the optimizer's threshold; above 1, full-batch steps are
                                        linearly unstable (SGD, Adam, AdamW; else ``not_reported`` says why)
    ``stability/mini_batch``            ``batch_sharpness`` over the same threshold, with ``_stderr`` over batches
                                        (SGD with one learning rate)
    ``stability/batch_sharpness``       mean over batches of gᵀHg/‖g‖², each with its own g and H, with ``_stderr``
    ``stability/gradient_noise_scale``  tr Σ/‖g‖² [examples], with ``_stderr`` by jackknife over batches
    ``stability/update_prediction``     −gᵀΔ + ½ΔᵀHΔ of the step Δ that led here, with ``_stderr`` over chunks
    ``stability/update_realised``       the change of the probe loss by that step, with ``_stderr`` over chunks
    ``stability/limit/full_batch``      1, at which full-batch training hovers: a line for charts
    ``stability/limit/mini_batch``      (1−β)/(1+β), at which small batches saturate, with momentum β (SGD)
    ``stability/chart``                 figure of the first two against steps, at the end of the run
    ==================================  =============================================================================

    Full-batch training hovers about 1. With small batches ``mini_batch`` saturates there instead, with momentum β at
    (1−β)/(1+β), and ``full_batch`` stays below it. ``update_realised`` far above ``update_prediction`` says that one
    step is too long for the quadratic model, as when the loss is about to rise.

    Sources: Cohen et al. (arXiv 2103.00065, 2207.14484), Andreyev and Beneventano (arXiv 2412.20553), McCandlish et al.
    (arXiv 1812.06162).

    Args:
        batch_size: examples that one optimizer step sees; by default the training loader's batch size times
            ``accumulate_grad_batches`` (with BatchNorm without that factor). Of one process.
        tolerance: relative residual at which the top curvature counts as converged.
        max_products: most Hessian products for it.
        **common: see :class:`MeasurementCallback`.
    """

    kind = "stability"
    advice = "Raise max_products, or tolerance."

    def __init__(
        self,
        *,
        batch_size: int | None = None,
        tolerance: float = 1e-3,
        max_products: int = 64,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"Expected batch_size to be at least 1 or None (that of the training), got {batch_size}.")
        if not 0 < tolerance < 1 or max_products < 1:
            raise ValueError(f"Expected 0 < tolerance < 1 and max_products ≥ 1, got {tolerance} and {max_products}.")
        self.batch_size, self.tolerance, self.max_products = batch_size, tolerance, max_products
        self._second_order = SecondOrder(self)
        self._seen: int | None = None
        self._last_steps = LastSteps(self.parameters)

    def measure(self, visit: Visit) -> Measurement:
        """Stability, batch sharpness and noise scale at this visit, and what the last step did."""
        checked, batch_norm = self._second_order.objective(visit), has_batch_norm(visit.module)
        batched = self._on_training_batches(visit, checked, batch_norm)
        whole = batched if batch_norm else checked  # without it, larger chunks are the same and cost less
        theta = whole.theta()
        full, gradient, spent = self._full_batch(visit, whole, theta)
        batches = batch_statistics(batched, theta, gradient if batched.num_examples == whole.num_examples else None)
        before = self._last_steps.take(visit.step, theta)
        update = None if before is None else update_prediction(whole, before, theta)
        status = self._second_order.status(full.converged)
        return Measurement(
            tuple(stability_quantities(self.key, full, batches, update, status)),
            evidence={
                "mode": whole.mode,
                "batch_stats": "batch" if batch_norm else None,
                "probe_loss": whole.baseline.loss,
                "probe_error": whole.baseline.error,
                "mean_max_probability": whole.baseline.confidence,
                "num_examples": whole.num_examples,
                "batch_size": batches.batch_size,
                "num_batches": batches.num_batches,
                "num_matvecs": spent["num_matvecs"] + 1 + (update is not None),
                "num_gradients": spent["num_gradients"] + batches.num_gradients + (update is not None),
                **self._second_order.evidence(whole),
                "not_reported": dict(not_reported(full, batches, update)),
            },
        )

    def charts(self) -> list[Chart | Band]:
        """Stability with its two limits, and the change of the loss that was predicted beside the one that came."""
        return [
            Chart("stability and its limits", (self.tag("(limit/)?(full|mini)_batch"),)),
            Band("batch sharpness", self.key("batch_sharpness")),
            Band("gradient noise scale [examples]", self.key("gradient_noise_scale")),
            Chart("change of the loss by the last step", (self.tag("update_(prediction|realised)"),)),
        ]

    def _full_batch(
        self, visit: Visit, objective: Objective, theta: Tensor
    ) -> tuple[Stability, Tensor, dict[str, int]]:
        """Stability and gradient of the mean over all examples, and what they cost."""
        plan = memory_plan(
            theta,
            objective.memory_budget,
            objective.collective,
            num_pairs=1,
            guard=GUARD_PAIRS,
            max_products=self.max_products,
            num_probes=0,
            num_steps=1,
            block_size=1,
        )
        limits: dict[str, Any] = {"max_products": self.max_products, "max_basis": plan.max_basis}
        with objective.hvp(theta, memory_budget=plan.graphs) as product:
            product.on_product = lambda done: visit.progress(done, self.max_products, "products")
            found = stability(visit.optimizers, objective.layout, product=product, tolerance=self.tolerance, **limits)
            gradient = product.gradient()
        return found, gradient, {"num_matvecs": product.num_products, "num_gradients": product.num_gradients}

    def _on_training_batches(self, visit: Visit, checked: Objective, batch_norm: bool) -> Objective:
        """The loss as the optimizer sees it, in batches of the size of training."""
        size = self.batch_size or self._seen
        if size is None and visit.trainer is None:
            raise ValueError("Without a trainer the batch size of the training is not known. Pass batch_size=.")
        if size and self.batch_size is None and visit.trainer is not None and not batch_norm:
            size *= visit.trainer.accumulate_grad_batches
        given, exact = visit.objective.batches, checked.second_order == "autograd"
        return visit.loss_on(
            equal_batches(given, size) if size else given,
            mode="train" if batch_norm else None,
            keep_batches=True,
            memory_budget=visit.objective.memory_budget,
            second_order=checked.second_order,
            dtype=None if exact else torch.float64,
        )

    def forget(self) -> None:
        """Forget parameters and batch size of another run too."""
        super().forget()
        self._second_order.check, self._seen, self._last_steps = None, None, LastSteps(self.parameters)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Read the batch size off the loader, then visit the start."""
        loader = trainer.train_dataloader
        sizes = [getattr(part, "batch_size", None) for part in (loader, getattr(loader, "batch_sampler", None))]
        self._seen = next((size for size in sizes if isinstance(size, int)), None)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the parameters before a step that will be visited."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._seen = self._seen or leading_size(batch)
        if self.leads_to_a_visit(trainer):
            self._last_steps.keep(self._step + 1, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the visits that still wait, and draw all."""
        super().on_train_end(trainer, pl_module)
        keys = [self.key(name) for name in ("full_batch", "mini_batch")]
        if trainer.is_global_zero and any(r.name in keys and r.value is not None for r in self.results):
            chart = Measurement((), figures={self.key("chart"): partial(draw_stability, self.results, keys)})
            self._recorder.add(chart, step=self._step, epoch=trainer.current_epoch, loggers=trainer.loggers)
