import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.curvature import SpectrumResult, Stability, spectrum, stability, stderr_data
from tests import oracles, problems
from tests.problems import ConvNet, cross_entropy, generator, images, mean_squared_error, normal, split


def measure(objective: Objective, **options: Any) -> SpectrumResult:
    return spectrum(objective, objective.theta(), **{"generator": generator(0), **options})


def conv_net(dtype: torch.dtype = torch.float64, chunk_size: int = 35) -> Objective:
    return Objective(ConvNet(dtype), split(images(dtype=dtype), [64, 6]), cross_entropy, chunk_size=chunk_size)


@pytest.fixture(scope="module")
def hessian() -> Tensor:
    module, batches = ConvNet(), split(images(), [64, 6])
    loss = oracles.mean_loss(module, batches, cross_entropy, [64.0, 6.0])
    return oracles.dense_hessian(loss, oracles.flat_parameters(module))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_conv_net_against_its_dense_hessian_in_float64(hessian: Tensor, dtype: torch.dtype) -> None:
    exact = torch.linalg.eigvalsh(hessian).flip(0)
    result = measure(conv_net(dtype), num_eigenvalues=5, num_negative=1, num_probes=32, num_steps=6)
    assert result.converged
    assert result.lambda_max == pytest.approx(float(exact[0]), rel=1e-5)
    assert result.lambda_min == pytest.approx(float(exact[-1]), rel=1e-3)
    torch.testing.assert_close(result.eigenvalues[:5], exact[:5], rtol=1e-4, atol=0)
    assert bool((result.residuals[:5] <= 1e-3 * result.eigenvalues[:5]).all())
    assert result.trace is not None
    assert result.trace_stderr is not None
    assert result.trace_stderr < 0.04 * result.trace
    assert abs(result.trace - float(hessian.trace())) < 3 * result.trace_stderr
    assert result.frobenius_sq is not None
    assert result.frobenius_sq == pytest.approx(float(hessian.square().sum()), rel=0.02)


def test_all_pairs_deflated_leave_no_sampling_error() -> None:
    problem = problems.softmax_regression(num_features=3, num_classes=3)
    result = measure(problem.objective(), num_eigenvalues=9, num_negative=0, max_products=200, num_probes=2)
    assert result.trace == pytest.approx(float(problem.hessian.trace()), rel=1e-10)
    assert result.frobenius_sq == pytest.approx(float(problem.hessian.square().sum()), rel=1e-6)
    assert result.trace_stderr is not None
    assert result.trace_stderr < 1e-10 * float(problem.hessian.trace())


def test_eigenvectors_are_those_of_the_dense_hessian(hessian: Tensor) -> None:
    result = measure(conv_net(), num_eigenvalues=3, tolerance=1e-6, num_probes=0)
    assert result.eigenpairs is not None
    for value, vector, residual in zip(
        result.eigenvalues, result.eigenpairs.eigenvectors, result.residuals, strict=True
    ):
        defect = float(torch.linalg.vector_norm(hessian @ vector - value * vector))
        assert defect == pytest.approx(float(residual), abs=1e-10)


@pytest.fixture(scope="module")
def chunk_hessians() -> Tensor:
    """Of the chunks of 16 of the conv net, ``(5, P, P)``."""
    theta, chunks = oracles.flat_parameters(ConvNet()), split(images(), [16, 16, 16, 16, 6])
    losses = [oracles.mean_loss(ConvNet(), [chunk], cross_entropy, [1.0]) for chunk in chunks]
    return torch.stack([oracles.dense_hessian(loss, theta) for loss in losses])


def test_errors_over_data_are_the_spread_of_the_chunks_own_values(chunk_hessians: Tensor) -> None:
    objective = conv_net(chunk_size=16)
    weights = objective.baseline.weights
    result = measure(
        objective, num_eigenvalues=objective.num_params, num_negative=0, max_products=300, num_probes=1, num_steps=2
    )
    assert result.eigenpairs is not None
    assert result.converged
    u = result.eigenpairs.eigenvectors[0]

    def expected(values: Tensor) -> float:
        mean = float(weights @ values)
        squares = [float(w) ** 2 * (float(v) - mean) ** 2 for w, v in zip(weights, values, strict=True)]
        return math.sqrt(sum(squares) * 5 / 4)

    forms = torch.einsum("i,bij,j->b", u, chunk_hessians, u)
    assert result.lambda_max_stderr_data == pytest.approx(expected(forms), rel=1e-8)
    traces = chunk_hessians.diagonal(dim1=1, dim2=2).sum(1)
    assert result.trace_stderr_data == pytest.approx(expected(traces), rel=1e-6)


