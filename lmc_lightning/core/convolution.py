"""Convolutions, and batch normalisations in eval mode, that are differentiated twice at the price of their arithmetic.

torch's double backward of a convolution also takes the derivative by its input where nobody asked for it: at the first
layer, where that input is the data, half the time of a Hessian product of LeNet-5. A convolution C(x, w) is bilinear
and so are its two transposes, X(g, w) by the input and W(g, x) by the weight, with ⟨g, C(x, w)⟩ = ⟨x, X(g, w)⟩ =
⟨w, W(g, x)⟩. Derivatives of every order are these three again. With fixed statistics a normalisation is a scale and a
shift of each channel, while torch's double backward takes it for the general case, at more than twice the price.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Geometry: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Stride, padding, dilation and groups."""

_NUM_AXES = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class LeanLayers(TorchFunctionMode):
    """Convolutions and normalisations called inside have torch's values and derivatives, the second ones cheaper.

    Those that torch computes in a way of its own (named paddings, autocast, tensor subclasses, inside ``torch.func``)
    are left to it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _NUM_AXES:
            return _convolution(func, _NUM_AXES[func], *args, **(kwargs or {}))
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolution(
    func: Callable[..., Tensor],
    num_axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    tensors = [input, weight] if bias is None else [input, weight, bias]
    if isinstance(padding, str) or input.ndim != num_axes + 2 or not _ordinary(tensors):
        return func(input, weight, bias, stride, padding, dilation, groups)
    sizes = (_per_axis(value, num_axes) for value in (stride, padding, dilation))
    return _convolve(input, weight, (*sizes, groups), bias)  # type: ignore[arg-type]


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    tensors = [t for t in (input, running_mean, running_var, weight, bias) if t is not None]
    if training or running_mean is None or running_var is None or not _ordinary(tensors):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else weight * scale
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (1, -1, *[1] * (input.ndim - 2))
    return input * scale.view(shape) + shift.view(shape)


def _ordinary(tensors: Sequence[Tensor]) -> bool:
    """Whether plain reverse-mode autograd is all that watches these tensors."""
    first = tensors[0]
    if torch.is_autocast_enabled(first.device.type) or torch._C._are_functorch_transforms_active():
        return False
    return first.is_floating_point() and all(
        type(t) in (Tensor, nn.Parameter)
        and t.layout == torch.strided
        and t.dtype == first.dtype
        and forward_ad.unpack_dual(t).tangent is None
        for t in tensors
    )


def _per_axis(value: int | Sequence[int], num_axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * num_axes if len(values) == 1 else values


def _convolve(x: Tensor, w: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    """C(x, w)."""
    return _apply(_Convolution, x, w, bias, geometry)


def _by_input(g: Tensor, w: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """X(g, w), of the shape of x."""
    return _apply(_ByInput, g, w, x.detach(), geometry)


def _by_weight(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    """W(g, x), of the shape of w."""
    return _apply(_ByWeight, g, x, w.detach(), geometry)


def _apply(function: type["_Bilinear"], *arguments: Any) -> Tensor:
    # Without a graph the operations of torch serve, which also take the batched vectors of a block of products.
    found: Tensor = function.apply(*arguments) if torch.is_grad_enabled() else function.compute(*arguments)
    return found


def _backward(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, which: int) -> Tensor:
    stride, padding, dilation, groups = geometry
    mask, no_padding = [i == which for i in range(3)], [0] * len(stride)
    operation = torch.ops.aten.convolution_backward
    found = operation(g, x, w, None, stride, padding, dilation, False, no_padding, groups, mask)
    result: Tensor = found[which]
    return result


class _Bilinear(Function):
    """``compute(a, b, other, geometry)``, linear in a and in b."""

    @staticmethod
    def compute(a: Tensor, b: Tensor, other: Tensor | None, geometry: Geometry) -> Tensor:
        raise NotImplementedError

    @classmethod
    def forward(cls, ctx: Any, a: Tensor, b: Tensor, other: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.geometry = geometry
        return cls.compute(a, b, other, geometry)


class _Convolution(_Bilinear):
    @staticmethod
    def compute(a: Tensor, b: Tensor, other: Tensor | None, geometry: Geometry) -> Tensor:
        stride, padding, dilation, groups = geometry
        no_padding = [0] * len(stride)
        found: Tensor = torch.convolution(a, b, other, stride, padding, dilation, False, no_padding, groups)
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        return (
            _by_input(g, w, x, ctx.geometry) if ctx.needs_input_grad[0] else None,
            _by_weight(g, x, w, ctx.geometry) if ctx.needs_input_grad[1] else None,
            g.sum((0, *range(2, g.ndim))) if ctx.needs_input_grad[2] else None,
            None,
        )


class _ByInput(_Bilinear):
    @staticmethod
    def compute(a: Tensor, b: Tensor, other: Tensor | None, geometry: Geometry) -> Tensor:
        return _backward(a, other, b, geometry, 0)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        g, w = ctx.saved_tensors
        return (
            _convolve(x, w, ctx.geometry) if ctx.needs_input_grad[0] else None,
            _by_weight(g, x, w, ctx.geometry) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class _ByWeight(_Bilinear):
    @staticmethod
    def compute(a: Tensor, b: Tensor, other: Tensor | None, geometry: Geometry) -> Tensor:
        return _backward(a, b, other, geometry, 1)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        return (
            _convolve(x, w, ctx.geometry) if ctx.needs_input_grad[0] else None,
            _by_input(g, w, x, ctx.geometry) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )
