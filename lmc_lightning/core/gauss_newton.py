"""Gauss–Newton and empirical Fisher products at a fixed point: curvature of the loss behind the network's outputs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lmc_lightning.core.hvp import HessianProduct
from lmc_lightning.core.losstap import TappedLoss
from lmc_lightning.core.shadow import LOW_PRECISION

_NORMALISED = 1e-3
"""Largest abs(log Σ exp) of what counts as log-probabilities."""
_SMALLEST_VARIANCE = 1e-12
"""Of a probability that is 0 or 1 to rounding; the floor that torch takes in the gradient."""


OutputCurvature: TypeAlias = Callable[[Tensor], Tensor]
"""A positive semidefinite form on the outputs ``(n, …)`` of one chunk, one block an example, applied to a change."""


@dataclass(frozen=True)
class SoftmaxCurvature:
    """B = s (diag p − ppᵀ) over dimension 1: cross-entropy with respect to its logits."""

    probabilities: Tensor
    """``(n, C, …)``"""
    scale: Tensor
    """What the targets of each element sum to, class weights included, over the mean's divisor ``(n, 1, …)``."""

    def __call__(self, change: Tensor) -> Tensor:
        """B u."""
        weighted = self.probabilities * change
        return self.scale * (weighted - self.probabilities * weighted.sum(1, keepdim=True))

    @property
    def num_factors(self) -> int:
        """Columns of a square root S of each example's block, B = SSᵀ: one fewer than classes, for each element."""
        return (self.probabilities.shape[1] - 1) * self.probabilities[:1, 0].numel()

    def factor(self, index: int) -> Tensor:
        """One column of S for every example: class c against those after it, whose variances add up to B."""
        c, element = divmod(index, self.probabilities[:1, 0].numel())
        p = self.probabilities.flatten(2) if self.probabilities.ndim > 2 else self.probabilities[..., None]
        own, after = p[:, c, element], p[:, c + 1 :, element]
        rest = after.sum(1)
        share = torch.where(rest > 0, rest / (own + rest), 0)
        root = (self.scale.reshape(len(p), -1)[:, element] * own * share).sqrt()
        column = torch.zeros_like(p)
        column[:, c, element] = root
        column[:, c + 1 :, element] = -(root / torch.where(rest > 0, rest, 1))[:, None] * after
        return column.view_as(self.probabilities)


@dataclass(frozen=True)
class DiagonalCurvature:
    """B = diag d: losses that treat every output on its own."""

    diagonal: Tensor
    """``(n, …)``"""

    def __call__(self, change: Tensor) -> Tensor:
        """B u."""
        return self.diagonal * change

    @property
    def num_factors(self) -> int:
        """Columns of a square root S of each example's block: one for each output."""
        return self.diagonal[:1].numel()

    def factor(self, index: int) -> Tensor:
        """One column of S for every example."""
        column = torch.zeros_like(self.diagonal).reshape(len(self.diagonal), -1)
        column[:, index] = self.diagonal.reshape(len(self.diagonal), -1)[:, index].sqrt()
        return column.view_as(self.diagonal)


@dataclass(frozen=True)
class OuterProducts:
    """B = g gᵀ with g the loss's derivative by the outputs of an example: what the empirical Fisher is made of."""

    slopes: Tensor
    """``(n, …)``"""

    def __call__(self, change: Tensor) -> Tensor:
        """B u."""
        along = (self.slopes * change).reshape(len(change), -1).sum(1)
        return self.slopes * _column(along, change)


def output_hessian(tapped: TappedLoss, *, per_example: bool = False) -> SoftmaxCurvature | DiagonalCurvature:
    """Hessian B of a chunk's mean loss with respect to the network's outputs, in their natural parameters.

    Log-probabilities (``nll_loss``) and probabilities (``binary_cross_entropy``) are taken as functions of their
    logits, in which the loss is convex; then B is the Fisher information of the predicted distribution. Class weights,
    ignored targets, label smoothing and soft targets only scale an element's block.

    Args:
        tapped: the loss call.
        per_example: blocks of each example's own mean loss, in place of its share in the mean of the chunk.

    Raises:
        ValueError: ``nll_loss`` was given what are no log-probabilities, or the targets depend on the parameters.
    """
    _refuse_moving_targets(tapped)
    outputs = _at_least_float32(tapped.outputs.detach())
    divisor = tapped.weights.clamp(min=torch.finfo(torch.float64).tiny) if per_example else tapped.weights.sum()
    divisor = _column(divisor.to(outputs), outputs) if per_example else divisor.to(outputs)
    if tapped.kind in ("cross_entropy", "nll_loss"):
        return SoftmaxCurvature(outputs.softmax(1), _softmax_scale(tapped, outputs) / divisor)
    if tapped.kind == "binary_cross_entropy":
        return DiagonalCurvature(1 / ((outputs * (1 - outputs)).clamp(min=_SMALLEST_VARIANCE) * divisor))
    with torch.enable_grad():
        leaf = outputs.clone().requires_grad_()
        (slope,) = torch.autograd.grad(tapped.elements(leaf).sum(), leaf, create_graph=True)
        (diagonal,) = torch.autograd.grad(slope.sum(), leaf)
    return DiagonalCurvature(diagonal / divisor)


