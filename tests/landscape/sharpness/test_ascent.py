import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature.spectrum import spectrum
from lmc_lightning.landscape.sharpness.ascent import (
    adaptive,
    adaptive_linf,
    gradient_norm_rms,
    keskar,
    m_sharpness,
    worst_case,
)
from lmc_lightning.landscape.sharpness.measured import Centre, Measured, centre_at
from tests import problems
from tests.landscape.surfaces import MINIMUM, SPECTRUM, Counting, along_line, at_minimum, conv_net, linear, rescaled
from tests.problems import ConvNet, cross_entropy, generator, images, normal, split

# -- in a ball ---------------------------------------------------------------------------------------------------------


def test_worst_case_at_a_minimum_is_half_rho_squared_lambda_max() -> None:
    objective = at_minimum()
    result = worst_case(objective, objective.theta(), rho=0.3, num_steps=60)
    assert result.flags == ("stationary",)
    assert result.value == pytest.approx(0.3**2 * 6 / 2, rel=1e-9)


def test_worst_case_comes_from_below_and_grows_with_the_number_of_steps() -> None:
    objective = at_minimum()
    values = [worst_case(objective, objective.theta(), 0.3, n).value for n in range(1, 12)]
    assert values == sorted(values)
    assert all(0 < v <= 0.3**2 * 6 / 2 for v in values)


def test_worst_case_at_a_saddle_follows_the_largest_eigenvalue_not_the_largest_magnitude() -> None:
    objective = at_minimum([1.0, 0.2, -5.0])
    assert 0.99 * 0.1**2 / 2 < worst_case(objective, objective.theta(), 0.1, 100).value <= 0.1**2 / 2


def test_worst_case_of_a_quadratic_away_from_its_minimum() -> None:
    """Against the closed form of the trust-region problem: (μ − H)ε = g with ‖ε‖ = ρ and μ ≥ λ_max."""
    hessian, theta, rho = problems.with_spectrum(SPECTRUM), normal(8, seed=5), 0.5
    problem = problems.quadratic(hessian, theta)
    low, high = 6.0 + 1e-9, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        step = torch.linalg.solve(middle * torch.eye(8).double() - hessian, problem.gradient)
        low, high = (middle, high) if step.norm() > rho else (low, middle)
    expected = float(problem.gradient @ step + 0.5 * step @ hessian @ step)
    assert worst_case(problem.objective(), theta, rho, 100).value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_linear_loss_rises_by_rho_times_its_slope(num_steps: int) -> None:
    slope, theta = normal(5, seed=1), normal(5, seed=2)
    result = worst_case(linear(slope, theta), theta, 0.7, num_steps)
    assert result.value == pytest.approx(0.7 * float(slope.norm()), rel=1e-12)
    assert result.flags == ()


def test_a_relative_radius_is_a_share_of_the_norm_of_theta() -> None:
    slope, theta = normal(5, seed=1), normal(5, seed=2)
    expected = 0.1 * float(theta.norm() * slope.norm())
    assert worst_case(linear(slope, theta), theta, 0.1, radius="relative").value == pytest.approx(expected, rel=1e-12)


def test_the_ball_of_filters_is_the_ellipsoid_of_their_norms() -> None:
    objective = conv_net()
    theta, gradient = objective.theta(), objective.grad(objective.theta())
    parts = zip(objective.layout.shapes, theta.split(objective.layout.sizes), strict=True)
    rows = [p.reshape(shape[0] if len(shape) > 1 else len(p), -1) for shape, p in parts]
    lengths = torch.cat([r.norm(dim=1, keepdim=True).expand_as(r).reshape(-1) for r in rows])
    step = 0.1 * lengths**2 * gradient / (lengths * gradient).norm()
    rise = float(objective.loss(theta + step) - objective.loss(theta))
    assert worst_case(objective, theta, 0.1, radius="filter").value == pytest.approx(rise, rel=1e-10)


