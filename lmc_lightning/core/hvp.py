"""Hessian-vector products at a fixed point: what can be computed once is computed once."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lmc_lightning.core.collective import Collective
from lmc_lightning.core.memory import FREE_MEMORY_SHARE, CountBytes, free_bytes, is_out_of_memory
from lmc_lightning.types import Matvec

_BLOCK_TOLERANCE = 1e-3
"""Largest relative difference between a product from a block and the same product alone that is put to rounding."""

_PIECE = 1 << 20
"""Entries that are converted to float64 at a time."""

_SUMMED = 1 << 16
"""Products that are summed in the dtype of θ before float64 takes over."""


class CurvatureProduct(ABC):
    """v ↦ C v for a symmetric C that is a weighted mean over the chunks of a probe set, e.g. a Hessian at θ.

    Blocks of vectors, ``(P, b) -> (P, b)``, count as b products. Sums over chunks are taken in float64.

    Args:
        theta: the point ``(P,)``.
        weights: the share of each chunk of this process ``(B,)``; over all processes they sum to 1.
        sizes: entries of θ that each parameter tensor takes; by default one piece.
        context: entered around everything that is computed.
        collective: the processes over which products are summed.
    """

    def __init__(
        self,
        theta: Tensor,
        weights: Tensor,
        *,
        sizes: Sequence[int] | None = None,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
        collective: Collective | None = None,
    ) -> None:
        self.theta = theta.detach().clone()
        self.sizes = list(sizes or [theta.numel()])
        self._weights, self._collective = weights, collective or Collective()
        self.weights = self._collective.gather(lambda: weights)
        """The share of each chunk of all processes, summing to 1."""
        self.num_products = 0
        self.on_product: Callable[[int], None] | None = None
        """Told after each product how many there were."""
        self._num_chunk_gradients = 0
        self._context = context

    @abstractmethod
    def _product(self, index: int, vector: Tensor) -> Sequence[Tensor]:
        """The product of one chunk's own matrix, ``(P,) -> (P,)``, in pieces, tensor by tensor of ``sizes``."""

    @abstractmethod
    def _gradient(self, index: int) -> Sequence[Tensor]:
        """The gradient of one chunk's own loss ``(P,)``, in pieces."""

    def _products(self, index: int, vectors: Tensor) -> Tensor:
        """The products of one chunk's own matrix, ``(P, b) -> (P, b)``."""
        return torch.stack([torch.cat([*self._product(index, vector)]) for vector in vectors.unbind(1)], dim=1)

    def _block_product(self, index: int, tensors: Sequence[int], vector: Tensor) -> Sequence[Tensor]:
        """The product of the diagonal block of some tensors in one chunk's own matrix, in pieces."""
        whole = torch.zeros_like(self.theta)
        parts = whole.split(self.sizes)
        for number, part in zip(tensors, vector.split([self.sizes[n] for n in tensors]), strict=True):
            parts[number].copy_(part)
        product = self._product(index, whole)
        return [product[number] for number in tensors]

    def __enter__(self) -> "CurvatureProduct":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __call__(self, vector: Tensor) -> Tensor:
        """C v, ``(P,)``, or a block of products ``(P, b)``."""
        return self._apply(vector, None)

    def with_forms(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The product and vᵀC_b v of each chunk's own matrix in float64, ``(B,)`` or ``(B, b)``, for one each."""
        forms = torch.zeros(len(self._weights), *vector.shape[1:], dtype=torch.float64)
        product = self._apply(vector, lambda index, found: forms[index].copy_(_columnwise_dot(vector, found)))
        return product, self._collective.gather(lambda: forms)

    def with_projections(self, vector: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """C v ``(P,)``, and rᵀC_b v of each chunk's own matrix for each r of ``rows`` in float64, ``(B, n)``."""
        forms = torch.zeros(len(self._weights), len(rows), dtype=torch.float64)

        def observe(index: int, found: Tensor) -> None:
            pieces = found.split(_SUMMED)
            parts = [
                torch.stack([torch.dot(*pair) for pair in zip(r.split(_SUMMED), pieces, strict=True)]) for r in rows
            ]
            forms[index] = torch.stack(parts).double().sum(1)

        product = self._apply(vector, observe)
        return product, self._collective.gather(lambda: forms)

    def quadratic_forms(self, vector: Tensor) -> Tensor:
        """vᵀC_b v of each chunk's own matrix, as ``weights``, in float64; costs one product."""
        return self.with_forms(vector)[1]

    def on_tensors(self, tensors: Sequence[int]) -> Matvec:
        """v ↦ C v for the diagonal block of the parameter tensors of these numbers; a product counts as one."""

        def product(vector: Tensor) -> Tensor:
            with self._context():
                total = self._total(lambda index: self._block_product(index, tensors, vector), vector)
            self._count(1)
            return total

        return product

    def gradient(self) -> Tensor:
        """∇L(θ) ``(P,)``."""
        with self._context():
            return self._total(self._gradient, self.theta)

    def chunk_derivatives(self, index: int, vector: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gradient g_b and product C_b v ``(P,)`` of one chunk of this process, v = g_b unless it is given."""
        with self._context():
            gradient = torch.cat([*self._gradient(index)])
            return gradient, torch.cat([*self._product(index, gradient if vector is None else vector)])

    @property
    def num_chunks(self) -> int:
        """Chunks of this process that count."""
        return int(self._weights.count_nonzero())

    @property
    def num_cached(self) -> int:
        """Chunks whose graph is kept between products."""
        return 0

    @property
    def num_gradients(self) -> int:
        """Gradients of the whole probe set that were taken to differentiate them again."""
        return -(-self._num_chunk_gradients // max(1, self.num_chunks))

    def release(self) -> None:  # noqa: B027  # nothing is kept here
        """Free what is kept between products; the next one builds it anew."""

    def _apply(self, vector: Tensor, observe: Callable[[int, Tensor], object] | None) -> Tensor:
        def product(index: int) -> Sequence[Tensor]:
            pieces = self._product(index, vector) if vector.ndim == 1 else [self._products(index, vector)]
            if observe is not None:
                pieces = [torch.cat([*pieces])]
                observe(index, pieces[0])
            return pieces

        with self._context():
            total = self._total(product, vector)
        self._count(1 if vector.ndim == 1 else vector.shape[1])
        return total

    def _count(self, products: int) -> None:
        self.num_products += products
        if self.on_product is not None:
            self.on_product(self.num_products)

    def _total(self, part: Callable[[int], Sequence[Tensor]], like: Tensor) -> Tensor:
        return self._collective.total(lambda: self._sum(part, like)).to(like.dtype)

    def _sum(self, part: Callable[[int], Sequence[Tensor]], like: Tensor) -> Tensor:
        if len(self.weights) == 1:
            return torch.cat([*part(0)])  # nothing to add up
        total = torch.zeros_like(like, dtype=torch.float64)
        for index, weight in enumerate(self._weights.tolist()):
            if weight:
                # In pieces: a vector of length P in between, or one of float64, would leave the cache.
                pieces = [some for piece in part(index) for some in piece.split(_PIECE)]
                for target, piece in zip(total.split([len(piece) for piece in pieces]), pieces, strict=True):
                    target.add_(piece, alpha=weight)
        return total


class HessianProduct(CurvatureProduct):
    """v ↦ ∇²L(θ) v, ``(P,) -> (P,)``, by double backward.

    The gradient graph of each chunk is built at its first product and kept while all graphs fit the memory budget,
    which makes further products cost about 2 gradients; chunks beyond the budget are differentiated anew each time
    (3 to 4 gradients, memory of one chunk). Call :meth:`release` when done, or use it in a ``with`` block.

    Each parameter tensor is a leaf of the graphs of its own: through one flat leaf, every backward pass would make a
    vector of length P for each tensor.

    Args:
        theta: the point ``(P,)``.
        chunk_gradients: ``(index, leaves) -> gradients``, the differentiable gradient of one chunk's mean loss with
            respect to each leaf, a flat tensor of its own.
        weights: the share of each chunk of this process ``(B,)``; over all processes they sum to 1.
        memory_budget: for cached graphs [bytes]; by default a quarter of what is free.
        **common: see :class:`CurvatureProduct`.
    """

    def __init__(
        self,
        theta: Tensor,
        chunk_gradients: Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]],
        weights: Tensor,
        memory_budget: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(theta, weights, **common)
        if memory_budget is None:
            memory_budget = int(FREE_MEMORY_SHARE * free_bytes(theta.device))
        self.memory_budget = memory_budget
        self._chunk_gradients = chunk_gradients
        self._graphs: dict[int, tuple[Tensor, ...]] = {}
        self._graph_bytes: int | None = None
        self._leaves: tuple[Tensor, ...] = ()
        self._in_blocks: bool | None = None  # unknown until a block was compared with a single product

    @property
    def num_cached(self) -> int:
        """Chunks whose gradient graph is kept."""
        return len(self._graphs)

    def release(self) -> None:
        """Free the cached graphs; the next product builds them anew."""
        self._graphs.clear()

    def _gradient(self, index: int) -> Sequence[Tensor]:
        return [part.detach() for part in self._graph(index)]

    def _product(self, index: int, vector: Tensor) -> Sequence[Tensor]:
        return self._differentiated(index, range(len(self.sizes)), vector.split(self.sizes))

    def _block_product(self, index: int, tensors: Sequence[int], vector: Tensor) -> Sequence[Tensor]:
        return self._differentiated(index, tensors, vector.split([self.sizes[n] for n in tensors]))

    def _differentiated(
        self, index: int, tensors: Sequence[int], directions: Sequence[Tensor], *, in_block: bool = False
    ) -> list[Tensor]:
        """Σ_j ∂(g_j · d_j)/∂θ_i for the tensors i and j of these numbers; of many directions at once as a block."""
        gradients = self._graph(index)
        pairs = [(gradients[n], d) for n, d in zip(tensors, directions, strict=True) if gradients[n].requires_grad]
        found: Sequence[Tensor | None] = [None] * len(tensors)
        if pairs:
            found = torch.autograd.grad(
                [gradient for gradient, _ in pairs],
                [self._leaves[n] for n in tensors],
                [direction for _, direction in pairs],
                retain_graph=index in self._graphs or in_block,
                allow_unused=True,
                is_grads_batched=in_block,
            )
        return [torch.zeros_like(d) if part is None else part for part, d in zip(found, directions, strict=True)]

    def _products(self, index: int, vectors: Tensor) -> Tensor:
        if self._in_blocks is not False:
            blocked = self._vectorised(index, vectors)
            if self._in_blocks is None:
                self._in_blocks = blocked is not None and self._agree(index, vectors, blocked)
            if self._in_blocks and blocked is not None:
                return blocked
            self._in_blocks = False
        return super()._products(index, vectors)

    def _vectorised(self, index: int, vectors: Tensor) -> Tensor | None:
        """All products of a block in one backward pass; ``None`` where an operation of the graph does not allow it."""
        rows = vectors.T.contiguous().split(self.sizes, dim=1)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
                return torch.cat(self._differentiated(index, range(len(rows)), rows, in_block=True), dim=1).T
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return None

    def _agree(self, index: int, vectors: Tensor, blocked: Tensor) -> bool:
        alone = torch.cat([*self._product(index, vectors[:, 0])])
        return bool((blocked[:, 0] - alone).norm() <= _BLOCK_TOLERANCE * alone.norm())

    def _graph(self, index: int) -> tuple[Tensor, ...]:
        if index in self._graphs:
            return self._graphs[index]
        self._num_chunk_gradients += 1
        if not self._leaves:  # not before, since a product may be asked for in inference mode
            self._leaves = tuple(part.clone().requires_grad_() for part in self.theta.split(self.sizes))
        if self._graph_bytes is None:
            with CountBytes() as counted:
                gradients = self._chunk_gradients(index, self._leaves)
            self._graph_bytes = counted.total
        else:
            gradients = self._chunk_gradients(index, self._leaves)
        if (len(self._graphs) + 1) * self._graph_bytes <= self.memory_budget:
            self._graphs[index] = gradients
        return gradients


class FiniteDifferenceProduct(CurvatureProduct):
    """v ↦ ∇²L(θ) v by central differences of gradients: 2 gradients a product, right to about 1e-8 in float64 only.

    Args:
        theta: the point ``(P,)``.
        chunk_gradient: ``(index, theta) -> (P,)``, the gradient of one chunk's mean loss.
        weights: the share of each chunk of this process ``(B,)``.
        **common: see :class:`CurvatureProduct`.
    """

    def __init__(
        self, theta: Tensor, chunk_gradient: Callable[[int, Tensor], Tensor], weights: Tensor, **common: Any
    ) -> None:
        super().__init__(theta, weights, **common)
        self._chunk_gradient = chunk_gradient

    def _gradient(self, index: int) -> Sequence[Tensor]:
        self._num_chunk_gradients += 1
        return torch.split(self._chunk_gradient(index, self.theta), self.sizes)

    def _product(self, index: int, vector: Tensor) -> Sequence[Tensor]:
        norm = float(torch.linalg.vector_norm(vector))
        if norm == 0:
            return torch.split(torch.zeros_like(vector), self.sizes)
        step = relative_step(self.theta, vector)
        above, below = (self._chunk_gradient(index, self.theta + s * step * vector) for s in (1, -1))
        return torch.split((above - below) / (2 * step), self.sizes)


def relative_step(theta: Tensor, direction: Tensor) -> float:
    """The step of central differences along ``direction``: √eps · max(1, ‖θ‖) in all, so that few kinks are crossed."""
    scale = max(1.0, float(torch.linalg.vector_norm(theta)))
    epsilon = float(torch.finfo(theta.dtype).eps)
    return float(epsilon**0.5) * scale / float(torch.linalg.vector_norm(direction))


def _columnwise_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ_i a_i b_i in float64, ``()`` of vectors and ``(b,)`` of blocks, without float64 copies of the whole."""
    pieces = zip(a.split(_PIECE), b.split(_PIECE), strict=True)
    return torch.stack([(x.double() * y.double()).sum(0) for x, y in pieces]).sum(0)
