"""Lanczos with full reorthogonalisation: the Krylov space that eigenvalues and densities are read from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmc_lightning.linalg.subspace import Deflation, OrthonormalRows, norm64, orthogonalise_
from lmc_lightning.types import Matvec

_ROWS_PER_BLOCK = 16
_CERTAIN = 1e60


@dataclass(frozen=True)
class Tridiagonal:
    """Result of m Lanczos steps: ``A Q − Q T = r eₘᵀ`` with the rows of ``basis`` as the columns of Q.

    Attributes:
        alphas: Diagonal of T, ``(m,)`` float64 on the CPU.
        betas: Off-diagonal of T, ``(m − 1,)`` float64 on the CPU.
        basis: Orthonormal rows ``(m, P)`` in the dtype and on the device of the start.
        residual: The vector r ``(P,)``, orthogonal to the basis.
        residual_norm: ‖r‖, what the next off-diagonal entry would be.
        breakdown: Whether ‖r‖ is negligible relative to the size of A: the basis spans an invariant subspace.
    """

    alphas: Tensor
    betas: Tensor
    basis: Tensor
    residual: Tensor
    residual_norm: float
    breakdown: bool

    def matrix(self) -> Tensor:
        """T as a dense matrix, ``(m, m)`` float64."""
        return torch.diag(self.alphas) + torch.diag(self.betas, 1) + torch.diag(self.betas, -1)

    def deflation(self) -> Deflation:
        """The whole Krylov space as known part of A: m directions for m products."""
        return Deflation(torch.linalg.eigvalsh(self.matrix()), (self.basis,), self.residual_norm**2)


@dataclass(frozen=True)
class RitzPairs:
    """Eigenpairs of A projected on a Krylov space of dimension m, eigenvalues descending.

    Attributes:
        values: Ritz values θ, ``(m,)`` float64.
        coordinates: Columns y are the Ritz vectors in the coordinates of the basis, ``(m, m)`` float64.
        residuals: ‖A Q y − θ Q y‖, ``(m,)`` float64.
    """

    values: Tensor
    coordinates: Tensor
    residuals: Tensor

    def select(self, positions: list[int]) -> "RitzPairs":
        """The pairs at these positions."""
        return RitzPairs(self.values[positions], self.coordinates[:, positions], self.residuals[positions])


def lanczos(matvec: Matvec, start: Tensor, num_steps: int) -> Tridiagonal:
    """Tridiagonal projection of a symmetric operator on the Krylov space of ``start``.

    Full reorthogonalisation in two passes; ends early where the space is exhausted. Costs one product per step, and
    memory for ``num_steps + 3`` vectors.

    Raises:
        ValueError: ``num_steps`` below 1, or a start that is zero or not finite.
        FloatingPointError: A product is not finite.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    space = KrylovSpace(start, rows_per_block=min(num_steps, start.numel()))
    while space.size < num_steps and not space.breakdown:
        space.absorb(matvec(space.advance()))
    return Tridiagonal(
        alphas=space.projected.diagonal().clone(),
        betas=space.projected.diagonal(1).clone(),
        basis=space.basis.blocks()[0],
        residual=space.residual,
        residual_norm=space.residual_norm,
        breakdown=space.breakdown,
    )