def test_a_step_that_overshoots_is_negative_and_further_steps_repair_it() -> None:
    """(θ² − 1)² just left of the minimum at 1, with a radius that reaches over the other well."""
    objective = problems.double_well(0.99).objective()
    theta = objective.theta()
    over = worst_case(objective, theta, 1.9)
    assert over.value == pytest.approx(((0.99 - 1.9) ** 2 - 1) ** 2 - objective.baseline.loss, rel=1e-9)
    values = [worst_case(objective, theta, 1.9, n).value for n in range(1, 16)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1 - objective.baseline.loss, rel=1e-3)


def test_one_step_is_the_perturbation_of_sam() -> None:
    objective = conv_net()
    theta = objective.theta()
    gradient = objective.grad(theta)
    expected = objective.loss(theta + 0.05 * gradient / gradient.norm()) - objective.loss(theta)
    assert worst_case(objective, theta, 0.05).value == pytest.approx(expected.item(), rel=1e-12)


def test_adaptive_is_its_one_step() -> None:
    objective = conv_net()
    theta = objective.theta()
    gradient = objective.grad(theta)
    step = 0.5 * theta**2 * gradient / (theta.abs() * gradient).norm()
    expected = objective.loss(theta + step) - objective.loss(theta)
    assert adaptive(objective, theta, 0.5).value == pytest.approx(expected.item(), rel=1e-12)


def test_adaptive_on_a_linear_loss_and_zeros_that_stay() -> None:
    slope, theta = torch.tensor([3.0, 1.0, 5.0]).double(), torch.tensor([-2.0, 4.0, 0.0]).double()
    result = adaptive(linear(slope, theta), theta, 0.1)
    assert result.value == pytest.approx(0.1 * math.sqrt(6**2 + 4**2), rel=1e-12)
    only_zero = torch.tensor([0.0, 0.0, 5.0]).double()
    stuck = adaptive(linear(only_zero, theta), theta, 0.1)
    assert (stuck.value, stuck.flags) == (0, ("stationary",))


# -- in a box ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 5])
def test_in_a_box_a_linear_loss_rises_by_the_sum_of_its_slopes(num_steps: int) -> None:
    slope, theta = -normal(5, seed=1), normal(5, seed=2)
    objective = linear(slope, theta)
    loss = objective.baseline.loss
    assert loss > 0
    found = adaptive_linf(objective, theta, 0.01, num_steps)
    assert found.value == pytest.approx(0.01 * float((theta * slope).abs().sum()), rel=1e-10)
    rise = 1e-3 * float(((theta.abs() + 1) * slope.abs()).sum())
    assert keskar(objective, theta).value == pytest.approx(100 * rise / (1 + loss), rel=1e-10)


def test_in_a_box_the_maximum_of_a_diagonal_quadratic_is_at_a_corner() -> None:
    curvature = torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64)
    objective = Objective(
        problems.Vector(torch.full((3,), 1.5).double()),
        [torch.zeros(1)],
        lambda m, b: 0.5 * curvature @ (m.theta - 1.5) ** 2,
    )
    theta = objective.theta()
    found = adaptive_linf(objective, theta, 0.1, 5)
    assert found.flags == ("stationary",)
    assert found.value == pytest.approx(0.5 * 4.2 * 0.15**2, rel=1e-12)
    assert keskar(objective, theta, 0.1).value == pytest.approx(100 * 0.5 * 4.2 * 0.25**2, rel=1e-12)


def test_the_box_is_never_left() -> None:
    objective, seen = conv_net(), []
    theta, evaluate = objective.theta(), objective.evaluate

    def watched(point: Tensor, **options: Any) -> Any:
        seen.append(((point - theta).abs() / (theta.abs() + 1)).max().item())
        return evaluate(point, **options)

    objective.evaluate = watched  # type: ignore[method-assign]
    keskar(objective, theta, 0.2, centre=Centre(theta, objective.baseline.loss, objective.grad(theta)))
    assert len(seen) == 10
    assert max(seen) == pytest.approx(0.2, rel=1e-9)


