import math
from collections.abc import Callable, Sequence

import pytest
import torch
from scipy import stats

from lmc_lightning.linalg.subspace import Deflation
from lmc_lightning.linalg.trace import TraceEstimate, trace_to_precision
from tests.linalg.spectra import Counted, gaussian_vector, orthonormal_rows, rotated, sign_vectors

BULK_WITH_OUTLIERS = torch.cat([torch.tensor([40.0, 22.0, 15.0, 9.0, 7.0]), torch.linspace(3, -1, 95)]).double()


def signs(size: int, seed: int) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1


def any_vectors_as_deflation(matrix: torch.Tensor, count: int) -> Deflation:
    basis = orthonormal_rows(count, len(matrix), seed=8)
    return Deflation(torch.linalg.eigvalsh(basis @ matrix @ basis.T), (basis[:1], basis[1:]), 0.0)


def sampled(
    matvec: Callable[[torch.Tensor], torch.Tensor], probes: Sequence[torch.Tensor], deflation: Deflation | None = None
) -> TraceEstimate:
    """The estimate from all of the probes."""
    draw = iter(probes).__next__
    return trace_to_precision(matvec, draw, tolerance=0.0, num_sketch=0, deflation=deflation, max_products=len(probes))


@pytest.mark.parametrize("size", [3, 5, 7])
def test_all_sign_vectors_give_the_trace_and_the_known_variance(size):
    matrix = rotated(torch.linspace(-3, 5, size), seed=size)
    estimate = sampled(lambda v: matrix @ v, sign_vectors(size))
    assert estimate.value == pytest.approx(float(matrix.trace()), rel=1e-13)
    variance = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    assert estimate.stderr**2 * (2**size - 1) == pytest.approx(float(variance), rel=1e-12)
    assert estimate.num_probes == estimate.num_matvecs == 2**size


@pytest.mark.parametrize("count", [1, 3, 6])
def test_deflated_estimate_is_unbiased_for_any_orthonormal_vectors(count):
    matrix = rotated([4.0, 2.0, 1.0, 0.5, -0.5, -3.0], seed=3)
    known = any_vectors_as_deflation(matrix, count)
    estimate = sampled(lambda v: matrix @ v, sign_vectors(6), known)
    assert estimate.value == pytest.approx(float(matrix.trace()), rel=1e-12)
    basis = torch.cat(known.blocks)
    projector = torch.eye(6, dtype=torch.float64) - basis.T @ basis
    rest = projector @ matrix @ projector
    variance = 2 * (rest.square().sum() - rest.diagonal().square().sum())
    assert estimate.stderr**2 * 63 == pytest.approx(float(variance), rel=1e-10, abs=1e-20)


def test_probes_are_left_as_they_are():
    matrix = rotated([4.0, 2.0, 1.0, 0.5, -0.5, -3.0])
    probe = torch.ones(6, dtype=torch.float64)
    sampled(lambda v: matrix @ v, [probe] * 8, any_vectors_as_deflation(matrix, 2))
    assert torch.equal(probe, torch.ones(6, dtype=torch.float64))


def test_diagonal_matrix_is_exact_from_every_sign_vector():
    estimate = sampled(lambda v: torch.arange(5.0) * v, sign_vectors(5)[:8])
    assert estimate.value == 10
    assert estimate.stderr == 0


def test_interval_is_student_t():
    estimate = TraceEstimate(value=10.0, stderr=0.5, num_probes=9, num_matvecs=9)
    low, high = estimate.interval()
    assert high - 10 == pytest.approx(10 - low)
    assert high - 10 == pytest.approx(2.306004135 * 0.5, rel=1e-9)
    assert estimate.interval(0.9)[1] - 10 == pytest.approx(float(stats.t.ppf(0.95, 8)) * 0.5)


def test_interval_needs_eight_probes():
    with pytest.raises(ValueError, match="at least 8 probes, got 7"):
        TraceEstimate(value=1.0, stderr=0.1, num_probes=7, num_matvecs=7).interval()


@pytest.mark.parametrize("num_sketch", [0, 16])
def test_stops_at_the_requested_precision_and_counts_every_product(num_sketch):
    matrix = Counted(rotated(BULK_WITH_OUTLIERS))
    estimate = trace_to_precision(matrix, signs(100, seed=0), tolerance=0.05, num_sketch=num_sketch, max_products=2000)
    assert estimate.converged
    assert estimate.half_width() <= 0.05 * estimate.value
    assert estimate.num_matvecs == matrix.count == estimate.num_probes + num_sketch
    assert abs(estimate.value - float(BULK_WITH_OUTLIERS.sum())) < 4 * estimate.stderr


