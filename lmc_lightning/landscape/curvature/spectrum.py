"""Curvature of a mean loss at one point: extreme eigenvalues, trace and density of its Hessian, and what follows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lmc_lightning.core.hvp import CurvatureProduct
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.random_vectors import gaussian
from lmc_lightning.landscape.curvature.blocks import Blocks, BlockSpectrum, block_spectra, tensor_blocks
from lmc_lightning.landscape.curvature.chunk_forms import ChunkForms
from lmc_lightning.landscape.curvature.eigenvectors import share_within, squares_by_tensor, subspace_overlap
from lmc_lightning.landscape.curvature.exact_trace import ExactnessCheck, ExactTrace, exact_trace
from lmc_lightning.landscape.curvature.exact_trace import exactness as exactness_of
from lmc_lightning.landscape.curvature.memory_plan import MemoryPlan, chunk_size_of, memory_plan
from lmc_lightning.landscape.curvature.probing import Probing, sampled_trace
from lmc_lightning.landscape.curvature.result import Cost, SpectrumResult, Trace
from lmc_lightning.landscape.sharpness.perturbations import norm
from lmc_lightning.landscape.statistics.bands import stderr_data
from lmc_lightning.linalg.density import Quadrature, spectral_quadrature
from lmc_lightning.linalg.eigen import Eigenpairs, extreme_eigenpairs, warm_start
from lmc_lightning.types import Progress

Operator: TypeAlias = Literal["hessian", "ggn", "empirical_fisher"]

GUARD_PAIRS = 2
"""Pairs beyond those asked for that must converge too, so that no member of a cluster is missed.

