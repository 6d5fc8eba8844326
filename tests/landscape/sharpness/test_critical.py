import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.sharpness.critical import RATIO, critical_sharpness
from lmc_lightning.landscape.sharpness.measured import centre_at
from tests import problems
from tests.landscape.surfaces import SPECTRUM, Counting, along_line, conv_net, linear, rescaled
from tests.problems import ConvNet, cross_entropy, images, normal


@pytest.mark.parametrize(("seed", "scale"), [(0, 1e-6), (1, 1.0), (2, 1.0), (3, 1e6)])
def test_of_a_quadratic_it_is_the_curvature_along_the_step(seed: int, scale: float) -> None:
    hessian, theta = scale * problems.with_spectrum(SPECTRUM), normal(8, seed=seed)
    problem = problems.quadratic(hessian, theta)
    objective, gradient = problem.objective(), problem.gradient
    update = normal(8, seed=40 + seed)
    update = update if update @ gradient > 0 else -update
    for direction in (gradient, update):
        expected = float(direction @ hessian @ direction / (gradient @ direction))
        found = critical_sharpness(objective, theta, direction, tolerance=1e-10)
        assert found.value == pytest.approx(expected, rel=1e-8)
        assert (found.flags, found.converged) == ((), True)
    assert critical_sharpness(objective, theta).value <= scale * SPECTRUM[0] * (1 + 1e-3)


def test_it_is_the_value_of_the_step_and_that_is_where_the_loss_has_come_back() -> None:
    objective = conv_net()
    theta = objective.theta()
    found = critical_sharpness(objective, theta, tolerance=1e-8)
    step = found.details["critical_step"]
    assert found.value == pytest.approx(2 / step, rel=1e-12)
    gradient = objective.grad(theta)
    for factor, higher in ((0.5, False), (0.99, False), (1.01, True)):
        assert (float(objective.loss(theta - factor * step * gradient)) > objective.baseline.loss) is higher


def bump(theta: Tensor) -> Tensor:
    """Falls from θ = 10 to the left with slope 1, but is above its value there from 9.5 to 9.3 and below again."""
    return (theta - 10) + 1.5 * torch.exp(-(((theta - 9.4) / 0.1) ** 2))


def test_it_is_the_smallest_crossing_not_the_first_that_doubling_meets() -> None:
    objective = along_line(bump, 10.0)
    fine = torch.arange(0, 3, 1e-5, dtype=torch.float64)
    height = bump(10 - fine) - bump(torch.tensor(10.0))
    smallest = float(fine[(height > 1e-12).nonzero()[0]])
    assert 0.4 < smallest < 0.6
    assert float(height[fine > 1].max()) < 0
    found = critical_sharpness(objective, objective.theta(), tolerance=1e-8)
    assert found.details["critical_step"] == pytest.approx(smallest, abs=2e-5)
    assert found.details["resolution"] == RATIO == 1.25


def test_against_a_fine_grid_on_random_wiggly_lines() -> None:
    """Profiles that rise and fall several times, at steps more than a quarter apart: never a later crossing."""
    met = 0
    for seed in range(20):
        weights = normal(3, seed=seed).tolist()

        def profile(theta: Tensor, weights: list[float] = weights) -> Tensor:
            x = 10 - theta
            waves = sum(w * (torch.cos((2 * k + 2) * x.log1p()) - 1) for k, w in enumerate(weights))
            return -x + 0.15 * x**2 + x * waves

        objective = along_line(profile, 10.0)
        fine = torch.arange(1e-3, 99, 1e-3, dtype=torch.float64)
        above = profile(10 - fine) > 0
        met += int(above.diff().count_nonzero() > 1)
        found = critical_sharpness(objective, objective.theta(), tolerance=1e-6)
        assert found.details["critical_step"] == pytest.approx(float(fine[above.nonzero()[0]]), abs=2e-3)
    assert met >= 5


def test_a_direction_along_which_the_loss_rises_has_no_critical_step() -> None:
    problem = problems.quadratic(problems.with_spectrum(SPECTRUM), normal(8, seed=0))
    objective, theta = problem.objective(), normal(8, seed=0)
    orthogonal = normal(8, seed=1)
    orthogonal = orthogonal - problem.gradient * (orthogonal @ problem.gradient / problem.gradient.square().sum())
    for direction in (-problem.gradient, torch.zeros(8).double(), orthogonal - 1e-3 * problem.gradient):
        found = critical_sharpness(objective, theta, direction)
        assert math.isnan(found.value)
        assert found.flags == ("undefined",)
        assert found.num_losses == 0


