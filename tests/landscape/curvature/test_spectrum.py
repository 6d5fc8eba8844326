import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmc_lightning.core.collective import Collective
from lmc_lightning.core.hvp import CurvatureProduct
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.params import ParameterLayout
from lmc_lightning.landscape.curvature.exact_trace import ExactnessCheck
from lmc_lightning.landscape.curvature.result import SpectrumResult
from lmc_lightning.landscape.curvature.spectrum import spectrum
from lmc_lightning.landscape.statistics.bands import stderr_data
from tests import oracles, problems
from tests.problems import ConvNet, cross_entropy, generator, images, mean_squared_error, normal, split


def measure(objective: Objective, **options: Any) -> SpectrumResult:
    return spectrum(objective, objective.theta(), **{"generator": generator(0), "trace": "sampled", **options})


def conv_net(dtype: torch.dtype = torch.float64, chunk_size: int = 35) -> Objective:
    return Objective(ConvNet(dtype), split(images(dtype=dtype), [64, 6]), cross_entropy, chunk_size=chunk_size)


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
    assert result.num_matvecs == result.eigenpairs.num_matvecs + 2 * 5
    assert result.num_gradients == 1
    alone = measure(conv_net(), num_eigenvalues=3, num_negative=1, num_probes=0)
    assert alone.eigenpairs is not None
    assert alone.num_matvecs == alone.eigenpairs.num_matvecs
    short = Objective(ConvNet(), [images()], cross_entropy, chunk_size=35, memory_budget=91 * 8 * 40)
    restarted = measure(short, num_eigenvalues=3, num_negative=1, num_probes=0)
    assert restarted.eigenpairs is not None
    assert restarted.cost.max_basis is not None
    assert restarted.num_matvecs == restarted.eigenpairs.num_matvecs + 1
    assert restarted.lambda_max_stderr_data == pytest.approx(alone.lambda_max_stderr_data, rel=1e-3)
    uncached = Objective(ConvNet(), [images()], cross_entropy, chunk_size=16, memory_budget=0)
    recomputed = measure(uncached, num_eigenvalues=1, num_probes=0)
    assert recomputed.num_gradients == recomputed.num_matvecs + 1


def test_the_gradient_norm_is_recorded_with_the_curvature() -> None:
    objective = conv_net()
    theta = objective.theta() + 0.1
    result = spectrum(objective, theta, num_probes=0, generator=generator(0))
    assert result.gradient_norm == pytest.approx(float(objective.grad(theta).norm()), rel=1e-14)


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
    assert result.num_matvecs == 4
    assert result.lambda_max is not None


def test_stopping_ends_with_what_there_is() -> None:
    result = measure(conv_net(), should_stop=lambda: True)
    assert not result.converged
    assert result.quadrature is None
    assert result.num_matvecs == 1
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


# -- trace: exact, to a precision, by tensors ------------------------------------------------------------


def test_the_trace_of_a_piecewise_linear_net_is_exact_and_the_sampled_one_is_kept(hessian: Tensor) -> None:
    objective = conv_net()
    result = measure(objective, trace="auto", num_probes=8, num_steps=4)
    exact, sampled = result.traces
    assert (exact.method, exact.stderr, sampled.method) == ("exact", 0, "quadrature")
    assert result.trace == exact.value == pytest.approx(float(hessian.trace()), rel=1e-12)
    assert exact.interval() == (exact.value, exact.value)
    diagonals = hessian.diagonal().split(objective.layout.sizes)
    torch.testing.assert_close(exact.tensors, torch.stack([d.sum() for d in diagonals]), rtol=1e-11, atol=1e-12)
    assert abs(sampled.value - exact.value) < 4 * sampled.stderr
    assert result.trace_per_param == pytest.approx(exact.value / objective.num_params)
    assert result.exactness is not None
    assert result.exactness.reason == ""
    without = measure(conv_net(), num_probes=8, num_steps=4)
    assert without.traces[0].value == pytest.approx(sampled.value, rel=1e-12)
    assert without.exactness is None


def test_what_one_visit_found_out_about_exactness_serves_the_next() -> None:
    first = measure(conv_net(), trace="auto", num_probes=1, num_steps=2)
    again = measure(conv_net(), trace="auto", num_probes=1, num_steps=2, exactness=first.exactness)
    assert again.traces[0].value == first.traces[0].value
    told = ExactnessCheck("for a test")
    refused = measure(conv_net(), trace="auto", num_probes=1, num_steps=2, exactness=told)
    assert refused.traces[0].method == "quadrature"
    assert refused.exactness == told


def smooth_net(chunk_size: int = 35) -> Objective:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 2), nn.Tanh(), nn.Linear(2, 4)).double()
    return Objective(module, split(images(), [64, 6]), cross_entropy, chunk_size=chunk_size)