def _softmax_scale(tapped: TappedLoss, outputs: Tensor) -> Tensor:
    """Sum of each element's weighted targets ``(n, 1, …)``: its loss where all log-probabilities are −1."""
    if tapped.kind == "nll_loss":
        if float(outputs.logsumexp(1).abs().max()) > _NORMALISED:
            raise ValueError("nll_loss was not given log-probabilities: apply log_softmax before it.")
        return tapped.elements(torch.full_like(outputs, -1)).unsqueeze(1)
    num_classes = outputs.shape[1]
    if num_classes == 1:
        return torch.zeros_like(outputs)
    return tapped.elements(torch.zeros_like(outputs)).unsqueeze(1) / math.log(num_classes)


def outer_products(tapped: TappedLoss) -> OuterProducts:
    """The outer products of the derivatives of each example's mean loss, so that a chunk's mean is the mean of them.

    Raises:
        ValueError: the targets depend on the parameters.
    """
    _refuse_moving_targets(tapped)
    slopes = output_gradient(tapped)
    share = tapped.weights / tapped.weights.sum()
    return OuterProducts(slopes / _column(torch.where(share > 0, share, 1).sqrt().to(slopes), slopes))


def output_gradient(tapped: TappedLoss) -> Tensor:
    """Derivative of a chunk's mean loss by the outputs ``(n, …)``."""
    with torch.enable_grad():
        leaf = _at_least_float32(tapped.outputs.detach()).clone().requires_grad_()
        (slopes,) = torch.autograd.grad(tapped.elements(leaf).sum() / tapped.weights.sum().to(leaf), leaf)
    return slopes


def _refuse_moving_targets(tapped: TappedLoss) -> None:
    if tapped.targets.requires_grad:
        raise ValueError("The targets of the loss depend on the parameters: detach them, or measure the Hessian.")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in LOW_PRECISION else tensor


def _column(values: Tensor, like: Tensor) -> Tensor:
    """A value for each example, shaped to multiply ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class _Linearised:
    """A chunk's outputs f as a function of θ, ready for products with their Jacobian J from either side."""

    outputs: Tensor
    cotangent: Tensor
    """∂L/∂f, a leaf: J v is the derivative of Jᵀ ∂L/∂f by it, along v."""
    gradients: tuple[Tensor, ...]
    """∇L = Jᵀ ∂L/∂f by each leaf, with its graph."""
    curvature: OutputCurvature


def _linearised(tapped: TappedLoss, leaves: Sequence[Tensor], curvature: OutputCurvature) -> _Linearised:
    outputs = tapped.outputs
    cotangent = output_gradient(tapped).to(outputs.dtype).requires_grad_()
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if outputs.requires_grad:
        found = torch.autograd.grad(outputs, leaves, cotangent, create_graph=True, allow_unused=True)
    gradients = tuple(torch.zeros_like(a) if b is None else b for a, b in zip(leaves, found, strict=True))
    return _Linearised(outputs, cotangent, gradients, curvature)


class GaussNewtonProduct(HessianProduct):
    """v ↦ Jᵀ B J v, ``(P,) -> (P,)``: positive semidefinite, with the interface and memory of the Hessian product.

    J is the Jacobian of the network's outputs and B a form on them: the loss's Hessian for the Gauss–Newton matrix
    (arXiv 1412.1193), outer products of its gradients for the empirical Fisher. Where the outputs are linear in θ, the
    former is the Hessian. The graphs of each chunk are kept like those of the Hessian product; a product then costs
    about 1.5 gradients.

    Args:
        theta: the point ``(P,)``.
        tap: ``(index, leaves) ->`` one chunk's loss call, its outputs a function of the flat parameter tensors.
        curvature: B on the outputs of a loss call.
        weights: the share of each chunk of this process ``(B,)``; over all processes they sum to 1.
        memory_budget: for cached graphs [bytes]; by default a quarter of what is free.
        **common: see :class:`CurvatureProduct`.
    """

    def __init__(
        self,
        theta: Tensor,
        tap: Callable[[int, tuple[Tensor, ...]], TappedLoss],
        curvature: Callable[[TappedLoss], OutputCurvature],
        weights: Tensor,
        memory_budget: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(theta, self._gradients_of, weights, memory_budget, **common)
        self._tap, self._curvature = tap, curvature
        self._kept: dict[int, _Linearised] = {}

    def release(self) -> None:
        """Free the cached graphs; the next product builds them anew."""
        super().release()
        self._kept.clear()

    def _gradients_of(self, index: int, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._kept = {i: chunk for i, chunk in self._kept.items() if i in self._graphs}
        tapped = self._tap(index, leaves)
        self._kept[index] = _linearised(tapped, leaves, self._curvature(tapped))
        return self._kept[index].gradients

    def _differentiated(
        self, index: int, tensors: Sequence[int], directions: Sequence[Tensor], *, in_block: bool = False
    ) -> list[Tensor]:
        """Jᵀ B J d between the tensors of these numbers; of many directions at once as a block."""
        gradients = self._graph(index)
        chunk = self._kept[index]
        pairs = [(gradients[n], d) for n, d in zip(tensors, directions, strict=True) if gradients[n].requires_grad]
        found: Sequence[Tensor | None] = [None] * len(tensors)
        if pairs:
            (change,) = torch.autograd.grad(
                [gradient for gradient, _ in pairs],
                chunk.cotangent,
                [direction for _, direction in pairs],
                retain_graph=True,
                is_grads_batched=in_block,
            )
            curvature = torch.vmap(chunk.curvature) if in_block else chunk.curvature
            found = torch.autograd.grad(
                chunk.outputs,
                [self._leaves[n] for n in tensors],
                curvature(_at_least_float32(change)).to(chunk.outputs.dtype),
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=in_block,
            )
        return [torch.zeros_like(d) if part is None else part for part, d in zip(found, directions, strict=True)]
