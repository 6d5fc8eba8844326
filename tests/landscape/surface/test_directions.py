"""Directions are as long as the filters they move, orthogonal in each, and go through the states they are told to."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.surface.directions import (
    Directions,
    given_directions,
    hessian_directions,
    line_direction,
    plane_beside,
    plane_directions,
    random_directions,
)
from tests.landscape.surfaces import at_minimum, conv_net, rescaled
from tests.problems import generator, normal, softmax_regression


def by_filter(objective: Objective, vector: Tensor) -> dict[str, Tensor]:
    """The weights' parts of a vector with a row for each filter, spelled out tensor by tensor."""
    named = objective.layout.unflatten(vector)
    return {name: t.flatten(1) for name, t in named.items() if t.ndim > 1}


@pytest.fixture(scope="module")
def net() -> Objective:
    return conv_net()


@pytest.fixture(scope="module")
def drawn(net: Objective) -> Directions:
    return random_directions(net.theta(), net.layout, generator(0), biases=True)


def test_each_filter_of_a_random_direction_is_as_long_as_the_weights_own(net: Objective, drawn: Directions) -> None:
    weights = by_filter(net, net.theta())
    for vector in drawn.vectors:
        for name, rows in by_filter(net, vector).items():
            ratios = rows.norm(dim=1) / weights[name].norm(dim=1)
            torch.testing.assert_close(ratios, torch.ones_like(ratios), rtol=1e-14, atol=0)


def test_random_directions_are_orthogonal_within_each_filter(net: Objective, drawn: Directions) -> None:
    first, second = (by_filter(net, vector) for vector in drawn.vectors)
    for name, rows in first.items():
        cosines = (rows * second[name]).sum(1) / rows.square().sum(1)
        assert cosines.abs().max() < 1e-14


@pytest.mark.parametrize("size", [2, 3])
def test_orthogonal_although_the_second_draw_is_nearly_the_first(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Objective(nn.Linear(size, 1, bias=False).double(), [torch.ones(1, size).double()], summed)
    draw = normal(size, seed=1)
    draws = iter([draw, draw + 1e-9 * normal(size, seed=2)])
    monkeypatch.setattr("lmc_lightning.landscape.surface.directions.gaussian", lambda *args, **options: next(draws))
    found = random_directions(objective.theta(), objective.layout, generator(0)).vectors
    assert abs(found[0] @ found[1]) < 1e-14 * found[0].norm() ** 2
    torch.testing.assert_close(found.norm(dim=1), objective.theta().norm().expand(2), rtol=1e-14, atol=0)


def test_filters_of_one_entry_leave_the_second_direction(net: Objective, drawn: Directions) -> None:
    first, second = (net.layout.unflatten(vector) for vector in drawn.vectors)
    theta = net.layout.unflatten(net.theta())
    singles = [name for name, tensor in theta.items() if tensor.ndim < 2]
    assert {"body.1.weight", "body.1.bias", "head.bias"} <= set(singles)
    for name in singles:
        torch.testing.assert_close(first[name].abs(), theta[name].abs(), rtol=1e-14, atol=0)
        assert not second[name].any()


def test_without_biases_only_weights_move(net: Objective, drawn: Directions) -> None:
    """And they move as they do with them: which tensors come along changes no other direction."""
    for with_them, vector in zip(
        drawn.vectors, random_directions(net.theta(), net.layout, generator(0)).vectors, strict=True
    ):
        moved = net.layout.unflatten(vector)
        assert {name for name, t in moved.items() if t.any()} == set(by_filter(net, vector))
        for name, rows in by_filter(net, with_them).items():
            assert torch.equal(rows, moved[name].flatten(1))


def test_a_filter_of_zeros_does_not_move() -> None:
    module = nn.Linear(4, 3, bias=False).double()
    module.weight.data[1] = 0
    objective = Objective(module, [torch.ones(1, 4).double()], summed)
    for vector in random_directions(objective.theta(), objective.layout, generator(0)).vectors:
        rows = by_filter(objective, vector)["weight"]
        assert rows.any(dim=1).tolist() == [True, False, True]


def summed(module: nn.Module, batch: Any) -> Tensor:
    return module(batch).sum()


def test_equal_seeds_give_equal_directions_whatever_the_scale_of_the_weights(net: Objective) -> None:
    theta = net.theta()
    once, again, larger, other = (
        random_directions(scale * theta, net.layout, generator(seed)).vectors
        for scale, seed in [(1, 0), (1, 0), (2, 0), (1, 1)]
    )
    assert torch.equal(once, again)
    torch.testing.assert_close(larger, 2 * once, rtol=1e-14, atol=0)
    assert not torch.allclose(once, other)


def test_a_slice_does_not_depend_on_how_layers_around_a_relu_are_scaled() -> None:
    """The reason for filters: w₁ → cw₁, w₂ → w₂/c is the same network, and so is the loss at equal coordinates."""
    losses = []
    for factor in (1.0, 10.0):
        objective = rescaled(factor)
        found = random_directions(objective.theta(), objective.layout, generator(0))
        losses.append(objective.loss(found.point(objective.theta(), (0.5, -0.7))))
    assert losses[0] == pytest.approx(float(losses[1]), rel=1e-12)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (nn.Linear(1, 3, bias=False), {}),  # filters of one entry have no second direction
        (nn.Linear(3, 1, bias=False).requires_grad_().double(), {"zero": True}),
        (nn.BatchNorm1d(3), {}),  # no weights
    ],
    ids=["single entries", "zeros", "vectors"],
)
def test_a_direction_of_zeros_is_refused(module: nn.Module, options: dict[str, bool]) -> None:
    module = module.double().eval()
    if options.get("zero"):
        nn.init.zeros_(module.weight)  # type: ignore[arg-type]
    width = 1 if isinstance(module, nn.Linear) and module.in_features == 1 else 3
    objective = Objective(module, [torch.ones(2, width).double()], summed)
    with pytest.raises(ValueError, match=r"Random direction [12] is zero: .*Pass biases=True, dimensions=1, or"):
        random_directions(objective.theta(), objective.layout, generator(0))


