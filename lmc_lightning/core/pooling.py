"""Pooling on a CPU without its slow kernels, where nothing is to be differentiated.

torch's kernels for contiguous images look at one window at a time. The same reductions over shifted slices of whole
images are vectorised: two to six times faster for windows of 2 × 2, and bit for bit the same, means too since they are
summed in the same order.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Pair: TypeAlias = tuple[int, int]

_LARGEST = {torch.add: 4, torch.maximum: 9}
"""Entries of a window beyond which the slices cost more than they save."""
_CACHED = 2**18
"""Entries of the images that are pooled together, so that they stay in the cache."""


def lean_pooling(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What ``func(*args, **kwargs)`` returns, if it is a pooling of this kind and these arguments."""
    if func not in _POOLINGS or torch.is_grad_enabled():
        return None
    return _POOLINGS[func](*args, **kwargs)


def _mean(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor | None:
    if ceil_mode or divisor_override or input.dtype not in (torch.float32, torch.float64):
        return None  # narrower ones are summed in float32
    size = math.prod(_pair(kernel_size))
    total = _over_slices(torch.add, input, kernel_size, stride, padding)
    return None if total is None else total.div_(size)


def _maximum(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    if ceil_mode or return_indices or _pair(dilation) != (1, 1):
        return None
    return _over_slices(torch.maximum, input, kernel_size, stride, padding)


_POOLINGS: Mapping[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.avg_pool2d: _mean,
    F.max_pool2d: _maximum,
    torch.max_pool2d: _maximum,
}


def _over_slices(
    reduce: Callable[..., Tensor], input: Tensor, kernel_size: Any, stride: Any, padding: Any
) -> Tensor | None:
    """The reduction over each window, entry by entry and row by row, some images at a time."""
    (height, width), steps = _pair(kernel_size), _pair(stride or kernel_size)
    fits = type(input) is Tensor and input.ndim == 4 and input.device.type == "cpu" and input.is_floating_point()
    if not fits or _pair(padding) != (0, 0) or not 1 < height * width <= _LARGEST[reduce] or not input.is_contiguous():
        return None
    rows, columns = ((size - k) // s + 1 for size, k, s in zip(input.shape[2:], (height, width), steps, strict=True))
    if rows < 1 or columns < 1 or not len(input):
        return None
    result = input.new_empty(*input.shape[:2], rows, columns)
    images = max(1, _CACHED * len(input) // input.numel())
    down, right = (rows - 1) * steps[0] + 1, (columns - 1) * steps[1] + 1
    for out, part in zip(result.split(images), input.split(images), strict=True):
        first, second, *rest = (
            part[..., i : i + down : steps[0], j : j + right : steps[1]] for i in range(height) for j in range(width)
        )
        reduce(first, second, out=out)
        for entry in rest:
            reduce(out, entry, out=out)
    return result


def _pair(value: int | Sequence[int]) -> Pair:
    if isinstance(value, int):
        return value, value
    first, *rest = value
    return first, rest[0] if rest else first
