"""Which examples and classes a curvature is made of: λ = uᵀHu and tr H are means over examples."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmc_lightning.core.convolution import LeanLayers
from lmc_lightning.core.gauss_newton import output_hessian
from lmc_lightning.core.hvp import relative_step
from lmc_lightning.core.losstap import TappedLoss
from lmc_lightning.core.memory import is_out_of_memory
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.structure import cut, leading_size, tensors_in
from lmc_lightning.landscape.curvature.exact_trace import ExactTrace
from lmc_lightning.landscape.curvature.spectrum import Operator
from lmc_lightning.types import Batch

_ROUNDING = 1e4
"""Units of rounding by which the terms of a sum may miss it."""


@dataclass(frozen=True)
class CurvatureShares:
    """Parts of a curvature, one for each example of the probe set in its order.

    Attributes:
        parts: The example's weight times its own curvature, ``(N,)`` float64.
        weights: Its weight ``(N,)``, summing to 1: its share if all had the same curvature.
        labels: Its class ``(N,)``, −1 for none.
    """

    parts: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    @property
    def value(self) -> float:
        """The curvature: the sum of all ``parts``."""
        return float(self.parts.sum())

    @property
    def shares(self) -> Tensor:
        """Parts relative to their sum ``(N,)``; some are negative where some examples curve the other way."""
        return self.parts / self.parts.sum()

    @property
    def by_class(self) -> dict[int, float]:
        """Sum of the ``parts`` of each class, in the order of classes; with those of no class they sum to ``value``."""
        return self._by_class(self.parts)

    @property
    def weight_by_class(self) -> dict[int, float]:
        """Sum of the ``weights`` of each class."""
        return self._by_class(self.weights)

    def largest(self, count: int) -> Tensor:
        """The examples of the largest parts, descending ``(count,)``."""
        return self.parts.argsort(descending=True, stable=True)[:count]

    def _by_class(self, values: Tensor) -> dict[int, float]:
        classes = [c for c in self.labels.unique().tolist() if c >= 0]
        return {c: float(values[self.labels == c].sum()) for c in classes}


def trace_shares(trace: ExactTrace) -> CurvatureShares:
    """The parts of an exact trace; no further cost.

    Raises:
        ValueError: The trace could not be had exactly.
    """
    if trace.value is None:
        raise ValueError(f"The trace is not known example by example: {trace.reason}.")
    parts = trace.example_weights * trace.example_traces
    return CurvatureShares(parts, trace.example_weights, trace.example_labels)


def form_shares(objective: Objective, theta: Tensor, vector: Tensor, operator: Operator = "hessian") -> CurvatureShares:
    """The parts of uᵀHu at θ, of an eigenvalue for its eigenvector u: uᵀ∇²ℓ_n u of every example at once.

    Along the line θ + tu, Σ c_n ℓ_n is differentiated twice by t and then by c: one more backward pass than a Hessian
    product, about 4 gradients in all.

    Args:
        objective: The mean loss.
        theta: The point ``(P,)``.
        vector: The direction u ``(P,)``.
        operator: Parts of uᵀGu, or of the empirical Fisher matrix, instead.

    Raises:
        ValueError: Single examples are not known: the loss is not one that the tap can see.
    """
    rows = objective.collective.agree(lambda: _rows(objective, theta, vector, operator))
    weights, forms, labels = objective.collective.gather(lambda: rows).T
    return CurvatureShares(weights * forms, weights, labels.long())


def example_images(objective: Objective, numbers: Tensor) -> Tensor | None:
    """What the examples of these numbers look like, ``(k, H, W)`` or ``(k, C, H, W)``, as the step sees them.

    ``None`` where batches hold no tensor of that shape, and where other processes hold a part of the examples.
    """
    shares = objective.baseline.local_weights
    if len(shares) < len(objective.baseline.weights):
        return None
    counted = [batch for batch, share in zip(objective.batches, shares.tolist(), strict=True) if share]
    images = [_images_in(batch) for batch in counted]
    known = [i for i in images if i is not None]
    if len(known) < len(images) or any(i.shape[1:] != known[0].shape[1:] for i in known):
        return None
    starts = torch.tensor([len(i) for i in known]).cumsum(0)
    chunks = torch.searchsorted(starts, numbers, right=True).tolist()
    picked = zip(chunks, numbers.tolist(), strict=True)
    return torch.stack([known[c][n - int(starts[c]) + len(known[c])].cpu() for c, n in picked])


def _images_in(batch: Batch) -> Tensor | None:
    size = leading_size(batch)
    return next((t for t in tensors_in(batch) if t.ndim in (3, 4) and len(t) == size and not t.is_complex()), None)


def _rows(objective: Objective, theta: Tensor, vector: Tensor, operator: Operator) -> Tensor:
    """Weight, uᵀ∇²ℓ_n u and label of each example of this process ``(n, 3)``."""
    rows = []
    for index, share in enumerate(objective.baseline.local_weights.tolist()):
        if not share:
            continue
        line = _Line(objective, theta, vector, objective.batches[index], index)
        with objective.box(), LeanLayers():
            tapped, forms = _FORMS[operator](line)
        weights = share * tapped.weights / tapped.weights.sum()
        labels = torch.full_like(weights, -1) if tapped.labels is None else tapped.labels.double()
        rows.append(torch.stack([t.detach().double().cpu() for t in (weights, forms, labels)], 1))
    return torch.cat(rows)


@dataclass(frozen=True)
class _Line:
    """One chunk on the line θ + tu."""

    objective: Objective
    theta: Tensor
    vector: Tensor
    batch: Batch
    index: int

    def tap(self, t: Tensor, batch: Batch | None = None) -> TappedLoss:
        sizes = self.objective.layout.sizes
        pairs = zip(self.theta.detach().split(sizes), self.vector.detach().split(sizes), strict=True)
        module = self.objective.module_at([part + t * direction for part, direction in pairs])
        return self.objective.tap(module, self.batch if batch is None else batch, seed=self.index)

    def origin(self, at: float = 0.0) -> Tensor:
        return torch.tensor(at, dtype=self.theta.dtype, device=self.theta.device, requires_grad=True)


def _hessian_forms(line: _Line) -> tuple[TappedLoss, Tensor]:
    if line.objective.second_order == "finite_differences":
        return _differences(line)
    t = line.origin()
    tapped = line.tap(t)
    losses = _losses(tapped)
    try:
        slope, ones = _derivative(losses, t)
        (bend,) = torch.autograd.grad(slope, t, create_graph=True)
        return tapped, _by_example(bend, ones)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return tapped, torch.stack([_alone(line, n) for n in range(len(losses))])  # no third derivative


def _alone(line: _Line, number: int) -> Tensor:
    """uᵀ∇²ℓu of one example."""
    t = line.origin()
    slope, _ = _derivative(_losses(line.tap(t, cut(line.batch, number, number + 1))), t)
    if not slope.requires_grad:
        return torch.zeros_like(t)
    (bend,) = torch.autograd.grad(slope, t, materialize_grads=True)
    return bend


def _differences(line: _Line) -> tuple[TappedLoss, Tensor]:
    """By central differences of slopes, for steps that cannot be differentiated twice."""
    step = relative_step(line.theta, line.vector)
    (tapped, above), (_, below) = (_slopes(line, at) for at in (step, -step))
    return tapped, (above - below) / (2 * step)


def _slopes(line: _Line, at: float = 0.0) -> tuple[TappedLoss, Tensor]:
    """∇ℓ_n · u of each example ``(n,)``."""
    t = line.origin(at)
    tapped = line.tap(t)
    return tapped, _by_example(*_derivative(_losses(tapped), t))


def _squared_slopes(line: _Line) -> tuple[TappedLoss, Tensor]:
    tapped, slopes = _slopes(line)
    return tapped, slopes.square()


def _gauss_newton_forms(line: _Line) -> tuple[TappedLoss, Tensor]:
    t = line.origin()
    tapped = line.tap(t)
    change = _by_example(*_derivative(tapped.outputs, t)).to(torch.promote_types(line.theta.dtype, torch.float32))
    return tapped, (change * output_hessian(tapped, per_example=True)(change)).flatten(1).sum(1)


_FORMS: dict[str, Callable[[_Line], tuple[TappedLoss, Tensor]]] = {
    "hessian": _hessian_forms,
    "ggn": _gauss_newton_forms,
    "empirical_fisher": _squared_slopes,
}


def _losses(tapped: TappedLoss) -> Tensor:
    """The mean loss of each example ``(n,)``, with its graph."""
    elements = tapped.elements(tapped.outputs)
    divisor = torch.where(tapped.weights > 0, tapped.weights, 1).to(elements)
    return elements.reshape(len(elements), -1).sum(1) / divisor


def _derivative(values: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Σ c_i dv_i/dt, and the c = 1 by which it can be taken apart again."""
    ones = torch.ones_like(values, requires_grad=True)
    (sum_of_slopes,) = torch.autograd.grad(values, t, ones, create_graph=True)
    return sum_of_slopes, ones


def _by_example(total: Tensor, ones: Tensor) -> Tensor:
    """The terms of a sum that is linear in the factors ``ones`` that it was taken with.

    Raises:
        RuntimeError: they do not add up to it: an operation behind them has no derivative of this order.
    """
    if not total.requires_grad:
        return torch.zeros_like(ones)
    (parts,) = torch.autograd.grad(total, ones, materialize_grads=True)
    # Autograd leaves out, without a word, what would raise if it were on the way to a result.
    tolerance = _ROUNDING * torch.finfo(parts.dtype).eps * float(parts.abs().sum())
    if abs(float(parts.sum(dtype=torch.float64) - total.detach())) > tolerance:
        raise RuntimeError("The curvature along the line cannot be taken apart by examples.")
    return parts
