"""Linear CKA against dense oracles, its invariances, and what it says of independent data."""

import cka
import pytest
import torch
from torch import Tensor

from lmc_lightning.landscape.similarity.cka import Representation, similarity
from tests.problems import normal, rotation

N = 40


def both(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Debiased and biased CKA of two sets of features."""
    found = similarity({"x": Representation.of(x)}, {"y": Representation.of(y)})
    return float(found.debiased), float(found.biased)


def dense_hsic(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Unbiased HSIC by U-centred Gram matrices, with no diagonal, and biased HSIC by centring matrices."""
    n = len(x)
    k, upper = x @ x.T, y @ y.T
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    biased = torch.trace(k @ centring @ upper @ centring) / (n - 1) ** 2
    k, upper = (m - torch.diag(m.diagonal()) for m in (k, upper))
    ones = torch.ones(n, dtype=torch.float64)
    unbiased = (
        torch.trace(k @ upper) + k.sum() * upper.sum() / ((n - 1) * (n - 2)) - 2 * (ones @ k @ upper @ ones) / (n - 2)
    )
    return float(unbiased / (n * (n - 3))), float(biased)


def dense_cka(x: Tensor, y: Tensor) -> tuple[float, float]:
    pairs = zip(dense_hsic(x, y), dense_hsic(x, x), dense_hsic(y, y), strict=True)
    debiased, biased = (both / (a * b) ** 0.5 for both, a, b in pairs)
    return debiased, biased


def features(width: int, seed: int) -> Tensor:
    """Correlated, far from centred."""
    return normal(N, 3, seed=1) @ normal(3, width, seed=seed) + 0.5 * normal(N, width, seed=seed + 1) + 3.0


@pytest.mark.parametrize("widths", [(5, 7), (5, 90), (90, 5), (90, 120), (N, N)], ids=str)
def test_streamed_sums_equal_dense_gram_matrices(widths: tuple[int, int]) -> None:
    x, y = features(widths[0], 10), features(widths[1], 20)
    assert both(x, y) == pytest.approx(dense_cka(x, y), rel=1e-10)


def test_the_sums_are_those_of_features_that_are_not_centred() -> None:
    """The formula in C = XᵀY, sums and squared norms, without centring first."""
    x, y = features(6, 10), features(4, 20)
    n, a, b, c = N, x.square().sum(1), y.square().sum(1), x.T @ y
    sx, sy = x.sum(0), y.sum(0)
    m = sx @ c @ sy - sx @ (x.T @ b) - (y.T @ a) @ sy + a @ b
    k, length = sx @ sx - a.sum(), sy @ sy - b.sum()
    hsic = c.square().sum() - a @ b + k * length / ((n - 1) * (n - 2)) - 2 * m / (n - 2)
    assert float(hsic / (n * (n - 3))) == pytest.approx(dense_hsic(x, y)[0], rel=1e-10)


@pytest.mark.parametrize("width", [6, 80], ids=["features", "gram"])
def test_rotations_scale_and_offset_do_not_matter(width: int) -> None:
    x, y = features(width, 10), features(9, 20)
    assert both(x, x @ rotation(width)) == pytest.approx((1.0, 1.0), abs=1e-12)
    moved = 17.0 * x @ rotation(width) + 5.0
    assert both(moved, y) == pytest.approx(both(x, y), rel=1e-10)
    assert both(x, y) == pytest.approx(both(y, x), rel=1e-12)


def test_independent_gaussians_are_not_alike_once_the_bias_is_out() -> None:
    """Over 50 draws of p > n features the mean is 0 within three standard errors; biased, they look alike."""
    draws = [both(normal(N, 100, seed=2 * i), normal(N, 100, seed=2 * i + 1)) for i in range(50)]
    debiased, biased = torch.tensor(draws, dtype=torch.float64).T
    assert abs(float(debiased.mean())) < 3 * float(debiased.std()) / 50**0.5
    # The correlation of n(n−3)/2 free entries; a standard deviation of 50 draws is known to 10 %.
    assert float(debiased.std()) == pytest.approx((2 / (N * (N - 3))) ** 0.5, rel=0.3)
    assert float(biased.mean()) > 0.6


def test_the_unbiased_estimate_does_not_depend_on_the_number_of_examples() -> None:
    x, y = normal(3000, 4, seed=3), normal(3000, 4, seed=4)
    y = x + y  # population CKA of Σ = I: ‖Σ_xy‖² / (‖Σ_xx‖ ‖Σ_yy‖) = 1/2
    small = torch.tensor([both(x[i : i + 30], y[i : i + 30]) for i in range(0, 3000, 30)], dtype=torch.float64)
    debiased, biased = small.mean(0).tolist()
    assert debiased == pytest.approx(0.5, abs=0.03)
    assert biased > 0.53
    assert both(x, y)[0] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("width", [3, 250], ids=["features", "gram"])
def test_the_standard_error_is_the_spread_over_samples(width: int) -> None:
    """Over 150 samples of 200 examples, whose standard deviation is known to 6 %."""
    found = []
    for seed in range(150):
        x, noise = normal(200, 3, seed=2 * seed), normal(200, 3, seed=2 * seed + 1)
        lift = normal(3, width, seed=999)
        of = similarity({"x": Representation.of(x @ lift)}, {"y": Representation.of(x + noise)})
        found.append([float(of.debiased), float(of.stderr)])
    values, errors = torch.tensor(found, dtype=torch.float64).T
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.18)
    same = similarity({"x": Representation.of(x)}, {"y": Representation.of(2 * x)})
    assert float(same.stderr) == pytest.approx(0.0, abs=1e-12)


def test_nothing_is_said_of_constant_layers_or_three_examples() -> None:
    constant = similarity({"c": Representation.of(torch.ones(N, 3))}, {"x": Representation.of(features(3, 10))})
    assert bool(constant.debiased.isnan())
    assert bool(constant.biased.isnan())
    assert bool(constant.stderr.isnan())
    few = similarity({"x": Representation.of(normal(3, 2, seed=1))}, {"x": Representation.of(normal(3, 2, seed=2))})
    assert bool(few.debiased.isnan())
    assert 0 <= float(few.biased) <= 1


def test_all_layers_are_compared_with_all() -> None:
    of_a = {"one": Representation.of(features(3, 10)), "two": Representation.of(features(70, 20))}
    of_b = {"two": of_a["two"], "three": of_a["one"], "four": Representation.of(features(4, 30))}
    found = similarity(of_a, of_b)
    assert found.debiased.shape == (2, 3)
    assert float(found.debiased[1, 0]) == float(found.debiased[0, 1]) == pytest.approx(1.0)
    assert found.same_layers() == {"two": tuple(float(t[1, 0]) for t in (found.debiased, found.biased, found.stderr))}
    assert found.num_examples == N


def test_examples_must_be_the_same() -> None:
    of_a, of_b = ({"x": Representation.of(normal(n, 3, seed=1))} for n in (10, 11))
    with pytest.raises(ValueError, match=r"on the same examples, got numbers of examples \[10, 11\]"):
        similarity(of_a, of_b)


def test_pytorch_cka_says_the_same() -> None:
    x, y = features(6, 10), features(90, 20)
    theirs = cka.cka_from_features([x, y], [y, x, features(7, 40)])
    of_a, of_b = ({str(i): Representation.of(f) for i, f in enumerate(of)} for of in ([x, y], [y, x, features(7, 40)]))
    torch.testing.assert_close(similarity(of_a, of_b).debiased, theirs, rtol=1e-10, atol=1e-12)
