"""Volumes of low loss against closed forms, and what is compared between networks."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.volume.estimate import direction, filter_scales, minimum_volumes
from lmc_lightning.landscape.volume.result import Volume, VolumeSettings
from lmc_lightning.landscape.volume.tables import order_violations, rank_table, ranking_stability, volume_table
from tests.landscape.surfaces import Counting, at_minimum, linear, rescaled
from tests.problems import Vector, normal

LIGHT: dict[str, Any] = {"num_checked": 0}


def volume(objective: Objective, directions: Callable[[int], Tensor] | None = None, **options: Any) -> Volume:
    settings = VolumeSettings(**{**LIGHT, **options})
    return minimum_volumes(objective, objective.theta(), settings, directions=directions)[settings.thresholds[0]]


def angles(number: int) -> dict[str, Any]:
    """Equally spaced directions in the plane: means over them are exact for smooth functions of the angle."""

    def unit(index: int) -> Tensor:
        phi = 2 * math.pi * index / number
        return torch.tensor([math.cos(phi), math.sin(phi)], dtype=torch.float64)

    return {"directions": unit, "num_directions": number}


def log_ball(dimension: int) -> float:
    return dimension / 2 * math.log(math.pi) - math.lgamma(dimension / 2 + 1)


def log_ellipsoid(eigenvalues: list[float], tau: float) -> float:
    """½ Σ λ_i x_i² ≤ τ."""
    size = len(eigenvalues)
    return log_ball(size) + size / 2 * math.log(2 * tau) - 0.5 * sum(map(math.log, eigenvalues))


# -- closed forms ------------------------------------------------------------------------------------------------------


def test_the_unit_ball_has_its_known_volumes() -> None:
    for size, expected in ((1, 2.0), (2, math.pi), (3, 4 / 3 * math.pi), (8, math.pi**4 / 24)):
        ball = Volume(0.1, VolumeSettings(), 0.0, torch.ones(3).double(), torch.zeros(3).bool(), size)
        assert math.exp(ball.log_volume) == pytest.approx(expected, rel=1e-12)


def test_a_ball_is_known_from_any_ray() -> None:
    found = volume(at_minimum([2.5] * 8), num_directions=5, thresholds=(0.3,), rtol=1e-9)
    torch.testing.assert_close(found.radii, torch.full((5,), math.sqrt(2 * 0.3 / 2.5), dtype=torch.float64))
    assert found.log_volume == pytest.approx(log_ellipsoid([2.5] * 8, 0.3), rel=1e-7)
    assert found.log_volume_bound == pytest.approx(found.log_volume, rel=1e-7)
    assert found.effective_sample_size == pytest.approx(5)
    assert found.log_mean_r_pow_stderr is not None
    assert found.mean_log_r_stderr == pytest.approx(0, abs=1e-7)


def test_an_ellipse_by_equally_spaced_rays() -> None:
    found = volume(at_minimum([6.0, 0.5]), **angles(64), thresholds=(0.2,), rtol=1e-8)
    assert found.log_volume == pytest.approx(log_ellipsoid([6.0, 0.5], 0.2), abs=1e-6)


def test_an_ellipsoid_by_random_rays_within_its_standard_error() -> None:
    spectrum = [4.0, 2.0, 1.0, 0.5]
    found = volume(at_minimum(spectrum), num_directions=300, thresholds=(0.2,))
    error = found.log_volume - log_ellipsoid(spectrum, 0.2)
    assert abs(error) < 3 * found.log_mean_r_pow_stderr < 0.3
    assert found.log_volume_bound < found.log_volume
    assert 8 < found.effective_sample_size < 300


def test_the_reported_error_of_log_e_r_pow_is_that_of_repetitions() -> None:
    radii = (0.3 * normal(200, 64, seed=1)).exp()
    found = [Volume(0.1, VolumeSettings(), 0.0, row, torch.zeros(64).bool(), 3) for row in radii]
    spread = torch.tensor([v.log_mean_r_pow for v in found]).std()
    assert float(torch.tensor([v.log_mean_r_pow_stderr for v in found]).median()) == pytest.approx(
        float(spread), rel=0.35
    )
    few = Volume(0.1, VolumeSettings(), 0.0, radii[0], torch.zeros(64).bool(), 10_000)
    assert math.isnan(few.log_mean_r_pow_stderr)
    assert few.effective_sample_size < 8


# -- coordinates -------------------------------------------------------------------------------------------------------


class TwoFilters(nn.Module):
    """Two filters of one weight each, of different norms."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2, bias=False).double()
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[3.0], [-0.4]]))


