import math

import pytest
import torch

from lmc_lightning.landscape.sharpness.measured import Measured, centre_at, gradient_norm, mean_of
from tests import problems
from tests.landscape.surfaces import conv_net, rescaled
from tests.problems import generator


def test_the_centre_is_loss_error_and_gradient_of_the_whole_probe_set() -> None:
    objective = conv_net()
    centre = centre_at(objective, objective.theta())
    baseline = objective.baseline
    assert (centre.loss, centre.error) == (baseline.loss, baseline.error)
    assert torch.equal(centre.gradient, objective.grad(objective.theta()))


def test_gradient_norm() -> None:
    problem = problems.softmax_regression()
    objective = problem.objective()
    theta = objective.theta()
    alone, shared = gradient_norm(objective, theta), gradient_norm(objective, theta, centre=centre_at(objective, theta))
    assert alone.value == shared.value == pytest.approx(float(problem.gradient.norm()), rel=1e-12)
    assert (alone.num_gradients, shared.num_gradients) == (1, 0)
    assert gradient_norm(objective, theta * math.nan).flags == ("nonfinite",)


def test_rescaling_around_a_relu_moves_the_gradient_norm() -> None:
    values = [gradient_norm(o, o.theta()).value for o in (rescaled(1.0), rescaled(3.0))]
    assert values[1] > 1.2 * values[0]


def test_the_mean_of_samples_has_their_standard_error() -> None:
    found = mean_of(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64), radius=0.5)
    assert (found.value, found.radius, found.num_samples) == (3.0, 0.5, 3)
    assert found.stderr == pytest.approx(math.sqrt(7 / 3), rel=1e-12)
    assert mean_of(torch.ones(1)).stderr is None
    assert mean_of(torch.tensor([1.0, math.inf])).flags == ("nonfinite",)


def test_intervals_are_those_of_student_from_eight_samples_on() -> None:
    assert Measured(1.0).interval is None
    assert mean_of(torch.arange(7.0)).interval is None
    many = mean_of(torch.arange(8.0))
    assert many.stderr is not None
    half = 2.364624 * many.stderr  # t of 7 degrees of freedom at 97.5 %
    assert many.interval == (pytest.approx(3.5 - half, rel=1e-6), pytest.approx(3.5 + half, rel=1e-6))


def test_intervals_of_mean_rises_cover_the_truth_as_often_as_they_say() -> None:
    """Rises ½Σλz² under Gaussian noise, of a spectrum that decays as 1/k; 200 seeds."""
    eigenvalues = 1 / torch.arange(1, 51, dtype=torch.float64)
    expected, covered = float(eigenvalues.sum()) / 2, 0
    for seed in range(200):
        draws = torch.randn(8, 50, generator=generator(seed), dtype=torch.float64)
        interval = mean_of(draws.square() @ eigenvalues / 2).interval
        assert interval is not None
        covered += interval[0] < expected < interval[1]
    assert 180 <= covered <= 198


def test_the_evidence_names_what_a_record_needs() -> None:
    found = Measured(
        1.0, 0.1, 2, 3, stderr=0.5, num_samples=4, flags=("stationary",), details={"radius_kind": "filter"}
    )
    assert found.evidence() == {
        "radius": 0.1,
        "flags": ["stationary"],
        "own_gradients": 2,
        "own_losses": 3,
        "num_samples": 4,
        "interval": None,
        "radius_kind": "filter",
    }