For λ_max alone a bound serves, see :func:`extreme_eigenpairs`.
"""


def spectrum(
    objective: Objective,
    theta: Tensor,
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
    block_size: int | None = None,
    generator: torch.Generator,
    previous: Tensor | None = None,
    warm: bool = True,
    exactness: ExactnessCheck | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Progress | None = None,
    follow_up: Callable[[CurvatureProduct, SpectrumResult], None] | None = None,
) -> SpectrumResult:
    """Both ends of the spectrum of the Hessian, or of another curvature matrix, its trace and its density at θ.

    One Lanczos run gives the eigenvalues; stochastic Lanczos quadrature on the complement of those that converged gives
    the density, and with it trace, Frobenius norm and effective ranks at no further product. Probes and start follow
    from ``generator`` alone, so that equal seeds compare visits under common random numbers.

    Cost: up to ``max_products + num_probes · num_steps`` products, and where memory forces restarts one more for each
    eigenvalue (for errors over data; one in all where no trace is sampled). Memory: graphs and Lanczos vectors within
    the objective's memory budget, see :func:`memory_plan`; beside it the work space of one product, about 6 vectors.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        operator: ``"hessian"``; ``"ggn"`` for the Gauss–Newton matrix, the Fisher information of cross-entropy; or
            ``"empirical_fisher"``, the second moment of the gradients of single examples.
        num_eigenvalues: Pairs at the top; 0 for none.
        num_negative: Pairs at the bottom, by default 1 of the Hessian; the others have no negative eigenvalues.
        num_probes: Random probes of the density; 0 for no density and no trace, 8 or more for intervals.
        num_steps: Products per probe; moments up to 2·num_steps − 1 are exact for each probe.
        tolerance: Residual relative to abs(λ) at the top; ten times that at the bottom.
        max_products: Most products for the eigenvalues; what has not converged then is flagged.
        trace: ``"auto"`` also takes it exactly where that can be had, see :func:`exact_trace`.
        trace_tolerance: Where it cannot, sample until the 95 % interval is within ±trace_tolerance·|trace|.
        blocks: Also the spectra of the diagonal blocks that belong to each ``"module"`` or ``"tensor"``.
        block_size: Vectors multiplied at a time; by default 1 on the CPU and 16 elsewhere, as memory allows.
        generator: Source of all random vectors.
        previous: Eigenvectors of an earlier visit ``(k, P)``, those of the top first, for ``overlap``.
        warm: Also start from them.
        exactness: What an earlier visit found out about the exact trace of the module.
        should_stop: Asked after products; True ends with what there is.
        progress: Told after each product how many there were.
        follow_up: Given the products too, before their graphs are released.

    Raises:
        ValueError: Nothing is asked for, or negative eigenvalues of a matrix that has none.
        FloatingPointError: A product is not finite.
    """
    if operator != "hessian" and num_negative:
        raise ValueError(f"The matrix {operator!r} has no negative eigenvalues: expected num_negative=0.")
    request = _Request(
        num_largest=num_eigenvalues,
        operator=operator,
        num_smallest=int(operator == "hessian") if num_negative is None else num_negative,
        num_probes=num_probes,
        num_steps=num_steps,
        tolerance=tolerance,
        max_products=max_products,
        trace=trace,
        trace_tolerance=trace_tolerance,
        blocks=blocks,
        block_size=block_size,
    )
    if request.num_pairs + num_probes == 0 and trace_tolerance is None:
        raise ValueError("Nothing to measure: ask for num_eigenvalues, num_negative or num_probes above 0.")
    start = gaussian(theta.numel(), generator).to(theta)
    start = start if previous is None or not warm else warm_start(previous.to(start), start)
    plan = request.plan(objective, theta)
    with _OPERATORS[operator](objective, theta, plan.graphs) as product:
        if progress is not None:
            expected = max_products + num_probes * plan.num_steps
            product.on_product = lambda done: progress(done, max(done, expected), "products")
        result = _Run(product, request, plan, generator, should_stop).result(objective, start, previous, exactness)
        before = product.num_gradients
        if follow_up is not None:
            follow_up(product, result)
    gradients = result.cost.num_gradients + product.num_gradients - before
    return replace(result, cost=replace(result.cost, num_matvecs=product.num_products, num_gradients=gradients))


_OPERATORS: dict[Operator, Callable[[Objective, Tensor, int], CurvatureProduct]] = {
    "hessian": lambda objective, theta, budget: objective.hvp(theta, memory_budget=budget),
    "ggn": lambda objective, theta, budget: objective.ggn(theta, memory_budget=budget),
    "empirical_fisher": lambda objective, theta, budget: objective.empirical_fisher(theta, memory_budget=budget),
}


@dataclass(frozen=True)
class _Request:
    operator: Operator
    num_largest: int
    num_smallest: int
    num_probes: int
    num_steps: int
    tolerance: float
    max_products: int
    trace: Literal["auto", "sampled"]
    trace_tolerance: float | None
    blocks: Blocks | None
    block_size: int | None

    @property
    def num_pairs(self) -> int:
        return self.num_largest + self.num_smallest

    def plan(self, objective: Objective, theta: Tensor) -> MemoryPlan:
        return memory_plan(
            theta,
            objective.memory_budget,
            objective.collective,
            num_pairs=self.num_pairs,
            guard=GUARD_PAIRS,
            max_products=self.max_products,
            num_probes=self.num_probes,
            num_steps=self.num_steps,
            block_size=self.block_size,
        )


@dataclass
class _Run:
    """One spectrum, each part computed once, from the products of one matrix."""

    product: CurvatureProduct
    request: _Request
    plan: MemoryPlan
    generator: torch.Generator
    should_stop: Callable[[], bool] | None

    @cached_property
    def chunk_forms(self) -> ChunkForms | None:
        several = int(self.product.weights.count_nonzero()) > 1
        return ChunkForms(self.product) if several and self.plan.max_basis is None else None

    @property
    def stopped(self) -> bool:
        return self.should_stop is not None and self.should_stop()

    def result(
        self, objective: Objective, start: Tensor, previous: Tensor | None, exactness: ExactnessCheck | None
    ) -> SpectrumResult:
        gradient = self.product.gradient()
        pairs = self.eigenpairs(start)
        probing = Probing(self.product, self.generator)
        density = self.density(probing, pairs)
        exact = self.exact_trace(objective, exactness)
        forms = self.pair_forms(pairs, every=density is not None and (exact is None or exact.value is None))
        traces = self.traces(exact, probing, density, pairs, forms)
        blocks = self.blocks(objective.layout.names)
        top = None if pairs is None or not self.request.num_largest else pairs.eigenvectors[: pairs.num_largest]
        return SpectrumResult(
            num_params=self.product.theta.numel(),
            tensor_names=objective.layout.names,
            tensor_sizes=tuple(self.product.sizes),
            lambda_max=None if pairs is None or top is None else float(pairs.eigenvalues[0]),
            lambda_min=float(pairs.eigenvalues[-1]) if pairs is not None and self.request.num_smallest else None,
            eigenvalues_stderr_data=tuple(stderr_data(form, self.product.weights) or 0.0 for form in forms),
            resolution=_resolution(pairs, density, torch.finfo(self.product.theta.dtype).eps),
            eigenpairs=pairs,
            quadrature=density,
            traces=traces,
            exactness=exactness if exact is None else exact.check,
            blocks=blocks,
            overlap=None if top is None or previous is None else subspace_overlap(top, previous),
            gradient_in_top=None if top is None else share_within(top, gradient),
            layer_masses=None if top is None else squares_by_tensor(top[:1], self.product.sizes)[0],
            gradient_norm=norm(gradient),
            cost=self.cost(objective, 0 if exact is None else exact.num_gradients),
            converged=self.converged(pairs, density, traces),
            exact=exact,
        )

    def eigenpairs(self, start: Tensor) -> Eigenpairs | None:
        request = self.request
        if not request.num_pairs:
            return None
        return extreme_eigenpairs(
            self.chunk_forms or self.product,
            start,
            num_largest=request.num_largest,
            num_smallest=request.num_smallest,
            tolerance=request.tolerance,
            tolerance_smallest=10 * request.tolerance,
            max_products=request.max_products,
            guard=GUARD_PAIRS,
            max_basis=self.plan.max_basis,
            should_stop=self.should_stop,
        )

    def density(self, probing: Probing, pairs: Eigenpairs | None) -> Quadrature | None:
        if not self.request.num_probes or self.stopped:
            return None
        return spectral_quadrature(
            self.product,
            probing.draws(self.request.num_probes),
            self.plan.num_steps,
            deflation=None if pairs is None else pairs.deflation(),
            block_size=self.plan.block_size,
            first=probing.first,
            should_stop=self.should_stop,
        )

    def pair_forms(self, pairs: Eigenpairs | None, *, every: bool) -> Tensor:
        """uᵀH_b u of the first or of every pair, ``(c, B)``; none where a spread between chunks cannot be had."""
        weights = self.product.weights
        if pairs is None or weights.count_nonzero() < 2:
            return torch.zeros(0, len(weights), dtype=torch.float64)
        vectors = pairs.eigenvectors if every else pairs.eigenvectors[:1]
        if self.chunk_forms is not None:
            return torch.stack([self.chunk_forms.of(vector) for vector in vectors])
        if self.plan.block_size == 1:
            return torch.stack([self.product.quadratic_forms(vector) for vector in vectors])
        return torch.cat([self.product.quadratic_forms(block.T).T for block in vectors.split(self.plan.block_size)])

    def exact_trace(self, objective: Objective, check: ExactnessCheck | None) -> ExactTrace | None:
        """Without sampling error, or why not, if a trace is asked for at all."""
        request, theta = self.request, self.product.theta
        wanted = request.num_probes > 0 or request.trace_tolerance is not None
        if not wanted or request.trace == "sampled" or request.operator == "empirical_fisher" or self.stopped:
            return None
        own = torch.Generator().manual_seed(objective.seed)  # so that the probes are the same with and without it
        check = check or exactness_of(objective, theta, own)
        if request.operator == "ggn" and check.curved:  # which is all that can be wrong with the Hessian's
            check = replace(check, reason="")
        return exact_trace(objective, theta, generator=own, check=check)

    def traces(
        self,
        exact: ExactTrace | None,
        probing: Probing,
        density: Quadrature | None,
        pairs: Eigenpairs | None,
        forms: Tensor,
    ) -> tuple[Trace, ...]:
        """The exact trace, if there is one, and the one from the probes that were taken, or are to be taken for it."""
        known: tuple[Trace, ...] = ()
        if exact is not None and exact.value is not None:
            zeros = torch.zeros_like(exact.tensors)
            known = (Trace("exact", exact.value, 0.0, exact.stderr_data, 0, exact.tensors, zeros),)
        tolerance = None if known or self.stopped else self.request.trace_tolerance
        if density is None and tolerance is None:
            return known
        sampled = sampled_trace(
            probing, density, pairs, forms, self.product.weights, tolerance=tolerance, should_stop=self.should_stop
        )
        return (*known, sampled)

    def blocks(self, names: Sequence[str]) -> tuple[BlockSpectrum, ...]:
        if self.request.blocks is None or self.stopped:
            return ()
        found = block_spectra(
            self.product,
            tensor_blocks(names, self.request.blocks),
            num_steps=self.plan.num_steps,
            tolerance=self.request.tolerance,
            generator=self.generator,
            should_stop=self.should_stop,
        )
        return tuple(found)

    def cost(self, objective: Objective, num_gradients: int) -> Cost:
        return Cost(
            num_matvecs=self.product.num_products,
            num_gradients=self.product.num_gradients + num_gradients,
            num_chunks=self.product.num_chunks,
            chunk_size=chunk_size_of(objective),
            num_cached=self.product.num_cached,
            memory_budget=self.plan.budget,
            max_basis=self.plan.max_basis,
            num_steps=self.plan.num_steps,
            block_size=self.plan.block_size,
        )

    def converged(self, pairs: Eigenpairs | None, density: Quadrature | None, traces: Sequence[Trace]) -> bool:
        probes = 0 if density is None else len(density.nodes)
        found = pairs is None or bool(pairs.converged.all())
        return found and probes == self.request.num_probes and all(trace.converged for trace in traces)


def _resolution(pairs: Eigenpairs | None, density: Quadrature | None, eps: float) -> float:
    if pairs is not None:
        return max(float(pairs.residuals.max()), pairs.rounding)
    return 0.0 if density is None else 10 * eps * float(density.nodes.abs().max())