def test_keskar_has_no_meaning_where_one_plus_the_loss_is_not_positive() -> None:
    objective = at_minimum(offset=-2.0)
    assert math.isnan(keskar(objective, objective.theta()).value)


# -- chunk by chunk ----------------------------------------------------------------------------------------------------


def chunked(size: int) -> Objective:
    return conv_net(chunk_size=size)


def test_m_sharpness_is_the_mean_of_the_worst_cases_of_the_chunks() -> None:
    whole = chunked(16)
    theta = whole.theta()
    parts = split(images(), [16, 16, 16, 16, 6])
    values = torch.tensor([worst_case(Objective(ConvNet(), [b], cross_entropy), theta, 0.1).value for b in parts])
    weights = torch.tensor([16, 16, 16, 16, 6]) / 70
    found = m_sharpness(whole, theta, 0.1)
    assert found.value == pytest.approx(float(weights @ values), rel=1e-6)
    deviations = weights * (values - weights @ values)
    assert found.stderr == pytest.approx(float((deviations.square().sum() * 5 / 4).sqrt()), rel=1e-5)
    assert (found.num_samples, found.num_gradients, found.num_losses) == (5, 1, 2)


def test_m_sharpness_of_one_chunk_is_the_worst_case_and_of_more_is_larger() -> None:
    theta = chunked(70).theta()
    whole = worst_case(chunked(70), theta, 0.05, 8).value
    assert m_sharpness(chunked(70), theta, 0.05, 8).value == pytest.approx(whole, rel=1e-12)
    values = [m_sharpness(chunked(size), theta, 0.05, 8).value for size in (35, 10)]
    assert whole < values[0] < values[1]
    assert m_sharpness(chunked(70), theta, 0.05).stderr is None


def test_the_root_mean_square_of_gradients_is_that_of_the_chunks() -> None:
    objective = chunked(16)
    theta = objective.theta()
    weights = torch.tensor([16, 16, 16, 16, 6], dtype=torch.float64) / 70
    squares = torch.stack([objective.chunk_gradient(i, theta).square().sum() for i in range(5)])
    found = gradient_norm_rms(objective, theta)
    assert found.value == pytest.approx(math.sqrt(float(weights @ squares)), rel=1e-12)
    spread = math.sqrt(float((weights * (squares - weights @ squares)).square().sum()) * 5 / 4)
    assert found.stderr == pytest.approx(spread / (2 * found.value), rel=1e-10)
    one = gradient_norm_rms(chunked(70), theta)
    assert (one.value, one.stderr) == (pytest.approx(float(chunked(70).grad(theta).norm()), rel=1e-12), None)


# -- invariances -------------------------------------------------------------------------------------------------------


def moved(measure: Any) -> float:
    """By what factor a measure grows when a layer before a ReLU is tripled and the one behind it divided by three."""
    plain, scaled = rescaled(1.0), rescaled(3.0)
    assert plain.baseline.loss == pytest.approx(scaled.baseline.loss, rel=1e-12)
    values = [measure(objective, objective.theta()) for objective in (plain, scaled)]
    return values[1] / values[0]


def of(measure: Any, *args: Any, **options: Any) -> Any:
    return lambda objective, theta: measure(objective, theta, *args, **options).value


@pytest.mark.parametrize(
    "measure",
    [
        of(adaptive, 0.5),
        of(adaptive_linf, 0.05, 4),
        of(worst_case, 0.1, 3, radius="filter"),
        of(m_sharpness, 0.1, 2, radius="filter"),
    ],
    ids=["adaptive", "adaptive_linf", "worst_case-filter", "m_sharpness-filter"],
)
def test_rescaling_around_a_relu_leaves_relative_changes_alone(measure: Any) -> None:
    assert moved(measure) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(
    "measure",
    [
        of(worst_case, 0.05),
        of(worst_case, 0.01, radius="relative"),
        of(m_sharpness, 0.05),
        of(keskar),
        of(gradient_norm_rms),
        lambda o, t: spectrum(o, t, num_probes=0, generator=generator(0)).lambda_max,
    ],
    ids=["worst_case", "worst_case-relative", "m_sharpness", "keskar", "gradient_norm_rms", "lambda_max"],
)
def test_rescaling_around_a_relu_moves_the_others(measure: Any) -> None:
    assert abs(math.log(moved(measure))) > math.log(1.2)


