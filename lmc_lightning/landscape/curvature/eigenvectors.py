"""What eigenvectors are made of: their parts by tensor, what they share with a gradient and with one another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmc_lightning.linalg.subspace import dot64


def products_by_tensor(a: Tensor, b: Tensor, sizes: Sequence[int]) -> Tensor:
    """Inner product of each tensor's parts of two vectors ``(P,)``, ``(T,)`` float64."""
    parts = zip(a.split(list(sizes)), b.split(list(sizes)), strict=True)
    return torch.tensor([dot64(x, y) for x, y in parts], dtype=torch.float64)


def squares_by_tensor(vectors: Tensor, sizes: Sequence[int]) -> Tensor:
    """Squared norm of each tensor's part of each row ``(k, P)``, ``(k, T)`` float64; of unit vectors, its share."""
    found = torch.zeros(len(vectors), len(sizes), dtype=torch.float64)
    for row, vector in zip(found, vectors, strict=True):
        row.copy_(products_by_tensor(vector, vector, sizes))
    return found


def subspace_overlap(new: Tensor, old: Tensor) -> float:
    """‖UᵀU'‖²_F/k of orthonormal rows ``(k, P)``: 1 for the same subspace, k/P for random ones."""
    count = min(len(new), len(old))
    products = torch.tensor([[dot64(u, v.to(u)) for v in old[:count]] for u in new[:count]], dtype=torch.float64)
    return float(products.square().sum()) / count


def share_within(vectors: Tensor, gradient: Tensor) -> float | None:
    """‖Uᵀg‖²/‖g‖² of orthonormal rows ``(k, P)`` and g ``(P,)``; of no gradient there is no share."""
    norm = dot64(gradient, gradient)
    return None if norm == 0 else sum(dot64(u, gradient) ** 2 for u in vectors) / norm
