"""uᵀC_b u of the chunks of a probe set for combinations u of vectors that were multiplied anyway."""

import torch
from torch import Tensor

from lmc_lightning.core.hvp import CurvatureProduct
from lmc_lightning.linalg.subspace import dot64


class ChunkForms:
    """v ↦ C v that keeps what each chunk's own matrix C_b is on the span of the orthonormal vectors multiplied so far.

    A Ritz vector u = Σ y_i q_i lies in that span: uᵀC_b u = Σ y_i y_j q_iᵀC_b q_j, from which the error of λ over the
    data follows, costs no product of its own. The vectors are not copied and must stay as they are; a restart of the
    Krylov space would change them. The j-th product costs j inner products of each chunk more.
    """

    def __init__(self, product: CurvatureProduct) -> None:
        self._product = product
        self._vectors: list[Tensor] = []
        self._columns: list[Tensor] = []

    def __call__(self, vector: Tensor) -> Tensor:
        """C v ``(P,)``."""
        self._vectors.append(vector)
        product, column = self._product.with_projections(vector, self._vectors)
        self._columns.append(column)
        return product

    def of(self, vector: Tensor) -> Tensor:
        """uᵀC_b u of each chunk in float64, ``(B,)``, for a vector u in the span ``(P,)``."""
        y = torch.tensor([dot64(q, vector) for q in self._vectors], dtype=torch.float64)
        total = torch.zeros(len(self._columns[0]), dtype=torch.float64)
        for j, column in enumerate(self._columns):  # q_iᵀC_b q_j for i ≤ j, C_b being symmetric
            total += y[j] * (2 * column[:, :-1] @ y[:j] + column[:, -1] * y[j])
        return total
