import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.sharpness.flatness import average, average_adaptive, flatness_profile, random_max
from lmc_lightning.landscape.sharpness.measured import Measured, centre_at
from tests import problems
from tests.landscape.surfaces import MINIMUM, SPECTRUM, Counting, along_line, at_minimum, conv_net, linear, rescaled
from tests.problems import ConvNet, cross_entropy, generator, images, normal

NORM = float(MINIMUM.norm())


def within(found: Measured, expected: float, stderrs: float = 2.5) -> bool:
    assert found.stderr is not None
    assert found.stderr < 0.1 * abs(expected)
    return abs(found.value - expected) < stderrs * found.stderr


# -- under Gaussian noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("radius", "sigma", "deviation"), [("relative", 0.1, 0.1 * NORM / math.sqrt(8)), ("absolute", 0.2, 0.2)]
)
def test_average_at_a_minimum_is_half_sigma_squared_times_the_trace(
    radius: Any, sigma: float, deviation: float
) -> None:
    objective = at_minimum()
    result = average(objective, objective.theta(), sigma, 150, generator(0), radius=radius)
    assert within(result, deviation**2 * sum(SPECTRUM) / 2)
    spread = deviation**2 * math.sqrt(sum(v**2 for v in SPECTRUM) / 2) / math.sqrt(150)
    assert result.stderr == pytest.approx(spread, rel=0.15)
    assert result.details["expected_norm"] == pytest.approx(deviation * math.sqrt(8), rel=1e-9)


def test_average_adaptive_at_a_minimum_weighs_the_diagonal_by_theta_squared() -> None:
    objective = at_minimum()
    expected = 0.1**2 * float(problems.with_spectrum(SPECTRUM).diagonal() @ MINIMUM**2) / 2
    found = average_adaptive(objective, objective.theta(), 0.1, 150, generator(0))
    assert within(found, expected)
    assert found.details["expected_norm"] == pytest.approx(0.1 * NORM, rel=1e-9)


def test_noise_in_filters_has_their_norms() -> None:
    """Of 1-D parameters every entry is a filter: the noise is that of relative changes."""
    objective = at_minimum()
    values = [
        average(objective, MINIMUM, 0.1, 4, generator(0), radius="filter"),
        average_adaptive(objective, MINIMUM, 0.1, 4, generator(0)),
    ]
    assert values[0].value == pytest.approx(values[1].value, rel=1e-12)


@pytest.mark.parametrize("measure", [average, average_adaptive])
def test_an_average_is_not_moved_by_a_slope(measure: Any) -> None:
    slope, theta = 100 * normal(8, seed=1), MINIMUM
    flat = measure(linear(slope, theta), theta, 0.1, 8, generator(0))
    assert flat.value == pytest.approx(0, abs=1e-11)
    hessian = problems.with_spectrum(SPECTRUM)
    curved = [problems.quadratic(hessian, theta, s).objective() for s in (slope, torch.zeros(8).double())]
    values = [measure(o, theta, 0.1, 8, generator(0)).value for o in curved]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


@pytest.mark.parametrize("measure", [average, average_adaptive])
def test_equal_seeds_are_common_random_numbers(measure: Any) -> None:
    objective = conv_net(torch.float32)
    theta = objective.theta()
    first, second, other = (measure(objective, theta, 0.01, 3, generator(s)) for s in (1, 1, 2))
    assert first == second
    assert first.value != other.value


# -- on spheres --------------------------------------------------------------------------------------------------------


def test_the_profile_at_a_minimum_is_quadratic_in_the_radius() -> None:
    objective = at_minimum()
    found, errors = flatness_profile(objective, objective.theta(), (0.01, 0.05), 150, generator=generator(0))
    assert errors == []
    assert [m.radius for m in found] == [0.01, 0.05]
    for rise in found:
        assert rise.radius is not None
        assert within(rise, (rise.radius * NORM) ** 2 * sum(SPECTRUM) / (2 * 8))
        # One set of directions for all radii, so that the profile of a quadratic is exactly one.
        assert rise.value == pytest.approx((rise.radius / 0.01) ** 2 * found[0].value, rel=1e-9)