def test_without_eigenpairs_the_error_of_the_trace_over_data_is_that_of_its_probes(chunk_hessians: Tensor) -> None:
    objective = conv_net(chunk_size=16)
    result = measure(objective, num_eigenvalues=0, num_negative=0, num_probes=3, num_steps=4)
    draws = generator(0)
    torch.randn(objective.num_params, generator=draws)  # the start of the eigenvalue run
    signs = [torch.randint(0, 2, (objective.num_params,), generator=draws, dtype=torch.int8) for _ in range(3)]
    probes = torch.stack(signs).double() * 2 - 1
    values = torch.einsum("ri,bij,rj->b", probes, chunk_hessians, probes) / 3
    assert result.trace_stderr_data == pytest.approx(stderr_data(values, objective.baseline.weights), rel=1e-9)
    assert result.trace == pytest.approx(float(objective.baseline.weights @ values), rel=1e-9)
    assert (result.lambda_max, result.lambda_min, result.effective_rank) == (None, None, None)
    assert result.converged


@pytest.mark.slow
def test_errors_over_data_are_those_of_new_data() -> None:
    values, errors = [], []
    for seed in range(200):
        x, y = normal(512, 4, seed=seed), torch.zeros(512, 1, dtype=torch.float64)
        x[:, 0] *= 2
        objective = Objective(nn.Linear(4, 1, bias=False).double(), [(x, y)], mean_squared_error, chunk_size=32)
        result = measure(objective, num_eigenvalues=4, num_negative=0, num_probes=1)
        values.append([result.lambda_max, result.trace])
        errors.append([result.lambda_max_stderr_data, result.trace_stderr_data])
    spread = torch.tensor(values).std(0)
    typical = torch.tensor(errors).square().mean(0).sqrt()
    torch.testing.assert_close(typical, spread, rtol=0.1, atol=0)


def test_one_chunk_has_no_error_over_data_and_costs_no_product_for_it() -> None:
    objective = conv_net(chunk_size=70)
    result = measure(objective, num_eigenvalues=1, num_probes=2, num_steps=3)
    assert (result.lambda_max_stderr_data, result.trace_stderr_data) == (None, None)
    assert result.eigenpairs is not None
    assert result.num_matvecs == result.eigenpairs.num_matvecs + 2 * 3


def test_every_product_is_counted() -> None:
    result = measure(conv_net(), num_eigenvalues=3, num_negative=1, num_probes=2, num_steps=5)
    assert result.eigenpairs is not None
    assert result.num_matvecs == result.eigenpairs.num_matvecs + 2 * 5 + 4
    assert result.num_gradients == 1
    alone = measure(conv_net(), num_eigenvalues=3, num_negative=1, num_probes=0)
    assert alone.eigenpairs is not None
    assert alone.num_matvecs == alone.eigenpairs.num_matvecs + 1
    uncached = Objective(ConvNet(), [images()], cross_entropy, chunk_size=16, memory_budget=0)
    recomputed = measure(uncached, num_eigenvalues=1, num_probes=0)
    assert recomputed.num_gradients == recomputed.num_matvecs + 1


def test_the_state_is_recorded_with_the_curvature() -> None:
    objective = conv_net()
    theta = objective.theta() + 0.1
    result = spectrum(objective, theta, num_probes=0, generator=generator(0))
    assert result.loss == objective.loss(theta).item()
    assert result.gradient_norm == pytest.approx(float(objective.grad(theta).norm()), rel=1e-14)
    assert result.confidence == objective.evaluate(theta).confidence
    assert result.seconds > 0


SPECTRUM = [9.0, 5.0, 2.0, 1.0, 1.0, 0.5] + [0.0] * 12 + [-0.5, -3.0]


