from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature.exact_trace import exact_trace
from lmc_lightning.landscape.curvature.shares import CurvatureShares, example_images, form_shares, trace_shares
from tests import oracles
from tests.problems import ConvNet, cross_entropy, generator, images, normal, split

X, Y = images(20)
OPERATORS = ("hessian", "ggn", "empirical_fisher")


def objective_of(data: tuple[Tensor, Tensor] = (X, Y), sizes: tuple[int, ...] = (13, 7), **options: Any) -> Objective:
    return Objective(ConvNet(), split(data, sizes), cross_entropy, chunk_size=6, **options)


def forms_alone(theta: Tensor, vector: Tensor, operator: str, data: tuple[Tensor, Tensor] = (X, Y)) -> Tensor:
    """Of each example as a probe set of its own."""
    objectives = [Objective(ConvNet(), [(x[None], y[None])], cross_entropy) for x, y in zip(*data, strict=True)]
    take = {"hessian": Objective.hvp, "ggn": Objective.ggn, "empirical_fisher": Objective.empirical_fisher}[operator]
    return torch.stack([vector @ take(o, theta)(vector) for o in objectives])


@pytest.mark.parametrize("operator", OPERATORS)
def test_parts_are_those_of_the_examples_alone_and_add_up_to_the_form(operator: Any) -> None:
    objective = objective_of()
    theta, vector = objective.theta(), normal(objective.num_params, seed=1)
    result = form_shares(objective, theta, vector, operator)
    torch.testing.assert_close(20 * result.parts, forms_alone(theta, vector, operator), rtol=1e-10, atol=1e-12)
    product = {"hessian": objective.hvp, "ggn": objective.ggn, "empirical_fisher": objective.empirical_fisher}[operator]
    assert result.value == pytest.approx(float(vector @ product(theta)(vector)), rel=1e-12)
    assert float(result.shares.sum()) == pytest.approx(1, rel=1e-12)
    assert torch.equal(result.labels, Y)


def test_parts_of_the_dense_hessian() -> None:
    objective = objective_of()
    theta, vector = objective.theta(), normal(objective.num_params, seed=1)
    loss = oracles.mean_loss(ConvNet(), [(X[:1], Y[:1])], cross_entropy, [1.0])
    expected = vector @ oracles.dense_hessian(loss, theta) @ vector
    assert float(20 * form_shares(objective, theta, vector).parts[0]) == pytest.approx(float(expected), rel=1e-11)


def test_classes_add_up_and_ignored_targets_have_no_part() -> None:
    targets = Y.clone()
    targets[::3] = -100
    objective = objective_of((X, targets))
    result = form_shares(objective, objective.theta(), normal(objective.num_params, seed=1))
    assert list(result.by_class) == sorted(set(targets.tolist()) - {-100})
    assert sum(result.by_class.values()) == pytest.approx(result.value, rel=1e-12)
    assert sum(result.weight_by_class.values()) == pytest.approx(1, rel=1e-12)
    assert result.parts[::3].tolist() == [0.0] * 7


def test_a_chunk_that_is_ignored_as_a_whole_is_left_out() -> None:
    targets = Y.clone()
    targets[:6] = -100
    objective = objective_of((X, targets), (20,))
    result = form_shares(objective, objective.theta(), normal(objective.num_params, seed=1))
    assert len(result.parts) == 14
    assert torch.equal(example_images(objective, torch.tensor([0, 13])), X[[6, 19]])


def test_the_largest_come_first() -> None:
    parts = torch.tensor([1.0, -2.0, 5.0, 1.0], dtype=torch.float64)
    result = CurvatureShares(parts, torch.full((4,), 0.25), torch.zeros(4).long())
    assert result.largest(3).tolist() == [2, 0, 3]
    assert result.shares.tolist() == [0.2, -0.4, 1.0, 0.2]


def test_parts_of_the_trace_are_those_of_its_examples() -> None:
    objective = objective_of()
    exact = exact_trace(objective, objective.theta(), generator=generator(0))
    result = trace_shares(exact)
    assert result.value == pytest.approx(exact.value, rel=1e-12)
    assert sum(result.by_class.values()) == pytest.approx(exact.value, rel=1e-12)
    torch.testing.assert_close(20 * result.parts, exact.example_traces, rtol=1e-14, atol=0)


def test_a_trace_that_is_not_exact_has_no_parts() -> None:
    objective = objective_of()
    none = exact_trace(objective, objective.theta(), generator=generator(0), max_passes=1)
    with pytest.raises(ValueError, match=r"not known example by example: it takes 3 backward passes"):
        trace_shares(none)


def test_a_loss_whose_examples_are_unknown_is_refused() -> None:
    def penalised(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module, batch) + module.head.weight.square().sum()

    objective = Objective(ConvNet(), [(X, Y)], penalised)
    with pytest.raises(ValueError, match="losses of single examples are unknown"):
        form_shares(objective, objective.theta(), objective.theta())


def test_in_float32() -> None:
    reference = objective_of()
    objective = Objective(ConvNet(torch.float32), [(X.float(), Y)], cross_entropy)
    vector = normal(objective.num_params, seed=1)
    for operator in OPERATORS:
        expected = form_shares(reference, reference.theta(), vector, operator).parts
        parts = form_shares(objective, objective.theta(), vector.float(), operator).parts
        torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-5)


def smooth() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def test_central_differences_where_there_is_no_double_backward() -> None:
    exact, differences = (
        Objective(smooth(), [(X, Y)], cross_entropy, second_order=route) for route in ("autograd", "finite_differences")
    )
    vector = normal(exact.num_params, seed=1)
    expected = form_shares(exact, exact.theta(), vector).parts
    torch.testing.assert_close(form_shares(differences, exact.theta(), vector).parts, expected, rtol=1e-5, atol=1e-6)


class SquareTwice(torch.autograd.Function):
    """x² with a first and a second derivative and no third."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Doubled.apply(grad, *ctx.saved_tensors)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(grad, x)
        return 2 * grad * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, other: Tensor) -> tuple[Tensor, Tensor]:
        grad, x = ctx.saved_tensors
        return 2 * other * x, 2 * other * grad


def test_example_by_example_where_there_is_no_third_derivative() -> None:
    def twice(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(SquareTwice.apply(module(batch[0])), batch[1])

    def often(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]).square(), batch[1])

    objectives = [Objective(smooth(), [(X, Y)], loss_fn) for loss_fn in (twice, often)]
    vector = normal(objectives[0].num_params, seed=1)
    alone, together = (form_shares(o, o.theta(), vector).parts for o in objectives)
    torch.testing.assert_close(alone, together, rtol=1e-11, atol=1e-13)


def test_images_are_those_of_the_examples() -> None:
    numbers = torch.tensor([19, 0, 7])
    assert torch.equal(example_images(objective_of(), numbers), X[numbers])
    flat = Objective(nn.Linear(36, 4).double(), [(X.flatten(1), Y)], cross_entropy)
    assert example_images(flat, numbers) is None