def dense(objective: Objective, operator: str = "hessian") -> Tensor:
    theta = objective.theta()
    product = {"hessian": objective.hvp, "ggn": objective.ggn, "empirical_fisher": objective.empirical_fisher}[operator]
    with product(theta) as matvec:
        return torch.stack([matvec(column) for column in torch.eye(len(theta), dtype=theta.dtype)])


def test_a_smooth_net_is_sampled_and_the_reason_is_kept() -> None:
    result = measure(smooth_net(), trace="auto", num_probes=4, num_steps=4)
    assert [t.method for t in result.traces] == ["quadrature"]
    assert result.exactness is not None
    assert "not piecewise linear in 1.weight" in result.exactness.reason


def test_the_trace_is_sampled_until_it_is_as_precise_as_asked_for() -> None:
    objective = smooth_net()
    result = measure(objective, num_eigenvalues=3, num_probes=8, num_steps=4, trace_tolerance=0.1)
    (trace,) = result.traces
    assert trace.method == "hutch++"
    assert trace.converged
    assert trace.num_probes >= 16
    low, high = trace.interval()
    assert (high - low) / 2 <= 0.1 * trace.value
    assert low < float(dense(objective).trace()) < high
    assert result.eigenpairs is not None
    further = trace.num_probes - 8
    assert result.num_matvecs == result.eigenpairs.num_matvecs + 8 * 4 + further
    assert float(trace.tensors.sum()) == pytest.approx(trace.value, rel=1e-12)
    impossible = measure(objective, num_eigenvalues=1, num_probes=2, num_steps=2, trace_tolerance=1e-6)
    assert not impossible.traces[0].converged
    assert not impossible.converged


def test_a_precise_trace_alone_needs_no_density() -> None:
    objective = smooth_net()
    result = measure(objective, num_eigenvalues=0, num_negative=0, num_probes=0, trace_tolerance=0.2)
    assert result.quadrature is None
    assert result.trace == pytest.approx(float(dense(objective).trace()), rel=0.3)
    assert result.trace_stderr_data is not None


def test_traces_by_tensor_are_those_of_the_diagonal_and_sum_to_the_trace(hessian: Tensor) -> None:
    objective = conv_net()
    (trace,) = measure(objective, num_probes=64, num_steps=2).traces
    exact = torch.stack([d.sum() for d in hessian.diagonal().split(objective.layout.sizes)])
    errors = (trace.tensors - exact).abs()
    assert bool((errors <= 4 * trace.tensors_stderr + 1e-3 * float(hessian.trace())).all())
    assert bool((trace.tensors_stderr <= trace.stderr * 3).all())
    assert float(trace.tensors.sum()) == pytest.approx(trace.value, rel=1e-10)


@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_intervals_of_the_trace_cover_it_over_200_seeds_with_the_stopping_rule_on(tolerance: float | None) -> None:
    """Between 90 and 99 % of the 95 % intervals, at fixed data and with eigenpairs that are only just converged."""
    decay = torch.cat([torch.tensor([40.0, 22.0, 9.0]), torch.linspace(2, -0.5, 57)])
    objective = DenseObjective(problems.with_spectrum(decay.tolist()))
    covered, probes = 0, []
    for seed in range(200):
        result = spectrum(
            objective,  # type: ignore[arg-type]
            objective.theta(),
            num_eigenvalues=2,
            max_products=9,
            num_probes=8,
            num_steps=2,
            trace="sampled",
            trace_tolerance=tolerance,
            generator=generator(seed),
        )
        low, high = result.traces[0].interval()
        covered += low <= float(decay.sum()) <= high
        probes.append(result.traces[0].num_probes)
    assert 180 <= covered <= 198
    assert max(probes) > min(probes) or tolerance is None


class DenseObjective:
    """As much of an objective as a spectrum needs, of a matrix, without the cost of a module and its glass box."""

    memory_budget, collective, seed, batches = None, Collective(), 0, (torch.zeros(1),)

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.layout = ParameterLayout(("theta",), (torch.Size([len(matrix)]),), (matrix.dtype,))

    def theta(self) -> Tensor:
        return torch.zeros(len(self.matrix), dtype=self.matrix.dtype)

    def hvp(self, theta: Tensor, memory_budget: int | None = None) -> CurvatureProduct:
        return DenseProduct(self.matrix, theta, torch.ones(1, dtype=torch.float64))

    def evaluate(self, theta: Tensor) -> Any:
        return SimpleNamespace(loss=0.0, confidence=None)