def test_prescribed_spectrum() -> None:
    problem = problems.quadratic(problems.with_spectrum(SPECTRUM))
    result = measure(problem.objective(), num_eigenvalues=3, num_negative=2, tolerance=1e-8, num_probes=64)
    assert result.eigenvalues.tolist() == pytest.approx([9, 5, 2, -0.5, -3], rel=1e-7)
    assert (result.lambda_max, result.lambda_min) == (pytest.approx(9), pytest.approx(-3))
    assert result.spectral_radius == result.lambda_max
    assert result.trace == pytest.approx(15, abs=0.1)
    assert result.trace_per_param == pytest.approx(0.75, abs=0.005)
    assert result.frobenius_sq == pytest.approx(121.5, abs=0.1)
    assert result.effective_rank == pytest.approx(18.5 / 9, rel=0.01)
    assert result.stable_rank == pytest.approx(121.5 / 81, rel=0.001)
    shares = torch.tensor([9, 5, 2, 1, 1, 0.5]) / 18.5
    assert result.effective_rank_entropy == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=0.01)
    assert result.negative_mass == pytest.approx(0.1, abs=1e-12)
    assert result.null_mass == pytest.approx(0.6, abs=0.01)


def test_a_dominant_negative_eigenvalue_is_not_lambda_max() -> None:
    problem = problems.quadratic(problems.with_spectrum([1.0, 0.5, 0.2, 0.0, -7.0]))
    result = measure(problem.objective(), num_eigenvalues=1)
    assert result.lambda_max == pytest.approx(1)
    assert result.lambda_min == pytest.approx(-7)
    assert result.spectral_radius == pytest.approx(7)


def test_ranks_need_a_positive_largest_eigenvalue() -> None:
    result = measure(problems.quadratic(problems.with_spectrum([-1.0, -2.0, -3.0])).objective())
    assert result.lambda_max == pytest.approx(-1)
    assert (result.effective_rank, result.stable_rank) == (None, None)
    assert result.negative_mass == pytest.approx(1)
    assert result.effective_rank_entropy == 0


@pytest.mark.parametrize("num_params", [1, 2, 50])
def test_a_multiple_of_the_identity(num_params: int) -> None:
    """L = mean(θ²): every vector is an eigenvector, and the Krylov space is exhausted after one step."""
    hessian = torch.eye(num_params, dtype=torch.float64) * 2 / num_params
    objective = problems.quadratic(hessian, normal(num_params, seed=1)).objective()
    result = measure(objective, num_eigenvalues=1)
    assert result.lambda_max == pytest.approx(2 / num_params)
    assert result.lambda_min == pytest.approx(2 / num_params)
    assert result.num_matvecs < 8 + 8
    density = measure(objective, num_eigenvalues=0, num_negative=0)
    assert density.num_matvecs == 8
    assert density.trace == pytest.approx(2)
    assert density.frobenius_sq == pytest.approx(4 / num_params)
    assert density.effective_rank_entropy == pytest.approx(num_params)
    assert (density.negative_mass, density.null_mass) == (0, 0)


def test_a_flat_loss_has_a_spectrum_of_zeros() -> None:
    objective = problems.quadratic(torch.zeros(6, 6, dtype=torch.float64)).objective()
    result = measure(objective, num_eigenvalues=2)
    assert result.eigenvalues.abs().max() == 0
    assert (result.trace, result.frobenius_sq, result.negative_mass, result.converged) == (0, 0, 0, True)
    assert (result.effective_rank, result.stable_rank) == (None, None)
    assert measure(objective, num_eigenvalues=0, num_negative=0).null_mass == pytest.approx(1)


def test_a_projection_has_its_rank() -> None:
    problem = problems.quadratic(problems.with_spectrum([4.0] * 10 + [0.0] * 30))
    result = measure(problem.objective(), num_eigenvalues=1, num_probes=64)
    assert result.lambda_max == pytest.approx(4)
    assert result.trace_stderr is not None
    assert result.trace == pytest.approx(40, abs=3 * result.trace_stderr)
    for rank in (result.effective_rank, result.stable_rank, result.effective_rank_entropy):
        assert rank == pytest.approx(10, abs=3 / 4 * result.trace_stderr)
    assert result.null_mass == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(("theta", "curvature"), [(1.0, 8.0), (-1.0, 8.0), (0.0, -4.0)])
def test_double_well(theta: float, curvature: float) -> None:
    result = measure(problems.double_well(theta).objective())
    assert result.lambda_max == result.lambda_min == pytest.approx(curvature)
    assert result.trace == pytest.approx(curvature)


