import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc_lightning.linalg.lanczos import KrylovSpace, lanczos
from tests.linalg.spectra import DTYPES, SCALES, SPECTRA, Counted, gaussian_vector, orthonormal_rows, rotated


def relation_error(matrix: torch.Tensor, result) -> float:
    """max |A Q − Q T − r eₘᵀ| in float64."""
    columns = result.basis.double().T
    error = matrix.double() @ columns - columns @ result.matrix()
    error[:, -1] -= result.residual.double()
    return float(error.abs().max())


def gram_error(rows: torch.Tensor) -> float:
    return float((rows.double() @ rows.double().T - torch.eye(len(rows), dtype=torch.float64)).abs().max())


def grow(space: KrylovSpace, matvec, steps: int) -> KrylovSpace:
    for _ in range(steps):
        space.absorb(matvec(space.advance()))
    return space


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SPECTRA)
def test_lanczos_relation_and_orthonormality(name, scale, dtype):
    spectrum = torch.tensor(SPECTRA[name]) * scale
    matrix = rotated(spectrum, dtype=dtype)
    result = lanczos(lambda v: matrix @ v, gaussian_vector(12, seed=1, dtype=dtype), 6)
    eps = torch.finfo(dtype).eps
    size = float(spectrum.abs().max())
    assert relation_error(matrix, result) < 20 * eps * size
    assert gram_error(result.basis) < 20 * eps
    assert float((result.basis @ result.residual).abs().max()) < 20 * eps * size
    assert result.residual_norm == pytest.approx(float(result.residual.double().norm()), rel=1e-12)
    assert result.alphas.dtype == result.betas.dtype == torch.float64
    assert result.basis.dtype == dtype


@settings(max_examples=40, deadline=None)
@given(
    spectrum=st.lists(st.floats(-100, 100), min_size=2, max_size=12),
    seed=st.integers(0, 10_000),
    steps=st.integers(1, 14),
)
def test_lanczos_relation_for_any_spectrum(spectrum, seed, steps):
    matrix = rotated(spectrum, seed)
    result = lanczos(lambda v: matrix @ v, gaussian_vector(len(spectrum), seed + 1), steps)
    size = max(map(abs, spectrum))
    assert relation_error(matrix, result) <= 1e-13 * size
    assert gram_error(result.basis) < 1e-13
    assert len(result.alphas) == len(result.betas) + 1 <= min(steps, len(spectrum))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["separated", "repeated", "rank_deficient"])
def test_breakdown_after_as_many_steps_as_distinct_eigenvalues(name, scale, dtype):
    spectrum = torch.tensor(SPECTRA[name], dtype=torch.float64) * scale
    matrix = Counted(rotated(spectrum, dtype=dtype))
    result = lanczos(matrix, gaussian_vector(12, seed=1, dtype=dtype), 50)
    assert result.breakdown
    expected = torch.unique(spectrum)
    assert len(result.alphas) == matrix.count == len(expected)
    found = torch.linalg.eigvalsh(result.matrix())
    assert (found - expected).abs().max() < 20 * torch.finfo(dtype).eps * spectrum.abs().max()


