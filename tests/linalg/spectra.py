"""Symmetric matrices of prescribed spectrum in random bases (never diagonal: Rademacher probes are exact there)."""

import itertools

import torch
from torch import Tensor

SPECTRA: dict[str, list[float]] = {
    "separated": [9.0, 6.0, 4.0, 2.5, 1.5, 1.0, 0.6, 0.3, 0.1, -0.2, -0.7, -3.0],
    "clustered": [5.0, 4.999, 4.99, 2.0, 1.999, 1.0, 0.5, 0.499, 0.1, 0.0, -1.0, -1.01],
    "negative": [-0.1, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -20.0],
    "repeated": [4.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -3.0],
    "rank_deficient": [7.0, 3.0, -2.0] + [0.0] * 9,
}
SCALES = [1e-8, 1.0, 1e8]
DTYPES = [torch.float32, torch.float64]


def rotated(eigenvalues: list[float] | Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """``V diag(eigenvalues) Vᵀ`` with V orthogonal from ``seed``, exactly symmetric."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    matrix = (basis * values) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


def gaussian_vector(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sign_vectors(size: int) -> Tensor:
    """All 2ⁿ sign vectors as rows: averages over them are expectations over Rademacher probes."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=size)), dtype=torch.float64)


def orthonormal_rows(count: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64)).Q.T.contiguous()


class Counted:
    """A matrix as a matvec that counts the vectors it has been applied to."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.count = 0

    def __call__(self, vectors: Tensor) -> Tensor:
        self.count += 1 if vectors.ndim == 1 else vectors.shape[1]
        return self.matrix @ vectors
