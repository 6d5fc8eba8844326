"""Eigenvalues, trace and density of the Hessian while a network trains."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.spectrum.attribution import attribute
from lmc_lightning.callbacks.spectrum.figures import draw_block_densities, draw_density
from lmc_lightning.callbacks.spectrum.options import check_choices, check_limits, check_numbers
from lmc_lightning.callbacks.spectrum.quantities import (
    block_arrays,
    cost_evidence,
    spectrum_arrays,
    spectrum_charts,
    spectrum_quantities,
)
from lmc_lightning.callbacks.visits.common import Common, Unpack
from lmc_lightning.callbacks.visits.second_order import SecondOrder
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.core.hvp import CurvatureProduct
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature.blocks import Blocks
from lmc_lightning.landscape.curvature.exact_trace import ExactnessCheck
from lmc_lightning.landscape.curvature.result import SpectrumResult
from lmc_lightning.landscape.curvature.spectrum import Operator, spectrum
from lmc_lightning.landscape.curvature.stability import Stability, stability
from lmc_lightning.loggers import Band, Chart
from lmc_lightning.recording import Measurement, Quantity


class HessianSpectrum(MeasurementCallback):
    """Extreme eigenvalues, trace and density of the Hessian of the mean training loss.

    One Lanczos run gives both ends of the spectrum, with a residual for each pair; stochastic Lanczos quadrature on the
    complement of what converged gives trace, density and ranks. Costs up to ``max_products + num_probes · num_steps``
    Hessian products over the probe set, at about 2 gradients each while the gradient graphs fit in memory. A visit
    starts from the eigenvectors of the last one of the run; each is right to its tolerance, whatever its start. The
    stability of Adam, and of groups of different learning rates, takes a Lanczos run of its own.

    ======================================  =========================================================================
    ``hessian/lambda_max``                  largest eigenvalue
    ``hessian/lambda_max_stderr_data``      its standard error over examples, by the delta method, from two chunks on
    ``hessian/lambda_max_residual``         ‖Hu − λu‖: some eigenvalue lies within that distance
    ``hessian/eigenvalue_{2..k}``           the next ones, in descending order
    ``hessian/lambda_min``                  smallest (most negative) eigenvalue
    ``hessian/negative_eigenvalue_{2..k}``  the ones above it, in ascending order
    ``hessian/trace``                       tr H, with ``_stderr`` over probes, 0 if exact, and ``_stderr_data``
                                            over data
    ``hessian/effective_rank``              Σλ₊/λ_max, with ``_stderr``
    ``hessian/stable_rank``                 ‖H‖²_F/λ_max², with ``_stderr``
    ``hessian/negative_mass``               share of the eigenvalues below 0 by more than the resolution; ``_stderr``
    ``hessian/overlap``                     ‖UᵀU'‖²_F/k with the k top eigenvectors U' of the last visit, from the
                                            second visit on
    ``hessian/grad_in_topk``                ‖Uᵀg‖²/‖g‖²: share of the gradient in the k top eigenvectors
    ``hessian/layer_mass/{tensor}``         share of the top eigenvector in a parameter tensor, of the largest five
    ``hessian/stability``                   λ_max in units of the optimizer's threshold: above 1, full-batch training is
                                            linearly unstable (SGD, Adam, AdamW; else ``no_stability`` in the evidence)
    ``hessian/lambda_max/{block}``          with ``blocks=``: largest eigenvalue of a diagonal block, of the
                                            largest five
    ``hessian/trace/{block}``               with ``blocks=``: the trace of those
    ``hessian/lambda_max_share/{class}``    with ``attribution=True``: share of λ_max that a class of examples carries,
                                            of the largest five
    ``hessian/lambda_max_top_percent``      with ``attribution=True``: share of λ_max that the hundredth of the examples
                                            carries that carries most
    ``hessian/trace_share/{class}``         with ``attribution=True``: the same of the trace, where it is exact
    ``hessian/trace_top_percent``           with ``attribution=True``: the same of the trace, where it is exact
    ``hessian/frobenius_sq``                table only: ‖H‖²_F = tr H²
    ``hessian/effective_rank_entropy``      table only: exponential of the entropy of the positive eigenvalues
    ``hessian/null_mass``                   table only: share of the eigenvalues within the resolution of 0
    ``hessian/spectral_radius``             table only: largest abs(λ)
    ``hessian/trace_per_param``             table only: tr H/P, the mean eigenvalue
    ``hessian/trace/{tensor}``              table only: trace of the diagonal block of a parameter tensor
    ``hessian/ritz_values``                 histogram of the eigenvalue estimates, unweighted; in TensorBoard also
                                            on a symmetric log scale, ``_symlog``
    ``hessian/density``                     figure of the smoothed spectral density, logarithmic
    ``hessian/attribution``                 figure, with ``attribution=True``: shares of λ_max, and the images of the
                                            largest
    ``hessian/block_density``               figure, with ``blocks=``: densities of the five blocks of largest λ_max
    ======================================  =========================================================================

    The table also has layer masses and numbers of blocks of all tensors and blocks; the nodes and weights of their
    densities are in ``<log_dir>/lmc/arrays/hessian_block_density_<step>.npz``. With another ``operator``, its name
    takes the place of ``hessian`` in the keys, and what concerns negative eigenvalues and stability is left out.

    Sources: Ghorbani et al. (arXiv 1901.10159) for the density, Cohen et al. (arXiv 2103.00065) for the threshold,
    Gur-Ari et al. (arXiv 1812.04754) for the gradient in the top subspace.

    Args:
        operator: ``"hessian"``, ``"ggn"`` (Gauss–Newton; the Fisher information of cross-entropy) or
            ``"empirical_fisher"`` (second moment of the gradients of single examples).
        num_eigenvalues: pairs at the top.
        num_negative: pairs at the bottom; 1 by default, and 0 for matrices without negative eigenvalues.
        num_probes: random probes of trace and density; 8 or more for error bars worth the name, 0 for neither.
        num_steps: Hessian products per probe.
        tolerance: relative residual at which a top eigenvalue counts as converged.
        max_products: most products for the eigenvalues; what has not converged then is flagged.
        trace: ``"auto"`` takes it exactly where that can be had; ``"sampled"`` from probes.
        trace_tolerance: where it is sampled, until its 95 % interval is within ±trace_tolerance·|trace|.
        blocks: also measure the diagonal blocks of each ``"module"`` or ``"tensor"``, at up to ``num_steps`` products.
        density: draw the density and the histogram.
        attribution: also find what each example and class contributes to λ_max and to an exact trace (4 gradients).
        warm_start: start from the last visit's eigenvectors; ``False`` makes every visit independent of the others.
        keep_eigenvectors: write the pairs of each visit to ``<log_dir>/lmc/arrays/*.npz``: plain arrays, which numpy
            reads without torch and without pickles.
        memory_budget: for cached gradient graphs and Lanczos vectors [bytes]; by default a quarter of what is free.
        block_size: vectors multiplied at a time; by default 1 on the CPU and 16 elsewhere, as memory allows.
        chunk_size: examples evaluated at a time; by default 1,024, and on the CPU 128, or more where the weights
            outweigh the activations.
        **common: see :class:`MeasurementCallback`.
    """

    kind = "hessian"
    advice = "Raise max_products (num_steps for blocks), or tolerance."

    def __init__(
        self,
        *,
        operator: Operator = "hessian",
        num_eigenvalues: int = 5,
        num_negative: int | None = None,
        num_probes: int = 8,
        num_steps: int = 24,
        tolerance: float = 1e-3,
        max_products: int = 64,
        trace: Literal["auto", "sampled"] = "auto",
        trace_tolerance: float | None = None,
        blocks: Blocks | None = None,
        density: bool = True,
        attribution: bool = False,
        warm_start: bool = True,
        keep_eigenvectors: bool = False,
        memory_budget: int | None = None,
        block_size: int | None = None,
        chunk_size: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        check_choices(operator, trace, blocks)
        self.kind = operator
        super().__init__(**common)
        num_negative = int(operator == "hessian") if num_negative is None else num_negative
        check_numbers(operator, num_eigenvalues, num_negative, num_probes, num_steps)
        check_limits(tolerance, max_products, trace_tolerance, memory_budget, block_size, chunk_size)
        self.operator, self.num_probes, self.density, self.attribution = operator, num_probes, density, attribution
        self.warm_start, self.keep_eigenvectors = warm_start, keep_eigenvectors
        self.memory_budget, self.chunk_size = memory_budget, chunk_size
        self.min_effort = 0.25 if num_probes else 1.0
        self._options: dict[str, Any] = {
            "operator": operator,
            "num_eigenvalues": num_eigenvalues,
            "num_negative": num_negative,
            "num_steps": num_steps,
            "tolerance": tolerance,
            "max_products": max_products,
            "trace": trace,
            "trace_tolerance": trace_tolerance,
            "blocks": blocks,
            "block_size": block_size,
        }
        self._second_order = SecondOrder(self, of_outputs=operator != "hessian")
        self._last_vectors: Tensor | None = None
        self._exactness: ExactnessCheck | None = None

    def measure(self, visit: Visit) -> Measurement:
        """The spectrum at this visit."""
        objective = self._second_order.objective(visit)
        theta, limits = objective.theta(), list[Stability]()

        def follow_up(product: CurvatureProduct, result: SpectrumResult) -> None:
            limits.append(self._stability(visit, product, result))

        result = spectrum(
            objective,
            theta,
            num_probes=visit.scaled(self.num_probes),
            generator=visit.generator,
            previous=self._previous(visit, theta),
            warm=self.warm_start,
            exactness=self._exactness if visit.trainer is not None else None,
            progress=visit.progress,
            follow_up=follow_up,
            **self._options,
        )
        self._remember(visit, result)
        measurement = self._measurement(visit, objective, result, limits[0])
        if not self.attribution:
            return measurement
        return attribute(objective, theta, result, self.operator).added_to(measurement, self.key, visit.epoch)

    def charts(self) -> list[Chart | Band]:
        """λ_max and trace with their errors, and what belongs to them."""
        further = {"blocks": self._options["blocks"] is not None, "attribution": self.attribution}
        return spectrum_charts(self.key, self.tag, signed=self.operator == "hessian", **further)

    def _measurement(self, visit: Visit, objective: Objective, result: SpectrumResult, limit: Stability) -> Measurement:
        quantities = list(spectrum_quantities(result, self.key, self._second_order.status))
        if limit.value is not None:
            status = self._second_order.status(limit.converged)
            residual = {} if limit.residual is None else {"residual": limit.residual}
            quantities.append(Quantity(self.key("stability"), limit.value, evidence=residual, status=status))
        drawn = self.density and result.quadrature is not None and result.eigenpairs is not None
        return Measurement(
            tuple(quantities),
            evidence={
                **cost_evidence(result),
                "gradient_norm": result.gradient_norm,
                "converged": result.converged,
                "num_params": result.num_params,
                "no_stability": limit.reason,
                **self._second_order.evidence(objective),
            },
            histograms={self.key("ritz_values"): result.eigenpairs.ritz_values.numpy()} if drawn else {},  # type: ignore[union-attr]
            figures=self._figures(visit, result) if drawn else {},
            arrays=self._arrays(result),
        )

    def _arrays(self, result: SpectrumResult) -> dict[str, dict[str, Any]]:
        of_blocks = {self.key("block_density"): block_arrays(result.blocks)} if result.blocks else {}
        of_pairs = {self.key("eigenvectors"): spectrum_arrays(result)} if self.keep_eigenvectors else {}
        return of_blocks | of_pairs

    def _figures(self, visit: Visit, result: SpectrumResult) -> dict[str, Callable[[], Any]]:
        shown = (result, self.operator, visit.epoch, visit.objective.num_examples)
        figures: dict[str, Callable[[], Any]] = {self.key("density"): partial(draw_density, *shown)}
        if result.blocks:
            figures[self.key("block_density")] = partial(draw_block_densities, *shown)
        return figures

    def _stability(self, visit: Visit, product: CurvatureProduct, result: SpectrumResult) -> Stability:
        if self.operator != "hessian":
            return Stability(None, "Stability is a matter of the Hessian.")
        return stability(
            visit.optimizers,
            visit.objective.layout,
            lambda_max=result.lambda_max,
            product=product,
            tolerance=self._options["tolerance"],
            max_products=self._options["max_products"],
            max_basis=result.cost.max_basis,
        )

    def _previous(self, visit: Visit, theta: Tensor) -> Tensor | None:
        """The last visit's eigenvectors, where it was one of this run and of as many parameters."""
        known = self._last_vectors
        return known if visit.trainer is not None and known is not None and known.shape[1] == len(theta) else None

    def _remember(self, visit: Visit, result: SpectrumResult) -> None:
        self._exactness, pairs = result.exactness, result.eigenpairs
        small = pairs is not None and pairs.eigenvectors.nbytes <= result.cost.memory_budget // 2
        self._last_vectors = pairs.eigenvectors.cpu() if pairs and small and visit.trainer is not None else None

    def objective(self, *arguments: Any, **options: Any) -> Objective:
        """The module's loss on given batches, under this callback's memory budget and in its chunks too."""
        own = {"memory_budget": self.memory_budget, "chunk_size": self.chunk_size}
        return super().objective(*arguments, **{**own, **options})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check second derivatives anew in every run, and start it without knowledge of another."""
        super().setup(trainer, pl_module, stage)
        self._second_order.check, self._last_vectors, self._exactness = None, None, None

    def __getstate__(self) -> dict[str, Any]:
        """Without eigenvectors, which belong to the run that goes on."""
        return {**super().__getstate__(), "_last_vectors": None}