class DenseProduct(CurvatureProduct):
    def __init__(self, matrix: Tensor, theta: Tensor, weights: Tensor) -> None:
        super().__init__(theta, weights)
        self.matrix = matrix

    def _product(self, index: int, vector: Tensor) -> Sequence[Tensor]:
        return [self.matrix @ vector]

    def _gradient(self, index: int) -> Sequence[Tensor]:
        return [self.matrix @ self.theta]


# -- eigenvectors ------------------------------------------------------------------------------------------------------


def test_layer_masses_are_the_squares_of_the_top_eigenvector(hessian: Tensor) -> None:
    objective = conv_net()
    result = measure(objective, num_eigenvalues=1, tolerance=1e-8, num_probes=0)
    vector = torch.linalg.eigh(hessian)[1][:, -1]
    expected = torch.stack([part.square().sum() for part in vector.split(objective.layout.sizes)])
    assert result.layer_masses is not None
    torch.testing.assert_close(result.layer_masses, expected, rtol=1e-6, atol=1e-9)
    assert float(result.layer_masses.sum()) == pytest.approx(1, rel=1e-12)
    assert dict(zip(result.tensor_names, result.layer_masses.tolist(), strict=True))["unused.weight"] < 1e-20


def test_the_share_of_the_gradient_in_the_top_eigenvectors(hessian: Tensor) -> None:
    objective = conv_net()
    result = measure(objective, num_eigenvalues=3, tolerance=1e-7, num_probes=0)
    vectors, gradient = torch.linalg.eigh(hessian)[1][:, -3:], objective.grad(objective.theta())
    expected = float((vectors.T @ gradient).square().sum() / gradient.square().sum())
    assert result.gradient_in_top == pytest.approx(expected, rel=1e-6)
    flat = measure(problems.quadratic(problems.with_spectrum([3.0, 1.0])).objective(), num_eigenvalues=1)
    assert flat.gradient_in_top is None  # there is no gradient at the minimum


def test_overlap_is_that_of_the_subspaces() -> None:
    matrix = problems.with_spectrum([9.0, 6.0, 3.0] + [0.1 * i for i in range(20)])
    _, vectors = torch.linalg.eigh(matrix)
    top = vectors[:, -3:].flip(1).T.contiguous()
    objective = problems.quadratic(matrix).objective()
    common = {"num_eigenvalues": 3, "num_probes": 0, "tolerance": 1e-9}
    assert measure(objective, **common).overlap is None
    assert measure(objective, previous=top, **common).overlap == pytest.approx(1, rel=1e-9)
    angle = torch.tensor(0.3)
    turned = top.clone()
    turned[0] = angle.cos() * top[0] + angle.sin() * vectors[:, 0]
    for warm in (True, False):
        found = measure(objective, previous=turned, warm=warm, **common)
        assert found.overlap == pytest.approx((2 + float(angle.cos()) ** 2) / 3, rel=1e-6)
    cold = measure(objective, **common)
    assert torch.equal(measure(objective, previous=turned, warm=False, **common).eigenvalues, cold.eigenvalues)


def test_errors_over_data_of_all_eigenvalues_are_known_where_the_trace_needed_them(chunk_hessians: Tensor) -> None:
    result = measure(conv_net(chunk_size=16), num_eigenvalues=3, num_probes=1, num_steps=2, tolerance=1e-7)
    assert result.eigenpairs is not None
    weights = conv_net(chunk_size=16).baseline.weights
    forms = torch.einsum(
        "ki,bij,kj->kb", result.eigenpairs.eigenvectors, chunk_hessians, result.eigenpairs.eigenvectors
    )
    expected = [stderr_data(row, weights) for row in forms]
    assert list(result.eigenvalues_stderr_data) == pytest.approx(expected, rel=1e-9)
    assert len(measure(conv_net(chunk_size=16), num_probes=0).eigenvalues_stderr_data) == 1


def test_errors_over_probes_of_ranks_and_masses_are_those_of_the_probes() -> None:
    problem = problems.quadratic(problems.with_spectrum(SPECTRUM))
    result = measure(problem.objective(), num_eigenvalues=1, num_negative=1, num_probes=6, num_steps=3)
    rule = result.quadrature
    assert rule is not None
    positive = 20 * (rule.weights * rule.nodes.clamp(min=0)).sum(1)
    assert result.effective_rank_stderr == pytest.approx(float(positive.std()) / 6**0.5 / 9, rel=1e-9)
    squares = 20 * (rule.weights * rule.nodes**2).sum(1)
    assert result.stable_rank_stderr == pytest.approx(float(squares.std()) / 6**0.5 / 81, rel=1e-9)
    below = (rule.weights * (rule.nodes < -result.resolution)).sum(1)
    assert result.negative_mass_stderr == pytest.approx(float(below.std()) / 6**0.5, rel=1e-9)
    within = (rule.weights * (rule.nodes.abs() <= result.resolution)).sum(1)
    assert result.null_mass_stderr == pytest.approx(float(within.std()) / 6**0.5, rel=1e-9)


