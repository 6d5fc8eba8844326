import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc_lightning.linalg.eigen import extreme_eigenpairs, warm_start
from lmc_lightning.linalg.lanczos import KrylovSpace
from tests.linalg.spectra import DTYPES, SCALES, SPECTRA, Counted, gaussian_vector, rotated

BULK_WITH_OUTLIERS = torch.cat(
    [torch.tensor([40.0, 22.0, 15.0, 9.0, 7.0, 5.0]), torch.logspace(0.4, -4, 244), -torch.logspace(-0.5, -4, 50)]
).double()


def true_residuals(matrix: torch.Tensor, pairs) -> torch.Tensor:
    vectors = pairs.eigenvectors.double()
    return (vectors @ matrix.double() - pairs.eigenvalues[:, None] * vectors).norm(dim=1)


def expected_values(spectrum: torch.Tensor, num_largest: int, num_smallest: int) -> torch.Tensor:
    ordered = spectrum.double().sort(descending=True).values
    return torch.cat([ordered[:num_largest], ordered[len(ordered) - num_smallest :]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SPECTRA)
def test_both_ends_of_prescribed_spectra(name, scale, dtype):
    spectrum = torch.tensor(SPECTRA[name], dtype=torch.float64) * scale
    matrix = Counted(rotated(spectrum, dtype=dtype))
    start = gaussian_vector(12, seed=1, dtype=dtype)
    pairs = extreme_eigenpairs(matrix, start, num_largest=3, num_smallest=2, tolerance_smallest=1e-3)
    size, eps = float(spectrum.abs().max()), torch.finfo(dtype).eps
    assert pairs.converged.all()
    assert pairs.num_matvecs == matrix.count <= 12
    torch.testing.assert_close(pairs.eigenvalues, expected_values(spectrum, 3, 2), rtol=1e-3, atol=20 * eps * size)
    assert (true_residuals(matrix.matrix, pairs) - pairs.residuals).abs().max() < 20 * eps * size
    gram = pairs.eigenvectors.double() @ pairs.eigenvectors.double().T
    assert (gram - torch.eye(5)).abs().max() < 20 * eps
    assert pairs.eigenvectors.dtype == dtype
    assert pairs.eigenvalues.dtype == pairs.residuals.dtype == pairs.ritz_values.dtype == torch.float64


@settings(max_examples=40, deadline=None)
@given(
    spectrum=st.lists(st.floats(-100, 100), min_size=1, max_size=14),
    seed=st.integers(0, 10_000),
    num_largest=st.integers(0, 4),
    num_smallest=st.integers(0, 4),
    budget=st.integers(1, 30),
)
def test_residuals_are_true_and_values_interlace_for_any_spectrum(spectrum, seed, num_largest, num_smallest, budget):
    if num_largest + num_smallest == 0:
        num_largest = 1
    matrix = Counted(rotated(spectrum, seed))
    pairs = extreme_eigenpairs(
        matrix,
        gaussian_vector(len(spectrum), seed + 1),
        num_largest=num_largest,
        num_smallest=num_smallest,
        max_products=budget,
    )
    size = max(map(abs, spectrum))
    assert pairs.num_matvecs == matrix.count <= min(budget, len(spectrum))
    assert len(pairs.eigenvalues) == min(num_largest + num_smallest, len(pairs.ritz_values))
    assert (true_residuals(matrix.matrix, pairs) - pairs.residuals).abs().max() <= 1e-13 * size
    ordered = torch.tensor(spectrum, dtype=torch.float64).sort(descending=True).values
    top = pairs.num_largest
    assert (pairs.eigenvalues[:top] <= ordered[:top] + 1e-13 * size).all()
    assert (pairs.eigenvalues[top:] >= ordered[len(ordered) - len(pairs.eigenvalues) + top :] - 1e-13 * size).all()


def test_residuals_count_what_is_dropped_where_the_space_is_taken_for_invariant():
    matrix = Counted(rotated([0.0, 1.0, 0.0, 2.0, 40.0, 40.0]))
    pairs = extreme_eigenpairs(matrix, gaussian_vector(6, 1), num_largest=0, num_smallest=1, max_products=5)
    assert true_residuals(matrix.matrix, pairs)[0] > 1e-12
    assert (true_residuals(matrix.matrix, pairs) - pairs.residuals).abs().max() <= 1e-13 * 40


@pytest.mark.parametrize("seed", range(4))
def test_outliers_over_a_bulk_converge_within_the_budget(seed):
    matrix = rotated(BULK_WITH_OUTLIERS, seed)
    start = gaussian_vector(300, seed)
    pairs = extreme_eigenpairs(lambda v: matrix @ v, start, num_largest=5, num_smallest=1)
    assert pairs.converged.all()
    assert (pairs.residuals <= pairs.eigenvalues.abs() * torch.tensor([1e-3] * 5 + [1e-2])).all()
    torch.testing.assert_close(pairs.eigenvalues, expected_values(BULK_WITH_OUTLIERS, 5, 1), rtol=1e-3, atol=0)
    assert pairs.num_matvecs <= 45


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_basis", [11, 14, 20])
def test_thick_restart_bounds_the_basis_and_finds_the_same(max_basis, dtype):
    matrix = Counted(rotated(BULK_WITH_OUTLIERS, dtype=dtype))
    pairs = extreme_eigenpairs(
        matrix,
        gaussian_vector(300, seed=0, dtype=dtype),
        num_largest=5,
        num_smallest=1,
        max_basis=max_basis,
        max_products=200,
    )
    assert pairs.converged.all()
    assert pairs.num_matvecs == matrix.count > max_basis
    assert len(pairs.ritz_values) <= max_basis
    torch.testing.assert_close(pairs.eigenvalues, expected_values(BULK_WITH_OUTLIERS, 5, 1), rtol=1e-3, atol=0)
    assert (true_residuals(matrix.matrix, pairs) - pairs.residuals).abs().max() < 40 * 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("num_largest", "num_smallest"), [(3, 0), (0, 2)])
