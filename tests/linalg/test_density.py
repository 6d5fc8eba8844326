import math

import pytest
import torch

from lmc_lightning.linalg.density import Quadrature, spectral_quadrature
from lmc_lightning.linalg.eigen import extreme_eigenpairs
from lmc_lightning.linalg.lanczos import lanczos
from lmc_lightning.linalg.subspace import Deflation
from tests.linalg.spectra import (
    DTYPES,
    SCALES,
    SPECTRA,
    Counted,
    gaussian_vector,
    orthonormal_rows,
    rotated,
    sign_vectors,
)


def eigenvectors_as_deflation(matrix: torch.Tensor, positions: list[int]) -> Deflation:
    values, vectors = torch.linalg.eigh(matrix)
    return Deflation(values[positions], (vectors.T[positions].contiguous(),), 0.0)


def any_vectors_as_deflation(matrix: torch.Tensor, count: int) -> Deflation:
    basis = orthonormal_rows(count, len(matrix), seed=8)
    within = basis @ matrix @ basis.T
    rest = matrix @ basis.T - basis.T @ within
    return Deflation(torch.linalg.eigvalsh(within), (basis,), float(rest.square().sum()))


def exact_quadrature(eigenvalues: list[float]) -> Quadrature:
    nodes = torch.tensor([eigenvalues], dtype=torch.float64)
    return Quadrature(nodes, torch.full_like(nodes, 1 / nodes.numel()), nodes.numel(), 0, 0.0, 0)


@pytest.mark.parametrize("num_steps", [2, 3, 5])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["separated", "clustered", "negative"])
def test_gauss_exactness_up_to_degree_2m_minus_1_and_not_2m(name, scale, num_steps):
    matrix = rotated(torch.tensor(SPECTRA[name]) * scale)
    probes = torch.stack([gaussian_vector(12, seed) for seed in range(3)])
    rule = spectral_quadrature(lambda v: matrix @ v, probes, num_steps)
    size = float(matrix.norm())
    for degree in range(2 * num_steps + 1):
        power = torch.linalg.matrix_power(matrix / size, degree)
        expected = torch.stack([v @ power @ v / (v @ v) for v in probes])
        error = expected - (rule.weights * (rule.nodes / size) ** degree).sum(dim=1)
        if degree < 2 * num_steps:
            assert error.abs().max() < 1e-14
    runs = [lanczos(lambda v: matrix @ v / size, v, num_steps) for v in probes]
    remainder = torch.stack([(run.betas.prod() * run.residual_norm) ** 2 for run in runs])
    assert remainder.min() > 1e-11
    torch.testing.assert_close(error, remainder, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SPECTRA)
def test_full_depth_reproduces_the_spectral_measure_of_a_probe(name, scale, dtype):
    spectrum = torch.tensor(SPECTRA[name], dtype=torch.float64) * scale
    matrix = rotated(spectrum, dtype=dtype)
    probe = gaussian_vector(12, seed=2, dtype=dtype)
    rule = spectral_quadrature(lambda v: matrix @ v, [probe], 30)
    values, vectors = torch.linalg.eigh(matrix.double())
    masses = (vectors.T @ probe.double()).square() / float(probe.double() @ probe.double())
    distinct = torch.unique(spectrum)
    perturbation = torch.finfo(dtype).eps * spectrum.abs().max() / distinct.diff().min()
    for edge in (distinct[1:] + distinct[:-1]) / 2:
        expected = masses[values <= edge].sum()
        assert float(rule.weights[rule.nodes <= edge].sum()) == pytest.approx(
            float(expected), abs=4 * float(perturbation)
        )


