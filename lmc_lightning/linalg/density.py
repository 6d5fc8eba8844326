"""Spectral density and moments of a symmetric operator by stochastic Lanczos quadrature."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lmc_lightning.linalg.lanczos import KrylovSpace
from lmc_lightning.linalg.subspace import Deflation, norm64
from lmc_lightning.types import Matvec


@dataclass(frozen=True)
class Quadrature:
    """Nodes and weights with ``Σ_k w_rk f(ν_rk)`` an estimate of tr f(A) / P from each probe r.

    Unbiased for polynomials f of degree ≤ 2·steps − 1 (deflated: see ``spectral_quadrature``). The total weight per
    probe is 1; deflated it is 1 on average only, and is left like that.

    Attributes:
        nodes: ``(R, k)`` float64 on the CPU; rows that broke down early are padded with nodes of weight 0.
        weights: ``(R, k)`` float64 on the CPU, non-negative.
        num_params: P.
        num_deflated: The first so many columns are deflated values of weight 1/P, the same in every row.
        leak: ‖ΠAU‖²_F of the deflated vectors.
        num_matvecs: Products spent.
    """

    nodes: Tensor
    weights: Tensor
    num_params: int
    num_deflated: int
    leak: float
    num_matvecs: int

    def moment(self, power: int) -> tuple[float, float]:
        """tr A^power and its standard error over probes (NaN for a single one)."""
        return _as_floats(self.num_params * (self.weights * self.nodes**power).sum(dim=1))

    @property
    def traces(self) -> Tensor:
        """The estimate of tr A from each probe, ``(R,)`` float64."""
        return self.num_params * (self.weights * self.nodes).sum(dim=1)

    @property
    def sampled_masses(self) -> Tensor:
        """‖Πv‖² of each probe of squared norm P, ``(R,)`` float64."""
        return self.num_params * self.weights[:, self.num_deflated :].sum(dim=1)

    @property
    def trace(self) -> float:
        """tr A, unbiased."""
        return self.moment(1)[0]

    @property
    def trace_stderr(self) -> float:
        """Standard error of ``trace`` over probes."""
        return self.moment(1)[1]

    @property
    def frobenius_sq(self) -> float:
        """‖A‖²_F = E‖Av‖², unbiased."""
        return self.moment(2)[0] + 2 * self.leak

    @property
    def frobenius_sq_stderr(self) -> float:
        """Standard error of ``frobenius_sq`` over probes."""
        return self.moment(2)[1]

    def positive_trace(self) -> tuple[float, float]:
        """Sum of the positive eigenvalues, and its standard error over probes."""
        mean, stderr = self._mean(self.nodes.clamp(min=0))
        return self.num_params * mean, self.num_params * stderr

    def effective_rank_entropy(self) -> float:
        """Exponential of the entropy of the positive spectrum: exp(−P Σ_k w_k q_k ln q_k), q_k = ν_k / Σλ₊, ν_k > 0."""
        total, _ = self.positive_trace()
        if total == 0:
            return 0.0
        shares = self.nodes.clamp(min=0) / total
        return math.exp(-self.num_params * self._mean(torch.xlogy(shares, shares))[0])

    def negative_mass(self, threshold: float) -> tuple[float, float]:
        """Share of the eigenvalues below −threshold, and its standard error over probes."""
        return self._mean(self.nodes < -threshold)

    def null_mass(self, threshold: float) -> tuple[float, float]:
        """Share of the eigenvalues within ±threshold, and its standard error over probes."""
        return self._mean(self.nodes.abs() <= threshold)

    def density(self, grid: Tensor, bandwidth: float) -> Tensor:
        """Density of the eigenvalues at ``grid`` ``(G,)`` [1/eigenvalue], smoothed by a Gaussian.

        ``bandwidth`` is its standard deviation. Not renormalised: the integral is the mean total weight.

        Raises:
            ValueError: ``bandwidth`` is not positive.
        """
        if not bandwidth > 0:
            raise ValueError(f"bandwidth is a standard deviation and must be positive, got {bandwidth}")
        return gaussian_mixture(grid, self.nodes.flatten(), self.weights.flatten() / len(self.weights), bandwidth)

    def _mean(self, values: Tensor) -> tuple[float, float]:
        """Mean over probes of Σ w·values, and its standard error."""
        return _as_floats((self.weights * values).sum(dim=1))


def spectral_quadrature(
    matvec: Matvec,
    probes: Iterable[Tensor],
    num_steps: int,
    *,
    deflation: Deflation | None = None,
    block_size: int = 1,
    first: Callable[[Tensor, list[int]], Tensor] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Quadrature:
    """Quadrature of the spectral density of A: Gauss nodes and weights of each probe's tridiagonal (arXiv 1901.10159).

    Lanczos with full reorthogonalisation; per probe ``Σ w ν^q = vᵀA^q v / ‖v‖²`` exactly for q ≤ 2·num_steps − 1.

    With ``deflation`` the known eigenvalues are nodes of weight exactly 1/P, and probes run in the complement with
    total weight ‖Πv‖²/‖v‖². ``trace`` and ``frobenius_sq`` stay unbiased for any orthonormal vectors independent of the
    probes, the other moments for invariant subspaces. The variance of the trace falls from 2(‖A‖²_F − Σa_ii²)
    (Rademacher) to the same of ΠAΠ.

    Args:
        matvec: The operator A; also called with ``(P, b)``, b ≤ ``block_size``, if that is above 1.
        probes: Independent vectors ``(P,)`` of which only the direction counts: Rademacher, Gaussian or sphere.
        num_steps: Products per probe, at least 2.
        deflation: What is known of A already.
        block_size: Probes that advance together, holding ``block_size · num_steps`` vectors.
        first: Takes the place of ``matvec`` for the first product of each probe, whose direction within the complement
            is then multiplied; also given the numbers of the probes.
        should_stop: Asked after each block of probes; True ends with the probes done.

    Raises:
        ValueError: No probes, ``num_steps`` below 2, ``block_size`` below 1, or a probe that is zero.
    """
    if num_steps < 2 or block_size < 1:
        raise ValueError(f"need num_steps >= 2 and block_size >= 1, got {num_steps} and {block_size}")
    known = deflation or Deflation(torch.zeros(0, dtype=torch.float64), (), 0.0)
    nodes: list[Tensor] = []
    weights: list[Tensor] = []
    num_params = 0
    for block in _blocks(probes, block_size):
        num_params = block[0].numel()
        for rule in _gauss_rules(matvec, block, num_steps, known, first, len(nodes)):
            nodes.append(rule[0])
            weights.append(rule[1])
        if should_stop is not None and should_stop():
            break
    if not nodes:
        raise ValueError("probes is empty: give at least one random vector")
    values = known.values.expand(len(nodes), -1)
    return Quadrature(
        nodes=torch.cat([values, pad_sequence(nodes, batch_first=True)], dim=1),
        weights=torch.cat([torch.full_like(values, 1 / num_params), pad_sequence(weights, batch_first=True)], dim=1),
        num_params=num_params,
        num_deflated=len(known.values),
        leak=known.leak,
        num_matvecs=sum(map(len, nodes)),
    )


def _gauss_rules(
    matvec: Matvec,
    probes: list[Tensor],
    num_steps: int,
    known: Deflation,
    first: Callable[[Tensor, list[int]], Tensor] | None,
    number: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Nodes and weights of each probe, one node per product; none for a probe within the known span."""
    spaces = [KrylovSpace(probe, excluded=known.blocks, rows_per_block=num_steps) for probe in probes]
    masses = [(space.residual_norm / norm64(probe)) ** 2 for space, probe in zip(spaces, probes, strict=True)]
    _grow_together(matvec, spaces, num_steps, first, number)
    for space, mass in zip(spaces, masses, strict=True):
        ritz = space.ritz()
        yield ritz.values, mass * ritz.coordinates[:1].flatten() ** 2