def bowl(module: TwoFilters, batch: Any) -> Tensor:
    away = module.layer.weight.flatten() - torch.tensor([3.0, -0.4]).double()
    return 0.5 * (torch.tensor([2.0, 5.0]).double() * away.square()).sum() + 0.8 * away.prod()


def test_plain_and_filter_coordinates_give_the_same_euclidean_volume() -> None:
    objective = Objective(TwoFilters(), [torch.zeros(1)], bowl)
    options = {**angles(100), "thresholds": (0.2,), "rtol": 1e-8}
    plain, filtered = (volume(objective, **options, coordinates=c) for c in ("plain", "filter"))
    exact = math.log(math.pi * 2 * 0.2 / math.sqrt(2 * 5 - 0.8**2))
    assert plain.log_volume == pytest.approx(exact, abs=1e-6)
    assert filtered.log_volume == pytest.approx(exact, abs=1e-6)
    assert filtered.log_jacobian == pytest.approx(math.log(3.0 * 0.4))
    assert filtered.log_volume_normalised == pytest.approx(exact - math.log(1.2), abs=1e-6)
    assert math.isnan(plain.log_volume_normalised)


def test_filter_coordinates_of_several_weights_find_an_ellipsoid_within_their_error() -> None:
    spectrum, weight = torch.tensor([4.0, 2.0, 1.0, 0.5]).double(), normal(2, 2, seed=8)
    module = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(weight)

    def loss_fn(m: nn.Linear, batch: Any) -> Tensor:
        return 0.5 * (spectrum * (m.weight - weight).flatten().square()).sum()

    objective = Objective(module, [torch.zeros(1)], loss_fn)
    found = volume(objective, thresholds=(0.2,), num_directions=300, coordinates="filter")
    assert found.log_jacobian == pytest.approx(2 * float(weight.norm(dim=1).log().sum()))
    error = found.log_volume - log_ellipsoid(spectrum.tolist(), 0.2)
    assert abs(error) < 3 * found.log_mean_r_pow_stderr < 0.5


def test_scales_are_norms_of_filters_and_one_for_vectors_and_zeros() -> None:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight[0], module.weight[1] = torch.tensor([3.0, 0.0, 4.0]), 0.0
        module.bias.fill_(9.0)
    objective = Objective(module, [torch.zeros(1, 3)], lambda m, b: m(b).sum())
    assert filter_scales(objective.theta(), objective.layout).tolist() == [5, 5, 5, 1, 1, 1, 1, 1]