class KrylovSpace:
    """Orthonormal basis Q, projection T = QᵀAQ and what is missing: ``A Q − Q (T + E) = r bᵀ/‖r‖``.

    A product enters as ``q = advance(); absorb(A q)``, so that several spaces can share a blocked product. In plain
    Lanczos T is tridiagonal and b = ‖r‖ eₘ; after ``restart`` the kept Ritz vectors make T an arrowhead (thick restart,
    doi:10.1137/S0895479898334605). E holds the components of A Q within Q that an exact symmetric operator does not
    have: rounding, noise, asymmetry. They are recorded, so the residual of a Ritz pair (θ, Q y) costs no product and is
    true in floating point: ``‖A Q y − θ Q y‖² = (bᵀy)² + ‖E y‖²``, and what ``inject`` drops of A Q is added to it. (A
    restart forgets E in the directions it discards.)

    Attributes:
        basis: Q as rows.
        projected: T, ``(m, m)`` float64 on the CPU.
        residual: r ``(P,)``, orthogonal to Q and to the excluded vectors.
        residual_norm: ‖r‖.
        breakdown: Whether ‖r‖ is negligible: the basis spans an invariant subspace.
        from_start: Whether the basis has grown from the start alone, without restarts and injections.
        norm_estimate: Largest ‖A q‖ seen, a lower bound of ‖A‖: the scale of every rounding test.
    """

    def __init__(
        self, start: Tensor, *, excluded: Sequence[Tensor] = (), rows_per_block: int = _ROWS_PER_BLOCK
    ) -> None:
        """Start at the part of ``start`` outside the span of the orthonormal rows ``excluded``, and stay outside it.

        Raises:
            ValueError: The start is zero or not finite.
        """
        self.basis = OrthonormalRows(rows_per_block)
        self.projected = torch.zeros(0, 0, dtype=torch.float64)
        self.norm_estimate = 0.0
        self._excluded = [block for block in excluded if len(block)]
        self._num_excluded = sum(len(block) for block in self._excluded)
        self._eps = torch.finfo(start.dtype).eps
        self._defect = self.projected
        self._dropped = torch.zeros(0, dtype=torch.float64)
        self.residual_norm = 0.0
        self.from_start = True
        self.inject(start)

    @property
    def size(self) -> int:
        """Dimension m."""
        return self.basis.size

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans all there is to span."""
        return self.size + self._num_excluded >= self.residual.numel()

    @property
    def rounding(self) -> float:
        """Size below which a residual is rounding: 10 · eps · ‖A‖."""
        return 10 * self._eps * self.norm_estimate

    @property
    def negligible(self) -> float:
        """Residual of an invariant subspace: eps^¾ · ‖A‖, as the steps before it magnify rounding."""
        return float(self._eps**0.75) * self.norm_estimate

    def hidden_share(self, value: float) -> float:
        """How much of an eigenvector whose eigenvalue is ``value`` or more the start can hold at most, as a cosine.

        With the orthonormal polynomials π_j of T, uᵀq_j = π_j(λ) uᵀq_0 for each eigenpair (λ, u) and j ≤ m. From
        ‖Qᵀu‖ ≤ 1 follows |uᵀq_0| ≤ (Σ_j π_j(λ)²)^(−1/2), the root of the Christoffel function, which falls with λ above
        the largest Ritz value. Holds where the basis is ``from_start``. No product, O(m).
        """
        alphas = self.projected.diagonal().tolist()
        betas = [*self.projected.diagonal(1).tolist(), self.residual_norm]
        before, now, total = 0.0, 1.0, 1.0
        for index, (alpha, beta) in enumerate(zip(alphas, betas, strict=True)):
            last = betas[index - 1] if index else 0.0
            if beta <= self.rounding:
                return 0.0
            before, now = now, ((value - alpha) * now - last * before) / beta
            total += now * now
            if total > _CERTAIN:
                return 0.0
        return float(total**-0.5)

    def inject(self, vector: Tensor) -> None:
        """Go on in a fresh direction that A does not couple to the basis: the start, or after a breakdown."""
        norm = norm64(vector)
        if not 0 < norm < math.inf:
            raise ValueError(f"expected a finite, non-zero vector to start from, got one of norm {norm}")
        self._dropped[-1:] = self.residual_norm
        self.from_start = self.size == 0
        self.residual = vector.detach().clone()
        orthogonalise_(self.residual, self._excluded + self.basis.blocks())
        self.residual_norm = norm64(self.residual)
        self.breakdown = self.residual_norm <= 10 * self._eps * norm
        self._coupling = torch.zeros(self.size, dtype=torch.float64)

    def advance(self) -> Tensor:
        """Make the normalised residual the next basis vector q ``(P,)``; ``absorb`` waits for A q."""
        self.projected = _bordered(self.projected, self._coupling)
        self._defect = _bordered(self._defect, torch.zeros_like(self._coupling))
        self._dropped = torch.cat([self._dropped, torch.zeros(1, dtype=torch.float64)])
        return self.basis.append(self.residual / self.residual_norm)

    def absorb(self, product: Tensor) -> None:
        """Take A q for the q of the last ``advance``: completes T and leaves the next residual.

        Raises:
            FloatingPointError: The product is not finite.
        """
        self.residual = product.detach().clone()
        coefficients = orthogonalise_(self.residual, self._excluded + self.basis.blocks())
        self.residual_norm = norm64(self.residual)
        coefficients = coefficients[self._num_excluded :]
        norm = math.hypot(self.residual_norm, norm64(coefficients))
        if not math.isfinite(norm):
            raise FloatingPointError("a product with the operator is not finite: check its parameters and its data")
        self.norm_estimate = max(self.norm_estimate, norm)
        self.projected[-1, -1] = coefficients[-1]
        self._defect[:, -1] = coefficients - self.projected[:, -1]
        self._coupling = torch.zeros(self.size, dtype=torch.float64)
        self._coupling[-1] = self.residual_norm
        self.breakdown = self.exhausted or self.residual_norm <= self.negligible

    def ritz(self) -> RitzPairs:
        """All Ritz pairs with their residuals; no product, O(m³)."""
        values, coordinates = torch.linalg.eigh(self.projected)
        values, coordinates = values.flip(0), coordinates.flip(1)
        within = torch.cat([self._defect @ coordinates, self._dropped[:, None] * coordinates])
        return RitzPairs(values, coordinates, torch.hypot(self._coupling @ coordinates, within.norm(dim=0)))

    def restart(self, kept: RitzPairs) -> None:
        """Shrink to the Ritz vectors ``kept`` (a selection), which stay coupled to the residual."""
        rotation = kept.coordinates
        self.from_start = False
        self.basis.replace(rotation.T)
        self.projected = torch.diag(kept.values)
        self._defect = rotation.T @ self._defect @ rotation
        self._dropped = (self._dropped[:, None] * rotation).norm(dim=0)
        self._coupling = self._coupling @ rotation


def _bordered(matrix: Tensor, border: Tensor) -> Tensor:
    """``matrix`` with one more row and column: ``border``, and a zero in the corner."""
    grown = matrix.new_zeros(len(border) + 1, len(border) + 1)
    grown[:-1, :-1] = matrix
    grown[-1, :-1] = grown[:-1, -1] = border
    return grown