def test_a_loss_that_never_rises_is_censored_at_the_longest_step() -> None:
    slope, theta = normal(8, seed=1), normal(8, seed=2)
    objective = linear(slope, theta)
    found = critical_sharpness(objective, theta)
    longest = 10 * float(theta.norm() / slope.norm())
    assert (found.flags, found.converged) == (("censored",), False)
    assert found.value == pytest.approx(2 / longest, rel=1e-9)
    nearer = critical_sharpness(objective, theta, eta_max=0.5)
    assert (nearer.flags, nearer.value) == (("censored",), 4.0)


def test_a_longest_step_beyond_the_crossing_changes_nothing_and_one_before_it_censors() -> None:
    problem = problems.quadratic(problems.with_spectrum(SPECTRUM), normal(8, seed=0))
    objective, theta = problem.objective(), normal(8, seed=0)
    free = critical_sharpness(objective, theta)
    step = free.details["critical_step"]
    assert critical_sharpness(objective, theta, eta_max=2 * step).value == pytest.approx(free.value, rel=2e-3)
    before = critical_sharpness(objective, theta, eta_max=0.9 * step)
    assert (before.flags, before.value) == (("censored",), pytest.approx(2 / (0.9 * step), rel=1e-12))


@pytest.mark.parametrize("beyond", [math.inf, math.nan])
def test_a_loss_that_ends_counts_as_a_rise_and_is_flagged(beyond: float) -> None:
    objective = along_line(lambda theta: torch.where(theta > 0.7, theta, theta.new_tensor(beyond)), 1.0)
    found = critical_sharpness(objective, objective.theta(), tolerance=1e-6)
    assert found.details["critical_step"] == pytest.approx(0.3, abs=1e-5)
    assert found.flags == ("nonfinite",)


def test_where_the_loss_is_no_number_nothing_is_found() -> None:
    objective = linear(normal(8, seed=1), normal(8, seed=2))
    found = critical_sharpness(objective, objective.theta() * math.nan)
    assert math.isnan(found.value)
    assert found.flags[0] == "undefined"


def test_in_single_precision_it_is_that_of_double() -> None:
    single, double = conv_net(torch.float32), conv_net()
    theta = single.theta()
    values = [critical_sharpness(o, t).value for o, t in ((single, theta), (double, theta.double()))]
    assert values[0] == pytest.approx(values[1], rel=5e-3)


def test_a_fall_that_is_lost_in_rounding_is_said_to_be() -> None:
    """A loss of 1e9 whose slope falls by less than its last digit before it rises."""
    objective = along_line(lambda theta: 1e9 + 0.5 * (theta - 1) ** 2, 1 + 1e-5)
    found = critical_sharpness(objective, objective.theta())
    assert math.isnan(found.value)
    assert found.flags == ("unresolved",)


def test_near_a_minimum_the_short_steps_that_drown_are_passed_over() -> None:
    """The first step of a thousandth of ‖θ‖ would fall by less than rounding; the curvature is found all the same."""
    objective = along_line(lambda theta: 1.0 + 0.5e-6 * (theta - 1) ** 2, 1 + 1e-3)
    found = critical_sharpness(objective, objective.theta(), eta_max=1e9)
    assert found.flags == ()
    assert found.value == pytest.approx(1e-6, rel=0.02)


def test_a_factor_of_the_loss_is_a_factor_of_it_and_an_offset_is_none() -> None:
    theta = normal(8, seed=0)
    hessian = problems.with_spectrum(SPECTRUM)

    def of(factor: float, offset: float) -> float:
        objective = Objective(
            problems.Vector(theta),
            [torch.zeros(1)],
            lambda m, b: factor * (0.5 * m.theta @ hessian @ m.theta + m.theta.pow(4).sum()) + offset,
        )
        return critical_sharpness(objective, theta, tolerance=1e-8).value

    assert of(3.0, 0.0) == pytest.approx(3 * of(1.0, 0.0), rel=1e-6)
    assert of(1.0, 5.0) == pytest.approx(of(1.0, 0.0), rel=1e-6)


def test_rescaling_around_a_relu_moves_it() -> None:
    values = [critical_sharpness(o, o.theta()).value for o in (rescaled(1.0), rescaled(3.0))]
    assert values[1] > 1.5 * values[0]


def test_it_costs_no_gradient_beside_the_shared_one_and_few_losses() -> None:
    objective = Counting(ConvNet(), [images()], cross_entropy)
    theta = objective.theta()
    centre = centre_at(objective, theta)
    objective.losses = objective.gradients = 0
    found = critical_sharpness(objective, theta, centre=centre)
    assert (objective.losses, objective.gradients) == (found.num_losses, 0)
    assert found.num_losses <= 40


@pytest.mark.parametrize("options", [{"eta_max": 0.0}, {"tolerance": -1.0}])
def test_what_is_not_positive_is_refused(options: dict[str, Any]) -> None:
    objective = conv_net()
    with pytest.raises(ValueError, match=r"must be positive, got"):
        critical_sharpness(objective, objective.theta(), **options)
