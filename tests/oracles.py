"""Slow, obvious, independent answers: nothing here uses the package."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[nn.Module, Any], Tensor]


def mean_loss(
    module: nn.Module, batches: Sequence[Any], loss_fn: Loss, weights: Sequence[float]
) -> Callable[[Tensor], Tensor]:
    """θ ↦ weighted mean loss in float64, θ the trainable parameters in the order of ``named_parameters``."""
    module = copy.deepcopy(module).double().eval()
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, batch: Any) -> Tensor:
            return loss_fn(self.inner, batch)

    step = Step()

    def loss(theta: Tensor) -> Tensor:
        parts = [t.reshape(p.shape) for t, p in zip(theta.split(sizes), named.values(), strict=True)]
        tensors = {f"inner.{n}": t for n, t in zip(named, parts, strict=True)}
        losses = [torch.func.functional_call(step, tensors, (as_double(b),)) for b in batches]
        return sum(w * v for w, v in zip(weights, losses, strict=True)) / sum(weights)

    return loss


def as_double(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {k: as_double(v) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(as_double(v) for v in batch)
    return batch.double() if isinstance(batch, Tensor) and batch.is_floating_point() else batch


def flat_parameters(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in module.parameters() if p.requires_grad])


def gradient(loss: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    leaf = theta.detach().clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.grad(loss(leaf), leaf)[0]


def dense_hessian(loss: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """Reverse mode over reverse mode, all rows at once."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jacrev(torch.func.grad(loss))(theta.detach())


def finite_difference_hessian(loss: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """Central differences of first derivatives: no second derivative of torch enters. For smooth losses only."""
    step = torch.finfo(torch.float64).eps ** (1 / 3)
    columns = []
    for index in range(theta.numel()):
        shift = torch.zeros_like(theta)
        shift[index] = step
        columns.append((gradient(loss, theta + shift) - gradient(loss, theta - shift)) / (2 * step))
    return torch.stack(columns, 1)
