"""Orthonormal sets of long vectors, and what is known of an operator on their span."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SLICE = {"cpu": 1 << 16}
"""Columns of a set of vectors that are worked on at a time, by device type; elsewhere ``_LARGE_SLICE``."""
_LARGE_SLICE = 1 << 22


@dataclass(frozen=True)
class Deflation:
    """What is known of a symmetric operator A on the span of orthonormal vectors U, so that only the rest is sampled.

    For *any* orthonormal U, invariant or not, with Π = I − UUᵀ:

    ``tr A = Σ values + tr ΠAΠ`` and ``‖A‖²_F = Σ values² + 2·leak + ‖ΠAΠ‖²_F``.

    For a random probe v with E vvᵀ = I, independent of U, ``(Πv)ᵀA(Πv)`` is unbiased for tr ΠAΠ as it is. (Rescaling Πv
    to its expected norm √(P − k) would bias every moment of Rademacher probes, by a relative 1/P.)

    Attributes:
        values: Eigenvalues of UᵀAU (Ritz values), ``(k,)`` float64 on the CPU.
        blocks: The vectors as rows ``(k_1, P), (k_2, P), …``: any orthonormal basis of the span.
        leak: ‖ΠAU‖²_F, the sum of the squared residuals; 0 for exact eigenvectors.
    """

    values: Tensor
    blocks: tuple[Tensor, ...]
    leak: float


class OrthonormalRows:
    """A growing set of vectors ``(m, P)`` in blocks of rows: growth copies nothing and wastes at most a block."""

    def __init__(self, rows_per_block: int) -> None:
        self._rows_per_block = rows_per_block
        self._blocks: list[Tensor] = []
        self.size = 0

    def append(self, vector: Tensor) -> Tensor:
        """Copy ``vector`` in as the last row; returns that row."""
        block, row = divmod(self.size, self._rows_per_block)
        if block == len(self._blocks):
            self._blocks.append(vector.new_empty(self._rows_per_block, vector.numel()))
        self.size += 1
        return self._blocks[block][row].copy_(vector)

    def blocks(self) -> list[Tensor]:
        """Views of the rows in use."""
        step = self._rows_per_block
        return [self._blocks[i // step][: self.size - i] for i in range(0, self.size, step)]

    def combine(self, weights: Tensor) -> Tensor:
        """Linear combinations of the rows: weights ``(k, m)`` to vectors ``(k, P)``."""
        blocks = self.blocks()
        parts = torch.split(weights.to(blocks[0]), [len(block) for block in blocks], dim=1)
        result: Tensor = parts[0] @ blocks[0]
        for part, block in zip(parts[1:], blocks[1:], strict=True):
            result.addmm_(part, block)
        return result

    def replace(self, weights: Tensor, columns: int = 1 << 16) -> None:
        """Replace the rows by ``weights`` ``(k, m)``, k ≤ m, of them: in place, a slice of columns at a time."""
        blocks = self.blocks()
        weights = weights.to(blocks[0])
        for left in range(0, blocks[0].shape[1], columns):
            old = torch.cat([block[:, left : left + columns] for block in blocks])
            new = torch.split(weights @ old, self._rows_per_block)
            for block, rows in zip(blocks, new, strict=False):
                block[: len(rows), left : left + columns] = rows
        self.size = len(weights)
        del self._blocks[math.ceil(self.size / self._rows_per_block) :]


def orthogonalise_(vector: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """Remove the span of orthonormal rows from ``vector`` ``(P,)`` in place; returns the coefficients in float64.

    Classical Gram–Schmidt in two passes ("twice is enough"), slice by slice: inner products of the slices are summed in
    float64, as sums of 10⁷ terms in float32 would be wrong in the third digit, and the second pass's inner products are
    taken while its slice is still in the cache.
    """
    width = _SLICE.get(vector.device.type, _LARGE_SLICE)
    slices = [slice(left, left + width) for left in range(0, vector.numel(), width)]
    first = torch.zeros(sum(len(block) for block in blocks), dtype=torch.float64, device=vector.device)
    if not blocks:
        return first.cpu()
    second = torch.zeros_like(first)
    for part in slices:
        first += _inner_products(vector[part], blocks, part)
    for part in slices:
        _subtract(vector[part], blocks, part, first)
        second += _inner_products(vector[part], blocks, part)
    for part in slices:
        _subtract(vector[part], blocks, part, second)
    return (first + second).cpu()


def _inner_products(piece: Tensor, blocks: Sequence[Tensor], part: slice) -> Tensor:
    return torch.cat([block[:, part] @ piece for block in blocks]).double()


def _subtract(piece: Tensor, blocks: Sequence[Tensor], part: slice, coefficients: Tensor) -> None:
    sizes = [len(block) for block in blocks]
    for block, own in zip(blocks, torch.split(coefficients.to(piece), sizes), strict=True):
        piece.addmv_(block[:, part].T, own, alpha=-1)


def norm64(vector: Tensor) -> float:
    """Euclidean norm, accumulated in float64."""
    return math.sqrt(dot64(vector, vector))


def dot64(a: Tensor, b: Tensor, piece: int = 1 << 20) -> float:
    """Inner product of two vectors, accumulated in float64 piece by piece, so that no float64 copy is held."""
    pieces = zip(torch.split(a, piece), torch.split(b, piece), strict=True)
    return float(torch.stack([torch.dot(x.double(), y.double()) for x, y in pieces]).sum())
