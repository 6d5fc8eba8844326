"""Batch sharpness, noise scale and predicted updates against closed forms."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature.dynamics import batch_statistics, update_prediction
from tests import oracles
from tests.problems import (
    ConvNet,
    Vector,
    cross_entropy,
    images,
    linear_regression,
    mean_squared_error,
    normal,
    softmax_regression,
    split,
    weighted_quadratics,
    with_spectrum,
)


def quadratics(sizes: list[int]) -> Any:
    hessians = torch.stack([with_spectrum([4.0, 1.0, -0.5], seed=s) for s in range(len(sizes))])
    return hessians, weighted_quadratics(hessians, sizes, normal(3, seed=9))


def test_batch_sharpness_is_the_mean_rayleigh_quotient_of_each_batch_along_its_own_gradient() -> None:
    hessians, problem = quadratics([8, 8, 8])
    theta = problem.module.theta.detach()
    gradients = hessians @ theta
    quotients = torch.einsum("bi,bij,bj->b", gradients, hessians, gradients) / gradients.square().sum(1)
    found = batch_statistics(problem.objective(), theta)
    assert found.batch_sharpness == pytest.approx(float(quotients.mean()), rel=1e-12)
    assert found.batch_sharpness_stderr == pytest.approx(float(quotients.std()) / 3**0.5, rel=1e-12)
    assert found.num_batches == 3


def test_of_the_whole_set_as_one_batch_there_is_no_spread() -> None:
    problem = linear_regression(sizes=(70,))
    found = batch_statistics(problem.objective(keep_batches=True), problem.objective().theta())
    quotient = problem.gradient @ problem.hessian @ problem.gradient / problem.gradient.square().sum()
    assert found.batch_sharpness == pytest.approx(float(quotient), rel=1e-12)
    assert (found.batch_sharpness_stderr, found.gradient_noise_scale) == (None, None)
    assert (found.num_batches, found.batch_size) == (1, 70)


def test_a_batch_without_gradient_has_no_direction_and_counts_for_nothing() -> None:
    x, y = normal(8, 2, seed=1), normal(8, 1, seed=2)
    y[:4] = 0.0
    module = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    module.weight.data.zero_()
    found = batch_statistics(
        Objective(module, split((x, y), [4, 4]), mean_squared_error, keep_batches=True),
        torch.zeros(2, dtype=torch.float64),
    )
    hessian, gradient = 2 / 4 * x[4:].T @ x[4:], -2 / 4 * x[4:].T @ y[4:]
    quotient = gradient.T @ hessian @ gradient / gradient.square().sum()
    assert found.batch_sharpness == pytest.approx(float(quotient), rel=1e-12)


class Linear(Vector):
    """Batches of slopes: the gradient of an example is the example."""


def of_slopes(slopes: Tensor, batch_size: int) -> Any:
    module = Linear(torch.zeros(slopes.shape[1], dtype=slopes.dtype))
    batches = list(slopes.split(batch_size))
    objective = Objective(module, batches, lambda m, batch: (batch @ m.theta).mean(), keep_batches=True)
    return batch_statistics(objective, objective.theta())


def test_noise_and_gradient_are_unbiased_over_all_samples_of_a_population() -> None:
    population = torch.tensor([[1.0, 0.0], [0.5, 2.0], [-1.0, 1.0]], dtype=torch.float64)
    samples = [population[list(chosen)] for chosen in product(range(3), repeat=4)]
    found = [of_slopes(sample, 2) for sample in samples]
    mean = population.mean(0)
    covariance = float((population - mean).square().sum(1).mean())
    assert sum(f.noise_trace for f in found) / 81 == pytest.approx(covariance, rel=1e-12)
    assert sum(f.gradient_sq for f in found) / 81 == pytest.approx(float(mean @ mean), rel=1e-12)


def test_the_noise_scale_is_their_ratio_and_its_error_the_jackknife() -> None:
    slopes = normal(24, 5, seed=3) + 2.0
    found = of_slopes(slopes, 4)
    assert found.gradient_noise_scale == found.noise_trace / found.gradient_sq
    assert found.batch_size == 4
    without = torch.tensor(
        [of_slopes(torch.cat([slopes[: 4 * j], slopes[4 * j + 4 :]]), 4).gradient_noise_scale for j in range(6)],
        dtype=torch.float64,
    )
    expected = float((5 / 6 * (without - without.mean()).square().sum()).sqrt())
    assert found.gradient_noise_scale_stderr == pytest.approx(expected, rel=1e-9)


def test_a_mean_gradient_that_cannot_be_told_from_noise_has_no_noise_scale() -> None:
    slopes = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    found = of_slopes(slopes, 1)
    assert found.noise_trace == pytest.approx(4 / 3)
    assert found.gradient_sq == pytest.approx(-1 / 3)
    assert (found.gradient_noise_scale, found.gradient_noise_scale_stderr) == (None, None)
    assert found.batch_sharpness == 0.0  # of a linear loss


@pytest.mark.parametrize("second_order", ["autograd", "finite_differences"])
def test_of_a_network_the_derivatives_of_a_chunk_are_those_of_its_dense_hessian(second_order: Any) -> None:
    module, batches = ConvNet(), split(images(), [40, 30])
    objective = Objective(module, batches, cross_entropy, keep_batches=True, second_order=second_order)
    theta, vector = objective.theta(), normal(objective.num_params, seed=5)
    loss = oracles.mean_loss(module, batches[1:], cross_entropy, [30.0])
    exact_gradient, exact_hessian = oracles.gradient(loss, theta), oracles.dense_hessian(loss, theta)
    product = objective.hvp(theta)
    gradient, along_gradient = product.chunk_derivatives(1)
    _, along_vector = product.chunk_derivatives(1, vector)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(along_gradient, exact_hessian @ exact_gradient, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(along_vector, exact_hessian @ vector, rtol=1e-6, atol=1e-7)


# -- updates -----------------------------------------------------------------------------------------------------------


def test_on_a_quadratic_the_prediction_is_what_happens() -> None:
    hessians, problem = quadratics([8, 8, 4])
    before = problem.module.theta.detach()
    after = before - 0.3 * normal(3, seed=4)
    found = update_prediction(problem.objective(batch_weight=lambda batch: batch["weight"]), before, after)
    assert found.predicted == pytest.approx(found.realised, rel=1e-10)
    assert found.predicted_stderr == pytest.approx(found.realised_stderr, rel=1e-9)
    losses = [0.5 * torch.einsum("i,bij,j->b", t, hessians, t) for t in (before, after)]
    changes, shares = losses[1] - losses[0], torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    assert found.realised == pytest.approx(float(shares @ changes), rel=1e-10)
    deviations = shares * (changes - shares @ changes)
    assert found.realised_stderr == pytest.approx(float((deviations.square().sum() * 3 / 2).sqrt()), rel=1e-9)
    assert found.slope == pytest.approx(-float(problem.gradient @ (before - after)), rel=1e-10)
    assert found.slope + found.curvature == pytest.approx(found.predicted, rel=1e-12)
    assert found.update_norm == pytest.approx(float((before - after).norm()), rel=1e-12)


def test_what_the_prediction_misses_is_of_third_order() -> None:
    objective = softmax_regression(sizes=(70,)).objective(keep_batches=True)
    theta, direction = objective.theta(), normal(objective.num_params, seed=6)
    found = [update_prediction(objective, theta, theta - step * direction) for step in (4e-3, 2e-3)]
    misses = [f.realised - f.predicted for f in found]
    assert misses[0] / misses[1] == pytest.approx(8, rel=0.1)
    assert found[0].predicted_stderr is None