def test_average_over_all_sign_vectors_is_the_trace_with_the_known_variance():
    matrix = rotated([4.0, 2.0, 1.0, 0.5, -0.5, -3.0], seed=3)
    rule = spectral_quadrature(lambda v: matrix @ v, sign_vectors(6), 3)
    assert rule.trace == pytest.approx(float(matrix.trace()), rel=1e-13)
    assert rule.frobenius_sq == pytest.approx(float(matrix.square().sum()), rel=1e-13)
    cubed = torch.linalg.matrix_power(matrix, 3).trace()
    assert rule.moment(3)[0] == pytest.approx(float(cubed), rel=1e-12)
    variance = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    assert rule.trace_stderr**2 * 63 == pytest.approx(float(variance), rel=1e-12)
    torch.testing.assert_close(rule.weights.sum(dim=1), torch.ones(64, dtype=torch.float64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("positions", [[0], [5], [0, 4, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]])
def test_deflated_moments_stay_unbiased_over_all_sign_vectors(positions):
    matrix = rotated([4.0, 2.0, 1.0, 0.5, -0.5, -3.0], seed=3)
    known = eigenvectors_as_deflation(matrix, positions)
    rule = spectral_quadrature(lambda v: matrix @ v, sign_vectors(6), 3, deflation=known)
    for power in range(6):
        expected = float(torch.linalg.matrix_power(matrix, power).trace())
        assert rule.moment(power)[0] == pytest.approx(expected, rel=1e-12)
    assert rule.num_deflated == len(positions)
    assert torch.equal(rule.nodes[:, : len(positions)], known.values.expand(64, -1))
    assert (rule.weights[:, : len(positions)] == 1 / 6).all()


def test_deflated_variance_is_that_of_the_projected_operator():
    matrix = rotated([40.0, 2.0, 1.0, 0.5, -0.5, -30.0], seed=3)
    known = eigenvectors_as_deflation(matrix, [0, 5])
    projector = torch.eye(6, dtype=torch.float64) - known.blocks[0].T @ known.blocks[0]
    rest = projector @ matrix @ projector
    rule = spectral_quadrature(lambda v: matrix @ v, sign_vectors(6), 2, deflation=known)
    variance = 2 * (rest.square().sum() - rest.diagonal().square().sum())
    assert rule.trace_stderr**2 * 63 == pytest.approx(float(variance), rel=1e-11)
    plain = spectral_quadrature(lambda v: matrix @ v, sign_vectors(6), 2)
    assert rule.trace_stderr < plain.trace_stderr / 10


@pytest.mark.parametrize("count", [1, 3])
def test_trace_and_frobenius_norm_are_unbiased_for_vectors_that_are_no_eigenvectors(count):
    matrix = rotated([4.0, 2.0, 1.0, 0.5, -0.5, -3.0], seed=3)
    known = any_vectors_as_deflation(matrix, count)
    rule = spectral_quadrature(lambda v: matrix @ v, sign_vectors(6), 2, deflation=known)
    assert rule.trace == pytest.approx(float(matrix.trace()), rel=1e-12)
    assert rule.frobenius_sq == pytest.approx(float(matrix.square().sum()), rel=1e-12)
    assert known.leak > 0.1


def test_deflation_by_converged_pairs_and_by_the_whole_krylov_space():
    spectrum = torch.cat([torch.tensor([40.0, 22.0, 15.0]), torch.linspace(2, -1, 97)])
    matrix = rotated(spectrum)
    pairs = extreme_eigenpairs(lambda v: matrix @ v, gaussian_vector(100, 0), num_largest=3, num_smallest=1)
    space = lanczos(lambda v: matrix @ v, gaussian_vector(100, 0), pairs.num_matvecs)
    probes = [torch.sign(gaussian_vector(100, seed)) for seed in range(10, 26)]
    plain, some, whole = (
        spectral_quadrature(lambda v: matrix @ v, probes, 6, deflation=known)
        for known in (None, pairs.deflation(), space.deflation())
    )
    for rule in (some, whole):
        assert rule.trace_stderr < plain.trace_stderr / 3
        assert rule.frobenius_sq_stderr < plain.frobenius_sq_stderr / 10
    for rule in (plain, some, whole):
        assert abs(rule.trace - float(spectrum.sum())) < 4 * rule.trace_stderr
        assert abs(rule.frobenius_sq - float(spectrum.square().sum())) < 4 * rule.frobenius_sq_stderr


def test_missed_copy_of_a_repeated_eigenvalue_shows_up_in_the_complement():
    spectrum = torch.cat([torch.tensor([40.0, 40.0, 15.0, 9.0, 7.0, 5.0]), torch.linspace(2, -1, 194)])
    matrix = rotated(spectrum)
    pairs = extreme_eigenpairs(lambda v: matrix @ v, gaussian_vector(200, 0), num_largest=2, num_smallest=0)
    assert pairs.eigenvalues.tolist() == pytest.approx([40.0, 15.0], rel=1e-6)
    rule = spectral_quadrature(lambda v: matrix @ v, [gaussian_vector(200, 1)], 12, deflation=pairs.deflation())
    assert float(rule.nodes[:, rule.num_deflated :].max()) == pytest.approx(40.0, rel=1e-6)


def test_gaussian_probes_count_by_their_direction_only():
    matrix = rotated(SPECTRA["separated"])
    probe = gaussian_vector(12, seed=0)
    one = spectral_quadrature(lambda v: matrix @ v, [probe], 4)
    other = spectral_quadrature(lambda v: matrix @ v, [1e-3 * probe], 4)
    assert one.trace == pytest.approx(other.trace, rel=1e-12)


def test_rows_that_break_down_early_are_padded_without_weight():
    matrix = rotated([3.0, 2.0, 1.0, 1.0, 1.0, -1.0])
    probes = [torch.linalg.eigh(matrix).eigenvectors[:, 0], gaussian_vector(6, seed=0)]
    counted = Counted(matrix)
    rule = spectral_quadrature(counted, probes, 5)
    assert rule.nodes.shape == rule.weights.shape == (2, 4)
    assert rule.weights[0].tolist() == pytest.approx([1.0, 0, 0, 0])
    assert rule.num_matvecs == counted.count == 1 + 4
    assert rule.trace == pytest.approx(
        (6 * -1.0 + 6 * float(probes[1] @ matrix @ probes[1] / probes[1].square().sum())) / 2
    )


@pytest.mark.parametrize("block_size", [2, 3, 8])
def test_blocks_of_probes_give_the_same_rule_and_count_every_product(block_size):
    matrix = rotated(SPECTRA["separated"])
    known = eigenvectors_as_deflation(matrix, [0, 11])
    probes = [gaussian_vector(12, seed) for seed in range(5)] + [torch.linalg.eigh(matrix).eigenvectors[:, 3]]
    single, blocked = Counted(matrix), Counted(matrix)
    one = spectral_quadrature(single, probes, 4, deflation=known)
    other = spectral_quadrature(blocked, probes, 4, deflation=known, block_size=block_size)
    torch.testing.assert_close(one.nodes, other.nodes)
    torch.testing.assert_close(one.weights, other.weights)
    assert one.num_matvecs == other.num_matvecs == single.count == blocked.count == 5 * 4 + 1


def test_stops_between_probes_and_never_before_the_first():
    matrix = Counted(rotated(SPECTRA["separated"]))
    probes = (gaussian_vector(12, seed) for seed in range(10))
    rule = spectral_quadrature(matrix, probes, 3, should_stop=lambda: matrix.count >= 5)
    assert len(rule.nodes) == 2
    assert rule.num_matvecs == 6


def test_single_probe_has_no_standard_error():
    matrix = rotated(SPECTRA["separated"])
    rule = spectral_quadrature(lambda v: matrix @ v, [gaussian_vector(12, seed=0)], 3)
    assert math.isnan(rule.trace_stderr)
    assert math.isnan(rule.frobenius_sq_stderr)


def test_density_integrates_to_the_total_weight_and_is_the_gaussian_mixture():
    rule = Quadrature(
        nodes=torch.tensor([[0.0, 1.0], [2.0, 5.0]], dtype=torch.float64),
        weights=torch.tensor([[0.25, 0.75], [0.5, 0.6]], dtype=torch.float64),
        num_params=10,
        num_deflated=0,
        leak=0.0,
        num_matvecs=4,
    )
    grid = torch.linspace(-2, 7, 2001, dtype=torch.float64)
    density = rule.density(grid, bandwidth=0.1)
    assert float(torch.trapezoid(density, grid)) == pytest.approx((1 + 1.1) / 2, rel=1e-10)
    peak = 0.5 * 0.75 / (0.1 * math.sqrt(2 * math.pi))
    assert float(rule.density(torch.tensor([1.0]), 0.1)) == pytest.approx(peak, rel=1e-12)
    mean = float(torch.trapezoid(density * grid, grid))
    assert mean == pytest.approx(0.5 * (0.75 + 1.0 + 3.0), rel=1e-10)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.nan])