def test_krylov_sketch_saves_products():
    spent = []
    for num_sketch in (0, 16):
        matrix = Counted(rotated(BULK_WITH_OUTLIERS))
        trace_to_precision(matrix, signs(100, seed=0), tolerance=0.05, num_sketch=num_sketch, max_products=2000)
        spent.append(matrix.count)
    assert spent[1] < spent[0] / 3


def test_deflation_takes_the_place_of_the_sketch():
    matrix = Counted(rotated(BULK_WITH_OUTLIERS))
    values, vectors = torch.linalg.eigh(matrix.matrix)
    known = Deflation(values[-5:], (vectors[:, -5:].T.contiguous(),), 0.0)
    estimate = trace_to_precision(matrix, signs(100, seed=0), tolerance=0.1, deflation=known)
    assert estimate.num_matvecs == matrix.count == estimate.num_probes
    assert estimate.converged


@pytest.mark.parametrize(
    ("arguments", "num_probes", "converged"),
    [
        ({"tolerance": 1e9}, 16, True),
        ({"tolerance": 1e9, "max_products": 10}, 10, True),
        ({"tolerance": 1e-9, "max_products": 1}, 8, False),
        ({"tolerance": 1e-9, "should_stop": lambda: True}, 8, False),
    ],
)
def test_fewest_probes(arguments, num_probes, converged):
    matrix = rotated(BULK_WITH_OUTLIERS)
    estimate = trace_to_precision(lambda v: matrix @ v, signs(100, seed=0), num_sketch=0, **arguments)
    assert estimate.num_probes == num_probes
    assert estimate.converged is converged


def test_exhausted_budget_is_a_flag():
    matrix = rotated(BULK_WITH_OUTLIERS)
    estimate = trace_to_precision(lambda v: matrix @ v, signs(100, seed=0), tolerance=1e-6, max_products=40)
    assert estimate.num_matvecs == 40
    assert not estimate.converged


@pytest.mark.parametrize("rank", [0, 3])
def test_operator_within_the_sketch_has_no_error(rank):
    matrix = rotated([9.0, 4.0, -2.0][:rank] + [0.0] * (40 - rank))
    estimate = trace_to_precision(lambda v: matrix @ v, signs(40, seed=0), tolerance=1e-9)
    assert estimate.value == pytest.approx(11.0 if rank else 0.0, rel=1e-12)
    assert estimate.converged
    assert estimate.num_probes == 16


def test_slowly_moving_mean_does_not_stop_the_estimate():
    spectrum = torch.cat([torch.tensor([1000.0]), torch.linspace(0.5, 1.5, 199)]).double()
    matrix = rotated(spectrum)
    estimate = trace_to_precision(
        lambda v: matrix @ v, signs(200, seed=2), tolerance=0.01, num_sketch=0, max_products=100
    )
    assert not estimate.converged
    low, high = estimate.interval()
    assert low < float(spectrum.sum()) < high


@pytest.mark.parametrize(
    ("spectrum", "num_sketch", "tolerance"),
    [
        (BULK_WITH_OUTLIERS, 16, 0.05),
        (BULK_WITH_OUTLIERS, 0, 0.3),
        (torch.linspace(-1, 2, 100), 8, 0.1),
        (torch.arange(1.0, 101.0) ** -1.5, 12, 0.02),
    ],
    ids=["outliers", "outliers-plain", "indefinite", "power-law"],
)
def test_intervals_cover_the_truth_with_the_stopping_rule_on(spectrum, num_sketch, tolerance):
    matrix = rotated(spectrum, seed=1)
    truth = float(spectrum.double().sum())
    covered, probes = 0, []
    for seed in range(200):
        estimate = trace_to_precision(
            lambda v: matrix @ v, signs(100, seed), tolerance=tolerance, num_sketch=num_sketch, max_products=2000
        )
        low, high = estimate.interval()
        covered += low <= truth <= high
        probes.append(estimate.num_probes)
    assert 180 <= covered <= 198
    assert max(probes) > 16


def test_gaussian_probes_work_too():
    matrix = rotated(BULK_WITH_OUTLIERS)
    estimate = sampled(lambda v: matrix @ v, [gaussian_vector(100, seed) for seed in range(64)])
    expected = math.sqrt(2 * float(matrix.square().sum()) / 64)
    assert estimate.stderr == pytest.approx(expected, rel=0.5)
    assert abs(estimate.value - float(BULK_WITH_OUTLIERS.sum())) < 4 * expected
