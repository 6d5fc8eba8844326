"""Curvature of a mean loss at one point: extreme eigenvalues, trace and density of its Hessian, and what follows."""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lmc_lightning.core.hvp import FREE_MEMORY_SHARE, HessianProduct, free_bytes
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.random_vectors import gaussian, rademacher
from lmc_lightning.linalg.density import Quadrature, spectral_quadrature
from lmc_lightning.linalg.eigen import Eigenpairs, extreme_eigenpairs, warm_start

GUARD_PAIRS = 2
"""Pairs beyond those asked for that must converge too, so that no member of a cluster is missed."""


@dataclass(frozen=True)
class SpectrumResult:
    """Extreme eigenvalues, trace and density of the Hessian H of the mean loss L at θ, from one set of products.

    ``None`` stands for what was not asked for and for what cannot be had, such as an error over data from one chunk.

    Two kinds of error are kept apart: ``…_stderr`` is over the random probes, at fixed data; ``…_stderr_data`` is over
    the data, at fixed vectors, by the delta method on the B chunks of the probe set. With q_b the chunk's own value and
    w_b its share, ``SE² = Σ w_b² (q_b − Σ w q)² · B/(B − 1)``. It is blind to the bias of small probe sets.

    Attributes:
        num_params: P.
        lambda_max: Largest (signed) eigenvalue.
        lambda_max_stderr_data: From uᵀH_b u.
        lambda_min: Smallest (signed) eigenvalue.
        trace_stderr_data: From tr H_b, with the probes held fixed.
        resolution: τ = max(largest Ritz residual, 10·eps·‖H‖); what is closer to 0 counts as 0 in the masses.
        eigenpairs: The extreme pairs, from which a next visit may start.
        quadrature: Nodes and weights of the spectral density.
        loss: L(θ); with ``gradient_norm`` and ``confidence`` the state in which the curvature was taken.
        gradient_norm: ‖∇L(θ)‖₂.
        confidence: Mean largest predicted probability, of classifiers.
        num_matvecs: Hessian products spent, all of them.
        num_gradients: Gradients of the whole probe set spent beside the products.
        seconds: Wall-clock time [s].
        converged: Whether all pairs asked for reached their tolerance and all probes were taken.
    """

    num_params: int
    lambda_max: float | None
    lambda_max_stderr_data: float | None
    lambda_min: float | None
    trace_stderr_data: float | None
    resolution: float
    eigenpairs: Eigenpairs | None = field(repr=False)
    quadrature: Quadrature | None = field(repr=False)
    loss: float
    gradient_norm: float
    confidence: float | None
    num_matvecs: int
    num_gradients: int
    seconds: float
    converged: bool

    @property
    def eigenvalues(self) -> Tensor:
        """Signed, ``(k,)`` float64: from the top downwards, then those of the bottom, the smallest last."""
        return torch.zeros(0, dtype=torch.float64) if self.eigenpairs is None else self.eigenpairs.eigenvalues

    @property
    def residuals(self) -> Tensor:
        """‖Hu − λu‖ of each of the ``eigenvalues``, ``(k,)`` float64: some eigenvalue lies within that distance."""
        return torch.zeros(0, dtype=torch.float64) if self.eigenpairs is None else self.eigenpairs.residuals

    @property
    def spectral_radius(self) -> float | None:
        """Largest abs(λ), where both ends were asked for."""
        if self.lambda_max is None or self.lambda_min is None:
            return None
        return max(abs(self.lambda_max), abs(self.lambda_min))

    @property
    def trace(self) -> float | None:
        """tr H, unbiased: the converged eigenvalues plus a Hutchinson estimate on their complement."""
        return self._from_quadrature(lambda q: q.trace)

    @property
    def trace_stderr(self) -> float | None:
        """Standard error of ``trace`` over probes."""
        return self._from_quadrature(lambda q: q.trace_stderr)

    @property
    def trace_per_param(self) -> float | None:
        """tr H / P, the mean eigenvalue."""
        return self._from_quadrature(lambda q: q.trace / self.num_params)

    @property
    def frobenius_sq(self) -> float | None:
        """‖H‖²_F = tr H², unbiased."""
        return self._from_quadrature(lambda q: q.frobenius_sq)

    @property
    def frobenius_sq_stderr(self) -> float | None:
        """Standard error of ``frobenius_sq`` over probes."""
        return self._from_quadrature(lambda q: q.frobenius_sq_stderr)

    @property
    def effective_rank(self) -> float | None:
        """Σλ₊/λ_max, for λ_max > 0: how many eigenvalues of the largest size carry the positive part."""
        return self._from_quadrature(lambda q: q.positive_trace / self._positive_lambda_max)

    @property
    def stable_rank(self) -> float | None:
        """‖H‖²_F/λ_max², for λ_max > 0."""
        return self._from_quadrature(lambda q: q.frobenius_sq / self._positive_lambda_max**2)

    @property
    def effective_rank_entropy(self) -> float | None:
        """Exponential of the entropy of the positive eigenvalues as shares of their sum."""
        return self._from_quadrature(lambda q: q.effective_rank_entropy())

    @property
    def negative_mass(self) -> float | None:
        """Share of the eigenvalues below −``resolution``."""
        return self._from_quadrature(lambda q: q.negative_mass(self.resolution))

    @property
    def null_mass(self) -> float | None:
        """Share of the eigenvalues within ±``resolution``."""
        return self._from_quadrature(lambda q: q.null_mass(self.resolution))

    @property
    def _positive_lambda_max(self) -> float:
        return self.lambda_max if self.lambda_max is not None and self.lambda_max > 0 else math.nan

    def _from_quadrature(self, quantity: Callable[[Quadrature], float]) -> float | None:
        value = math.nan if self.quadrature is None else quantity(self.quadrature)
        return None if math.isnan(value) else value


