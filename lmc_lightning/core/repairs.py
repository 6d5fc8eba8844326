"""Operations of torch whose second derivative is silently wrong, replaced while a measurement runs.

Two cases raise no error at all: ``torch._weight_norm`` returns a wrong double backward, and reentrant activation
checkpointing loses the checkpointed layers' gradients under ``torch.autograd.grad``. Both have an exact substitute.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _CompositeWeightNorm(TorchFunctionMode):
    """``torch._weight_norm`` computed as ``v * (g / ‖v‖)``, whose derivatives of every order are right."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [d for d in range(v.ndim) if d != dim % v.ndim] if dim != -1 else list(range(v.ndim))
    norm: Tensor = torch.linalg.vector_norm(v, dim=others or None, keepdim=True)
    return v * (g / norm)


class _RunDirectly:
    """Stands in for ``CheckpointFunction``: runs the checkpointed function and keeps its activations."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def repaired_double_backward() -> Iterator[None]:
    """Second derivatives inside the block are those of the computed loss."""
    reentrant = torch_checkpoint.CheckpointFunction
    torch_checkpoint.CheckpointFunction = _RunDirectly  # type: ignore[assignment, misc]
    try:
        with _CompositeWeightNorm():
            yield
    finally:
        torch_checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]