def _grow_together(
    matvec: Matvec,
    spaces: list[KrylovSpace],
    num_steps: int,
    first: Callable[[Tensor, list[int]], Tensor] | None,
    number: int,
) -> None:
    """Up to ``num_steps`` products for each space, those of one step as one block; ``number`` is that of the first."""
    for step in range(num_steps):
        active = [index for index, space in enumerate(spaces) if not space.breakdown]
        if not active:
            return
        directions = [spaces[index].advance() for index in active]
        together = torch.stack(directions, dim=1) if len(active) > 1 else directions[0]
        products = matvec(together) if first is None or step else first(together, [number + i for i in active])
        columns = products.unbind(1) if len(active) > 1 else [products]
        for index, product in zip(active, columns, strict=True):
            spaces[index].absorb(product)


def _blocks(probes: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    iterator = iter(probes)
    while block := list(islice(iterator, size)):
        yield block


def gaussian_mixture(grid: Tensor, nodes: Tensor, weights: Tensor, bandwidth: float) -> Tensor:
    """Σ_k w_k N(x; ν_k, bandwidth²) at the points x of ``grid`` ``(G,)``, float64."""
    offsets = (grid.to(nodes)[:, None] - nodes) / bandwidth
    kernel = torch.exp(-0.5 * offsets**2) / (bandwidth * math.sqrt(2 * math.pi))
    return kernel @ weights


def mean_and_stderr(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the rows, and its standard error, NaN for a single one."""
    mean = values.mean(dim=0)
    if len(values) < 2:
        return mean, torch.full_like(mean, math.nan)
    return mean, values.std(dim=0) / math.sqrt(len(values))


def _as_floats(values: Tensor) -> tuple[float, float]:
    mean, stderr = mean_and_stderr(values)
    return float(mean), float(stderr)