def test_thick_restart_for_one_end_alone(num_largest, num_smallest):
    matrix = rotated(BULK_WITH_OUTLIERS)
    pairs = extreme_eigenpairs(
        lambda v: matrix @ v,
        gaussian_vector(300, seed=0),
        num_largest=num_largest,
        num_smallest=num_smallest,
        max_basis=9,
        max_products=300,
    )
    assert pairs.converged.all()
    expected = expected_values(BULK_WITH_OUTLIERS, num_largest, num_smallest)
    torch.testing.assert_close(pairs.eigenvalues, expected, rtol=1e-2, atol=0)


def classical_stop(matvec, start: torch.Tensor, num_largest: int, tolerance: float) -> torch.Tensor:
    """Ritz values where the estimate residual²/gap first meets the tolerance for all pairs."""
    space = KrylovSpace(start)
    while True:
        space.absorb(matvec(space.advance()))
        ritz = space.ritz()
        if space.size <= num_largest:
            continue
        distances = (ritz.values[:, None] - ritz.values).abs() + torch.diag(torch.full((space.size,), math.inf))
        errors = (ritz.residuals**2 / distances.min(dim=1).values)[:num_largest]
        if (errors <= tolerance * ritz.values[:num_largest].abs()).all():
            return ritz.values[:num_largest]


def relative_error(values: torch.Tensor, spectrum: torch.Tensor) -> float:
    expected = spectrum.double()[: len(values)]
    return float(((values - expected) / expected).abs().max())