@pytest.mark.parametrize(
    "problem", [problems.linear_regression(), problems.softmax_regression(), problems.matrix_factorisation()]
)
def test_closed_forms(problem: problems.Problem) -> None:
    result = measure(problem.objective(chunk_size=16), num_eigenvalues=2, num_probes=0, tolerance=1e-6)
    assert result.eigenvalues[:2].tolist() == pytest.approx(problem.eigenvalues[:2].tolist(), rel=1e-9)
    assert result.gradient_norm == pytest.approx(float(problem.gradient.norm()), rel=1e-12)


def test_numbers_scale_with_the_loss() -> None:
    objective = conv_net(torch.float32)

    def scaled(module: nn.Module, batch: Any) -> Tensor:
        return 1e-8 * cross_entropy(module, batch)

    batches = split(images(dtype=torch.float32), [64, 6])
    small = measure(Objective(ConvNet(torch.float32), batches, scaled, chunk_size=35), num_steps=6)
    plain = measure(objective, num_steps=6)
    assert small.converged
    for name in ("lambda_max", "lambda_min", "trace", "lambda_max_stderr_data", "trace_stderr_data"):
        assert getattr(small, name) == pytest.approx(1e-8 * getattr(plain, name), rel=1e-3)
    assert small.effective_rank == pytest.approx(plain.effective_rank, rel=1e-3)


@pytest.mark.parametrize("sizes", [[64, 6], [35, 35], [70]])
def test_numbers_do_not_depend_on_the_loaders_batch_size(sizes: list[int]) -> None:
    reference = measure(conv_net(), num_probes=2, num_steps=6)
    objective = Objective(ConvNet(), split(images(), sizes), cross_entropy, chunk_size=35)
    result = measure(objective, num_probes=2, num_steps=6)
    for name in ("lambda_max", "lambda_min", "trace", "trace_stderr_data", "lambda_max_stderr_data", "frobenius_sq"):
        assert getattr(result, name) == pytest.approx(getattr(reference, name), rel=1e-9)


def test_equal_seeds_give_equal_bits_and_leave_the_global_generator_alone() -> None:
    objective = conv_net(torch.float32)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = (measure(objective, num_probes=2, num_steps=4) for _ in range(2))
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert first.trace == second.trace
    assert torch.equal(torch.get_rng_state(), state)


def test_probes_do_not_depend_on_the_number_of_eigenvalues() -> None:
    problem = problems.quadratic(problems.with_spectrum([3.0, 1.0] + [0.0] * 6))
    generators = generator(1), generator(1)
    for source, count in zip(generators, (1, 4), strict=True):
        spectrum(problem.objective(), torch.zeros(8).double(), num_eigenvalues=count, generator=source)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_a_second_visit_starts_from_the_eigenvectors_of_the_first() -> None:
    decay = [50 * 0.8**i for i in range(100)] + [0.0] * 100 + [-0.1 * 0.9**i for i in range(100)]
    before = problems.with_spectrum(decay)
    after = before + 0.02 * problems.with_spectrum(normal(300, seed=3).tolist(), seed=5)
    first = measure(problems.quadratic(before).objective(), num_probes=0)
    assert first.eigenpairs is not None
    problem = problems.quadratic(after)
    spent = {"warm": 0, "cold": 0}
    for seed in range(5):
        for kind, previous in (("warm", first.eigenpairs.eigenvectors), ("cold", None)):
            result = measure(problem.objective(), num_probes=0, generator=generator(seed), previous=previous)
            torch.testing.assert_close(result.eigenvalues[:5], problem.eigenvalues[:5], rtol=1e-5, atol=0)
            spent[kind] += result.num_matvecs
    assert spent["warm"] < spent["cold"]


def test_what_has_not_converged_is_flagged() -> None:
    result = measure(conv_net(), max_products=4, num_probes=0)
    assert not result.converged
    assert result.num_matvecs == 4 + 1
    assert result.lambda_max is not None


def test_stopping_ends_with_what_there_is() -> None:
    result = measure(conv_net(), should_stop=lambda: True)
    assert not result.converged
    assert result.quadrature is None
    assert result.num_matvecs == 2
    stops = iter([False] * 60 + [True] * 100)
    halfway = measure(
        conv_net(), num_eigenvalues=0, num_negative=0, num_probes=80, num_steps=2, should_stop=lambda: next(stops)
    )
    assert halfway.quadrature is not None
    assert not halfway.converged
    assert len(halfway.quadrature.nodes) == 60