def test_density_needs_a_bandwidth(bandwidth):
    with pytest.raises(ValueError, match="must be positive"):
        exact_quadrature([1.0]).density(torch.zeros(1), bandwidth)


def test_masses_of_an_exact_spectrum():
    rule = exact_quadrature([5.0, 1.0, 1e-9, 0.0, -1e-9, -2.0, -3.0, 4.0])
    assert rule.negative_mass(1e-6)[0] == pytest.approx(2 / 8)
    assert rule.null_mass(1e-6)[0] == pytest.approx(3 / 8)
    assert rule.negative_mass(0)[0] == pytest.approx(3 / 8)
    assert rule.positive_trace()[0] == pytest.approx(10 + 1e-9)


def test_entropy_rank_counts_equal_eigenvalues_and_ignores_the_rest():
    assert exact_quadrature([2.0] * 5 + [0.0] * 20 + [-1.0] * 7).effective_rank_entropy() == pytest.approx(5)
    shares = [0.5, 0.25, 0.25]
    entropy = -sum(q * math.log(q) for q in shares)
    rank = exact_quadrature([8.0, 4.0, 4.0, -3.0, 0.0]).effective_rank_entropy()
    assert rank == pytest.approx(math.exp(entropy))
    assert exact_quadrature([-1.0, 0.0]).effective_rank_entropy() == 0


