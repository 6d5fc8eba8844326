"""How alike two networks represent the same examples: linear CKA between their layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
        num_examples: n.
    """

    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]
    debiased: Tensor = field(repr=False)
    biased: Tensor = field(repr=False)
    num_examples: int

    def same_layers(self) -> dict[str, tuple[float, float]]:
        """Debiased and biased CKA of each layer with the layer of the same name, in the order of A."""
        places = {name: j for j, name in enumerate(self.layers_b)}
        return {
            name: (float(self.debiased[i, places[name]]), float(self.biased[i, places[name]]))
            for i, name in enumerate(self.layers_a)
            if name in places
        }


def similarity(of_a: Mapping[str, Representation], of_b: Mapping[str, Representation]) -> Similarity:
    """Linear CKA between every layer of A and every layer of B on the same examples.

    CKA(X, Y) = HSIC(X, Y) / √(HSIC(X, X) HSIC(Y, Y)), a ratio of sums over all examples. Debiased, of the unbiased
    HSIC₁ (Song et al. 2012; arXiv 2010.15327); biased, of HSIC₀ (arXiv 1905.00414). Invariant to rotations and to the
    scale of either side. Costs 2·n·min(n, p)·min(n, q) float64 operations a pair of layers with p and q features, and
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
    table = torch.tensor(
        [
            [_ratio(_dependence(x, y), own_a[i], own_b[j]) for j, y in enumerate(of_b.values())]
            for i, x in enumerate(of_a.values())
        ],
        dtype=torch.float64,
    )
    return Similarity(tuple(of_a), tuple(of_b), table[..., 1], table[..., 0], sizes.pop())


def _ratio(both: Tensor, own_a: Tensor, own_b: Tensor) -> list[float]:
    ratio = both / (own_a * own_b).sqrt()
    return torch.where((own_a > 0) & (own_b > 0), ratio, torch.nan).tolist()


def _dependence(x: Representation, y: Representation) -> Tensor:
    """(n−1)² HSIC₀ and n(n−3) HSIC₁ of two representations, ``(2,)``.

    Of centred features Σx = Σy = 0, which changes neither, and HSIC₁'s terms reduce to sums over examples.
    """
    n = len(x.squares)
    cross = _squared_cross(x, y)
    if n < MIN_EXAMPLES:
        return torch.stack([cross, torch.full_like(cross, torch.nan)])
    a, b = x.squares, y.squares
    products = a @ b
    unbiased = cross - products + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * products / (n - 2)
    return torch.stack([cross, unbiased])


def _squared_cross(x: Representation, y: Representation) -> Tensor:
    """‖XᵀY‖² = tr XXᵀYYᵀ ``()``, from what is kept of each."""
    if x.is_gram and y.is_gram:
        return (x.matrix * y.matrix).sum()
    if x.is_gram or y.is_gram:
        gram, features = (x.matrix, y.matrix) if x.is_gram else (y.matrix, x.matrix)
        return ((gram @ features) * features).sum()
    return (x.matrix.T @ y.matrix).square().sum()
