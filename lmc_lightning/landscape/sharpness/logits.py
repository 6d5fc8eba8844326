"""Losses of normalised logits: what is left of sharpness once the scale of the network's outputs is taken out."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmc_lightning.types import Batch, LossFn


def with_normalized_logits(loss_fn: LossFn) -> LossFn:
    """The same step, with the logits of each example divided by their standard deviation over classes.

    The loss then no longer depends on how large the logits are, and sharpness no longer falls merely because they grow
    (arXiv 2302.07011; the authors' programs divide by the norm of the centred logits, which is √C times larger). Logits
    that are all equal stay as they are.

    The step that is returned raises ``ValueError`` where ``loss_fn`` is not one mean by ``F.cross_entropy``.
    """

    def normalized(module: nn.Module, batch: Batch) -> Tensor:
        with _NormalizedLogits() as mode:
            loss = loss_fn(module, batch)
        if loss is not None and not mode.gave(loss):
            raise ValueError(
                f"logit_normalized=True needs a loss that is one mean by torch.nn.functional.cross_entropy; this step "
                f"made {len(mode.losses)} such calls, and its loss is not that of a single one. Leave it out, or pass "
                f"loss_fn=(module, batch) -> cross_entropy(module(x), y)."
            )
        return loss

    return normalized


class _NormalizedLogits(TorchFunctionMode):
    """Normalises what is given to ``F.cross_entropy``."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is not F.cross_entropy:
            return func(*args, **given)
        logits, *rest = args or (given.pop("input"),)
        self.losses.append(func(_normalized(logits), *rest, **given))
        return self.losses[-1]

    def gave(self, loss: Tensor) -> bool:
        """Whether ``loss`` is what the only call returned."""
        if len(self.losses) != 1 or self.losses[0].numel() != 1:
            return False
        return torch.equal(self.losses[0].detach().reshape(()), loss.detach().reshape(())) or bool(loss.isnan())


def _normalized(logits: Tensor) -> Tensor:
    classes = 1 if logits.ndim > 1 else 0
    spread = logits.std(classes, correction=0, keepdim=True)
    return logits / torch.where(spread > 0, spread, 1)
