import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature import spectrum
from lmc_lightning.landscape.sharpness import (
    SharpnessResult,
    adaptive,
    average,
    centre_at,
    gradient_norm,
    sharpness,
    worst_case,
)
from tests import problems
from tests.problems import ConvNet, cross_entropy, generator, images, mean_squared_error, normal, split

SPECTRUM = [6.0, 3.0, 1.0, 0.5, 0.1, 0.0, 0.0, 0.0]
MINIMUM = normal(8, seed=3)


def at_minimum(eigenvalues: list[float] = SPECTRUM) -> Objective:
    """½(θ − θ*)ᵀH(θ − θ*) at θ*, a point that is not 0."""
    hessian = problems.with_spectrum(eigenvalues)
    minimum = MINIMUM[: len(eigenvalues)]

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return 0.5 * (module.theta - minimum) @ hessian @ (module.theta - minimum)

    return Objective(problems.Vector(minimum), [torch.zeros(1)], loss_fn)


def linear(slope: Tensor, theta: Tensor) -> Objective:
    return problems.quadratic(torch.zeros(len(slope), len(slope)).double(), theta, slope).objective()


def conv_net(dtype: torch.dtype = torch.float64) -> Objective:
    return Objective(ConvNet(dtype), split(images(dtype=dtype), [64, 6]), cross_entropy)


def test_worst_case_at_a_minimum_is_half_rho_squared_lambda_max() -> None:
    objective = at_minimum()
    result = worst_case(objective, objective.theta(), rho=0.3, num_steps=60)
    assert result.stationary
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
    assert not result.stationary


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
    assert (stuck.value, stuck.stationary) == (0, True)


class TwoLayers(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6).double(), nn.Linear(6, 1).double()
        with torch.no_grad():
            for index, tensor in enumerate(self.parameters()):
                tensor.copy_(normal(*tensor.shape, seed=30 + index))
            self.first.weight *= factor
            self.first.bias *= factor
            self.second.weight /= factor

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_rescaling_around_a_relu_leaves_adaptive_sharpness_and_moves_the_others() -> None:
    batch = normal(30, 3, seed=1), normal(30, 1, seed=2)
    plain, scaled = (Objective(TwoLayers(c), [batch], mean_squared_error) for c in (1.0, 3.0))
    values, curvatures = [], []
    for objective in (plain, scaled):
        theta = objective.theta()
        values.append((adaptive(objective, theta, 0.5).value, worst_case(objective, theta, 0.05).value))
        curvatures.append(spectrum(objective, theta, num_probes=0, generator=generator(0)).lambda_max)
    assert plain.baseline.loss == pytest.approx(scaled.baseline.loss, rel=1e-12)
    assert values[1][0] == pytest.approx(values[0][0], rel=1e-10)
    assert values[1][1] > 1.5 * values[0][1]
    assert curvatures[0] is not None
    assert curvatures[1] is not None
    assert curvatures[1] > 2 * curvatures[0]


def test_average_at_a_minimum_is_half_sigma_squared_times_the_trace() -> None:
    objective = at_minimum()
    theta = objective.theta()
    result = average(objective, theta, 0.1, 300, generator(0))
    assert result.radius == pytest.approx(0.1 * float(theta.norm()) / math.sqrt(8), rel=1e-12)
    expected = result.radius**2 * sum(SPECTRUM) / 2
    assert result.stderr is not None
    assert abs(result.value - expected) < 2.5 * result.stderr
    spread = result.radius**2 * math.sqrt(sum(v**2 for v in SPECTRUM) / 2) / math.sqrt(300)
    assert result.stderr == pytest.approx(spread, rel=0.15)


def test_average_is_not_moved_by_a_slope() -> None:
    slope, theta = 100 * normal(8, seed=1), MINIMUM
    flat = average(linear(slope, theta), theta, 0.1, 8, generator(0))
    assert flat.value == pytest.approx(0, abs=1e-11)
    hessian = problems.with_spectrum(SPECTRUM)
    curved = [problems.quadratic(hessian, theta, s).objective() for s in (slope, torch.zeros(8).double())]
    values = [average(o, theta, 0.1, 8, generator(0)).value for o in curved]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_equal_seeds_are_common_random_numbers() -> None:
    objective = conv_net(torch.float32)
    theta = objective.theta()
    first, second, other = (average(objective, theta, 0.01, 3, generator(s)) for s in (1, 1, 2))
    assert first == second
    assert first.value != other.value


def test_one_direction_has_no_standard_error() -> None:
    objective = at_minimum()
    assert average(objective, objective.theta(), 0.1, 1, generator(0)).stderr is None


def test_gradient_norm() -> None:
    problem = problems.softmax_regression()
    objective = problem.objective()
    assert gradient_norm(objective, objective.theta()) == pytest.approx(float(problem.gradient.norm()), rel=1e-12)


def test_a_flat_loss_is_not_sharp() -> None:
    objective = linear(torch.zeros(4).double(), torch.ones(4).double())
    result = measure(objective)
    assert (result.worst_case.value, result.adaptive.value, result.average.value) == (0, 0, 0)
    assert result.gradient_norm == 0
    assert result.worst_case.stationary


def measure(objective: Objective, **options: Any) -> SharpnessResult:
    return sharpness(objective, objective.theta(), **{"generator": generator(0), **options})


class Counting(Objective):
    losses = gradients = 0

    def evaluate(self, *args: Any, **options: Any) -> Any:
        self.losses += 1
        return super().evaluate(*args, **options)

    def grad(self, theta: Tensor) -> Tensor:
        self.gradients += 1
        return super().grad(theta)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_one_gradient_is_shared_and_every_evaluation_is_counted(num_steps: int) -> None:
    objective = Counting(ConvNet(), [images()], cross_entropy)
    objective.baseline  # noqa: B018
    objective.losses = 0
    result = measure(objective, num_steps=num_steps, num_samples=3)
    assert objective.gradients == result.num_gradients <= num_steps
    assert objective.losses == result.num_losses == 2 + num_steps + 2 * 3


def test_the_members_are_those_measured_alone() -> None:
    objective = conv_net()
    theta = objective.theta()
    result = measure(objective, rho=0.1, adaptive_rho=0.2, num_steps=2, sigma=0.02, num_samples=4)
    assert result.worst_case == worst_case(objective, theta, 0.1, 2)
    assert result.adaptive == adaptive(objective, theta, 0.2)
    assert result.average == average(objective, theta, 0.02, 4, generator(0))
    assert result.gradient_norm == gradient_norm(objective, theta)
    centre = centre_at(objective, theta)
    assert (result.loss, result.confidence) == (centre.loss, centre.confidence)
    assert result.seconds > 0


@pytest.mark.parametrize("sizes", [[64, 6], [35, 35], [70]])
def test_numbers_do_not_depend_on_the_loaders_batch_size(sizes: list[int]) -> None:
    reference = measure(conv_net())
    result = measure(Objective(ConvNet(), split(images(), sizes), cross_entropy, chunk_size=32))
    for name in ("worst_case", "adaptive", "average"):
        assert getattr(result, name).value == pytest.approx(getattr(reference, name).value, rel=1e-9)


def test_the_ascent_leaves_theta_and_the_global_generator_alone() -> None:
    objective = conv_net()
    theta = objective.theta()
    kept, state = theta.clone(), torch.get_rng_state()
    sharpness(objective, theta, num_steps=2, generator=generator(0))
    assert torch.equal(theta, kept)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"adaptive_rho": -1.0}, {"num_steps": 0}, {"sigma": 0.0}])
def test_what_is_not_positive_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be positive, got"):
        measure(conv_net(), **options)
