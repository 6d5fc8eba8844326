"""Extreme eigenpairs of a symmetric operator: both ends of the spectrum from one Krylov space, with residuals.

Why guards: a small residual says that *some* eigenvalue is near. Before a cluster is resolved, one Ritz value stands
for all of it with a small residual; guard pairs keep the run going until the other members have come up.

Why a bound for the largest eigenvalue alone: what could hide above its Ritz value had to have a small share of the
start, and the Krylov space says how small (``KrylovSpace.hidden_share``). A random start has so small a share with a
probability that is known, whatever the spectrum. That is certain sooner than guards are: two guards have to converge,
which nobody asked for. On pairs and clusters of a relative gap of 0.002 to 0.03 the residual alone misses λ_max by more
than its tolerance in up to half of all starts, the bound in at most 1 in 500.

Why sweeps: a Krylov space has one direction per distinct eigenvalue. When it turns out invariant, fresh directions
follow until a whole sweep changes nothing; then all copies of repeated eigenvalues are found. Where it is not, copies
come up through rounding only; one that is missed is a node above the smallest of the largest pairs in a deflated
``spectral_quadrature``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmc_lightning.linalg.lanczos import KrylovSpace, RitzPairs
from lmc_lightning.linalg.subspace import Deflation, norm64
from lmc_lightning.types import Matvec

_SMALLEST_SHARE = 0.0125
"""A standard normal number is smaller than this in size with a probability of 0.01."""


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs (λ, u) at the ends of the spectrum of A, eigenvalues descending.

    Fewer than asked for where the Krylov space has fewer dimensions; no pair occurs twice.

    Attributes:
        eigenvalues: Signed, ``(k,)`` float64: ``num_largest`` from the top, then those from the bottom, smallest last.
        eigenvectors: Orthonormal rows ``(k, P)`` in the dtype and on the device of the start.
        residuals: ‖A u − λ u‖, ``(k,)`` float64; some eigenvalue of A lies within that distance of λ.
        converged: Whether each residual is within its tolerance, ``(k,)`` bool; for the largest pair alone also whether
            λ_max is within it with a probability of 0.99 over starts.
        num_largest: How many of the pairs are counted from the top.
        num_matvecs: Products spent, all of them.
        ritz_values: All Ritz values of the final projection, descending, ``(m,)`` float64.
        rounding: 10 · eps · ‖A‖, below which an eigenvalue cannot be told from 0.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    converged: Tensor
    num_largest: int
    num_matvecs: int
    ritz_values: Tensor
    rounding: float

    def deflation(self) -> Deflation:
        """The converged pairs as known part of A."""
        every = bool(self.converged.all())
        vectors = self.eigenvectors if every else self.eigenvectors[self.converged.to(self.eigenvectors.device)]
        leak = float(self.residuals[self.converged].square().sum())
        return Deflation(self.eigenvalues[self.converged], (vectors,), leak)


def extreme_eigenpairs(
    matvec: Matvec,
    start: Tensor,
    *,
    num_largest: int,
    num_smallest: int,
    tolerance: float = 1e-3,
    tolerance_smallest: float = 1e-2,
    max_products: int = 64,
    guard: int = 2,
    max_basis: int | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Eigenpairs:
    """Largest and smallest (signed) eigenpairs of a symmetric operator by one Lanczos run, fully reorthogonalised.

    Stops when ‖A u − λ u‖ ≤ tolerance·|λ| (or rounding) holds for the top ``num_largest + guard`` pairs and, with
    ``tolerance_smallest``, for the bottom ``num_smallest``. Residuals cost no product (``KrylovSpace``); errors of the
    eigenvalues are about residual²/gap, far smaller. For the largest pair alone a bound takes the place of the guards:
    the run ends when λ_max ≤ θ + tolerance·|θ| with a probability of 0.99 over random starts.

    Of an operator known to be positive semi-definite ask for ``num_smallest=0``: nothing converges relative to 0.

    Args:
        matvec: The operator A.
        start: Random vector ``(P,)`` without preferred direction, or ``warm_start`` of the last eigenvectors.
        num_largest: Pairs wanted at the top.
        num_smallest: Pairs wanted at the bottom.
        tolerance: Residual relative to |λ| at the top.
        tolerance_smallest: Residual relative to |λ| at the bottom.
        max_products: Budget; what has not converged then is returned with ``converged=False``.
        guard: Further top pairs that must converge too, of one pair after restarts only; 0 for no bound either.
        max_basis: Most basis vectors held, by thick restarts; None for no limit. Memory peaks at
            ``max_basis + num_largest + num_smallest + 20`` vectors.
        should_stop: Asked after every product; True ends the run with what there is.

    Raises:
        ValueError: Nothing is asked for, ``max_basis`` is too small for it, or the start is zero or not finite.
        FloatingPointError: A product is not finite.
    """
    request = _Request(num_largest, num_smallest, guard, tolerance, tolerance_smallest)
    _validate(request, max_products, max_basis)
    space, ritz, products = _run(matvec, start, request, max_products, max_basis, should_stop)
    positions = request.returned(space.size)
    pairs = ritz.select(positions)
    return Eigenpairs(
        eigenvalues=pairs.values,
        eigenvectors=space.basis.combine(pairs.coordinates.T),
        residuals=pairs.residuals,
        converged=request.converged(ritz, space)[positions],
        num_largest=min(num_largest, space.size),
        num_matvecs=products,
        ritz_values=ritz.values,
        rounding=space.rounding,
    )


def warm_start(previous: Tensor, fresh: Tensor) -> Tensor:
    """Normalised sum of earlier eigenvectors plus a random vector of equal norm, ``(P,)``: where to start a next visit.

    Args:
        previous: Eigenvectors of the last visit, ``(k, P)``.
        fresh: Random vector ``(P,)``; without it a direction that has come up since could be missed.
    """
    remembered = previous.sum(dim=0)
    norm = norm64(remembered)
    start = fresh / norm64(fresh)
    return start + remembered / norm if norm > 0 else start


@dataclass(frozen=True)
class _Request:
    """What is asked for, and when it is reached."""

    num_largest: int
    num_smallest: int
    guard: int
    tolerance: float
    tolerance_smallest: float

    @property
    def num_top(self) -> int:
        """Pairs at the top that have to converge, guards included."""
        return self.num_largest + self.guard if self.num_largest else 0

    @property
    def num_wanted(self) -> int:
        return self.num_top + self.num_smallest

    def returned(self, size: int) -> list[int]:
        """Positions of the pairs to return among ``size`` descending Ritz values."""
        top = min(self.num_largest, size)
        return [*range(top), *range(max(top, size - self.num_smallest), size)]

    def kept(self, size: int) -> list[int]:
        """Positions that survive a restart: the wanted ones, and half of the others, next to the ends asked for."""
        spare = (size - self.num_wanted) // 2
        below = spare // (2 if self.num_top else 1) if self.num_smallest else 0
        return [*range(self.num_top + spare - below), *range(size - self.num_smallest - below, size)]

    def converged(self, ritz: RitzPairs, space: KrylovSpace) -> Tensor:
        """Which residuals are within tolerance·|θ|, or are rounding, ``(m,)`` bool; of one pair also its bound."""
        tolerances = torch.full_like(ritz.values, self.tolerance_smallest)
        tolerances[: self.num_top] = self.tolerance
        found = ritz.residuals <= (tolerances * ritz.values.abs()).clamp(min=space.rounding)
        if self.bounded(space) and not self.is_largest(float(ritz.values[0]), space):
            found[0] = False
        return found

    def bounded(self, space: KrylovSpace) -> bool:
        """Whether a bound takes the place of guards."""
        return self.num_largest == 1 and self.guard > 0 and space.from_start and not space.breakdown

    def is_largest(self, value: float, space: KrylovSpace) -> bool:
        """Whether a random start would have shown an eigenvalue that is larger than this one by the tolerance."""
        # Random vectors have entries of about 1/√P along any direction, warm starts of 1/√2P.
        smallest = _SMALLEST_SHARE / math.sqrt(2 * space.residual.numel())
        return space.hidden_share(value + self.tolerance * abs(value)) <= smallest

    def settled(self, found: Tensor, before: Tensor | None, space: KrylovSpace) -> bool:
        """Whether the sweep of the last fresh direction has left the eigenvalues as they were."""
        if before is None or len(found) != len(before) or space.size < self.num_wanted:
            return False
        return float((found - before).abs().max()) <= space.negligible

    def reached(self, ritz: RitzPairs, space: KrylovSpace) -> bool:
        size, top = len(ritz.values), 1 if self.bounded(space) else self.num_top
        if size < top + self.num_smallest:
            return False
        converged = self.converged(ritz, space)
        return bool(converged[:top].all() and converged[size - self.num_smallest :].all())


def _run(
    matvec: Matvec,
    start: Tensor,
    request: _Request,
    max_products: int,
    max_basis: int | None,
    should_stop: Callable[[], bool] | None,
) -> tuple[KrylovSpace, RitzPairs, int]:
    """Grow the Krylov space until the request is met or the budget spent; also returns the number of products."""
    space = KrylovSpace(start)
    products, swept = 0, None
    while True:
        space.absorb(matvec(space.advance()))
        products += 1
        ritz = space.ritz()
        if space.exhausted or products >= max_products or (should_stop is not None and should_stop()):
            break
        if space.breakdown:
            found = ritz.values[request.returned(space.size)]
            if request.settled(found, swept, space):
                break
            swept = found
        elif swept is None and request.reached(ritz, space):
            break
        if space.size == max_basis:
            space.restart(ritz.select(request.kept(space.size)))
        if space.breakdown:
            space.inject(_fresh_direction(start, seed=products))
    return space, ritz, products


def _validate(request: _Request, max_products: int, max_basis: int | None) -> None:
    numbers = (request.num_largest, request.num_smallest, request.guard)
    if min(numbers) < 0 or request.num_largest + request.num_smallest == 0:
        raise ValueError(f"(num_largest, num_smallest, guard) must ask for at least one pair, got {numbers}")
    if max_products < 1:
        raise ValueError(f"max_products must be at least 1, got {max_products}")
    needed = request.num_wanted + 3
    if max_basis is not None and max_basis < needed:
        raise ValueError(
            f"max_basis={max_basis} is too small for {request.num_wanted} pairs, guards included: "
            f"raise it to at least {needed}, or ask for fewer pairs"
        )


def _fresh_direction(start: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(start.numel(), generator=generator).to(start)