def test_the_profile_of_a_linear_loss_is_flat() -> None:
    found, _ = flatness_profile(linear(normal(8, seed=1), MINIMUM), MINIMUM, num_samples=2, generator=generator(0))
    assert [m.radius for m in found] == [0.01, 0.02, 0.03, 0.04, 0.05]
    assert [m.value for m in found] == pytest.approx([0.0] * 5, abs=1e-13)


def test_the_points_lie_on_the_sphere() -> None:
    objective, seen = conv_net(), []
    theta, evaluate_many = objective.theta(), objective.evaluate_many

    def watched(points: Iterable[torch.Tensor], **options: Any) -> Any:
        points = list(points)
        seen.extend(float((point - theta).norm() / theta.norm()) for point in points)
        return evaluate_many(points, **options)

    centre = centre_at(objective, theta)
    objective.evaluate_many = watched  # type: ignore[method-assign, assignment]
    random_max(objective, theta, generator=generator(0), centre=centre)
    assert seen == pytest.approx([0.02] * 20, rel=1e-6)
    seen.clear()
    flatness_profile(objective, theta, (0.1, 0.3), 2, generator=generator(0), centre=centre)
    assert seen == pytest.approx([0.1, 0.1, 0.3, 0.3] * 2, rel=1e-6)


def test_the_loss_of_accuracy_is_the_mean_over_the_same_points() -> None:
    objective = conv_net()
    theta, draws = objective.theta(), generator(3)
    _, errors = flatness_profile(objective, theta, (0.3,), 4, generator=generator(3))
    drawn = [torch.randn(len(theta), generator=draws).double() for _ in range(4)]
    steps = [0.3 * d * theta.norm() / d.norm() for d in drawn]
    lost = [
        (objective.evaluate(theta + s).error + objective.evaluate(theta - s).error) / 2  # type: ignore[operator]
        - objective.baseline.error
        for s in steps
    ]
    assert errors[0].value == pytest.approx(sum(lost) / 4, rel=1e-9)
    assert errors[0].value != 0
    assert errors[0].stderr == pytest.approx(float(torch.tensor(lost).std()) / 2, rel=1e-5)


def test_random_max_is_the_largest_of_its_draws() -> None:
    objective, theta = conv_net(), conv_net().theta()
    draws = generator(5)
    steps = [0.1 * theta.norm() * d / d.norm() for d in (torch.randn(len(theta), generator=draws) for _ in range(6))]
    rises = [float(objective.loss(theta + s)) - objective.baseline.loss for s in steps]
    found = random_max(objective, theta, 0.1, 6, generator=generator(5))
    assert found.value == pytest.approx(max(rises), rel=1e-6)
    assert found.num_losses == 6


def test_random_max_is_never_negative() -> None:
    objective = along_line(lambda theta: -(theta**2), 1.0)
    top = Objective(problems.Vector(MINIMUM), [torch.zeros(1)], lambda m, b: -(m.theta - MINIMUM).square().sum())
    assert random_max(top, MINIMUM, generator=generator(0)).value == 0
    assert random_max(objective, objective.theta(), 0.1, 20, generator=generator(0)).value > 0


# -- invariances -------------------------------------------------------------------------------------------------------


def of(measure: Any, *args: Any, **options: Any) -> Any:
    return lambda objective, theta: measure(objective, theta, *args, **options, generator=generator(0)).value


def profile(objective: Objective, theta: torch.Tensor, radius: Any) -> float:
    return flatness_profile(objective, theta, (0.3,), 4, generator=generator(0), radius=radius)[0][0].value


def moved(measure: Any) -> float:
    """By what factor a measure grows when a layer before a ReLU is tripled and the one behind it divided by three."""
    values = [measure(objective, objective.theta()) for objective in (rescaled(1.0), rescaled(3.0))]
    return values[1] / values[0]


