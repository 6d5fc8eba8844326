"""What the self-check says of second derivatives is so: right ones, wrong ones, missing ones, and none at all."""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lmc_lightning.core.collective import Collective, InterruptedMeasurementError
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.selfcheck import SelfCheck, pruned_nodes, self_check, self_check_outputs
from tests import oracles
from tests.problems import ConvNet, Vector, cross_entropy, images, linear_regression, normal, softmax_regression

BATCH = (normal(12, 4, seed=1), torch.arange(12) % 3)


def mlp(activation: nn.Module) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 3), activation, nn.Linear(3, 3)).double()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=10 + index))
    return module


def objective(module: nn.Module, loss_fn: Any = cross_entropy, batch: Any = BATCH, **options: Any) -> Objective:
    return Objective(module, [batch], loss_fn, dtype=torch.float64, **options)


# -- right ones --------------------------------------------------------------------------------------------------------


class Exp(torch.autograd.Function):
    """Its backward is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].exp()


class Applies(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def weight_norm() -> nn.Module:
    module = mlp(nn.Tanh())
    module[0] = torch.nn.utils.parametrizations.weight_norm(module[0])
    return module


RIGHT: dict[str, Callable[[], Objective]] = {
    "smooth": lambda: objective(mlp(nn.Tanh())),
    "ReLU": lambda: objective(mlp(nn.ReLU())),
    "weight norm": lambda: objective(weight_norm()),
    "convolution, BatchNorm, dropout": lambda: objective(ConvNet(), batch=images(12)),
    "float32": lambda: objective(mlp(nn.Tanh()).float(), batch=(BATCH[0].float(), BATCH[1])),
    "linear regression": lambda: linear_regression().objective(),
    "softmax regression": lambda: softmax_regression().objective(),
    "own function": lambda: objective(mlp(Applies(Exp))),
    "without curvature": lambda: objective(Vector(normal(3, seed=1)), lambda m, b: (m.theta * 2).sum()),
    "at a stationary point": lambda: objective(Vector(torch.zeros(3).double()), lambda m, b: m.theta.square().sum()),
    "dropout of a function, under a fixed seed": lambda: objective(
        mlp(nn.Tanh()), lambda m, b: F.cross_entropy(F.dropout(m(b[0]), 0.5), b[1])
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_second_derivatives_are_found_exact(name: str) -> None:
    found = self_check(RIGHT[name]())
    assert (found.verdict, found.reason, found.suspect) == ("exact", "", "")
    assert found.relative_error < 1e-3


# -- none at all -------------------------------------------------------------------------------------------------------


class Sign(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def rounded(module: nn.Module, batch: Any) -> Tensor:
    logits = module(batch[0])
    return F.cross_entropy(logits + (logits.round() - logits).detach(), batch[1])


def counting() -> Any:
    calls = itertools.count()
    return lambda module, batch: cross_entropy(module, batch) * (1 + next(calls))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: objective(mlp(Applies(Sign))),
            r"the gradient is not that of the loss \(relative error .*straight-through",
        ),
        (lambda: objective(mlp(nn.Tanh()), rounded), r"the gradient is not that of the loss"),
        (lambda: objective(mlp(nn.Tanh()), counting()), r"two evaluations at one point give different losses"),
    ],
    ids=["straight-through", "rounding", "random"],
)
def test_where_there_is_no_hessian_that_is_said(make: Callable[[], Objective], reason: str) -> None:
    found = self_check(make())
    assert found.verdict == "no_hessian"
    assert re.match(reason, found.reason)


def test_a_loss_that_is_not_finite_cannot_be_checked() -> None:
    found = self_check(objective(mlp(nn.Tanh()), lambda m, b: cross_entropy(m, b) * math.nan))
    assert found == SelfCheck("unchecked", "the loss is nan")


# -- missing and wrong ones --------------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """tanh, whose backward is hidden from autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Wrong(torch.autograd.Function):
    """tanh, whose backward is right and made of what autograd takes for constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 1 - x.tanh() ** 2
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.slope.detach()


class Aligner(nn.Module):
    """A network whose loss is CTC's, for which torch has no double backward."""

    num_classes: ClassVar[int] = 4

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, self.num_classes, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(normal(self.num_classes, 3, seed=2))
            self.head.bias.zero_()

    def loss(self, batch: Any) -> Tensor:
        x, targets = batch
        log_p = self.head(x).tanh().log_softmax(-1).transpose(0, 1)
        lengths = torch.full((len(x),), x.shape[1]), torch.full((len(x),), targets.shape[1])
        return F.ctc_loss(log_p, targets, *lengths)


SPEECH = (normal(3, 6, 3, seed=4), torch.tensor([[1, 2], [3, 1], [2, 2]]))

REPAIRABLE: dict[str, tuple[Callable[..., Objective], str]] = {
    "once differentiable": (
        lambda **options: objective(mlp(Applies(Once)), **options),
        "double backward skips OnceBackward|double backward skips .*Error",
    ),
    "wrong": (
        lambda **options: objective(mlp(Applies(Wrong)), **options),
        r"double backward is wrong \(relative error",
    ),
    "CTC": (
        lambda **options: objective(Aligner(), lambda m, b: m.loss(b), SPEECH, **options),
        "no double backward: .*_ctc_loss_backward",
    ),
}


