"""Pooling over slices: torch's own values bit for bit, and torch's own kernels for all the rest."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.leading import Shortcuts
from lmc_lightning.core.pooling import lean_pooling
from tests.problems import normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [nn.AvgPool2d, nn.MaxPool2d])
@pytest.mark.parametrize("window", [(2, 2), (2, 1), ((2, 1), None), (3, 2), (3, 3), ((1, 2), (2, 3))])
@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (2, 3, 7, 9), (700, 5, 9, 9)])
@torch.no_grad()
def test_values_are_torchs(dtype: torch.dtype, layer: Any, window: tuple[Any, Any], shape: tuple[int, ...]) -> None:
    x = normal(*shape, seed=1).to(dtype)
    x[0, 0, 0, 0], x[0, 0, 3, 3], x[1, 0, 2, 2] = torch.inf, torch.nan, -torch.inf
    pool = layer(*window)
    expected = pool(x)
    with Shortcuts():
        found = pool(x)
    assert torch.equal(found.nan_to_num(5.0), expected.nan_to_num(5.0))
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.stride() == expected.stride()


@pytest.mark.parametrize(
    ("func", "args", "options"),
    [
        (F.avg_pool2d, (2, 2, 1), {}),
        (F.avg_pool2d, (2,), {"ceil_mode": True}),
        (F.avg_pool2d, (2,), {"divisor_override": 3}),
        (F.avg_pool2d, (4,), {}),
        (F.max_pool2d, (2, 2, 0, 2), {}),
        (F.max_pool2d, (2,), {"ceil_mode": True}),
        (F.max_pool2d, (1,), {}),
        (F.relu, (), {}),
    ],
)
@torch.no_grad()
def test_other_calls_are_left_alone(
    func: Callable[..., Tensor], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    assert lean_pooling(func, (normal(2, 2, 9, 9, seed=1), *args), options) is None


def test_what_is_to_be_differentiated_is_left_alone() -> None:
    x = normal(2, 2, 8, 8, seed=1)
    assert lean_pooling(F.max_pool2d, (x, 2), {}) is None
    with torch.no_grad():
        assert lean_pooling(F.max_pool2d, (x, 2), {}) is not None
        assert lean_pooling(F.max_pool2d, (x.to(memory_format=torch.channels_last), 2), {}) is None
        assert lean_pooling(F.avg_pool2d, (x.bfloat16(), 2), {}) is None
        assert lean_pooling(F.max_pool2d, (x[0], 2), {}) is None