# -- eigenvectors ------------------------------------------------------------------------------------------------------


def test_hessian_directions_are_the_top_eigenvectors() -> None:
    problem = softmax_regression()
    found = hessian_directions(problem.objective(), generator(0))
    values, vectors = torch.linalg.eigh(problem.hessian)
    for row, value, vector in zip(found.vectors, values.flip(0), vectors.T.flip(0), strict=False):
        assert abs(row @ vector) == pytest.approx(1, abs=1e-6)
        assert row @ problem.hessian @ row == pytest.approx(float(value), rel=1e-6)
        assert row[row.abs().argmax()] > 0
    assert found.evidence["eigenvalues"] == pytest.approx(problem.eigenvalues[:2].tolist(), rel=1e-6)
    assert found.evidence["directions_converged"]
    assert found.evidence["num_matvecs"] > 2


# -- through states ----------------------------------------------------------------------------------------------------


def corners(count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [normal(20, seed=index).to(dtype) for index in range(count)]


def test_a_plane_goes_through_its_three_states_at_the_coordinates_it_says() -> None:
    a, b, c = corners()
    found = plane_directions(a, b, c)
    for state, expected in ((a, (0.0, 0.0)), (b, (1.0, 0.0)), (c, None)):
        position, distance = found.coordinates(state - a)
        assert distance < 1e-13
        torch.testing.assert_close(found.point(a, position), state, rtol=0, atol=1e-13)
        if expected is not None:
            assert position == pytest.approx(expected, abs=1e-14)
    assert found.coordinates(c - a)[0][1] > 0


def test_a_plane_is_not_distorted() -> None:
    a, b, c = corners()
    found = plane_directions(a, b, c)
    torch.testing.assert_close(found.vectors @ found.vectors.T, (b - a).square().sum() * torch.eye(2).double())
    of_b, of_c = (torch.tensor(found.coordinates(state - a)[0], dtype=torch.float64) for state in (b, c))
    assert (of_b - of_c).norm() * (b - a).norm() == pytest.approx(float((b - c).norm()), rel=1e-12)


def test_what_is_off_the_plane_has_a_distance_to_it() -> None:
    a, b, c = corners()
    found = plane_directions(a, b, c)
    normal_vector = torch.linalg.qr(torch.stack([*found.vectors, normal(20, seed=9)]).T)[0][:, 2]
    position, distance = found.coordinates(0.3 * (b - a) + 2.5 * normal_vector)
    assert position == pytest.approx((0.3, 0.0), abs=1e-12)
    assert distance == pytest.approx(2.5, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [0.5, 2.0, -0.3, 0.0, 1.0])
def test_three_states_on_one_line_are_refused(t: float, dtype: torch.dtype) -> None:
    a, b = corners(2, dtype)
    with pytest.raises(ValueError, match="The three states lie on one line and span no plane"):
        plane_directions(a, b, torch.lerp(a, b, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flat_triangle_is_a_plane_still(dtype: torch.dtype) -> None:
    a, b, aside = corners(3, dtype)
    found = plane_directions(a, b, torch.lerp(a, b, 0.5) + 1e-4 * aside)
    assert found.vectors[0] @ found.vectors[1] == pytest.approx(0, abs=1e-4)


def test_two_states_are_on_the_plane_beside_their_line(net: Objective) -> None:
    a = net.theta()
    b = a + 0.3 * normal(len(a), seed=5)
    found = plane_beside(a, b, net.layout, generator(0))
    torch.testing.assert_close(found.vectors @ found.vectors.T, (b - a).square().sum() * torch.eye(2).double())
    assert torch.equal(found.vectors[0], b - a)
    assert found.coordinates(b - a)[1] < 1e-12


def test_a_line_is_the_difference_of_its_states() -> None:
    a, b = corners(2)
    found = line_direction(a, b)
    assert found.coordinates(b - a)[0] == pytest.approx((1.0,), rel=1e-14)
    torch.testing.assert_close(found.point(a, (0.25,)), 0.75 * a + 0.25 * b)


def test_equal_states_span_nothing() -> None:
    (a, b) = corners(2)
    objective = at_minimum()
    with pytest.raises(ValueError, match="The two states are the same point and span no line"):
        line_direction(a, a.clone())
    with pytest.raises(ValueError, match="A and B are the same point"):
        plane_directions(a, a.clone(), b)
    with pytest.raises(ValueError, match="The two states are the same point and span no plane"):
        plane_beside(objective.theta(), objective.theta(), objective.layout, generator(0))


# -- given ones --------------------------------------------------------------------------------------------------------


def test_columns_become_directions_as_they_are() -> None:
    columns = normal(20, 2, seed=1)
    found = given_directions(columns)
    assert torch.equal(found.vectors, columns.T)
    assert found.labels == ("direction 1", "direction 2")
    assert torch.equal(given_directions(columns[:, 0]).vectors, columns[:, :1].T)


def test_directions_may_be_of_very_different_lengths() -> None:
    columns = normal(20, 2, seed=1) * torch.tensor([1.0, 1e-30])
    assert torch.equal(given_directions(columns).vectors, columns.T)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (normal(20, 3, seed=1), r"Expected one or two directions as columns \(P, k\), got a tensor of \(20, 3\)"),
        (torch.stack([torch.ones(5), 2 * torch.ones(5)], dim=1), "zero or parallel"),
        (torch.zeros(5), "zero or parallel"),
        (torch.stack([normal(50, seed=1).float(), 0.3 * normal(50, seed=1).float()], dim=1), "zero or parallel"),
    ],
)
def test_columns_that_span_no_plane_are_refused(columns: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given_directions(columns)


def test_at_coordinates_zero_a_point_is_an_exact_copy() -> None:
    theta = torch.tensor([-0.0, 1.0, 3.0])
    found = given_directions(torch.tensor([[1.0, float("inf")], [0.0, 1.0], [2.0, 0.0]])[:, :1])
    moved = found.point(theta, (0.0,))
    assert torch.equal(moved, theta)
    assert torch.signbit(moved[0])
    assert moved.data_ptr() != theta.data_ptr()
