import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from lmc_lightning.landscape.statistics.bands import (
    seed_standard_error,
    standard_error,
    student_quantile,
    sup_t_quantile,
)
from tests.problems import generator, normal


def equal(size: int) -> Tensor:
    return torch.full((size,), 1 / size, dtype=torch.float64)


def null_curves(num_curves: int, size: int, num_points: int = 25) -> Tensor:
    """Smooth random functions of t that are 0 at both ends and in expectation, ``(num_curves, num_points, size)``."""
    ts = torch.linspace(0, 1, num_points, dtype=torch.float64)
    waves = torch.stack([torch.sin(k * math.pi * ts) / k for k in range(1, 9)], 1)
    draws = torch.randn(num_curves, 8, size, generator=generator(0), dtype=torch.float64)
    curves = waves @ draws
    curves[:, [0, -1]] = 0
    return curves


def test_equal_weights_give_the_textbook_standard_error() -> None:
    samples = torch.randn(3, 50, generator=generator(1), dtype=torch.float64)
    torch.testing.assert_close(standard_error(samples, equal(50)), samples.std(1) / 50**0.5, rtol=1e-13, atol=0)


def test_unequal_weights_give_the_weighted_formula() -> None:
    samples, weights = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    mean = 0.5 + 0.5 + 1
    expected = math.sqrt((0.25 * (1 - mean) ** 2 + (0.25 * (2 - mean)) ** 2 + (0.25 * (4 - mean)) ** 2) * 3 / 2)
    assert float(standard_error(samples, weights)) == pytest.approx(expected, rel=1e-14)


def test_one_sample_has_no_standard_error_and_fewer_than_eight_no_interval() -> None:
    assert standard_error(torch.ones(2, 1).double(), equal(1)).isnan().all()
    assert math.isnan(student_quantile(7))
    assert student_quantile(8) == pytest.approx(2.364624, abs=1e-6)
    assert student_quantile(10**9) == pytest.approx(1.959964, abs=1e-6)
    assert math.isnan(sup_t_quantile(torch.randn(3, 7, generator=generator(0)).double(), equal(7)))


def test_one_curve_of_one_point_has_the_normal_quantile() -> None:
    samples = torch.randn(1, 2000, generator=generator(2), dtype=torch.float64)
    assert sup_t_quantile(samples, equal(2000), num_bootstrap=20_000) == pytest.approx(1.96, abs=0.04)


def test_independent_points_have_the_sidak_quantile() -> None:
    samples = torch.randn(25, 2000, generator=generator(3), dtype=torch.float64)
    assert sup_t_quantile(samples, equal(2000), num_bootstrap=10_000) == pytest.approx(3.08, abs=0.06)


def test_no_variation_has_no_band_and_scale_does_not_matter() -> None:
    samples = torch.randn(4, 40, generator=generator(4), dtype=torch.float64)
    assert sup_t_quantile(torch.zeros(3, 40).double(), equal(40)) == 0
    padded = torch.cat([torch.zeros(1, 40), 1e-9 * samples, torch.full((1, 40), torch.nan)])
    assert sup_t_quantile(padded, equal(40)) == pytest.approx(sup_t_quantile(samples, equal(40)), rel=1e-9)


def test_the_seed_decides() -> None:
    samples = torch.randn(4, 40, generator=generator(5), dtype=torch.float64)
    assert sup_t_quantile(samples, equal(40)) == sup_t_quantile(samples, equal(40))
    assert sup_t_quantile(samples, equal(40)) != sup_t_quantile(samples, equal(40), seed=1)


def test_blocks_of_resamples_are_one_sample_of_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = torch.randn(4, 40, generator=generator(6), dtype=torch.float64)
    whole = sup_t_quantile(samples, equal(40))
    monkeypatch.setattr("lmc_lightning.landscape.statistics.bands._BLOCK_ENTRIES", 40 * 100)
    assert sup_t_quantile(samples, equal(40)) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("size", [16, 128])
def test_bands_cover_null_curves_as_often_as_they_say_and_two_standard_errors_do_not(size: int) -> None:
    curves = null_curves(200, size)
    weights = equal(size)
    means, stderrs = (curves @ weights)[:, 1:-1], standard_error(curves, weights)[:, 1:-1]
    quantiles = torch.tensor([sup_t_quantile(c, weights, num_bootstrap=400) for c in curves]).double()
    covered = (means.abs() <= quantiles[:, None] * stderrs).all(1).double().mean()
    claimed = (means > quantiles[:, None] * stderrs).any(1).double().mean()
    naive = (means > 2 * stderrs).any(1).double().mean()
    assert 0.90 <= covered <= 0.99
    assert claimed <= 0.05
    assert naive > 0.05


def test_of_independent_repetitions_the_error_over_seeds_is_that_of_a_mean() -> None:
    values = normal(7, seed=3).tolist()
    pairs = [((r, "trunk"), (r, "child")) for r in range(7)]
    stderr, num_nodes = seed_standard_error(pairs, values)
    assert num_nodes == 7
    assert stderr == pytest.approx(float(torch.tensor(values).std() / 7**0.5))


def test_of_children_of_one_trunk_it_is_that_of_the_mean_over_children() -> None:
    values = [0.1, 0.4, 0.2, 0.5]
    stderr, num_nodes = seed_standard_error([("trunk", j) for j in range(4)], values)
    assert num_nodes == 4
    assert stderr == pytest.approx(float(torch.tensor(values).double().std() / 2))


def test_of_all_pairs_of_siblings_it_is_the_jackknife_of_a_statistic_of_two() -> None:
    # |a − b| over all pairs, Gini's mean difference, whose variance is known for a normal sample.
    draws = normal(400, 12, seed=4)
    pairs = list(combinations(range(12), 2))
    found = torch.tensor(
        [seed_standard_error(pairs, [float(abs(row[a] - row[b])) for a, b in pairs])[0] ** 2 for row in draws]
    )
    exact = torch.stack([(row[:, None] - row).abs().sum() / (12 * 11) for row in draws]).var()
    assert 0.95 < float(found.mean() / exact) < 1.4  # on average too large rather than too small (Efron and Stein)


def test_repetitions_are_the_nodes_where_there_are_several() -> None:
    pairs = [((r, "trunk"), (r, j)) for r in range(3) for j in range(3)]
    values = [float(r) for r in range(3) for _ in range(3)]
    stderr, num_nodes = seed_standard_error(pairs, values)
    assert num_nodes == 3
    assert stderr == pytest.approx((1 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("pairs", "num_nodes"), [([("t", 0)], 1), ([("t", 0), ("t", 1)], 2), ([("a", "b"), ("c", "d")], 2)]
)
def test_below_three_nodes_there_is_no_error_over_seeds(pairs: list[tuple[str, str]], num_nodes: int) -> None:
    stderr, found = seed_standard_error(pairs, [1.0] * len(pairs))
    assert math.isnan(stderr)
    assert found == num_nodes
