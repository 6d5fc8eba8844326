"""Sees the loss call inside a step: per-example losses, predictions and targets of a loss that is only a number."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CLASS_LOSSES = {F.cross_entropy: "cross_entropy", F.nll_loss: "nll_loss"}
_WATCHED: dict[Callable[..., Any], str] = {
    **_CLASS_LOSSES,
    F.mse_loss: "mse_loss",
    F.binary_cross_entropy: "binary_cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
}
NO_OUTPUTS = (
    "The step's loss is not one mean by cross_entropy, nll_loss, mse_loss or binary_cross_entropy(_with_logits) of "
    "torch.nn.functional, so the network's outputs and the losses of single examples are unknown."
)
"""Why what needs them cannot be had."""


@dataclass(frozen=True)
class TappedLoss:
    """The loss call that produced the loss of one batch of n examples."""

    kind: str
    outputs: Tensor
    """What the network gave: logits, log-probabilities or predictions, ``(n, …)``."""
    targets: Tensor
    losses: Tensor
    """Mean loss of each example ``(n,)``, float64."""
    weights: Tensor
    """Share of each example in the mean ``(n,)``, float64: its number of targets that are not ignored."""
    counted: Tensor
    """Which targets count ``(n, m)``."""
    elements: Callable[[Tensor], Tensor] = field(repr=False, compare=False)
    """Outputs ↦ the loss of each target, weighted as in the mean, whose divisor is the sum of ``weights``."""

    @property
    def mean(self) -> float:
        """The loss, summed over examples in float64: small differences survive that a float32 mean would round away."""
        return float(self.weights @ self.losses / self.weights.sum())

    @property
    def errors(self) -> Tensor | None:
        """Share of wrong predictions in each example ``(n,)``, float64; ``None`` for losses over no classes."""
        outputs, targets = self.outputs.detach(), self.targets
        if self.kind in _CLASS_LOSSES.values():
            wrong = outputs.argmax(1) != (targets.argmax(1) if targets.is_floating_point() else targets)
        elif self.kind.startswith("binary"):
            wrong = (outputs > (0 if self.kind.endswith("logits") else 0.5)) != (targets > 0.5)
        else:
            return None
        total = (wrong.reshape(self.counted.shape) & self.counted).sum(1)
        return total.double() / self.counted.sum(1).clamp(min=1)

    @property
    def labels(self) -> Tensor | None:
        """The class of each example ``(n,)``, int64; ``None`` where an example has no class or several."""
        if self.kind == "mse_loss" or self.counted.shape[1] != 1:
            return None
        if self.kind in _CLASS_LOSSES.values() and self.targets.is_floating_point():
            return self.targets.argmax(1).reshape(-1)
        return self.targets.reshape(-1).round().long()

    @property
    def confidences(self) -> Tensor | None:
        """Largest predicted probability of each example ``(n,)``, float64, for losses over classes."""
        p = self.probabilities
        if p is None or self.kind not in _CLASS_LOSSES.values():
            return None
        return p.amax(1).reshape(len(p), -1).mean(1)

    @property
    def probabilities(self) -> Tensor | None:
        """What the network predicts, float64, of the shape of ``outputs``; ``None`` for losses over no classes."""
        outputs = self.outputs.detach().double()
        if self.kind == "cross_entropy":
            return outputs.softmax(1)
        if self.kind == "nll_loss":
            return outputs.exp()
        if self.kind.startswith("binary"):
            return outputs.sigmoid() if self.kind.endswith("logits") else outputs
        return None


class LossTap(TorchFunctionMode):
    """Records the calls of torch's common losses while a step runs inside the ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], dict[str, Any], Any, list[int]]] = []

    def __enter__(self) -> "LossTap":
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _WATCHED:
            bound = _signature(func).bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            self._calls.append((func, arguments, result, _versions(arguments)))
        return result

    def match(self, loss: Tensor) -> TappedLoss | None:
        """The one recorded mean over examples that equals ``loss``; ``None`` when there is none or more than one."""
        equal = [call for call in self._calls if _equals(call[2], loss)]
        if len(equal) != 1 or equal[0][1]["reduction"] != "mean":
            return None
        func, arguments, _, versions = equal[0]
        # What a step has overwritten since, as targets by predictions, is not what the loss was of.
        return _tapped(func, arguments) if _versions(arguments) == versions else None

    def required(self, loss: Tensor | None) -> TappedLoss:
        """The call that :meth:`match` finds.

        Raises:
            ValueError: it finds none.
        """
        tapped = None if loss is None else self.match(loss)
        if tapped is None:
            raise ValueError(NO_OUTPUTS)
        return tapped


def _versions(arguments: Mapping[str, Any]) -> list[int]:
    return [a._version for a in arguments.values() if isinstance(a, Tensor) and not a.is_inference()]


@cache
def _signature(func: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(func)


def _equals(result: Any, loss: Tensor) -> bool:
    if not isinstance(result, Tensor) or result.numel() != 1 or loss.numel() != 1:
        return False
    # NaN equals NaN: a batch whose targets are all ignored has no mean, and no weight.
    return result is loss or result.item() == loss.item() or bool(result.isnan() & loss.isnan())


def _tapped(func: Callable[..., Any], arguments: dict[str, Any]) -> TappedLoss | None:
    outputs, targets = arguments["input"], arguments["target"]
    if outputs.ndim < 1 + (func in _CLASS_LOSSES) or (
        arguments.get("weight") is not None and func not in _CLASS_LOSSES
    ):
        return None
    legacy = {name: None for name in ("size_average", "reduce") if name in arguments}
    fixed = arguments | legacy | {"reduction": "none"}
    with torch.no_grad():
        elements = func(**fixed).double()
        weights = _element_weights(func, arguments, elements).double()
    rows = len(elements)
    sums, weights = elements.reshape(rows, -1).sum(1), weights.reshape(rows, -1)
    per_example = weights.sum(1)
    losses = sums / torch.where(per_example > 0, per_example, 1)

    def elementwise(at: Tensor) -> Tensor:
        result: Tensor = func(**(fixed | {"input": at}))
        return result

    return TappedLoss(_WATCHED[func], outputs, targets, losses, per_example, weights > 0, elementwise)


def _element_weights(func: Callable[..., Any], arguments: dict[str, Any], elements: Tensor) -> Tensor:
    """What torch divides the sum of ``elements`` by, entry by entry."""
    targets, class_weights = arguments["target"], arguments.get("weight")
    if func not in _CLASS_LOSSES or targets.is_floating_point():
        return torch.ones_like(elements)
    counted: Tensor = targets != arguments["ignore_index"]
    if class_weights is None:
        return counted
    weights: Tensor = class_weights[targets.where(counted, torch.zeros_like(targets))]
    masked: Tensor = weights * counted
    return masked
