"""Points θ on a line, and the first linear layer of a network at many of them for the price of two."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmc_lightning.core.params import ParameterLayout
from lmc_lightning.core.pooling import lean_pooling
from lmc_lightning.core.structure import PLAIN

_LINEAR = (F.linear, torch.conv1d, torch.conv2d, torch.conv3d)


@dataclass(frozen=True, eq=False)
class Anchors:
    """Two parameter vectors ``(P,)``, between and beyond which points lie."""

    thetas: tuple[Tensor, Tensor]

    def at(self, t: float) -> "Mix":
        """The point (1−t)θ₀ + tθ₁."""
        return Mix(self, t)


@dataclass(frozen=True)
class Mix:
    """A point on the line through two anchors: ``torch.lerp``, exact at both of them."""

    anchors: Anchors
    t: float

    @property
    def theta(self) -> Tensor:
        """The point ``(P,)``."""
        with torch.inference_mode(False):  # a step that differentiates by its inputs cannot save inference tensors
            return self.of(self.anchors.thetas)

    def of(self, values: tuple[Tensor, Tensor], *, out: Tensor | None = None) -> Tensor:
        """The same mix of any values at the anchors."""
        return torch.lerp(*values, self.t, out=out)


Theta: TypeAlias = Tensor | Mix
"""A point in parameter space."""


def point_of(theta: Theta) -> Tensor:
    """θ ``(P,)``."""
    return theta.theta if isinstance(theta, Mix) else theta


@dataclass(frozen=True)
class _Call:
    """A layer's call on one chunk, and what it gives at each anchor."""

    about: tuple[Any, ...]
    input: Tensor
    outputs: tuple[Tensor, Tensor]


class LeadingLayer:
    """The output z = W x + b of a step's first linear layer or convolution at mixes of anchors.

    It is linear in (W, b), so that where its input x is the same at all points, z is the same mix of z at the anchors:
    equal to what the layer computes up to rounding, for one product per anchor instead of one per point. Whether x is
    the same is seen from its values, at every call. Memory: input and outputs at both anchors of each chunk kept.

    Args:
        anchors: what the points are mixes of.
        layout: of the points.
        names: names of parameters by the ids of the tensors that the module computes with.
        budget: bytes that are kept of chunks before the present one; beyond it, further chunks are computed.
    """

    def __init__(self, anchors: Anchors, layout: ParameterLayout, names: Mapping[int, str], budget: int) -> None:
        self._parts, self._names = [layout.unflatten(theta) for theta in anchors.thetas], names
        self._budget = self._left = budget
        self._known: dict[int, _Call] = {}

    def output(
        self,
        chunk: int,
        mix: Mix,
        func: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> Tensor | None:
        """What ``func`` gives on a chunk at the mix, unless it is a call of another kind."""
        names = [None if t is None else self._names.get(id(t), "") for t in (weight, bias)]
        about = (func, *names, rest, options)
        if "" in names or not _is_plain([*rest, *options.values()]) or torch.is_autocast_enabled(weight.device.type):
            return None
        if chunk not in self._known:
            if self._left <= 0 < self._budget:
                return None
            tensors = [[None if n is None else part[n] for n in names] for part in self._parts]
            first, second = (func(input, *pair, *rest, **options) for pair in tensors)
            self._keep(chunk, _Call(about, input.clone(), (first, second)))  # a step may change its input in place
        call = self._known[chunk]
        return mix.of(call.outputs) if about == call.about and torch.equal(input, call.input) else None

    def _keep(self, chunk: int, call: _Call) -> None:
        if not self._budget:
            self._known.clear()
        self._left -= sum(t.numel() * t.element_size() for t in (call.input, *call.outputs))
        self._known[chunk] = call


def _is_plain(values: list[Any]) -> bool:
    return all(isinstance(v, PLAIN) or (isinstance(v, tuple | list) and _is_plain([*v])) for v in values)


class Shortcuts(TorchFunctionMode):
    """A step inside the block takes cheaper ways to the same values, as long as nothing is to be differentiated.

    Args:
        layer: gives the output of its first linear layer or convolution.
    """

    def __init__(self, layer: Callable[..., Tensor | None] | None = None) -> None:
        super().__init__()
        self._layer = layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LINEAR and self._layer is not None and not torch.is_grad_enabled():
            layer, self._layer = self._layer, None
            result = layer(func, *args, **(kwargs or {}))
        else:
            result = lean_pooling(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if result is None else result