@pytest.mark.parametrize("name", REPAIRABLE)
def test_missing_and_wrong_products_are_replaced_by_differences_of_gradients(name: str) -> None:
    make, reason = REPAIRABLE[name]
    found = self_check(make())
    assert found.verdict == "finite_differences"
    assert re.match(reason, found.reason)
    repaired = make(second_order="finite_differences")
    theta = repaired.theta()
    with repaired.hvp(theta) as product:
        hessian = torch.stack([product(row) for row in torch.eye(len(theta), dtype=torch.float64)])
    exact = dense_of_speech() if name == "CTC" else dense()
    assert float((hessian - exact).norm() / exact.norm()) < 1e-6
    assert self_check(make(), seed=1).verdict == "finite_differences"


def dense() -> Tensor:
    """The Hessian of the network with torch's own tanh."""
    module = mlp(nn.Tanh())
    loss = oracles.mean_loss(module, [BATCH], cross_entropy, [1.0])
    return oracles.dense_hessian(loss, oracles.flat_parameters(module))


def dense_of_speech() -> Tensor:
    module = Aligner()
    loss = oracles.mean_loss(module, [SPEECH], lambda m, b: m.loss(b), [1.0])
    return oracles.finite_difference_hessian(loss, oracles.flat_parameters(module))


def test_the_products_that_are_taken_for_wrong_are_so() -> None:
    found = objective(mlp(Applies(Wrong)))
    theta = found.theta()
    with found.hvp(theta) as product:
        hessian = torch.stack([product(row) for row in torch.eye(len(theta), dtype=torch.float64)])
    assert float((hessian - dense()).norm() / dense().norm()) > 1e-2


class Partly(nn.Module):
    """Only the second of three vectors goes through the wrong function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Parameter(normal(3, seed=s)) for s in (1, 2, 3))

    def loss(self) -> Tensor:
        return (self.first.exp() + Wrong.apply(self.second) + self.third**3).square().sum()


def test_the_parameter_behind_wrong_products_is_named() -> None:
    found = self_check(objective(Partly(), lambda m, b: m.loss()))
    assert (found.verdict, found.suspect) == ("finite_differences", "second")
    assert found.relative_error > 1e-2


def test_nodes_that_would_raise_if_they_were_not_pruned_are_found() -> None:
    leaf = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def gradient(function: Any) -> Tensor:
        return torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)[0]

    assert pruned_nodes(gradient(torch.tanh)) == set()
    assert len(pruned_nodes(gradient(Once.apply))) == 1
    assert pruned_nodes(torch.zeros(2)) == set()


# -- what is no answer -------------------------------------------------------------------------------------------------


def test_a_run_that_is_asked_to_end_gets_no_verdict() -> None:
    polled = itertools.count()
    total = objective(mlp(nn.Tanh()), collective=Collective(lambda: next(polled) < 0))
    self_check(total)
    count = next(polled)
    for ending in range(1, count, 7):
        calls = itertools.count()
        asked = Collective(lambda calls=calls, ending=ending: next(calls) >= ending)  # type: ignore[misc]
        with pytest.raises(InterruptedMeasurementError, match="asked to end"):
            self_check(objective(mlp(nn.Tanh()), collective=asked))


def test_memory_that_runs_out_is_no_verdict() -> None:
    found = objective(mlp(nn.Tanh()))
    theta = found.theta()

    def exhausted(index: int, leaf: Tensor) -> Tensor:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hvp = found.hvp
    found.hvp = lambda at: type(hvp(at))(at, exhausted, found.baseline.local_weights)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        self_check(found)
    assert torch.equal(found.theta(), theta)


# -- through the outputs -----------------------------------------------------------------------------------------------


class HalfTheDerivative(torch.autograd.Function):
    """exp with a right backward whose own derivative by the incoming gradient is half of what it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (0.5 * gradient + 0.5 * gradient.detach()) * ctx.saved_tensors[0].exp()


@pytest.mark.parametrize("module", [mlp(nn.Tanh()), mlp(nn.ReLU()), mlp(Applies(Exp))])
def test_right_derivatives_of_the_outputs_pass(module: nn.Module) -> None:
    found = self_check_outputs(objective(module))
    assert found.verdict == "exact"
    assert found.relative_error < 1e-6


def test_wrong_derivatives_of_the_outputs_are_told() -> None:
    found = self_check_outputs(objective(mlp(Applies(HalfTheDerivative))))
    assert found.verdict == "no_hessian"
    assert re.match(r"the outputs' derivatives are wrong \(relative error", found.reason)


def test_outputs_that_do_not_depend_on_the_parameters_are_right() -> None:
    module = Vector(torch.zeros(3, dtype=torch.float64))
    found = self_check_outputs(objective(module, lambda m, b: F.mse_loss(m.theta.sum() * 0 * b[0], b[0])))
    assert (found.verdict, found.relative_error) == ("exact", 0.0)
