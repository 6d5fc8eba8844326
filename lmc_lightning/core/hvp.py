"""Hessian-vector products at a fixed point: what can be computed once is computed once."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmc_lightning.core.collective import Collective

FREE_MEMORY_SHARE = 0.25
"""Share of the free memory that cached gradient graphs may take by default."""


class HessianProduct:
    """v ↦ ∇²L(θ) v, ``(P,) -> (P,)``, by double backward.

    The gradient graph of each chunk is built at its first product and kept while all graphs fit the memory budget,
    which makes further products cost about 2 gradients; chunks beyond the budget are differentiated anew each time
    (3 to 4 gradients, memory of one chunk). Call :meth:`release` when done, or use it in a ``with`` block.

    Args:
        theta: the point ``(P,)``.
        chunk_gradient: ``(index, leaf) -> (P,)``, the differentiable gradient of one chunk's mean loss.
        weights: the share of each chunk of this process ``(B,)``; over all processes they sum to 1.
        memory_budget: for cached graphs [bytes]; by default a quarter of what is free.
        context: entered around everything that is computed.
        collective: the processes over which products are summed.
    """

    def __init__(
        self,
        theta: Tensor,
        chunk_gradient: Callable[[int, Tensor], Tensor],
        weights: Tensor,
        memory_budget: int | None = None,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
        collective: Collective | None = None,
    ) -> None:
        self.theta = theta.detach().clone()
        self._weights, self._collective = weights, collective or Collective()
        self.weights = self._collective.gather(lambda: weights)
        """The share of each chunk of all processes, summing to 1."""
        self.num_products = 0
        self._num_chunk_gradients = 0
        if memory_budget is None:
            memory_budget = int(FREE_MEMORY_SHARE * free_bytes(theta.device))
        self.memory_budget = memory_budget
        self._context = context
        self._chunk_gradient = chunk_gradient
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}
        self._graph_bytes: int | None = None
        self._leaf: Tensor | None = None

    def __enter__(self) -> "HessianProduct":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __call__(self, vector: Tensor) -> Tensor:
        """∇²L(θ) v ``(P,)``, summed over chunks in float64."""
        return self._apply(vector, None)

    def with_forms(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The product ``(P,)`` and vᵀH_b v of each chunk's own Hessian, as ``weights``, in float64, for one product."""
        forms = torch.zeros(len(self._weights), dtype=torch.float64)
        product = self._apply(vector, forms)
        return product, self._collective.gather(lambda: forms)

    def quadratic_forms(self, vector: Tensor) -> Tensor:
        """vᵀH_b v of each chunk's own Hessian, as ``weights``, in float64; costs one product."""
        return self.with_forms(vector)[1]

    @property
    def num_cached(self) -> int:
        """Chunks whose gradient graph is kept."""
        return len(self._graphs)

    def release(self) -> None:
        """Free the cached graphs; the next product builds them anew."""
        self._graphs.clear()

    def gradient(self) -> Tensor:
        """∇L(θ) ``(P,)``, which the graphs of the products hold already."""
        with self._context():
            total = self._collective.total(lambda: self._sum(lambda index: self._graph(index)[1].detach()))
        return total.to(self.theta.dtype)

    @property
    def num_gradients(self) -> int:
        """Gradients of the whole probe set that were taken to differentiate them again."""
        return -(-self._num_chunk_gradients // max(1, int(self._weights.count_nonzero())))

    def _apply(self, vector: Tensor, forms: Tensor | None) -> Tensor:
        def product(index: int) -> Tensor:
            result = self._product(index, vector)
            if forms is not None:
                forms[index] = torch.dot(result.double(), vector.double())
            return result

        with self._context():
            total = self._collective.total(lambda: self._sum(product))
        self.num_products += 1
        return total.to(vector.dtype)

    def _sum(self, part: Callable[[int], Tensor]) -> Tensor:
        total = torch.zeros_like(self.theta, dtype=torch.float64)
        for index, weight in enumerate(self._weights.tolist()):
            if weight:
                total.add_(part(index), alpha=weight)
        return total

    def _product(self, index: int, vector: Tensor) -> Tensor:
        leaf, gradient = self._graph(index)
        if not gradient.requires_grad:
            return torch.zeros_like(vector)
        kept = index in self._graphs
        (product,) = torch.autograd.grad(gradient, leaf, vector, retain_graph=kept, allow_unused=True)
        return torch.zeros_like(vector) if product is None else product

    def _graph(self, index: int) -> tuple[Tensor, Tensor]:
        if index in self._graphs:
            return self._graphs[index]
        self._num_chunk_gradients += 1
        if self._leaf is None:  # not before, since a product may be asked for in inference mode
            self._leaf = self.theta.clone().requires_grad_()
        leaf = self._leaf
        if self._graph_bytes is None:
            with _CountBytes() as counted:
                gradient = self._chunk_gradient(index, leaf)
            self._graph_bytes = counted.total
        else:
            gradient = self._chunk_gradient(index, leaf)
        if (len(self._graphs) + 1) * self._graph_bytes <= self.memory_budget:
            self._graphs[index] = (leaf, gradient)
        return leaf, gradient


class FiniteDifferenceProduct(HessianProduct):
    """v ↦ ∇²L(θ) v by central differences of gradients: 2 gradients a product, right to about 1e-8 in float64 only."""

    def _product(self, index: int, vector: Tensor) -> Tensor:
        norm = float(torch.linalg.vector_norm(vector))
        if norm == 0:
            return torch.zeros_like(vector)
        step = relative_step(self.theta, vector)
        above, below = (self._chunk_gradient(index, self.theta + s * step * vector) for s in (1, -1))
        return (above - below) / (2 * step)


def relative_step(theta: Tensor, direction: Tensor) -> float:
    """The step of central differences along ``direction``: √eps · max(1, ‖θ‖) in all, so that few kinks are crossed."""
    scale = max(1.0, float(torch.linalg.vector_norm(theta)))
    epsilon = float(torch.finfo(theta.dtype).eps)
    return float(epsilon**0.5) * scale / float(torch.linalg.vector_norm(direction))


class _CountBytes(TorchDispatchMode):
    """Sums the sizes of all tensors made inside: an upper bound on what a graph built there keeps alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            made = result if isinstance(result, tuple | list) else (result,)
            self.total += sum(t.numel() * t.element_size() for t in made if isinstance(t, Tensor))
        return result


def free_bytes(device: torch.device) -> int:
    """Memory that is free on ``device`` [bytes]; on hosts that do not tell, 4 GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30