def test_eigenvalues_alone_at_either_end() -> None:
    top = measure(conv_net(), num_negative=0, num_probes=0)
    assert top.lambda_min is None
    assert (top.trace, top.negative_mass, top.effective_rank, top.frobenius_sq) == (None, None, None, None)
    bottom = measure(conv_net(), num_eigenvalues=0, num_probes=0)
    assert bottom.lambda_max is None
    assert bottom.lambda_max_stderr_data is None
    assert bottom.lambda_min == pytest.approx(measure(conv_net(), num_probes=0).lambda_min, rel=1e-2)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="Nothing to measure: ask for num_eigenvalues"):
        measure(conv_net(), num_eigenvalues=0, num_negative=0, num_probes=0)


def test_parameters_that_are_not_finite_are_an_error() -> None:
    objective = conv_net()
    with pytest.raises(FloatingPointError, match="not finite"):
        spectrum(objective, objective.theta() * float("nan"), generator=generator(0))


SGD_VARIANTS: list[tuple[dict[str, Any], float]] = [
    ({}, 20.0),
    ({"momentum": 0.9}, 38.0),
    ({"momentum": 0.9, "nesterov": True}, 3.8 / 0.28),
    ({"momentum": 0.9, "dampening": 0.5}, 76.0),
    ({"dampening": 0.5}, 20.0),
    ({"weight_decay": 2.0}, 18.0),
    ({"momentum": 0.9, "weight_decay": 2.0}, 36.0),
    ({"momentum": 0.5, "nesterov": True, "weight_decay": 1.0}, 14.0),
    ({"momentum": 0.9, "dampening": 0.5, "weight_decay": 4.0}, 72.0),
]


def divergence_threshold(options: dict[str, Any]) -> float:
    """The curvature from which torch's own SGD diverges on ½λθ²: a grid of λ, twice refined."""
    low, high = 1.0, 100.0
    for _ in range(2):
        curvatures = torch.linspace(low, high, 301, dtype=torch.float64)
        theta = torch.ones_like(curvatures).requires_grad_()
        optimizer = SGD([theta], lr=0.1, **options)
        for _ in range(3000):
            theta.grad = curvatures * theta.detach()
            optimizer.step()
        diverging = (theta.detach().abs() > 1) | theta.detach().isnan()
        first = int(diverging.int().argmax())
        low, high = float(curvatures[first - 1]), float(curvatures[first])
    return high


@pytest.mark.parametrize(("options", "critical"), SGD_VARIANTS)
def test_stability_is_one_where_the_optimizer_starts_to_diverge(options: dict[str, Any], critical: float) -> None:
    assert divergence_threshold(options) == pytest.approx(critical, rel=2e-3)
    groups = SGD([torch.zeros(1)], lr=0.1, **options).param_groups
    assert stability(critical, groups) == Stability(pytest.approx(1))
    shifted = 2 * critical + options.get("weight_decay", 0.0)
    assert stability(shifted, groups) == Stability(pytest.approx(2))


def test_equal_groups_count_as_one() -> None:
    parameters = torch.zeros(1), torch.zeros(1)
    groups = SGD([{"params": [p]} for p in parameters], lr=torch.tensor(0.1), momentum=0.9).param_groups
    assert stability(19.0, groups).value == pytest.approx(0.5)


def test_other_rules_are_not_reported_and_say_why() -> None:
    parameters = torch.zeros(1), torch.zeros(1)
    groups = [{"params": [parameters[0]], "weight_decay": 0.1}, {"params": [parameters[1]], "lr": 0.2}]
    assert stability(1.0, SGD(groups, lr=0.1).param_groups) == Stability(
        None, "The parameter groups differ in lr, weight_decay."
    )
    assert stability(1.0, SGD([parameters[0]], lr=0.1, maximize=True).param_groups).reason == "The optimizer maximises."
    adam = AdamW([parameters[0]])
    reason = "The threshold is known for torch.optim.SGD, not for AdamW."
    assert stability(1.0, adam.param_groups, type(adam)) == Stability(None, reason)


def test_subclasses_count_as_sgd_only_with_its_step() -> None:
    class Renamed(SGD):
        pass

    class Clipped(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    groups = Renamed([torch.zeros(1)], lr=0.1).param_groups
    assert stability(10.0, groups, Renamed).value == pytest.approx(0.5)
    assert stability(10.0, groups, Clipped).value is None