# -- other matrices, blocks of vectors, memory ------------------------------------------------------------


@pytest.mark.parametrize("operator", ["ggn", "empirical_fisher"])
def test_spectra_of_the_matrices_behind_the_outputs(operator: Any) -> None:
    objective = smooth_net()
    matrix = dense(objective, operator)
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    result = measure(objective, operator=operator, trace="auto", num_eigenvalues=3, num_probes=8, num_steps=6)
    assert float(exact[-1]) > -1e-12
    torch.testing.assert_close(result.eigenvalues, exact[:3], rtol=1e-4, atol=0)
    assert result.lambda_min is None
    assert result.trace == pytest.approx(float(matrix.trace()), rel=1e-9 if operator == "ggn" else 0.2)
    assert result.traces[0].method == ("exact" if operator == "ggn" else "quadrature")


def test_the_gauss_newton_matrix_is_the_hessian_where_the_outputs_are_linear() -> None:
    objective = problems.softmax_regression().objective()
    both = [measure(objective, operator=o, num_eigenvalues=3, num_negative=0, num_steps=4) for o in ("hessian", "ggn")]
    torch.testing.assert_close(both[0].eigenvalues, both[1].eigenvalues, rtol=1e-9, atol=0)


def test_a_matrix_without_negative_eigenvalues_is_not_asked_for_them() -> None:
    with pytest.raises(ValueError, match=r"The matrix 'ggn' has no negative eigenvalues: expected num_negative=0"):
        measure(smooth_net(), operator="ggn", num_negative=1)


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_vectors_in_blocks_give_the_same_numbers(operator: Any) -> None:
    options = {"operator": operator, "num_probes": 6, "num_steps": 5, "tolerance": 1e-6}
    single, blocked = (measure(smooth_net(), **options, block_size=size) for size in (1, 4))
    assert (single.cost.block_size, blocked.cost.block_size) == (1, 4)
    assert single.num_matvecs == blocked.num_matvecs
    torch.testing.assert_close(single.eigenvalues, blocked.eigenvalues, rtol=1e-12, atol=0)
    for name in ("trace", "trace_stderr", "trace_stderr_data", "frobenius_sq", "lambda_max_stderr_data"):
        assert getattr(blocked, name) == pytest.approx(getattr(single, name), rel=1e-9)
    torch.testing.assert_close(single.traces[0].tensors, blocked.traces[0].tensors, rtol=1e-9, atol=1e-12)


def test_blocks_come_with_the_spectrum_and_are_counted(hessian: Tensor) -> None:
    objective = conv_net()
    common = {"num_eigenvalues": 1, "num_probes": 1, "num_steps": 12}
    without, with_blocks = measure(objective, **common), measure(objective, blocks="module", **common)
    names = [block.name for block in with_blocks.blocks]
    assert names == ["body.0", "body.1", "head", "unused"]
    assert 4 < with_blocks.num_matvecs - without.num_matvecs <= 12 * 4
    assert with_blocks.trace == without.trace
    assert with_blocks.lambda_max is not None
    assert max(block.lambda_max for block in with_blocks.blocks) <= with_blocks.lambda_max
    head = hessian[33:-6, 33:-6]
    assert with_blocks.blocks[2].lambda_max == pytest.approx(float(torch.linalg.eigvalsh(head)[-1]), rel=1e-4)


def test_a_small_memory_budget_means_restarts_and_recomputation_and_the_same_numbers() -> None:
    def of(budget: int | None) -> SpectrumResult:
        objective = Objective(ConvNet(), split(images(), [64, 6]), cross_entropy, chunk_size=16, memory_budget=budget)
        return measure(objective, num_eigenvalues=3, num_probes=2, num_steps=6, max_products=200)

    ample, tight = of(None), of(0)
    assert (ample.cost.num_cached, ample.cost.num_chunks, ample.cost.max_basis) == (5, 5, None)
    assert (tight.cost.num_cached, tight.cost.max_basis) == (0, 12)
    assert tight.num_gradients == tight.num_matvecs + 1
    torch.testing.assert_close(tight.eigenvalues, ample.eigenvalues, rtol=1e-4, atol=0)
    assert tight.trace == pytest.approx(ample.trace, rel=0.01)
    assert tight.converged


def test_progress_is_told_at_every_product() -> None:
    told: list[tuple[int, int, str]] = []
    result = measure(conv_net(), num_probes=2, num_steps=3, progress=lambda *now: told.append(now))
    assert [done for done, _, _ in told] == list(range(1, result.num_matvecs + 1))
    assert {(total, text) for _, total, text in told} == {(64 + 2 * 3, "products")}