def test_entropy_rank_from_a_quadrature_of_full_depth():
    matrix = rotated([8.0, 4.0, 4.0, 1.0, -3.0, 0.0])
    rule = spectral_quadrature(lambda v: matrix @ v, 6**0.5 * torch.linalg.eigh(matrix).eigenvectors.T, 2)
    q = torch.tensor([8.0, 4.0, 4.0, 1.0]) / 17
    assert rule.effective_rank_entropy() == pytest.approx(float(torch.exp(-(q * q.log()).sum())), rel=1e-6)


def test_agrees_with_lanczos_of_the_same_probe():
    matrix = rotated(SPECTRA["clustered"])
    probe = gaussian_vector(12, seed=4)
    rule = spectral_quadrature(lambda v: matrix @ v, [probe], 5)
    tridiagonal = lanczos(lambda v: matrix @ v, probe, 5).matrix()
    values, vectors = torch.linalg.eigh(tridiagonal)
    torch.testing.assert_close(rule.nodes[0].flip(0), values)
    torch.testing.assert_close(rule.weights[0].flip(0), vectors[0] ** 2)


@pytest.mark.parametrize(
    ("probes", "num_steps", "block_size", "message"),
    [
        ([], 3, 1, "probes is empty"),
        ([torch.ones(4)], 1, 1, "num_steps >= 2 and block_size >= 1, got 1 and 1"),
        ([torch.ones(4)], 3, 0, "block_size >= 1, got 3 and 0"),
        ([torch.zeros(4)], 3, 1, "finite, non-zero"),
    ],
)
def test_impossible_input_raises(probes, num_steps, block_size, message):
    with pytest.raises(ValueError, match=message):
        spectral_quadrature(lambda v: v, probes, num_steps, block_size=block_size)