def test_clustered_pair_where_the_classical_gap_rule_stops_early():
    spectrum = torch.cat([torch.tensor([10.0, 9.999, 6.0, 4.0]), torch.linspace(3, -1, 300)])
    classical, guarded = [], []
    for seed in range(4):
        matrix, start = rotated(spectrum, seed), gaussian_vector(304, seed)
        classical.append(relative_error(classical_stop(lambda v, a=matrix: a @ v, start, 2, 1e-3), spectrum))
        pairs = extreme_eigenpairs(lambda v, a=matrix: a @ v, start, num_largest=2, num_smallest=0)
        guarded.append(relative_error(pairs.eigenvalues, spectrum))
    assert max(classical) > 0.3
    assert max(guarded) < 1e-6


HIDING = {
    "pair": [10.0, 9.97, 6.0, 4.0],
    "wider pair": [10.0, 9.95, 6.0, 4.0],
    "triple": [10.0, 9.97, 9.94, 4.0],
    "one above four": [10.0, 9.97, 9.969, 9.968, 9.967],
}
"""Top eigenvalues that one Ritz value stands for at first, with a small residual."""


@pytest.mark.parametrize("name", HIDING)
def test_the_largest_eigenvalue_is_within_its_tolerance_whatever_the_spectrum(name):
    spectrum = torch.cat([torch.tensor(HIDING[name]), torch.linspace(1.5, -0.5, 300)]).double()
    missed = {0: 0, 2: 0}
    for seed in range(60):
        for guard in missed:
            start = gaussian_vector(len(spectrum), seed)
            pairs = extreme_eigenpairs(lambda v: spectrum * v, start, num_largest=1, num_smallest=0, guard=guard)
            assert pairs.converged.all()
            missed[guard] += relative_error(pairs.eigenvalues, spectrum) > 1e-3
    assert missed[2] <= 1 < missed[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SPECTRA)
def test_the_largest_eigenvalue_alone_of_prescribed_spectra(name, scale, dtype):
    spectrum = torch.tensor(SPECTRA[name], dtype=torch.float64) * scale
    matrix = Counted(rotated(spectrum, dtype=dtype))
    pairs = extreme_eigenpairs(matrix, gaussian_vector(12, seed=1, dtype=dtype), num_largest=1, num_smallest=0)
    assert pairs.converged.all()
    assert pairs.num_matvecs == matrix.count <= 12
    assert float(pairs.eigenvalues[0]) == pytest.approx(float(spectrum.max()), rel=1e-3)


def test_the_bound_of_the_largest_eigenvalue_takes_fewer_products_than_guards():
    matrix = rotated(BULK_WITH_OUTLIERS)
    alone, guarded = (
        extreme_eigenpairs(lambda v: matrix @ v, gaussian_vector(300, 3), num_largest=k, num_smallest=0, guard=3 - k)
        for k in (1, 2)
    )
    assert alone.num_matvecs < guarded.num_matvecs - 2
    assert float(alone.eigenvalues[0]) == pytest.approx(40, rel=1e-6)


def test_a_small_residual_is_not_called_the_largest_eigenvalue_before_the_bound_says_so():
    spectrum = torch.cat([torch.tensor([10.0, 9.97]), torch.linspace(1.5, -0.5, 300)]).double()
    start = gaussian_vector(302, 0)
    start[0] = 0.02
    pairs = extreme_eigenpairs(lambda v: spectrum * v, start, num_largest=1, num_smallest=0, max_products=5)
    assert float(pairs.eigenvalues[0]) == pytest.approx(9.97, rel=1e-4)
    assert float(pairs.residuals[0]) < 1e-3 * 9.97
    assert not pairs.converged.any()


def test_thick_restarts_bring_the_guards_back_in_place_of_the_bound():
    matrix = rotated(BULK_WITH_OUTLIERS)
    pairs = extreme_eigenpairs(
        lambda v: matrix @ v, gaussian_vector(300, 0), num_largest=1, num_smallest=0, max_basis=6, tolerance=1e-6
    )
    assert pairs.converged.all()
    assert float(pairs.eigenvalues[0]) == pytest.approx(40, rel=1e-9)
    assert pairs.num_matvecs > 6


