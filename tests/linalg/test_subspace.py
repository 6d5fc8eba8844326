import pytest
import torch

from lmc_lightning.linalg.subspace import Deflation, OrthonormalRows, dot64, norm64, orthogonalise_
from tests.linalg.spectra import gaussian_vector, orthonormal_rows, rotated


def rows_of(matrix: torch.Tensor, rows_per_block: int) -> OrthonormalRows:
    rows = OrthonormalRows(rows_per_block)
    for vector in matrix:
        rows.append(vector)
    return rows


@pytest.mark.parametrize("rows_per_block", [1, 3, 4, 16])
def test_blocks_hold_the_appended_rows_in_order(rows_per_block):
    matrix = orthonormal_rows(7, 20, seed=0)
    rows = rows_of(matrix, rows_per_block)
    assert rows.size == 7
    assert all(len(block) <= rows_per_block for block in rows.blocks())
    assert torch.equal(torch.cat(rows.blocks()), matrix)


@pytest.mark.parametrize("rows_per_block", [1, 3, 16])
@pytest.mark.parametrize("columns", [1, 6, 1000])
def test_replace_is_combine_in_place_and_growth_goes_on(rows_per_block, columns):
    matrix = orthonormal_rows(7, 20, seed=1)
    weights = orthonormal_rows(4, 7, seed=2)
    rows = rows_of(matrix, rows_per_block)
    torch.testing.assert_close(rows.combine(weights), weights @ matrix)
    rows.replace(weights, columns=columns)
    torch.testing.assert_close(torch.cat(rows.blocks()), weights @ matrix)
    extra = gaussian_vector(20, seed=3)
    rows.append(extra)
    assert rows.size == 5
    assert torch.equal(torch.cat(rows.blocks())[-1], extra)


def test_orthogonalise_splits_a_vector_into_span_and_complement():
    basis = orthonormal_rows(6, 30, seed=0)
    vector = gaussian_vector(30, seed=1)
    rest = vector.clone()
    coefficients = orthogonalise_(rest, [basis[:2], basis[2:]])
    torch.testing.assert_close(coefficients @ basis + rest, vector)
    assert (basis @ rest).abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_passes_stay_orthogonal_when_almost_all_cancels(dtype):
    basis = orthonormal_rows(6, 30, seed=0).to(dtype)
    outside = gaussian_vector(30, seed=1, dtype=dtype)
    orthogonalise_(outside, [basis])
    eps = torch.finfo(dtype).eps
    rest = basis.sum(dim=0) + 100 * eps * outside
    orthogonalise_(rest, [basis])
    assert (basis @ rest).abs().max() < 10 * eps * norm64(rest)


def test_orthogonalise_against_nothing_changes_nothing():
    vector = gaussian_vector(5, seed=0)
    rest = vector.clone()
    assert len(orthogonalise_(rest, [])) == 0
    assert torch.equal(rest, vector)


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_inner_product_is_accumulated_in_float64(piece):
    ones = torch.ones(100)
    tenth = torch.full((100,), 0.1)
    assert dot64(ones, tenth, piece) == pytest.approx(100 * float(tenth[0].double()), rel=1e-15)
    assert norm64(tenth) == pytest.approx(10 * float(tenth[0].double()), rel=1e-15)


def test_deflation_splits_trace_and_frobenius_norm_for_any_orthonormal_vectors():
    matrix = rotated([5.0, 3.0, 1.0, -1.0, -4.0, 0.5, 0.2], seed=4)
    basis = orthonormal_rows(3, 7, seed=5)
    projector = torch.eye(7, dtype=torch.float64) - basis.T @ basis
    rest = projector @ matrix @ projector
    leak = float((projector @ matrix @ basis.T).square().sum())
    known = Deflation(torch.linalg.eigvalsh(basis @ matrix @ basis.T), (basis,), leak)
    assert known.values.sum() + rest.trace() == pytest.approx(float(matrix.trace()), rel=1e-13)
    total = known.values.square().sum() + 2 * known.leak + rest.square().sum()
    assert total == pytest.approx(float(matrix.square().sum()), rel=1e-13)


def test_long_float32_vectors_stay_orthogonal_to_rounding():
    """Inner products of 2²² terms, which float32 sums would leave wrong in the fifth digit."""
    size = 1 << 22
    start = torch.rand(size, generator=torch.Generator().manual_seed(0)) + 1  # all of one sign: nothing cancels
    row = start / norm64(start)
    vector = start + torch.randn(size, generator=torch.Generator().manual_seed(1))
    expected = dot64(row, vector)
    coefficients = orthogonalise_(vector, [row[None]])
    assert float(coefficients[0]) == pytest.approx(expected, rel=1e-6)
    assert abs(dot64(row, vector)) < 1e-7 * norm64(vector)
