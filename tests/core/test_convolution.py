"""Lean convolutions are torch's own, in value and in derivatives of the first three orders, and do less."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lmc_lightning.core.convolution import LeanLayers
from lmc_lightning.core.objective import Objective
from tests.problems import cross_entropy, normal

Operation = Callable[..., Tensor]

CASES: dict[str, tuple[Operation, list[int], list[int], dict[str, Any]]] = {
    "1d": (F.conv1d, [2, 3, 7], [4, 3, 3], {"padding": 1}),
    "2d": (F.conv2d, [2, 3, 6, 5], [4, 3, 3, 2], {}),
    "strided": (F.conv2d, [2, 2, 7, 7], [3, 2, 3, 3], {"stride": (2, 3), "padding": (1, 2)}),
    "dilated": (F.conv2d, [2, 2, 7, 7], [3, 2, 3, 3], {"dilation": 2, "padding": [2]}),
    "grouped": (F.conv2d, [2, 4, 5, 5], [6, 2, 3, 3], {"groups": 2}),
    "depthwise": (F.conv2d, [2, 3, 5, 5], [3, 1, 3, 3], {"groups": 3, "stride": 2}),
    "3d": (F.conv3d, [2, 2, 4, 3, 4], [3, 2, 2, 2, 2], {"padding": 1}),
}


def draw(case: str) -> tuple[Operation, tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    operation, input_shape, weight_shape, options = CASES[case]
    shapes = (input_shape, weight_shape, weight_shape[:1])
    tensors = tuple(normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    return operation, tensors, options  # type: ignore[return-value]


@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_those_of_the_values(case: str) -> None:
    operation, tensors, options = draw(case)

    def lean(*arguments: Tensor) -> Tensor:
        with LeanLayers():
            return operation(*arguments, **options)

    assert torch.autograd.gradcheck(lean, tensors)
    assert torch.autograd.gradgradcheck(lean, tensors)


@pytest.mark.parametrize("case", CASES)
def test_values_have_the_same_bits_and_third_derivatives_agree(case: str) -> None:
    operation, tensors, options = draw(case)

    def third(output: Tensor) -> Tensor:
        value = output.pow(3).sum()
        for seed in (10, 11):
            found = torch.autograd.grad(value, tensors, create_graph=True)
            value = sum((g * normal(*g.shape, seed=seed)).sum() for g in found)  # type: ignore[assignment]
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, tensors)])

    torch_output = operation(*tensors, **options)
    with LeanLayers():
        lean_output = operation(*tensors, **options)
    assert torch.equal(lean_output, torch_output)
    torch.testing.assert_close(third(lean_output), third(torch_output), rtol=1e-10, atol=1e-10)


# torch scripts some of its own forward derivatives.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("bias", [True, False])
def test_modules_without_batch_named_paddings_and_transforms_are_left_to_torch(bias: bool) -> None:
    layer = nn.Conv2d(2, 3, 3, padding="same", bias=bias).double()
    x = normal(2, 5, 5, seed=0)
    expected = layer(x)
    with LeanLayers():
        assert torch.equal(layer(x), expected)
        mapped = torch.func.vmap(layer)(x[None])
        _, tangent = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(mapped[0], expected)
    torch.testing.assert_close(tangent, expected - layer(torch.zeros_like(x)))


class _InputDerivatives(TorchDispatchMode):
    """Shapes of the inputs by which convolutions were differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default and args[-1][0]:
            self.shapes.append(tuple(args[1].shape))
        elif func is torch.ops.aten.convolution.default and args[6]:  # transposed
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_a_hessian_product_never_differentiates_by_the_data() -> None:
    layers = [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3)]
    module = nn.Sequential(*layers).double()
    objective = Objective(module, [(normal(5, 1, 6, 6, seed=0), torch.arange(5) % 3)], cross_entropy)
    with objective.hvp(objective.theta()) as product:
        product(torch.ones(objective.num_params))
        with _InputDerivatives() as derivatives:
            product(torch.ones(objective.num_params))
    # Of the second layer: by its input in the forward-going and in the backward-going half of the product.
    assert derivatives.shapes == [(5, 4, 4, 4)] * 2


def test_blocks_of_products_go_through_convolutions_at_once() -> None:
    layers = [nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)]
    objective = Objective(
        nn.Sequential(*layers).double(), [(normal(5, 1, 6, 6, seed=0), torch.arange(5) % 3)], cross_entropy
    )
    vectors = normal(objective.num_params, 3, seed=1)
    with objective.hvp(objective.theta()) as product:
        together = product(vectors)
        alone = torch.stack([product(v) for v in vectors.unbind(1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [[5, 3], [4, 3, 5], [2, 3, 4, 5]])
def test_batch_norm_in_eval_mode_has_the_value_and_derivatives_of_torch(shape: list[int], affine: bool) -> None:
    x = normal(*shape, seed=0).requires_grad_()
    mean, variance = normal(3, seed=1), normal(3, seed=2).square() + 0.1
    pair = [normal(3, seed=3).requires_grad_(), normal(3, seed=4).requires_grad_()] if affine else []

    def lean(*tensors: Tensor) -> Tensor:
        with LeanLayers():
            return F.batch_norm(tensors[0], mean, variance, *tensors[1:])

    torch.testing.assert_close(lean(x, *pair), F.batch_norm(x, mean, variance, *pair), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lean, (x, *pair))
    assert torch.autograd.gradgradcheck(lean, (x, *pair))


def test_batch_norm_of_batch_statistics_is_left_to_torch() -> None:
    norm, x = nn.BatchNorm1d(3).double(), normal(6, 3, seed=0)
    expected = nn.BatchNorm1d(3).double()(x)
    with LeanLayers():
        assert torch.equal(norm(x), expected)
    assert int(norm.num_batches_tracked) == 1
