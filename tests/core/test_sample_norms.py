from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lmc_lightning.core.sample_norms import SampleNorms
from tests.problems import normal

N = 5


class Applied(nn.Module):
    """One layer, applied by a function of it and of the input."""

    def __init__(self, layer: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer.double()
        self._forward = forward
        for index, tensor in enumerate(self.parameters()):
            tensor.data.copy_(normal(*tensor.shape, seed=10 + index))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self.layer, x)


def explicit(module: nn.Module, x: Tensor, cotangents: list[Tensor]) -> dict[str, Tensor]:
    """One backward pass for each example and cotangent."""
    sums = {name: torch.zeros(N, dtype=torch.float64) for name, _ in module.named_parameters()}
    for n in range(N):
        for cotangent in cotangents:
            gradients = torch.autograd.grad(module(x)[n], list(module.parameters()), cotangent[n])
            for (name, _), gradient in zip(module.named_parameters(), gradients, strict=True):
                sums[name][n] += gradient.square().sum()
    return sums


CASES: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], Tensor]] = {
    "linear": (nn.Linear(3, 4), lambda m, x: m(x), normal(N, 3, seed=1)),
    "many positions": (nn.Linear(2, 3), lambda m, x: m(x), normal(N, 4, 3, 2, seed=1)),
    "few positions": (nn.Linear(7, 3), lambda m, x: m(x), normal(N, 2, 7, seed=1)),
    "convolution, gradients formed": (nn.Conv2d(1, 3, 2), lambda m, x: m(x), normal(N, 1, 6, 6, seed=1)),
    "convolution, gram matrix": (nn.Conv2d(4, 3, 2, stride=2), lambda m, x: m(x), normal(N, 4, 4, 4, seed=1)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), lambda m, x: m(x), normal(N, 4, 3, 3, seed=1)),
    "one axis": (nn.Conv1d(2, 3, 3, 2, 1, 2), lambda m, x: m(x), normal(N, 2, 9, seed=1)),
    "batchnorm": (nn.BatchNorm2d(3).eval(), lambda m, x: m(x), normal(N, 3, 2, 2, seed=1)),
    "batchnorm of features": (nn.BatchNorm1d(3).eval(), lambda m, x: m(x), normal(N, 3, seed=1)),
    "layernorm": (nn.LayerNorm(4), lambda m, x: m(x), normal(N, 3, 4, seed=1)),
    "groupnorm": (nn.GroupNorm(2, 4), lambda m, x: m(x), normal(N, 4, 3, seed=1)),
    "twice": (nn.Linear(3, 3), lambda m, x: m(x) - m(x.square()), normal(N, 3, seed=1)),
    "twice, at other numbers of positions": (
        nn.Conv1d(2, 3, 2),
        lambda m, x: m(x).sum(2) + m(x[..., :3]).sum(2),
        normal(N, 2, 5, seed=1),
    ),
    "norm twice": (nn.LayerNorm(4), lambda m, x: m(x) + m(x.exp()), normal(N, 4, seed=1)),
    "rows of the examples": (
        nn.Linear(3, 2),
        lambda m, x: m(x.flatten(0, 1)).unflatten(0, (N, 4)),
        normal(N, 4, 3, seed=1),
    ),
    "overwritten": (nn.Linear(3, 4), lambda m, x: m(x).relu_(), normal(N, 3, seed=1)),
    "by keyword": (nn.Linear(3, 4), lambda m, x: m(input=x), normal(N, 3, seed=1)),
}


@pytest.mark.parametrize(("layer", "forward", "x"), CASES.values(), ids=CASES.keys())
def test_squares_are_those_of_one_backward_pass_for_each_example(
    layer: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> None:
    module = Applied(layer, forward)
    with SampleNorms(module, ["layer.weight", "layer.bias"]) as norms:
        outputs = module(x)
    cotangents = [normal(*outputs.shape, seed=20 + k) for k in range(3)]
    squares, held = norms.squares(outputs, cotangents)
    expected = explicit(module, x, cotangents)
    assert squares.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(squares[name], values, rtol=1e-12, atol=1e-13)
    assert held > 0


def test_equal_tokens_share_a_row_and_padding_has_no_gradient() -> None:
    module = Applied(nn.Embedding(4, 3, padding_idx=0), lambda m, x: m(x))
    tokens = torch.tensor([[1, 1, 2], [1, 2, 3], [0, 0, 0], [0, 3, 3], [2, 2, 2]])
    with SampleNorms(module, ["layer.weight"]) as norms:
        outputs = module(tokens)
    cotangents = [normal(*outputs.shape, seed=20 + k) for k in range(2)]
    squares, _ = norms.squares(outputs, cotangents)
    torch.testing.assert_close(squares["layer.weight"], explicit(module, tokens, cotangents)["layer.weight"])
    assert float(squares["layer.weight"][2]) == 0


def test_only_what_is_asked_for_and_nothing_tied_is_watched() -> None:
    first, second, third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    module = nn.Sequential(first, second, third)
    with SampleNorms(module, ["0.weight", "0.bias", "2.weight"]) as norms:
        outputs = module(torch.ones(N, 3))
    squares, _ = norms.squares(outputs, [torch.ones_like(outputs)])
    assert set(squares) == {"0.bias", "2.weight"}


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layer",
    [
        Doubling(3, 3),
        nn.Conv1d(1, 1, 3, padding="same"),
        nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm1d(3).train(),
        nn.BatchNorm1d(3, track_running_stats=False).eval(),
        nn.ConvTranspose1d(1, 1, 3),
        nn.Bilinear(3, 3, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_compute_in_another_way_are_not_known(layer: nn.Module) -> None:
    with SampleNorms(nn.Sequential(layer), ["0.weight", "0.bias"]) as norms:
        x = torch.ones(N, 3) if not isinstance(layer, nn.Conv1d | nn.ConvTranspose1d) else torch.ones(N, 1, 3)
        outputs = layer(x, x) if isinstance(layer, nn.Bilinear) else layer(x)
    assert norms.squares(outputs, [torch.ones_like(outputs)]) == ({}, 0)


def test_rows_that_are_not_those_of_the_examples_are_refused() -> None:
    module = Applied(nn.Linear(3, 2), lambda m, x: m(x[:3]).sum() + x)
    with SampleNorms(module, ["layer.weight"]) as norms:
        outputs = module(normal(N, 3, seed=1))
    with pytest.raises(ValueError, match="Linear was called on rows that are not those of the examples"):
        norms.squares(outputs, [outputs])


def test_calls_without_a_graph_have_no_gradient_and_hooks_are_gone_afterwards() -> None:
    def partly(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = layer(x)
        return layer(x) * fixed

    module = Applied(nn.Linear(3, 2), partly)
    x = normal(N, 3, seed=1)
    with SampleNorms(module, ["layer.weight", "layer.bias"]) as norms:
        outputs = module(x)
    squares, _ = norms.squares(outputs, [torch.ones_like(outputs)])
    expected = explicit(module, x, [torch.ones_like(outputs)])
    torch.testing.assert_close(squares["layer.weight"], expected["layer.weight"])
    assert not module.layer._forward_hooks