def test_worst_case_is_invariant_to_rotations_and_adaptive_is_not() -> None:
    turn = problems.rotation(8, seed=9)
    hessian, theta = problems.with_spectrum(SPECTRUM), normal(8, seed=5)
    plain = problems.quadratic(hessian, theta).objective()
    turned = problems.quadratic(turn @ hessian @ turn.T, turn @ theta).objective()
    values = [worst_case(o, o.theta(), 0.3, 3).value for o in (plain, turned)]
    assert values[0] == pytest.approx(values[1], rel=1e-10)
    values = [adaptive(o, o.theta(), 0.3).value for o in (plain, turned)]
    assert abs(values[0] - values[1]) > 0.05 * values[0]


# -- evidence, trouble, misuse -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("measure", [worst_case, adaptive_linf, keskar])
def test_every_evaluation_is_counted(measure: Any, num_steps: int) -> None:
    objective = Counting(ConvNet(), [images()], cross_entropy)
    theta = objective.theta()
    centre = centre_at(objective, theta)
    objective.losses = objective.gradients = 0
    found: Measured = measure(objective, theta, 0.05, num_steps, centre=centre)
    assert (objective.gradients, objective.losses) == (found.num_gradients, found.num_losses)
    assert found.num_losses == num_steps


@pytest.mark.parametrize("beyond", [math.inf, math.nan])
def test_losses_that_are_not_finite_are_flagged(beyond: float) -> None:
    objective = along_line(lambda theta: torch.where(theta < 1, theta, theta.new_tensor(beyond)), 0.5)
    theta = objective.theta()
    assert worst_case(objective, theta, 0.25).flags == ()
    found = worst_case(objective, theta, 0.75)
    assert found.value == pytest.approx(beyond, nan_ok=True)
    assert found.flags == ("nonfinite",)


def test_a_step_to_where_the_loss_is_no_number_is_taken_back() -> None:
    objective = along_line(lambda theta: torch.where(theta < 1, theta, theta.new_tensor(math.nan)), 0.5)
    found = worst_case(objective, objective.theta(), 1.6, 4)  # 2.1, 1.3, 0.9, 1.7
    assert found.value == pytest.approx(0.4, rel=1e-9)
    assert found.flags == ("nonfinite",)


@pytest.mark.parametrize("measure", [of(worst_case, 0.1), of(adaptive, 0.1), of(adaptive_linf, 0.1), of(keskar)])
def test_a_point_that_is_no_number_has_no_sharpness(measure: Any) -> None:
    objective = linear(normal(8, seed=1), MINIMUM)
    assert math.isnan(measure(objective, MINIMUM * math.nan))


def test_chunks_that_are_not_finite_are_flagged() -> None:
    objective = Objective(ConvNet(), split(images(), [64, 6]), cross_entropy, chunk_size=16)
    theta = objective.theta() * math.nan
    for found in (m_sharpness(objective, theta, 0.1), gradient_norm_rms(objective, theta)):
        assert math.isnan(found.value)
        assert "nonfinite" in found.flags


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        (worst_case, {"rho": 0.0}),
        (worst_case, {"rho": 0.1, "num_steps": 0}),
        (adaptive, {"rho": -1.0}),
        (adaptive_linf, {"rho": 0.0}),
        (keskar, {"epsilon": 0.0}),
        (m_sharpness, {"rho": math.nan}),
    ],
)
def test_what_is_not_positive_is_refused(measure: Any, options: dict[str, float]) -> None:
    objective = at_minimum()
    with pytest.raises(ValueError, match=r"must be positive, got"):
        measure(objective, objective.theta(), **options)
