"""Eigenvalues, trace and density of the Hessian while a network trains."""

from typing import Any, Literal

from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.spectrum.attribution import attribute
from lmc_lightning.callbacks.spectrum.figures import spectrum_pictures
from lmc_lightning.callbacks.spectrum.last_visit import LastVisit
from lmc_lightning.callbacks.spectrum.options import check_choices, check_limits, check_numbers
from lmc_lightning.callbacks.spectrum.quantities import (
    spectrum_arrays,
    spectrum_charts,
    spectrum_evidence,
    spectrum_quantities,
)
from lmc_lightning.callbacks.visits.common import Common, Unpack
from lmc_lightning.callbacks.visits.second_order import SecondOrder
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.core.hvp import CurvatureProduct
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature.blocks import Blocks
from lmc_lightning.landscape.curvature.result import SpectrumResult
from lmc_lightning.landscape.curvature.spectrum import Operator, spectrum
from lmc_lightning.landscape.curvature.stability import Stability, stability
from lmc_lightning.loggers import Band, Chart
from lmc_lightning.recording import Measurement


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
        self._last_visit = LastVisit()

    def measure(self, visit: Visit) -> Measurement:
        """The spectrum at this visit."""
        objective, limits = self._second_order.objective(visit), list[Stability]()
        theta = objective.theta()
        result = spectrum(
            objective,
            theta,
            num_probes=visit.scaled(self.num_probes),
            generator=visit.generator,
            warm=self.warm_start,
            progress=visit.progress,
            follow_up=lambda product, result: limits.append(self._stability(visit, product, result)),
            **self._last_visit.known(visit, len(theta)),
            **self._options,
        )
        self._last_visit.keep(visit, result)
        measurement = Measurement(
            tuple(spectrum_quantities(result, limits[0], self.key, self._second_order.status)),
            evidence=spectrum_evidence(result, limits[0]) | self._second_order.evidence(objective),
            arrays=spectrum_arrays(result, self.key, eigenvectors=self.keep_eigenvectors),
            **(spectrum_pictures(result, self.key, self.operator, visit) if self.density else {}),
        )
        if not self.attribution:
            return measurement
        return attribute(objective, theta, result, self.operator).added_to(measurement, self.key, visit.epoch)

    def charts(self) -> list[Chart | Band]:
        """λ_max and trace with their errors, and what belongs to them."""
        further = {"blocks": self._options["blocks"] is not None, "attribution": self.attribution}
        return spectrum_charts(self.key, self.tag, signed=self.operator == "hessian", **further)

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

    def objective(self, *arguments: Any, **options: Any) -> Objective:
        """The module's loss on given batches, under this callback's memory budget and in its chunks too."""
        own = {"memory_budget": self.memory_budget, "chunk_size": self.chunk_size}
        return super().objective(*arguments, **{**own, **options})

    def forget(self) -> None:
        """Check second derivatives anew in every run, and start it without knowledge of another."""
        super().forget()
        self._second_order.check, self._last_visit = None, LastVisit()
