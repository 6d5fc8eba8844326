"""What is known of a spectrum at one point: numbers, errors of two kinds, and what they were derived from."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lmc_lightning.landscape.curvature.blocks import BlockSpectrum
from lmc_lightning.landscape.curvature.exact_trace import ExactnessCheck, ExactTrace
from lmc_lightning.linalg.density import Quadrature
from lmc_lightning.linalg.eigen import Eigenpairs
from lmc_lightning.linalg.trace import TraceEstimate

TraceMethod = Literal["exact", "hutch++", "quadrature"]


@dataclass(frozen=True)
class Trace:
    """tr H by one method, as a whole and for each parameter tensor.

    Attributes:
        method: ``"exact"`` has no sampling error; the others are unbiased.
        value: The trace.
        stderr: Over probes; 0 where it is exact, NaN for a single probe.
        stderr_data: Over data, from two chunks on.
        num_probes: Behind ``stderr``.
        tensors: Its parts by parameter tensor ``(T,)`` float64, which sum to ``value``.
        tensors_stderr: Of each part over probes ``(T,)``.
        converged: False if a precision that was asked for was not reached.
    """

    method: TraceMethod
    value: float
    stderr: float
    stderr_data: float | None
    num_probes: int
    tensors: Tensor = field(repr=False)
    tensors_stderr: Tensor = field(repr=False)
    converged: bool = True

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student-t interval over probes with n − 1 degrees of freedom, at fixed data.

        Raises:
            ValueError: Fewer than 8 probes.
        """
        if self.method == "exact":
            return self.value, self.value
        return TraceEstimate(self.value, self.stderr, self.num_probes, 0).interval(confidence)


@dataclass(frozen=True)
class Cost:
    """What a spectrum has cost, and how memory was shared out.

    Attributes:
        num_matvecs: Products spent, all of them, those on blocks included.
        num_gradients: Gradients of the whole probe set spent beside the products.
        num_chunks: Chunks of the probe set on this process.
        chunk_size: Examples in the first of them; ``None`` where that cannot be told.
        num_cached: Chunks whose gradient graph was kept between products.
        memory_budget: For graphs and Lanczos vectors [bytes].
        max_basis: Most Lanczos vectors held for the eigenvalues, by thick restarts; ``None`` for all.
        num_steps: Products for each probe of the density.
        block_size: Vectors multiplied at a time.
    """

    num_matvecs: int
    num_gradients: int
    num_chunks: int
    chunk_size: int | None
    num_cached: int
    memory_budget: int
    max_basis: int | None
    num_steps: int
    block_size: int