class WithoutBias(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6, bias=False).double(), nn.Linear(6, 4, bias=False).double()
        with torch.no_grad():
            self.first.weight.copy_(factor * normal(6, 3, seed=30))
            self.second.weight.copy_(normal(4, 6, seed=31) / factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_the_normalised_volume_alone_is_invariant_to_rescaling_around_a_relu() -> None:
    batch = normal(30, 3, seed=1), torch.arange(30) % 4
    found = []
    for factor in (1.0, 8.0):
        objective = Objective(WithoutBias(factor), [batch], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
        options = {"threshold": "rise", "num_directions": 6, "rtol": 1e-5}
        found += [[volume(objective, coordinates=c, **options) for c in ("plain", "filter")]]
    (plain, filtered), (plain_scaled, filtered_scaled) = found
    assert filtered_scaled.log_volume_normalised == pytest.approx(filtered.log_volume_normalised, abs=1e-3)
    assert abs(plain_scaled.log_volume_bound - plain.log_volume_bound) > 1
    assert abs(filtered_scaled.log_volume - filtered.log_volume) > 1


# -- thresholds --------------------------------------------------------------------------------------------------------


def test_several_thresholds_in_one_search_are_those_of_each() -> None:
    objective = rescaled(1.0)
    taus = (0.5, 0.05, 0.1)
    options: dict[str, Any] = {"threshold": "rise", "num_directions": 6, **LIGHT}
    together = minimum_volumes(objective, objective.theta(), VolumeSettings(thresholds=taus, **options))
    assert list(together) == list(taus)
    for tau in taus:
        alone = volume(objective, thresholds=(tau,), **options)
        torch.testing.assert_close(together[tau].radii, alone.radii, rtol=2e-3, atol=0)


def test_absolute_thresholds_below_the_loss_are_cut_off() -> None:
    objective = at_minimum([1.0, 2.0], offset=0.25)
    options: dict[str, Any] = {"num_directions": 4, "thresholds": (0.1, 0.2, 0.25, 0.5)}
    found = minimum_volumes(objective, objective.theta(), VolumeSettings(**options, **LIGHT))
    assert [found[tau].cutoff for tau in (0.1, 0.2, 0.25, 0.5)] == [True, True, True, False]
    assert found[0.1].log_volume == -math.inf
    assert found[0.1].effective_sample_size == 0
    assert math.isnan(found[0.1].mean_log_r_stderr)
    rise = minimum_volumes(objective, objective.theta(), VolumeSettings(threshold="rise", **options, **LIGHT))
    torch.testing.assert_close(found[0.5].radii, rise[0.25].radii, rtol=2e-3, atol=0)


class Signs(nn.Module):
    """Says class 0 where w₁ > w₂."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, None] * self.w


def test_the_set_of_an_accuracy_is_left_where_the_classes_change() -> None:
    batch = torch.tensor([1.0, 2.0, 1.5, -1.0]).double(), torch.tensor([0, 0, 0, 0])  # three of four are right
    objective = Objective(Signs(), [batch], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    options: dict[str, Any] = {"metric": "accuracy", **angles(16), "r_max": 1e3}
    for threshold, tau in (("absolute", 0.75), ("absolute", 0.5), ("rise", 0.1)):
        found = volume(objective, threshold=threshold, thresholds=(tau,), **options)
        assert found.level == 0.75
        for index, (radius, censored) in enumerate(zip(found.radii.tolist(), found.censored.tolist(), strict=True)):
            phi = 2 * math.pi * index / 16
            crossing = math.sin(phi) - math.cos(phi)
            expected = 1 / crossing if crossing > 1e-9 else 1e3
            assert radius == pytest.approx(expected, rel=1e-3)
            assert censored == (crossing <= 1e-9)
    assert volume(objective, thresholds=(0.8,), **options).cutoff


def test_censored_rays_are_counted() -> None:
    objective = linear(torch.tensor([1.0, 0.0]).double(), torch.tensor([0.6, 0.8]).double())
    found = volume(objective, **angles(8), threshold="rise", thresholds=(1.0,), r_max=10.0)
    phi = torch.arange(8) * 2 * math.pi / 8
    assert found.censored.tolist() == (torch.cos(phi) < 0.1).tolist()
    assert found.fraction_censored == 5 / 8
    assert found.radii[found.censored].tolist() == pytest.approx([10.0] * 5)
    assert found.radii[0] == pytest.approx(1.0, rel=1e-3)


def test_a_set_that_is_left_and_entered_again_is_noticed() -> None:
    """A ring wall between radius 0.4 and 0.6, beyond which the loss is low again up to 2."""

    def walled(module: nn.Module, batch: Any) -> Tensor:
        r = module.theta.norm()
        return torch.where((r > 0.4) & (r < 0.6), 1.0, 0.1 * (r / 2) ** 2)

    objective = Objective(Vector(torch.tensor([1e-9, 0.0]).double()), [torch.zeros(1)], walled)
    far = volume(objective, **angles(6), thresholds=(0.1,), r_max=1e10, num_checked=3, num_inner=16)
    assert (far.num_checked, far.num_reentrant) == (3, 3)
    assert far.radii[:3].tolist() == pytest.approx([0.45, 0.45, 0.45], abs=0.15)
    assert far.radii[3:].tolist() == pytest.approx([2.0] * 3, rel=1e-3)


# -- directions and cost -----------------------------------------------------------------------------------------------


def test_directions_are_unit_vectors_that_depend_on_seed_and_number_alone() -> None:
    torch.manual_seed(0)
    first = direction(3, 7, 500)
    torch.manual_seed(1)
    assert torch.equal(first, direction(3, 7, 500))
    assert float(first.norm()) == pytest.approx(1, rel=1e-6)
    others = torch.stack([direction(3, 8, 500), direction(4, 7, 500)])
    assert float((others @ first).abs().max()) < 0.2


def test_it_counts_its_passes_and_tells_its_progress() -> None:
    told: list[tuple[int, int, str]] = []
    start = at_minimum([4.0, 2.0, 1.0, 0.5])
    objective = Counting(Vector(start.theta()), [torch.zeros(1)], lambda m, b: (m.theta - start.theta()).square().sum())
    settings = VolumeSettings(num_directions=20, num_checked=2, num_inner=5)
    found = minimum_volumes(objective, objective.theta(), settings, progress=lambda *a: told.append(a))[0.1]
    assert found.num_losses == objective.losses
    assert found.num_losses < 1 + 4 * 20 + 2 * 5
    assert told[-1] == (20, 20, "directions")


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected threshold to be one of .*, got 'relative'"):
        VolumeSettings(threshold="relative")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one threshold"):
        VolumeSettings(thresholds=())
    with pytest.raises(ValueError, match=r"thresholds\[0\] must be positive"):
        VolumeSettings(thresholds=(0.0,))
    with pytest.raises(ValueError, match="An accuracy is known when the step calls"):
        volume(at_minimum(), metric="accuracy")


# -- several networks --------------------------------------------------------------------------------------------------


def made(size: int, mean_log_r: float, *, cutoff: bool = False, spread: float = 0.1, seed: int = 0) -> Volume:
    noise = normal(size, seed=seed)
    radii = torch.zeros(size).double() if cutoff else (mean_log_r + spread * (noise - noise.mean())).exp()
    return Volume(0.1, VolumeSettings(), 0.0, radii, torch.zeros(size).bool(), 10, cutoff=cutoff)


def a_table() -> pd.DataFrame:
    sizes = {"a": 1.0, "b": 3.0, "c": 2.0}
    volumes = {(m, "small data"): {0.1: made(20, r)} for m, r in sizes.items()}
    volumes |= {("d", "small data"): {0.1: made(20, 0.0, cutoff=True)}}
    return volume_table(volumes, {"a": 0.5, "b": 0.1, "c": 0.7, "d": 0.2})


def test_networks_are_ranked_and_those_cut_off_are_not() -> None:
    ranks = rank_table(a_table())["small data", 0.1]
    assert ranks.index.tolist() == ["a", "b", "c", "d"]
    assert ranks.tolist()[:3] == [3, 1, 2]
    assert math.isnan(ranks["d"])


def test_order_violations_are_pairs_in_which_the_larger_is_the_worse() -> None:
    (row,) = order_violations(a_table()).to_dict("records")
    assert (row["violations"], row["pairs"]) == (1, 3)  # c is larger than a, and worse
    assert row["share"] == pytest.approx(1 / 3)


def test_a_table_has_a_row_for_each_network_landscape_and_threshold() -> None:
    table = a_table()
    assert table["log_volume"].tolist()[-1] == -math.inf
    assert table["mean_log_r"].tolist()[:3] == pytest.approx([1.0, 3.0, 2.0])
    assert table["test_loss"].tolist() == [0.5, 0.1, 0.7, 0.2]
    assert {"model", "landscape", "tau", "cutoff", "fraction_censored", "effective_sample_size"} <= set(table)


def test_a_ranking_by_common_directions_is_as_stable_as_its_gaps_are_wide() -> None:
    apart = {name: made(40, r, seed=s) for s, (name, r) in enumerate({"a": 1.0, "b": 3.0, "c": 2.0}.items())}
    found = ranking_stability(apart)
    assert (found.kendall, found.same_order, found.same_first) == (1, 1, 1)
    assert (found.num_directions, found.num_samples) == (20, 200)
    close = {name: made(40, 1e-3 * s, spread=0.5, seed=s) for s, name in enumerate("abc")}
    shaky = ranking_stability(close)
    assert shaky.kendall < 0.7
    assert shaky.same_order < 0.7
    # Equal rays, all longer by one factor: paired, no sub-sample can turn the order.
    paired = {name: made(40, 1e-3 * s, spread=0.5) for s, name in enumerate("abc")}
    assert ranking_stability(paired).same_order == 1


def test_a_ranking_needs_two_networks_and_common_directions() -> None:
    with pytest.raises(ValueError, match="at least two networks inside"):
        ranking_stability({"a": made(20, 1.0), "b": made(20, 1.0, cutoff=True)})
    with pytest.raises(ValueError, match=r"got 2 with \[20, 30\] directions"):
        ranking_stability({"a": made(20, 1.0), "b": made(30, 1.0)})
