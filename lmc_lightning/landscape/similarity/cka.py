"""How alike two networks represent the same examples: linear CKA between their layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

MIN_EXAMPLES = 4
"""Fewer leave nothing of the debiased estimate, whose denominator holds n − 3."""

_BLOCK = 1 << 22
"""Entries of features that are converted to float64 at a time."""


@dataclass(frozen=True, eq=False)
class Representation:
    """What one layer makes of n examples, centred, in float64.

    Attributes:
        matrix: The features ``(n, p)``, or, where these are more than examples, their Gram matrix XXᵀ ``(n, n)``.
        squares: ‖x_i‖² of each example ``(n,)``.
        width: Features p.
    """

    matrix: Tensor = field(repr=False)
    squares: Tensor = field(repr=False)
    width: int

    @property
    def is_gram(self) -> bool:
        """Whether ``matrix`` is the Gram matrix."""
        return self.width > len(self.squares)

    @classmethod
    def of(cls, features: Tensor) -> "Representation":
        """The representation with the given features ``(n, …)``; never more than n² numbers are kept."""
        features = features.reshape(len(features), -1)
        num_examples, width = features.shape
        if width <= num_examples:
            centred = _centred(features)
            return cls(centred, centred.square().sum(1), width)
        gram = features.new_zeros(num_examples, num_examples, dtype=torch.float64)
        for block in features.split(max(1, _BLOCK // max(1, num_examples)), dim=1):
            centred = _centred(block)
            gram.addmm_(centred, centred.T)
        return cls(gram, gram.diagonal().clone(), width)


def _centred(features: Tensor) -> Tensor:
    exact = features.double()
    return exact - exact.mean(0)


@dataclass(frozen=True, eq=False)
class Similarity:
    """Linear CKA between the layers of networks A (rows) and B (columns).

    Attributes:
        layers_a: Names of the rows.
        layers_b: Names of the columns.
        debiased: From the unbiased HSIC, ``(A, B)`` float64; may be slightly negative. NaN for a layer that gives all
            examples the same, and below four examples.
        biased: From the plain HSIC, ``(A, B)`` in [0, 1]; grows towards 1 with the number of features over examples.
        stderr: Of ``debiased`` over examples, by the infinitesimal jackknife; right for many examples.
        num_examples: n.
    """

    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]
    debiased: Tensor = field(repr=False)
    biased: Tensor = field(repr=False)
    stderr: Tensor = field(repr=False)
    num_examples: int

    def __repr__(self) -> str:
        shape = f"{len(self.layers_a)} × {len(self.layers_b)} layers, {self.num_examples:,} examples"
        found = [value.debiased for value in self.same_layers().values()]
        mean = f"; CKA of equal layers {sum(found) / len(found):.3f}" if found else ""
        return f"Similarity({shape}{mean})"

    def same_layers(self) -> dict[str, "Value"]:
        """Of each layer with that of the same name, in the order of A."""
        tables = torch.stack([self.debiased, self.biased, self.stderr], dim=-1)
        places = [(i, self.layers_b.index(name)) for i, name in enumerate(self.layers_a) if name in self.layers_b]
        return {self.layers_a[i]: Value(*tables[i, j].tolist()) for i, j in places}


class Value(NamedTuple):
    """One entry of a :class:`Similarity`."""

    debiased: float
    biased: float
    stderr: float


def similarity(of_a: Mapping[str, Representation], of_b: Mapping[str, Representation]) -> Similarity:
    """Linear CKA between every layer of A and every layer of B on the same examples.

    CKA(X, Y) = HSIC(X, Y) / √(HSIC(X, X) HSIC(Y, Y)), a ratio of sums over all examples. Debiased, of the unbiased
    HSIC₁ (Song et al. 2012; arXiv 2010.15327); biased, of HSIC₀ (arXiv 1905.00414). Invariant to rotations and to the
    scale of either side. Costs 4·n·min(n, p)·min(n, q) float64 operations a pair of layers with p and q features, and
    2·n²·p once for a layer with p > n.

    Args:
        of_a: representations of A by layer.
        of_b: of B.

    Raises:
        ValueError: no layers, or representations of different numbers of examples.
    """
    sizes = {len(r.squares) for r in (*of_a.values(), *of_b.values())}
    if len(sizes) != 1 or not of_a or not of_b:
        raise ValueError(f"Expected layers of A and B on the same examples, got numbers of examples {sorted(sizes)}.")
    own_a, own_b = [[_dependence(r, r) for r in of.values()] for of in (of_a, of_b)]
    table = torch.stack(
        [
            torch.stack([_ratios(_dependence(x, y), own_a[i], own_b[j]) for j, y in enumerate(of_b.values())])
            for i, x in enumerate(of_a.values())
        ]
    ).cpu()
    return Similarity(tuple(of_a), tuple(of_b), table[..., 1], table[..., 0], table[..., 2], sizes.pop())


@dataclass(frozen=True, eq=False)
class _Dependence:
    """(n−1)² HSIC₀ and n(n−3) HSIC₁ of two representations ``()``, and Σ_j≠i ⟨x_i, x_j⟩⟨y_i, y_j⟩ of each example."""

    biased: Tensor
    unbiased: Tensor
    rows: Tensor


def _dependence(x: Representation, y: Representation) -> _Dependence:
    """Of centred features Σx = Σy = 0, which changes neither, and HSIC₁'s terms reduce to sums over examples."""
    n, a, b = len(x.squares), x.squares, y.squares
    products, rows = a * b, _rows(x, y)
    cross, diagonal = rows.sum(), products.sum()
    unbiased = torch.full_like(cross, torch.nan)
    if n >= MIN_EXAMPLES:
        unbiased = cross - diagonal + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * diagonal / (n - 2)
    return _Dependence(cross, unbiased, rows - products)


def _rows(x: Representation, y: Representation) -> Tensor:
    """Σ_j ⟨x_i, x_j⟩⟨y_i, y_j⟩ of each example ``(n,)``, from what is kept; their sum is ‖XᵀY‖² = tr XXᵀYYᵀ."""
    if x.is_gram and y.is_gram:
        return (x.matrix * y.matrix).sum(1)
    if x.is_gram or y.is_gram:
        gram, features = (x.matrix, y.matrix) if x.is_gram else (y.matrix, x.matrix)
        return ((gram @ features) * features).sum(1)
    return ((x.matrix @ (x.matrix.T @ y.matrix)) * y.matrix).sum(1)


def _ratios(both: _Dependence, own_a: _Dependence, own_b: _Dependence) -> Tensor:
    """Biased and debiased CKA, and the standard error of the latter ``(3,)``."""
    biased = both.biased / (own_a.biased * own_b.biased).sqrt()
    debiased = both.unbiased / (own_a.unbiased * own_b.unbiased).sqrt()
    # The influence of an example on ‖C_xy‖² is twice ⟨x̃, C_xy ỹ⟩ less its mean; the rest is the chain rule.
    n, cross = len(both.rows), 2 * both.rows / (own_a.unbiased * own_b.unbiased).sqrt()
    influence = n * (cross - debiased * (own_a.rows / own_a.unbiased + own_b.rows / own_b.unbiased))
    found = torch.stack([biased, debiased, influence.std() / n**0.5])
    known = torch.stack([own_a.biased * own_b.biased, *[own_a.unbiased * own_b.unbiased] * 2]) > 0
    return torch.where(known, found, torch.nan)
