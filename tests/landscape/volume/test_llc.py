"""The local learning coefficient against regular and singular closed forms, and the diagnostics of its chains."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lmc_lightning.landscape.volume.llc import (
    Langevin,
    LearningCoefficient,
    default_n_beta,
    langevin_trace,
    local_learning_coefficient,
)
from tests.problems import generator, linear_regression, matrix_factorisation, normal, quadratic, softmax_regression


def sampled(potential: Any, start: Tensor, n_beta: float, **options: Any) -> LearningCoefficient:
    """Of a loss that is a sum over many independent copies: coefficients add, and one chain samples all copies."""
    settings = Langevin(**{"gamma": 0.0, "num_chains": 4, **options})

    def excess(w: Tensor) -> tuple[float, Tensor]:
        leaf = w.clone().requires_grad_()
        with torch.enable_grad():
            value = potential(leaf)
        return float(value.detach()), torch.autograd.grad(value, leaf)[0]

    chains = [langevin_trace(excess, start, n_beta, settings, generator(seed)) for seed in range(settings.num_chains)]
    return LearningCoefficient(torch.stack(chains), settings, n_beta)


def agrees(found: LearningCoefficient, exact: float, *, precision: float) -> None:
    """Within four standard errors and a hundredth, for the step size where that is not part of the answer."""
    assert found.stderr < precision * exact
    assert abs(found.value - exact) < 4 * found.stderr + 0.01 * exact
    assert "diverged" not in found.flags


# -- closed forms ------------------------------------------------------------------------------------------------------


def gaussian_answer(eigenvalues: Tensor, n_beta: float, gamma: float, step: float) -> float:
    """Of ½Σλ_i x_i²: an autoregression of variance 1/(k(1 − εk/4)), k = nβλ + γ, in each direction."""
    k = n_beta * eigenvalues + gamma
    return float((n_beta * eigenvalues / (2 * k * (1 - step * k / 4))).sum())


@pytest.mark.parametrize("gamma", [0.1, 30.0])
def test_a_quadratic_has_the_exact_gaussian_answer(gamma: float) -> None:
    spectrum = torch.linspace(0.5, 4, 40, dtype=torch.float64)
    options = {"gamma": gamma, "step_size": 4e-3, "num_burn_in": 100, "num_draws": 600}
    found = sampled(lambda w: 0.5 * (spectrum * w.square()).sum(), torch.zeros(40).double(), 100.0, **options)
    agrees(found, gaussian_answer(spectrum, 100.0, gamma, 4e-3), precision=0.02)


def test_without_localisation_and_with_small_steps_a_quadratic_has_half_its_dimension() -> None:
    spectrum = torch.linspace(0.5, 4, 40, dtype=torch.float64)
    assert gaussian_answer(spectrum, 100.0, 0.0, 1e-9) == pytest.approx(20, rel=1e-6)
    assert gaussian_answer(spectrum, 100.0, 100.0, 1e-9) < 16  # what a strong localisation costs


def test_a_quartic_has_a_quarter_for_each_dimension() -> None:
    """λ = ¼ for any nβ without localisation, as w ∂L/∂w = 4L."""
    options = {"step_size": 1e-3, "num_burn_in": 200, "num_draws": 1500}
    found = sampled(lambda w: w.pow(4).sum(), torch.zeros(200).double(), 100.0, **options)
    agrees(found, 0.25 * 200, precision=0.02)


def quadrature_of_the_cross(n_beta: float, gamma: float) -> float:
    """nβ E w₁²w₂² under exp(−nβ w₁²w₂² − ½γ‖w‖²): over w₂ it is Gaussian, over w₁ by a sum."""
    w = torch.linspace(0, 30 / math.sqrt(gamma), 400_001, dtype=torch.float64)
    precision = 2 * n_beta * w.square() + gamma
    density = precision.rsqrt() * torch.exp(-0.5 * gamma * w.square())
    return float((density * n_beta * w.square() / precision).sum() / density.sum())


def test_the_cross_is_found_as_localised_and_comes_slowly_to_a_half() -> None:
    def cross(w: Tensor) -> Tensor:
        return w.view(-1, 2).square().prod(1).sum()

    options = {"gamma": 10.0, "step_size": 1e-3, "num_burn_in": 600, "num_draws": 1000}
    found = sampled(cross, torch.zeros(1600).double(), 100.0, **options)
    agrees(found, 800 * quadrature_of_the_cross(100.0, 10.0), precision=0.02)
    slow = [quadrature_of_the_cross(n_beta, 1.0) for n_beta in (1e2, 1e4, 1e6)]
    assert slow == sorted(slow)
    assert slow[-1] < 0.5 < 1.25 * slow[-1]


def test_a_linear_net_of_reduced_rank_has_its_known_coefficient() -> None:
    """2×1 times 1×2 at a product of rank 1: λ = 3/2 and not 4/2, for one direction only rescales (Aoyagi, Watanabe)."""
    pairs = 40
    start = torch.cat([torch.tensor([1.0, 0.5, 0.8, -0.6]).double()] * pairs)

    def products(w: Tensor) -> Tensor:
        a, b = w.view(pairs, 2, 2).unbind(1)
        return a[:, :, None] * b[:, None, :]

    target = products(start)
    curvature = torch.autograd.functional.hessian(
        lambda w: (products(w.repeat(pairs)) - target)[0].square().sum(), start[:4]
    )
    eigenvalues = torch.linalg.eigvalsh(curvature)
    assert eigenvalues[0].abs() < 1e-9 < eigenvalues[1]
    exact = gaussian_answer(eigenvalues, 500.0, 5.0, 4e-5)
    assert exact == pytest.approx(1.5, rel=0.03)
    options = {"gamma": 5.0, "step_size": 4e-5, "num_burn_in": 300, "num_draws": 1000}
    found = sampled(lambda w: (products(w) - target).square().sum(), start, 500.0, **options)
    agrees(found, exact * pairs, precision=0.03)


# -- on objectives -----------------------------------------------------------------------------------------------------


def test_an_objective_of_one_chunk_has_the_gaussian_answer() -> None:
    hessian = torch.diag(torch.tensor([3.0, 1.0, 0.5, 2.0], dtype=torch.float64))
    objective = quadratic(hessian).objective()
    settings = Langevin(gamma=5.0, n_beta=80.0, step_size=5e-3, num_burn_in=30, num_draws=150, num_chains=3)
    found = local_learning_coefficient(objective, objective.theta(), settings)
    assert abs(found.value - gaussian_answer(hessian.diagonal(), 80.0, 5.0, 5e-3)) < 4 * found.stderr < 1.0
    assert found.num_gradients == 3 * 180
    assert found.traces.shape == (3, 180)
    assert found.traces[:, 0].tolist() == [0, 0, 0]


def test_chunks_are_drawn_by_weight_and_estimates_are_of_the_whole() -> None:
    """With steps of no length the excess of every chunk is 0, whatever its loss: noise between chunks cancels."""
    objective = softmax_regression(sizes=(50, 20)).objective(keep_batches=True)
    found = local_learning_coefficient(
        objective, objective.theta(), Langevin(step_size=1e-30, num_burn_in=10, num_draws=20)
    )
    assert float(found.traces.abs().max()) < 1e-12
    assert found.n_beta == pytest.approx(70 / math.log(70))


def test_chains_depend_on_the_seed_alone_and_tell_their_progress() -> None:
    problem = linear_regression()
    told: list[tuple[int, int, str]] = []
    settings = Langevin(num_chains=2, num_burn_in=20, num_draws=80)

    def run(seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        objective = problem.objective()
        progress = lambda *a: told.append(a)  # noqa: E731
        return local_learning_coefficient(objective, objective.theta(), settings, progress=progress).traces

    state = torch.get_rng_state()
    first = run()
    assert torch.equal(first, run(1))
    torch.set_rng_state(state)
    assert told[:2] == [(100, 200, "steps"), (200, 200, "steps")]


def test_where_there_is_no_minimum_it_says_so() -> None:
    problem = matrix_factorisation()
    objective = problem.objective()
    settings = Langevin(n_beta=50.0, step_size=1e-3, gamma=1.0, num_chains=2, num_burn_in=30, num_draws=60)
    found = local_learning_coefficient(objective, objective.theta(), settings)
    assert found.value < 0
    assert "negative" in found.flags


def test_a_chain_that_diverges_is_flagged() -> None:
    objective = quadratic(torch.diag(torch.tensor([1e3, 1.0]).double())).objective()
    settings = Langevin(n_beta=1e3, step_size=1.0, num_chains=2)
    found = local_learning_coefficient(objective, objective.theta(), settings)
    assert found.flags == ("diverged",)
    assert math.isnan(found.value)
    assert not found.converged


# -- diagnostics -------------------------------------------------------------------------------------------------------


def coefficient(draws: Tensor) -> LearningCoefficient:
    return LearningCoefficient(draws, Langevin(num_burn_in=0), 1.0)


def test_independent_draws_have_their_textbook_diagnostics() -> None:
    found = coefficient(normal(4, 2000, seed=1) + 5)
    assert found.r_hat == pytest.approx(1, abs=0.01)
    assert found.effective_sample_size == pytest.approx(8000, rel=0.15)
    assert found.value == pytest.approx(5, abs=0.05)
    assert found.stderr == pytest.approx(1 / math.sqrt(8000), rel=1.0)
    assert abs(found.drift) < 4


def test_an_autoregression_is_worth_fewer_draws() -> None:
    """Of correlation a: (1 − a)/(1 + a) of the draws."""
    noise, chain = normal(2, 20_000, seed=2), torch.zeros(2, 20_000).double()
    for step in range(1, 20_000):
        chain[:, step] = 0.9 * chain[:, step - 1] + noise[:, step]
    assert coefficient(chain).effective_sample_size == pytest.approx(40_000 * 0.1 / 1.9, rel=0.2)


def test_chains_that_disagree_or_wander_are_flagged() -> None:
    noise = normal(4, 500, seed=3)
    apart = coefficient(noise + torch.tensor([[0.0], [0.0], [5.0], [5.0]]) + 10)
    assert apart.r_hat > 1.5
    assert "not_mixed" in apart.flags
    wandering = coefficient(0.1 * noise + torch.linspace(0, 5, 500) + 10)
    assert "drifting" in wandering.flags
    assert not np.isnan(wandering.drift)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="step_size must be positive"):
        Langevin(step_size=0.0)
    with pytest.raises(ValueError, match="Expected gamma and num_burn_in of 0 or more"):
        Langevin(gamma=-1.0)
    with pytest.raises(ValueError, match="Pass n_beta="):
        default_n_beta(None)