@pytest.mark.parametrize("seed", range(3))
def test_repeated_outlier_comes_up_through_float32_rounding(seed):
    spectrum = BULK_WITH_OUTLIERS.clone()
    spectrum[1] = spectrum[0]
    matrix = rotated(spectrum, seed, torch.float32)
    start = gaussian_vector(300, seed, torch.float32)
    pairs = extreme_eigenpairs(lambda v: matrix @ v, start, num_largest=2, num_smallest=0)
    assert pairs.eigenvalues.tolist() == pytest.approx([40.0, 40.0], rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiples_of_the_identity_and_zero_go_on_from_fresh_directions(dtype):
    for factor in (0.0, 3.0):
        matrix = Counted(factor * torch.eye(40, dtype=dtype))
        pairs = extreme_eigenpairs(matrix, gaussian_vector(40, 0, dtype), num_largest=3, num_smallest=1)
        assert pairs.eigenvalues.tolist() == pytest.approx([factor] * 4, rel=1e-6)
        assert pairs.converged.all()
        assert pairs.num_matvecs == matrix.count == 6
        assert torch.linalg.matrix_rank(pairs.eigenvectors) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_deficient_with_a_repeated_eigenvalue(dtype):
    spectrum = torch.tensor([10.0, 10.0, 5.0, -3.0] + [0.0] * 60)
    matrix = rotated(spectrum, dtype=dtype)
    pairs = extreme_eigenpairs(
        lambda v: matrix @ v, gaussian_vector(64, 0, dtype), num_largest=3, num_smallest=1, tolerance_smallest=1e-3
    )
    assert pairs.eigenvalues.tolist() == pytest.approx([10.0, 10.0, 5.0, -3.0], rel=1e-5)


@pytest.mark.parametrize(
    ("spectrum", "num_largest", "num_smallest", "top"),
    [([3.0], 5, 1, 1), ([3.0, -1.0], 1, 1, 1), ([3.0, 1.0, -2.0], 5, 2, 3), ([3.0, 1.0, -2.0], 2, 2, 2)],
)
def test_fewer_dimensions_than_pairs_give_the_whole_spectrum_once(spectrum, num_largest, num_smallest, top):
    matrix = rotated(spectrum)
    start = gaussian_vector(len(spectrum), 0)
    pairs = extreme_eigenpairs(lambda v: matrix @ v, start, num_largest=num_largest, num_smallest=num_smallest)
    assert pairs.eigenvalues.tolist() == pytest.approx(spectrum, rel=1e-14)
    assert pairs.num_largest == top
    assert pairs.converged.all()


def test_exhausted_budget_is_a_flag_with_true_residuals():
    matrix = rotated(BULK_WITH_OUTLIERS)
    start = gaussian_vector(300, 0)
    pairs = extreme_eigenpairs(lambda v: matrix @ v, start, num_largest=5, num_smallest=1, max_products=10)
    assert pairs.num_matvecs == 10
    assert pairs.converged[0]
    assert not pairs.converged[-1]
    assert (true_residuals(matrix, pairs) - pairs.residuals).abs().max() < 1e-12
    for value, residual in zip(pairs.eigenvalues, pairs.residuals, strict=True):
        assert (BULK_WITH_OUTLIERS - value).abs().min() <= residual + 1e-12


def test_should_stop_is_asked_after_every_product():
    matrix = Counted(rotated(BULK_WITH_OUTLIERS))
    pairs = extreme_eigenpairs(
        matrix, gaussian_vector(300, 0), num_largest=3, num_smallest=1, should_stop=lambda: matrix.count >= 2
    )
    assert pairs.num_matvecs == matrix.count == 2
    assert len(pairs.eigenvalues) == 2
    assert not pairs.converged.any()


def test_asymmetric_operator_is_not_called_converged():
    noise = torch.randn(300, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = rotated(BULK_WITH_OUTLIERS) + 0.1 * noise
    pairs = extreme_eigenpairs(lambda v: matrix @ v, gaussian_vector(300, 0), num_largest=2, num_smallest=0)
    assert not pairs.converged.any()


def test_deflation_of_converged_pairs():
    matrix = rotated(BULK_WITH_OUTLIERS)
    pairs = extreme_eigenpairs(
        lambda v: matrix @ v, gaussian_vector(300, 0), num_largest=3, num_smallest=1, max_products=14
    )
    known = pairs.deflation()
    assert torch.equal(known.values, pairs.eigenvalues[pairs.converged])
    assert len(known.values) == len(known.blocks[0]) == 3
    basis = torch.cat(known.blocks)
    within = basis @ matrix @ basis.T
    torch.testing.assert_close(torch.linalg.eigvalsh(within), known.values.sort().values, rtol=0, atol=1e-12)
    rest = matrix @ basis.T - basis.T @ within
    assert known.leak == pytest.approx(float(rest.square().sum()), rel=1e-9, abs=1e-20)


def test_warm_start_saves_products_after_a_small_change():
    request = {"num_largest": 5, "num_smallest": 1}
    warm = cold = 0
    for seed in range(3):
        matrix, fresh = rotated(BULK_WITH_OUTLIERS, seed), gaussian_vector(300, seed + 100)
        before = extreme_eigenpairs(lambda v, a=matrix: a @ v, gaussian_vector(300, seed), **request)
        moved = matrix + 1e-3 * rotated(torch.linspace(-1, 1, 300), seed + 50)
        remembered = warm_start(before.eigenvectors, fresh)
        first = extreme_eigenpairs(lambda v, a=moved: a @ v, remembered, **request)
        second = extreme_eigenpairs(lambda v, a=moved: a @ v, fresh, **request)
        torch.testing.assert_close(first.eigenvalues, second.eigenvalues, rtol=1e-3, atol=0)
        warm, cold = warm + first.num_matvecs, cold + second.num_matvecs
    assert warm <= cold - 3


def test_warm_start_cannot_miss_a_new_direction():
    matrix = rotated(BULK_WITH_OUTLIERS)
    old = extreme_eigenpairs(lambda v: matrix @ v, gaussian_vector(300, 0), num_largest=2, num_smallest=0)
    new = gaussian_vector(300, 2)
    new -= old.eigenvectors.T @ (old.eigenvectors @ new)
    new /= new.norm()
    grown = matrix + 100 * torch.outer(new, new)
    start = warm_start(old.eigenvectors, gaussian_vector(300, 3))
    pairs = extreme_eigenpairs(lambda v: grown @ v, start, num_largest=1, num_smallest=0)
    assert pairs.eigenvalues[0] == pytest.approx(float(torch.linalg.eigvalsh(grown)[-1]), rel=1e-6)


def test_warm_start_weighs_memory_and_noise_equally():
    previous = torch.eye(2, 6, dtype=torch.float64)
    fresh = torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0, 4.0], dtype=torch.float64)
    half = 1 / math.sqrt(2)
    assert warm_start(previous, fresh).tolist() == pytest.approx([half, half, 0, 0, 0.6, 0.8])
    assert warm_start(torch.zeros(0, 6, dtype=torch.float64), fresh).tolist() == pytest.approx([0, 0, 0, 0, 0.6, 0.8])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_largest": 0, "num_smallest": 0}, "at least one pair"),
        ({"num_largest": -1, "num_smallest": 2}, "at least one pair"),
        ({"num_largest": 1, "num_smallest": 0, "max_products": 0}, "max_products must be at least 1"),
        ({"num_largest": 5, "num_smallest": 1, "max_basis": 10}, "raise it to at least 11"),
    ],
)
def test_impossible_requests_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        extreme_eigenpairs(lambda v: v, torch.ones(20), **arguments)
