"""What is true, in float64 and by other means than ours: double backward by hand, ARPACK, dense matrices, Jacobians."""

import json
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from benchmarks.peers import as_list, as_vector, differentiable_attention
from benchmarks.works import FOLDERS, Batch, Work, in_chunks, mean_loss

DENSE_LIMIT = 4_000
"""Largest P for which the whole Hessian is built."""
NUM_EIGENVALUES = 8


class Reference:
    """The truth about a work; each number is computed once and kept in a file beside the trained weights."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.module = work.module().double()
        self.chunks = [(x.double(), y) for x, y in work.chunks]
        self._path = FOLDERS["cache"] / f"{work.name}_reference.json"

    @property
    def top(self) -> np.ndarray[Any, Any]:
        """The largest eigenvalues, descending: of the dense matrix, or by ARPACK to 1e-9."""
        return np.array(self._kept("top", self._top))

    @property
    def trace(self) -> float:
        """tr H: of the dense matrix, or exactly by per-example Jacobians, or by many probes (``trace_stderr``)."""
        return float(self._kept("trace", self._trace)[0])

    @property
    def trace_stderr(self) -> float:
        """0 where the trace is exact."""
        return float(self._kept("trace", self._trace)[1])

    @property
    def frobenius_sq(self) -> float:
        """‖H‖²_F of the dense matrix; NaN where that was not built."""
        return float(self._kept("frobenius_sq", self._frobenius_sq))

    def product(self, vector: Tensor) -> Tensor:
        """H v in float64, by double backward, chunk by chunk."""
        parameters = list(self.module.parameters())
        directions = as_list(vector.double(), self.module)
        total = torch.zeros_like(vector, dtype=torch.float64)
        count = sum(len(labels) for _, labels in self.chunks)
        for (_, labels), gradients in zip(self.chunks, self.gradients, strict=True):
            found = torch.autograd.grad(gradients, parameters, directions, retain_graph=True)
            total.add_(as_vector(list(found)), alpha=len(labels) / count)
        return total

    @cached_property
    def gradients(self) -> list[tuple[Tensor, ...]]:
        """The gradient of each chunk with its graph."""
        parameters = list(self.module.parameters())
        with differentiable_attention():
            losses = [mean_loss(self.module, batch) for batch in self.chunks]
            return [torch.autograd.grad(loss, parameters, create_graph=True) for loss in losses]

    @cached_property
    def num_params(self) -> int:
        """P."""
        return sum(p.numel() for p in self.module.parameters())

    @cached_property
    def dense(self) -> Tensor:
        """The whole Hessian ``(P, P)``, a product for each column, symmetrised."""
        columns = [self.product(row) for row in torch.eye(self.num_params, dtype=torch.float64)]
        matrix = torch.stack(columns)
        return (matrix + matrix.T) / 2

    @property
    def is_dense(self) -> bool:
        """Whether the whole Hessian is built."""
        return self.num_params <= DENSE_LIMIT

    def _kept(self, name: str, compute: Callable[[], Any]) -> Any:
        known = json.loads(self._path.read_text()) if self._path.is_file() else {}
        if name not in known:
            known[name] = compute()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(known))
        return known[name]

    def _top(self) -> list[float]:
        if self.is_dense:
            return torch.linalg.eigvalsh(self.dense).flip(0)[:NUM_EIGENVALUES].tolist()
        shape = (self.num_params, self.num_params)
        operator = LinearOperator(shape, lambda v: self.product(torch.from_numpy(v.ravel())).numpy(), dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(self.num_params)
        found = eigsh(operator, k=NUM_EIGENVALUES, which="LA", tol=1e-9, v0=start, return_eigenvectors=False)
        return sorted(found.tolist(), reverse=True)

    def _trace(self) -> tuple[float, float]:
        if self.is_dense:
            return float(self.dense.trace()), 0.0
        if self.work.recipe.piecewise_linear:
            return gauss_newton_trace(self.module, self.chunks), 0.0
        return self._probed_trace(400)

    def _probed_trace(self, num_probes: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        samples = []
        for _ in range(num_probes):
            probe = torch.randint(0, 2, (self.num_params,), generator=generator).double() * 2 - 1
            samples.append(float(probe @ self.product(probe)))
        return float(np.mean(samples)), float(np.std(samples, ddof=1)) / math.sqrt(num_probes)

    def _frobenius_sq(self) -> float:
        return float(self.dense.square().sum()) if self.is_dense else math.nan


def gauss_newton_trace(module: nn.Module, chunks: list[Batch]) -> float:
    """Mean over examples of tr(JᵀBJ), J the Jacobian of the logits and B = diag p − ppᵀ: tr H of ReLU networks."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def logits(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        found: Tensor = functional_call(module, (parameters, buffers), (image[None],))[0]
        return found

    def trace(image: Tensor) -> Tensor:
        jacobian = [j.flatten(1) for j in jacrev(logits)(parameters, image).values()]
        p = logits(parameters, image).softmax(0)
        return ((torch.diag(p) - torch.outer(p, p)) * sum(j @ j.T for j in jacobian)).sum()

    examples = sum(len(labels) for _, labels in chunks)
    at_once = max(1, 2**24 // (10 * sum(p.numel() for p in parameters.values())))  # Jacobians in 128 MB
    small = [piece for chunk in chunks for piece in in_chunks(chunk, at_once)]
    return sum(float(vmap(trace)(images).sum()) for images, _ in small) / examples