@dataclass(frozen=True)
class SpectrumResult:
    """Extreme eigenvalues, trace and density of a symmetric matrix H at θ, from one set of products.

    H is the Hessian of the mean loss L, or its Gauss–Newton or empirical Fisher matrix.

    ``None`` stands for what was not asked for and for what cannot be had, such as an error over data from one chunk.

    Two kinds of error are kept apart: ``…_stderr`` is over the random probes, at fixed data; ``…_stderr_data`` is over
    the data, at fixed vectors, by the delta method on the B chunks of the probe set. With q_b the chunk's own value and
    w_b its share, ``SE² = Σ w_b² (q_b − Σ w q)² · B/(B − 1)``. It is blind to the bias of small probe sets.

    Attributes:
        num_params: P.
        tensor_names: The T parameter tensors of θ, in order.
        tensor_sizes: Their entries in θ.
        lambda_max: Largest (signed) eigenvalue.
        lambda_min: Smallest (signed) eigenvalue.
        eigenvalues_stderr_data: From uᵀH_b u, of as many of the ``eigenvalues`` as it was computed for.
        resolution: τ = max(largest Ritz residual, 10·eps·‖H‖); what is closer to 0 counts as 0 in the masses.
        eigenpairs: The extreme pairs, from which a next visit may start.
        quadrature: Nodes and weights of the spectral density.
        traces: By each method that was taken, the most precise one first.
        exactness: Whether the trace of this module can be had exactly, to be passed on to the next visit.
        blocks: Spectra of the diagonal blocks, if asked for.
        overlap: ‖UᵀU'‖²_F/k with the k top eigenvectors U' of the visit before: 1 for the same subspace.
        gradient_in_top: ‖Uᵀg‖²/‖g‖²: the share of the gradient in the k top eigenvectors.
        layer_masses: Share of the top eigenvector in each tensor ``(T,)``, summing to 1.
        gradient_norm: ‖∇L(θ)‖₂.
        cost: Products, gradients and memory.
        converged: Whether all pairs asked for reached their tolerance and all probes were taken.
        exact: The exact trace with its parts by example, or why there is none, if it was tried.
    """

    num_params: int
    tensor_names: tuple[str, ...] = field(repr=False)
    tensor_sizes: tuple[int, ...] = field(repr=False)
    lambda_max: float | None
    lambda_min: float | None
    eigenvalues_stderr_data: tuple[float, ...]
    resolution: float
    eigenpairs: Eigenpairs | None = field(repr=False)
    quadrature: Quadrature | None = field(repr=False)
    traces: tuple[Trace, ...]
    exactness: ExactnessCheck | None
    blocks: tuple[BlockSpectrum, ...]
    overlap: float | None
    gradient_in_top: float | None
    layer_masses: Tensor | None = field(repr=False)
    gradient_norm: float
    cost: Cost
    converged: bool
    exact: ExactTrace | None = field(default=None, repr=False)

    @property
    def eigenvalues(self) -> Tensor:
        """Signed, ``(k,)`` float64: from the top downwards, then those of the bottom, the smallest last."""
        return torch.zeros(0, dtype=torch.float64) if self.eigenpairs is None else self.eigenpairs.eigenvalues

    @property
    def residuals(self) -> Tensor:
        """‖Hu − λu‖ of each of the ``eigenvalues``, ``(k,)`` float64: some eigenvalue lies within that distance."""
        return torch.zeros(0, dtype=torch.float64) if self.eigenpairs is None else self.eigenpairs.residuals

    @property
    def lambda_max_stderr_data(self) -> float | None:
        """Standard error of ``lambda_max`` over data, from uᵀH_b u."""
        known = self.lambda_max is not None and self.eigenvalues_stderr_data
        return self.eigenvalues_stderr_data[0] if known else None

    @property
    def spectral_radius(self) -> float | None:
        """Largest abs(λ), where both ends were asked for."""
        if self.lambda_max is None or self.lambda_min is None:
            return None
        return max(abs(self.lambda_max), abs(self.lambda_min))

    @property
    def trace(self) -> float | None:
        """tr H, exact or unbiased: see ``traces``."""
        return self.traces[0].value if self.traces else None

    @property
    def trace_stderr(self) -> float | None:
        """Standard error of ``trace`` over probes."""
        return None if not self.traces or math.isnan(self.traces[0].stderr) else self.traces[0].stderr

    @property
    def trace_stderr_data(self) -> float | None:
        """Standard error of ``trace`` over data, with the probes held fixed."""
        return self.traces[0].stderr_data if self.traces else None

    @property
    def trace_per_param(self) -> float | None:
        """tr H / P, the mean eigenvalue."""
        return None if self.trace is None else self.trace / self.num_params

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
        return self._from_quadrature(lambda q: q.positive_trace()[0] / self._positive_lambda_max)

    @property
    def effective_rank_stderr(self) -> float | None:
        """Standard error of ``effective_rank`` over probes."""
        return self._from_quadrature(lambda q: q.positive_trace()[1] / self._positive_lambda_max)

    @property
    def stable_rank(self) -> float | None:
        """‖H‖²_F/λ_max², for λ_max > 0."""
        return self._from_quadrature(lambda q: q.frobenius_sq / self._positive_lambda_max**2)

    @property
    def stable_rank_stderr(self) -> float | None:
        """Standard error of ``stable_rank`` over probes."""
        return self._from_quadrature(lambda q: q.frobenius_sq_stderr / self._positive_lambda_max**2)

    @property
    def effective_rank_entropy(self) -> float | None:
        """Exponential of the entropy of the positive eigenvalues as shares of their sum."""
        return self._from_quadrature(lambda q: q.effective_rank_entropy())

    @property
    def negative_mass(self) -> float | None:
        """Share of the eigenvalues below −``resolution``."""
        return self._from_quadrature(lambda q: q.negative_mass(self.resolution)[0])

    @property
    def negative_mass_stderr(self) -> float | None:
        """Standard error of ``negative_mass`` over probes."""
        return self._from_quadrature(lambda q: q.negative_mass(self.resolution)[1])

    @property
    def null_mass(self) -> float | None:
        """Share of the eigenvalues within ±``resolution``."""
        return self._from_quadrature(lambda q: q.null_mass(self.resolution)[0])

    @property
    def null_mass_stderr(self) -> float | None:
        """Standard error of ``null_mass`` over probes."""
        return self._from_quadrature(lambda q: q.null_mass(self.resolution)[1])

    @property
    def num_matvecs(self) -> int:
        """Products spent, all of them."""
        return self.cost.num_matvecs

    @property
    def num_gradients(self) -> int:
        """Gradients of the whole probe set spent beside the products."""
        return self.cost.num_gradients

    @property
    def _positive_lambda_max(self) -> float:
        return self.lambda_max if self.lambda_max is not None and self.lambda_max > 0 else math.nan

    def _from_quadrature(self, quantity: Callable[[Quadrature], float]) -> float | None:
        value = math.nan if self.quadrature is None else quantity(self.quadrature)
        return None if math.isnan(value) else value