@pytest.mark.parametrize(
    "measure",
    [
        of(average_adaptive, 0.1, 4),
        of(average, 0.1, 4, radius="filter"),
        of(random_max, 0.2, 4, radius="filter"),
        lambda o, t: profile(o, t, "filter"),
    ],
    ids=["average_adaptive", "average-filter", "random_max-filter", "flatness_profile-filter"],
)
def test_rescaling_around_a_relu_leaves_relative_changes_alone(measure: Any) -> None:
    assert moved(measure) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(
    "measure",
    [
        of(average, 0.1, 4),
        of(average, 0.1, 4, radius="absolute"),
        of(random_max, 0.2, 4),
        lambda o, t: profile(o, t, "relative"),
    ],
    ids=["average", "average-absolute", "random_max", "flatness_profile"],
)
def test_rescaling_around_a_relu_moves_the_others(measure: Any) -> None:
    assert abs(math.log(moved(measure))) > math.log(1.2)


@pytest.mark.parametrize(
    "measure", [of(average, 0.1, 4), of(random_max, 0.2, 4), lambda o, t: profile(o, t, "relative")]
)
def test_relative_radii_do_not_see_a_common_factor_of_a_network_that_does_not(measure: Any) -> None:
    def direction_only(module: Any, batch: Any) -> torch.Tensor:
        unit = module.theta / module.theta.norm()
        return (unit @ batch[0].T).square().mean()

    batch = [(normal(20, 8, seed=1),)]
    values = []
    for factor in (1.0, 5.0):
        objective = Objective(problems.Vector(factor * MINIMUM), batch, direction_only)
        values.append(measure(objective, objective.theta()))
    assert values[1] == pytest.approx(values[0], rel=1e-9)


# -- evidence, trouble, misuse -----------------------------------------------------------------------------------------


def test_every_loss_is_counted() -> None:
    objective = Counting(ConvNet(), [images()], cross_entropy)
    theta = objective.theta()
    centre = centre_at(objective, theta)
    objective.losses = objective.gradients = 0
    common: dict[str, Any] = {"generator": generator(0), "centre": centre}
    found = [
        average(objective, theta, 0.1, 3, **common),
        average_adaptive(objective, theta, 0.1, 3, **common),
        random_max(objective, theta, 0.1, 5, **common),
        *flatness_profile(objective, theta, (0.1, 0.2), 3, **common)[0],
    ]
    assert objective.losses == sum(m.num_losses for m in found) == 6 + 6 + 5 + 12
    assert objective.gradients == sum(m.num_gradients for m in found) == 0


@pytest.mark.parametrize("beyond", [math.inf, math.nan])
def test_losses_that_are_not_finite_are_flagged(beyond: float) -> None:
    objective = along_line(lambda theta: torch.where(theta < 1, theta, theta.new_tensor(beyond)), 0.5)
    theta, common = objective.theta(), {"generator": generator(0), "radius": "absolute"}
    near = [random_max(objective, theta, 0.1, 8, **common), *flatness_profile(objective, theta, (0.1,), 2, **common)[0]]
    far = [random_max(objective, theta, 2.0, 8, **common), *flatness_profile(objective, theta, (2.0,), 2, **common)[0]]
    assert [m.flags for m in near] == [(), ()]
    assert [m.flags for m in far] == [("nonfinite",)] * 2
    assert [m.value for m in far] == pytest.approx([beyond] * 2, nan_ok=True)


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        (average, {"sigma": 0.0, "num_samples": 2}),
        (average_adaptive, {"sigma": 0.1, "num_samples": 0}),
        (random_max, {"r": -0.1}),
        (random_max, {"num_draws": 0}),
        (flatness_profile, {"radii": (0.1, 0.0)}),
        (flatness_profile, {"num_samples": 0}),
    ],
)
def test_what_is_not_positive_is_refused(measure: Any, options: dict[str, Any]) -> None:
    objective = at_minimum()
    with pytest.raises(ValueError, match=r"must be positive, got"):
        measure(objective, objective.theta(), **options, generator=generator(0))
