"""Eigenvalues, trace and density of the Hessian while a network trains."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.bridge import StepBatch
from lmc_lightning.callbacks.visits import Visit
from lmc_lightning.core.collective import InterruptedMeasurementError
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.selfcheck import NUM_EXAMPLES, SelfCheck, self_check
from lmc_lightning.core.structure import NotSliceableError, cut
from lmc_lightning.landscape.curvature import SpectrumResult, Stability, spectrum, stability
from lmc_lightning.plotting.density import plot_density
from lmc_lightning.plotting.style import figure_of
from lmc_lightning.recording import Measurement, Quantity, Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID_POINTS = 512
BANDWIDTH_SHARE = 0.01
"""Bandwidth of the drawn density, as a share of the spectrum's width."""


class HessianSpectrum(MeasurementCallback):
    """Extreme eigenvalues, trace and density of the Hessian of the mean training loss.

    One Lanczos run gives both ends of the spectrum, with a residual for each pair; stochastic Lanczos quadrature on the
    complement of what converged gives trace, density and effective rank. Costs up to ``max_products + num_probes ·
    num_steps`` Hessian products over the probe set, at about 2 gradients each while the gradient graphs fit in memory.

    ======================================  =========================================================================
    ``hessian/lambda_max``                  largest eigenvalue
    ``hessian/lambda_max_stderr_data``      its standard error over examples, by the delta method, from two chunks on
    ``hessian/lambda_max_residual``         ‖Hu − λu‖: some eigenvalue lies within that distance
    ``hessian/eigenvalue_{2..k}``           the next ones, in descending order
    ``hessian/lambda_min``                  smallest (most negative) eigenvalue
    ``hessian/negative_eigenvalue_{2..k}``  the ones above it, in ascending order
    ``hessian/trace``                       tr H, unbiased, with ``_stderr`` over probes and ``_stderr_data`` over data
    ``hessian/effective_rank``              Σλ₊/λ_max
    ``hessian/stability``                   λ_max in units of the optimizer's threshold: above 1, full-batch training is
                                            linearly unstable (SGD family; else ``no_stability`` in the evidence)
    ``hessian/ritz_values``                 histogram of the eigenvalue estimates, unweighted
    ``hessian/density``                     figure of the smoothed spectral density, logarithmic
    ======================================  =========================================================================

    Sources: Ghorbani et al. (arXiv 1901.10159) for the density, Cohen et al. (arXiv 2103.00065) for the threshold.

    Args:
        num_eigenvalues: pairs at the top.
        num_negative: pairs at the bottom.
        num_probes: random probes of trace and density; 8 or more for error bars worth the name, 0 for neither.
        num_steps: Hessian products per probe.
        tolerance: relative residual at which a top eigenvalue counts as converged.
        max_products: most products for the eigenvalues; what has not converged then is flagged.
        density: draw the density and the histogram.
        **common: see :class:`MeasurementCallback`.
    """

    kind = "hessian"
    advice = "Raise max_products, or tolerance."

    def __init__(
        self,
        *,
        num_eigenvalues: int = 5,
        num_negative: int = 1,
        num_probes: int = 8,
        num_steps: int = 24,
        tolerance: float = 1e-3,
        max_products: int = 64,
        density: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if num_eigenvalues < 1 or num_negative < 0 or num_probes < 0 or num_steps < 1:
            raise ValueError(
                f"Expected num_eigenvalues ≥ 1, num_negative ≥ 0, num_probes ≥ 0 and num_steps ≥ 1, got "
                f"{num_eigenvalues}, {num_negative}, {num_probes} and {num_steps}."
            )
        if not 0 < tolerance < 1 or max_products < 1:
            raise ValueError(f"Expected 0 < tolerance < 1 and max_products ≥ 1, got {tolerance} and {max_products}.")
        self.num_eigenvalues, self.num_negative = num_eigenvalues, num_negative
        self.num_probes, self.num_steps = num_probes, num_steps
        self.tolerance, self.max_products = tolerance, max_products
        self.density = density
        self._check: SelfCheck | None = None

    def measure(self, visit: Visit) -> Measurement:
        """The spectrum of the Hessian at this visit."""
        objective = self._verified(visit)
        result = spectrum(
            objective,
            objective.theta(),
            num_eigenvalues=self.num_eigenvalues,
            num_negative=self.num_negative,
            num_probes=self.num_probes,
            num_steps=self.num_steps,
            tolerance=self.tolerance,
            max_products=self.max_products,
            generator=visit.generator,
        )
        drawn = self.density and result.quadrature is not None
        return Measurement(
            tuple(self._quantities(result, visit)),
            evidence={
                "num_matvecs": result.num_matvecs,
                "num_gradients": result.num_gradients,
                "gradient_norm": result.gradient_norm,
                "converged": result.converged,
                "num_params": result.num_params,
                "no_stability": self._stability(result, visit).reason,
                "self_check": asdict(self._check) if self._check else None,
                "second_order": objective.second_order,
            },
            histograms={self.key("ritz_values"): result.eigenpairs.ritz_values.numpy()} if drawn else {},  # type: ignore[union-attr]
            figures={self.key("density"): partial(draw_density, result, visit)} if drawn else {},
        )

    def _verified(self, visit: Visit) -> Objective:
        """The objective of this visit, by the route to second derivatives that the self-check of this run found."""
        if self._check is None or visit.trainer is None:  # without a trainer, every module is another one
            self._check = self._self_check(visit)
            if self._check.verdict != "exact":
                where = f" Look at {self._check.suspect}." if self._check.suspect else ""
                rank_zero_warn(f"HessianSpectrum, self-check: {self._check.verdict}, {self._check.reason}.{where}")
        if self._check.verdict != "finite_differences":
            return visit.objective
        return self._in_float64(visit, *visit.objective.batches, second_order="finite_differences")

    def _self_check(self, visit: Visit) -> SelfCheck:
        try:
            few = _few(visit.objective.batches[0])
            return visit.objective.collective.agree(lambda: self_check(self._in_float64(visit, few), self.seed))
        except InterruptedMeasurementError:
            raise
        except Exception as error:
            return SelfCheck("unchecked", f"the step does not run in float64 ({type(error).__name__}: {error})")

    def _in_float64(self, visit: Visit, *batches: StepBatch, **options: Any) -> Objective:
        common: dict[str, Any] = {"trainer": visit.trainer, "loss_fn": visit.loss_fn, "dtype": torch.float64}
        return self.objective(visit.module, batches, **common, **options)

    def _status(self, converged: bool) -> Status:
        if self._check is not None and self._check.verdict == "no_hessian":
            return "unreliable"
        return "ok" if converged else "not_converged"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check second derivatives anew in every run."""
        super().setup(trainer, pl_module, stage)
        self._check = None

    def _quantities(self, result: SpectrumResult, visit: Visit) -> Iterator[Quantity]:
        pairs = result.eigenpairs
        assert pairs is not None
        for index in range(len(pairs.eigenvalues)):
            from_top = index < pairs.num_largest
            if not from_top and index < len(pairs.eigenvalues) - 1:
                name = f"negative_eigenvalue_{len(pairs.eigenvalues) - index}"
            else:
                name = ("lambda_max" if index == 0 else f"eigenvalue_{index + 1}") if from_top else "lambda_min"
            yield Quantity(
                self.key(name),
                float(pairs.eigenvalues[index]),
                stderr_data=result.lambda_max_stderr_data if name == "lambda_max" else None,
                evidence={"residual": float(pairs.residuals[index])},
                status=self._status(bool(pairs.converged[index])),
            )
        if self.num_negative and pairs.num_largest == len(pairs.eigenvalues):  # of few parameters, the last one
            yield Quantity(self.key("lambda_min"), result.lambda_min, evidence={"residual": float(pairs.residuals[-1])})
        yield Quantity(self.key("lambda_max_residual"), float(pairs.residuals[0]))
        if result.quadrature is not None:
            probes = {"num_probes": self.num_probes, "num_steps": self.num_steps}
            yield Quantity(
                self.key("trace"), result.trace, result.trace_stderr, result.trace_stderr_data, evidence=probes
            )
            yield Quantity(self.key("effective_rank"), result.effective_rank, evidence=probes)
        found = self._stability(result, visit)
        if found.value is not None:
            yield Quantity(self.key("stability"), found.value)

    def _stability(self, result: SpectrumResult, visit: Visit) -> Stability:
        if len(visit.optimizers) != 1 or result.lambda_max is None:
            return Stability(None, "The threshold is known for one optimizer.")
        kind, groups = visit.optimizers[0]
        return stability(result.lambda_max, groups, kind)


def _few(step_batch: StepBatch) -> StepBatch:
    """The first examples of a batch, where it can be cut."""
    try:
        return step_batch._replace(batch=cut(step_batch.batch, 0, NUM_EXAMPLES))
    except NotSliceableError:
        return step_batch


def draw_density(result: SpectrumResult, visit: Visit) -> "Figure":
    """The spectral density of one visit, smoothed by a hundredth of the spectrum's width."""
    quadrature = result.quadrature
    assert quadrature is not None
    low, high = float(quadrature.nodes.min()), float(quadrature.nodes.max())
    width = max(high - low, 1e-12)
    bandwidth = BANDWIDTH_SHARE * width
    grid = torch.linspace(low - 0.05 * width, high + 0.05 * width, GRID_POINTS, dtype=torch.float64)
    axes = plot_density(
        grid.numpy(),
        quadrature.density(grid, bandwidth).numpy(),
        eigenvalues=result.eigenvalues.numpy(),
        title=f"Hessian spectral density, epoch {visit.epoch}",
        caption=f"{visit.objective.num_examples} training examples, {len(quadrature.nodes)} probes, "
        f"bandwidth {bandwidth:.2g}, P = {result.num_params:,}",
    )
    return figure_of(axes)
