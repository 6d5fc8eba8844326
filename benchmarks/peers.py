"""The other packages, each behind the few calls that the tasks need; what is not installed is left out.

Where a package takes a loader, it gets the chunks that we cut the data into, which is the faster choice on a CPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.works import Batch, mean_loss

MODULES = {
    "PyHessian": "pyhessian",
    "landscaper": "landscaper",
    "hessian-eigenthings": "hessian_eigenthings",
    "curvlinops": "curvlinops",
    "loss-landscapes": "loss_landscapes",
    "rebasin": "rebasin",
}


def installed(*names: str) -> list[str]:
    """Those of the packages that can be imported."""
    return [name for name in names if find_spec(MODULES[name]) is not None]


def differentiable_attention() -> AbstractContextManager[None]:
    """The attention kernel that can be differentiated twice; without it every peer fails on a transformer."""
    return sdpa_kernel(SDPBackend.MATH)


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


def pyhessian(module: nn.Module, *, data: Batch | None = None, loader: list[Batch] | None = None) -> tuple[Any, Any]:
    """PyHessian on one batch, whose graph it keeps, or on a loader; and the function that counts its products."""
    peer = import_module("pyhessian.hessian")  # the package has a class of that name too
    operator = peer.hessian(module, nn.CrossEntropyLoss(), data=data, dataloader=loader, cuda=False)
    if data is None:
        operator.dataloader_hv_product = counter = Counted(operator.dataloader_hv_product)
    else:
        original = getattr(peer.hessian_vector_product, "function", peer.hessian_vector_product)
        peer.hessian_vector_product = counter = Counted(original)
    return operator, counter


def landscaper(module: nn.Module, loader: list[Batch], *, cached: bool = False) -> tuple[Any, Counted]:
    """landscaper, which recomputes the gradient for each product unless it is told to keep the graphs."""
    from landscaper import PyHessian

    operator = PyHessian(module, nn.CrossEntropyLoss(), loader, "cpu", try_cache=cached)
    operator.hv_product = counter = Counted(operator.hv_product)
    return operator, counter


def eigenthings(module: nn.Module, loader: list[Batch]) -> tuple[Any, Counted]:
    """hessian-eigenthings."""
    from hessian_eigenthings import HessianOperator

    operator = HessianOperator(module, loader, mean_loss)
    operator.matvec = counter = Counted(operator.matvec)  # type: ignore[method-assign]
    return operator, counter


def curvlinops(module: nn.Module, loader: list[Batch], *, check: bool = True) -> tuple[Any, "CountedColumns"]:
    """curvlinops, by default with its check that the products are deterministic (two products, four gradients)."""
    from curvlinops import HessianLinearOperator

    parameters = [p for p in module.parameters() if p.requires_grad]
    operator = HessianLinearOperator(module, nn.CrossEntropyLoss(), parameters, loader, check_deterministic=check)
    operator._matmat = counter = CountedColumns(operator._matmat)
    return operator, counter


class CountedColumns(Counted):
    """Counts the columns of the blocks that a curvlinops operator is applied to."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += args[0][0].shape[-1]
        return self.function(*args, **kwargs)


def as_list(vector: Tensor, module: nn.Module) -> list[Tensor]:
    """A flat vector in the shapes of the parameters."""
    parameters = list(module.parameters())
    parts = vector.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def as_vector(tensors: list[Tensor]) -> Tensor:
    """The reverse."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def gradient(module: nn.Module, batches: list[Batch]) -> Tensor:
    """One gradient of the mean loss over batches, by nothing but torch: the unit in which products are counted."""
    parameters = list(module.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters))
    count = sum(len(labels) for _, labels in batches)
    for batch in batches:
        parts = torch.autograd.grad(mean_loss(module, batch), parameters)
        total.add_(as_vector(list(parts)), alpha=len(batch[1]) / count)
    return total