def test_steps_beyond_an_unnoticed_breakdown_find_true_eigenvalues_only():
    distinct = torch.linspace(-1, 5, 20, dtype=torch.float64)
    matrix = rotated(distinct.repeat(5))
    result = lanczos(lambda v: matrix @ v, gaussian_vector(100, seed=1), 90)
    assert len(result.alphas) > 40
    assert not result.breakdown
    found = torch.linalg.eigvalsh(result.matrix())
    distances = (found[:, None] - distinct).abs().min(dim=0).values
    assert distances.max() < 1e-12
    assert result.matrix().trace() == pytest.approx(float((result.basis @ matrix @ result.basis.T).trace()), rel=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_multiple_of_the_identity_breaks_down_after_one_step(scale, dtype):
    result = lanczos(lambda v: 2 * scale / 5000 * v, gaussian_vector(5000, seed=0, dtype=dtype), 10)
    assert result.breakdown
    assert result.alphas.tolist() == pytest.approx([2 * scale / 5000], rel=1e-6)


def test_zero_operator_breaks_down_after_one_step():
    result = lanczos(torch.zeros_like, gaussian_vector(20, seed=0), 10)
    assert result.breakdown
    assert result.alphas.tolist() == [0.0]
    assert result.residual_norm == 0


def test_operator_may_return_its_argument():
    result = lanczos(lambda v: v, gaussian_vector(20, seed=0), 3)
    assert gram_error(result.basis) < 1e-15
    assert result.alphas.tolist() == pytest.approx([1.0], rel=1e-15)


def test_product_that_requires_grad_is_detached():
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    result = lanczos(lambda v: weight * v, gaussian_vector(20, seed=0), 3)
    assert not result.residual.requires_grad


def test_krylov_space_of_tridiagonal_as_deflation():
    matrix = rotated(SPECTRA["separated"])
    result = lanczos(lambda v: matrix @ v, gaussian_vector(12, seed=1), 4)
    known = result.deflation()
    projector = torch.eye(12, dtype=torch.float64) - result.basis.T @ result.basis
    assert known.values.sum() == pytest.approx(float((result.basis @ matrix @ result.basis.T).trace()), rel=1e-13)
    assert known.leak == pytest.approx(float((projector @ matrix @ result.basis.T).square().sum()), rel=1e-12)


@pytest.mark.parametrize("start", [torch.zeros(4), torch.full((4,), math.nan), torch.full((4,), math.inf)])
def test_unusable_start_raises(start):
    with pytest.raises(ValueError, match="finite, non-zero vector"):
        lanczos(lambda v: v, start, 3)


def test_no_steps_raises():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        lanczos(lambda v: v, torch.ones(4), 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_product_that_is_not_finite_raises(bad):
    with pytest.raises(FloatingPointError, match="not finite"):
        lanczos(lambda v: v * bad, torch.ones(4), 3)


def test_excluded_vectors_stay_excluded():
    matrix = rotated(SPECTRA["separated"])
    excluded = orthonormal_rows(3, 12, seed=2)
    space = grow(KrylovSpace(gaussian_vector(12, seed=3), excluded=[excluded]), lambda v: matrix @ v, 9)
    assert space.exhausted
    assert space.breakdown
    basis = torch.cat(space.basis.blocks())
    assert (excluded @ basis.T).abs().max() < 1e-14
    projector = torch.eye(12, dtype=torch.float64) - excluded.T @ excluded
    expected = torch.linalg.eigvalsh(projector @ matrix @ projector)
    found = torch.cat([space.ritz().values, torch.zeros(3, dtype=torch.float64)]).sort().values
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_start_within_the_excluded_span_is_a_breakdown():
    excluded = orthonormal_rows(3, 12, seed=2)
    assert KrylovSpace(excluded.sum(dim=0), excluded=[excluded]).breakdown


def test_restart_keeps_the_krylov_relation():
    matrix = rotated(torch.linspace(-3, 10, 40))
    space = grow(KrylovSpace(gaussian_vector(40, seed=0), rows_per_block=4), lambda v: matrix @ v, 10)
    full = space.ritz()
    space.restart(full.select([0, 1, 2, 9]))
    kept = space.ritz()
    torch.testing.assert_close(kept.values, full.values[[0, 1, 2, 9]])
    torch.testing.assert_close(kept.residuals, full.residuals[[0, 1, 2, 9]])
    grow(space, lambda v: matrix @ v, 5)
    basis = torch.cat(space.basis.blocks())
    assert gram_error(basis) < 1e-14
    torch.testing.assert_close(basis @ matrix @ basis.T, space.projected, rtol=0, atol=1e-13)
    leak = float((matrix @ basis.T - basis.T @ space.projected).square().sum())
    assert float(space.ritz().residuals.square().sum()) == pytest.approx(leak, rel=1e-10)


def test_thick_restart_equals_the_unrestarted_run_when_the_kept_space_holds_all_that_matters():
    spectrum = torch.cat([torch.tensor([10.0, 8.0, 6.0]), torch.zeros(37)])
    matrix = rotated(spectrum)
    space = grow(KrylovSpace(gaussian_vector(40, seed=0)), lambda v: matrix @ v, 4)
    space.restart(space.ritz().select([0, 1, 2]))
    torch.testing.assert_close(space.ritz().values, torch.tensor([10.0, 8.0, 6.0], dtype=torch.float64))


def test_ritz_residuals_are_true_even_for_an_asymmetric_operator():
    symmetric = rotated(torch.linspace(-3, 10, 40))
    noise = 1e-3 * torch.randn(40, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    matrix = symmetric + noise
    space = grow(KrylovSpace(gaussian_vector(40, seed=0)), lambda v: matrix @ v, 30)
    ritz = space.ritz()
    vectors = space.basis.combine(ritz.coordinates.T)
    true = (vectors @ matrix.T - ritz.values[:, None] * vectors).norm(dim=1)
    assert ritz.residuals[0] > 1e-4
    torch.testing.assert_close(ritz.residuals, true, rtol=1e-9, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_no_eigenvector_above_the_largest_ritz_value_has_more_of_the_start_than_its_hidden_share(seed):
    spectrum = torch.cat([torch.tensor([10.0, 9.97, 9.0, 8.0, 7.5]), torch.linspace(1.5, -0.5, 20)]).double()
    start = gaussian_vector(25, seed)
    shares = (start / start.norm()).abs()
    space = KrylovSpace(start)
    for _ in range(12):
        grow(space, lambda v: spectrum * v, 1)
        top = float(space.ritz().values[0])
        above = spectrum > top
        bounds = torch.tensor([space.hidden_share(float(value)) for value in spectrum[above]], dtype=torch.float64)
        assert (shares[above] <= bounds * (1 + 1e-9)).all()
        falling = [space.hidden_share(top * (1 + step)) for step in (0.001, 0.01, 0.1, 1.0)]
        assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 1e-6


def test_the_hidden_share_is_reached_where_one_eigenvector_is_missing():
    spectrum = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    start = torch.tensor([0.01, 1.0, 1.0], dtype=torch.float64)
    space = grow(KrylovSpace(start), lambda v: spectrum * v, 2)
    assert space.from_start
    assert space.hidden_share(3.0) == pytest.approx(0.01 / float(start.norm()), rel=1e-9)
    space.restart(space.ritz())
    assert not space.from_start