def spectrum(
    objective: Objective,
    theta: Tensor,
    *,
    num_eigenvalues: int = 5,
    num_negative: int = 1,
    num_probes: int = 8,
    num_steps: int = 24,
    tolerance: float = 1e-3,
    max_products: int = 64,
    generator: torch.Generator,
    previous: Tensor | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> SpectrumResult:
    """Both ends of the Hessian's spectrum, its trace and its density at θ.

    One Lanczos run gives the eigenvalues; stochastic Lanczos quadrature on the complement of those that converged gives
    the density, and with it trace, Frobenius norm and effective ranks at no further product. Probes and start follow
    from ``generator`` alone, so that equal seeds compare visits under common random numbers.

    Cost: up to ``max_products + num_probes · num_steps`` products and one more for each eigenvalue (for errors over
    data; one in all without probes). Memory: the cached gradient graphs of the objective, the Lanczos basis (restarted
    to stay within a quarter of the free memory) and ``num_steps`` vectors.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        num_eigenvalues: Pairs at the top; 0 for none.
        num_negative: Pairs at the bottom; 0 for none.
        num_probes: Random probes of the density; 0 for no density and no trace, 8 or more for intervals.
        num_steps: Products per probe; moments up to 2·num_steps − 1 are exact for each probe.
        tolerance: Residual relative to abs(λ) at the top; ten times that at the bottom.
        max_products: Most products for the eigenvalues; what has not converged then is flagged.
        generator: Source of all random vectors.
        previous: Eigenvectors of an earlier visit ``(k, P)`` to start from.
        should_stop: Asked after products; True ends with what there is.

    Raises:
        ValueError: Neither eigenvalues nor probes are asked for.
        FloatingPointError: A product is not finite.
    """
    if num_eigenvalues + num_negative + num_probes == 0:
        raise ValueError("Nothing to measure: ask for num_eigenvalues, num_negative or num_probes above 0.")
    began = time.perf_counter()
    start = gaussian(theta.numel(), generator, device=theta.device, dtype=theta.dtype)
    start = start if previous is None else warm_start(previous.to(start), start)
    with objective.hvp(theta) as product:
        gradient_norm = float(torch.linalg.vector_norm(product.gradient(), dtype=torch.float64))
        request = _Request(num_eigenvalues, num_negative, tolerance, max_products)
        pairs = _eigenpairs(product, start, request, should_stop)
        probing = _Probing(product, generator, num_probes)
        density = _density(probing, pairs, num_steps, should_stop)
        forms = _pair_forms(product, pairs, every=density is not None)
    evaluation = objective.evaluate(theta)
    return SpectrumResult(
        num_params=theta.numel(),
        lambda_max=float(pairs.eigenvalues[0]) if pairs is not None and num_eigenvalues else None,
        lambda_max_stderr_data=stderr_data(forms[0], product.weights) if num_eigenvalues and len(forms) else None,
        lambda_min=float(pairs.eigenvalues[-1]) if pairs is not None and num_negative else None,
        trace_stderr_data=_trace_stderr_data(product.weights, pairs, forms, density, probing),
        resolution=_resolution(pairs, density, torch.finfo(theta.dtype).eps),
        eigenpairs=pairs,
        quadrature=density,
        loss=evaluation.loss,
        gradient_norm=gradient_norm,
        confidence=evaluation.confidence,
        num_matvecs=product.num_products,
        num_gradients=product.num_gradients,
        seconds=time.perf_counter() - began,
        converged=(pairs is None or bool(pairs.converged.all())) and len(probing.forms) == num_probes,
    )


@dataclass(frozen=True)
class _Request:
    num_eigenvalues: int
    num_negative: int
    tolerance: float
    max_products: int


class _Probing:
    """Random probes, and the operator as they see it: each probe's first product is also taken apart by chunks."""

    def __init__(self, product: HessianProduct, generator: torch.Generator, num_probes: int) -> None:
        self.num_probes = num_probes
        self.forms: list[Tensor] = []
        self._product, self._generator = product, generator
        self._first = False

    def probes(self) -> Iterator[Tensor]:
        theta = self._product.theta
        for _ in range(self.num_probes):
            self._first = True
            self.forms.append(torch.zeros(len(self._product.weights), dtype=torch.float64))
            yield rademacher(theta.numel(), self._generator, device=theta.device, dtype=theta.dtype)

    def __call__(self, vector: Tensor) -> Tensor:
        if not self._first:
            return self._product(vector)
        self._first = False
        result, self.forms[-1] = self._product.with_forms(vector)
        return result


def _eigenpairs(
    product: HessianProduct, start: Tensor, request: _Request, should_stop: Callable[[], bool] | None
) -> Eigenpairs | None:
    if request.num_eigenvalues + request.num_negative == 0:
        return None
    wanted = request.num_eigenvalues + GUARD_PAIRS + request.num_negative
    affordable = int(FREE_MEMORY_SHARE * free_bytes(start.device)) // (start.numel() * start.element_size())
    return extreme_eigenpairs(
        product,
        start,
        num_largest=request.num_eigenvalues,
        num_smallest=request.num_negative,
        tolerance=request.tolerance,
        tolerance_smallest=10 * request.tolerance,
        max_products=request.max_products,
        guard=GUARD_PAIRS,
        max_basis=None if affordable >= request.max_products else max(affordable, 2 * wanted),
        should_stop=should_stop,
    )


def _density(
    probing: _Probing, pairs: Eigenpairs | None, num_steps: int, should_stop: Callable[[], bool] | None
) -> Quadrature | None:
    if not probing.num_probes or (should_stop is not None and should_stop()):
        return None
    known = None if pairs is None else pairs.deflation()
    return spectral_quadrature(probing, probing.probes(), num_steps, deflation=known, should_stop=should_stop)


def _pair_forms(product: HessianProduct, pairs: Eigenpairs | None, *, every: bool) -> Tensor:
    """uᵀH_b u of the first or of every pair, ``(c, B)``; none where a spread between chunks cannot be had."""
    if pairs is None or product.weights.count_nonzero() < 2:
        return torch.zeros(0, len(product.weights), dtype=torch.float64)
    vectors = pairs.eigenvectors if every else pairs.eigenvectors[:1]
    return torch.stack([product.quadratic_forms(vector) for vector in vectors])


def _trace_stderr_data(
    weights: Tensor, pairs: Eigenpairs | None, forms: Tensor, density: Quadrature | None, probing: _Probing
) -> float | None:
    if density is None or weights.count_nonzero() < 2:
        return None
    masses = density.num_params * density.weights[:, density.num_deflated :].sum(1)
    traces = (masses[:, None] * torch.stack(probing.forms)).mean(0)
    if pairs is not None:
        traces = traces + forms[pairs.converged].sum(0)
    return stderr_data(traces, weights)


def stderr_data(values: Tensor, weights: Tensor) -> float | None:
    """Standard error of a weighted mean of the values of B chunks, ``(B,)``: √(Σ w²(q − Σ w q)² · B/(B − 1))."""
    count = int(weights.count_nonzero())
    if count < 2:
        return None
    deviations = weights * (values - weights @ values)
    return math.sqrt(float(deviations.square().sum()) * count / (count - 1))


def _resolution(pairs: Eigenpairs | None, density: Quadrature | None, eps: float) -> float:
    if pairs is not None:
        return max(float(pairs.residuals.max()), pairs.rounding)
    return 0.0 if density is None else 10 * eps * float(density.nodes.abs().max())


@dataclass(frozen=True)
class Stability:
    """λ/λ_crit of an optimizer's linearised full-batch dynamics; above 1 they are unstable along that eigenvector."""

    value: float | None
    reason: str | None = None
    """Why there is no value."""


def stability(
    lambda_max: float, param_groups: Sequence[Mapping[str, Any]], optimizer: type[Optimizer] = SGD
) -> Stability:
    """``lambda_max`` in units of the largest curvature at which the optimizer converges on a quadratic.

    For SGD with learning rate η, momentum β, dampening d and coupled decay w: η(1−d)(λ+w)/(2(1+β)), without d where
    β = 0, and with Nesterov momentum η(1+2β)(λ+w)/(2(1+β)) (arXiv 2103.00065).

    Args:
        lambda_max: Largest eigenvalue of the Hessian without decay.
        param_groups: The optimizer's groups, as they were at the step.
        optimizer: Its type.
    """
    if not issubclass(optimizer, SGD) or inspect.unwrap(optimizer.step) is not inspect.unwrap(SGD.step):
        return Stability(None, f"The threshold is known for torch.optim.SGD, not for {optimizer.__name__}.")
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    settings = [tuple(float(group.get(name, 0)) for name in names) for group in param_groups]
    differing = [name for name, values in zip(names, zip(*settings, strict=True), strict=True) if len(set(values)) > 1]
    if differing:
        return Stability(None, f"The parameter groups differ in {', '.join(differing)}.")
    lr, momentum, dampening, decay, nesterov, maximize = settings[0]
    if maximize:
        return Stability(None, "The optimizer maximises.")
    gain = 1 + 2 * momentum if nesterov else 1 - dampening if momentum else 1.0
    return Stability(lr * gain * (lambda_max + decay) / (2 * (1 + momentum)))
