import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmc_lightning.landscape.paths.line import Endpoint
from lmc_lightning.landscape.paths.refinement import FULL_GRID, STARTS, next_points
from tests.landscape.paths.between import barrier_between
from tests.problems import double_well


def followed(*curves: Callable[[float], float]) -> tuple[Tensor, list[Tensor]]:
    """Where the search looks, and the curves there."""
    ts: list[float] = []
    while due := next_points(vector(ts), [vector([c(t) for t in ts]) for c in curves]):
        assert set(due).isdisjoint(ts)
        ts = sorted([*ts, *due])
    return vector(ts), [vector([c(t) for t in ts]) for c in curves]


def vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def height(ts: Tensor, values: Tensor) -> float:
    return float((values - torch.lerp(values[0], values[-1], ts)).amax())


def bump(center: float, width: float, slope: float = 0.0) -> Callable[[float], float]:
    def curve(t: float) -> float:
        ends = [math.exp(-(((s - center) / width) ** 2)) for s in (0, 1)]
        return math.exp(-(((t - center) / width) ** 2)) - (1 - t) * ends[0] - t * ends[1] + slope * t

    return curve


@pytest.mark.parametrize("center", [0.2, 0.37, 0.5, 0.62, 0.85])
@pytest.mark.parametrize("width", [0.15, 0.3, 0.6])
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_one_peak_is_found_within_half_a_percent_in_at_most_eleven_points(
    center: float, width: float, slope: float
) -> None:
    curve = bump(center, width, slope)
    ts, (values,) = followed(curve)
    fine = torch.linspace(0, 1, 20001, dtype=torch.float64)
    exact = height(fine, vector([curve(t) for t in fine.tolist()]))
    assert height(ts, values) == pytest.approx(exact, rel=5e-3)
    assert len(ts) <= (11 if slope == 0 else 13)  # with a slope, the largest value lies beside the largest gap


def test_a_parabola_costs_seven_points_and_no_barrier_no_more() -> None:
    for curve in (lambda t: t * (1 - t), lambda t: -t * (1 - t), lambda t: 3.0, lambda t: 2 * t):
        ts, _ = followed(curve)
        assert len(ts) <= 7
        assert set(STARTS) <= set(ts.tolist())


def test_two_peaks_are_given_the_full_grid() -> None:
    ts, (values,) = followed(lambda t: math.sin(2 * math.pi * t) ** 2 * (1 + 0.1 * t) + 0.01 * t)
    full = {i / FULL_GRID for i in range(FULL_GRID + 1)}
    assert full <= set(ts.tolist())
    assert height(ts, values) == pytest.approx(1.075, abs=2e-2)


def test_peaks_of_several_curves_are_all_followed() -> None:
    left, right = bump(0.3, 0.3), bump(0.7, 0.3)
    ts, values = followed(left, right)
    fine = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for curve, found in zip((left, right), values, strict=True):
        exact = height(fine, vector([curve(t) for t in fine.tolist()]))
        assert height(ts, found) == pytest.approx(exact, rel=5e-3)
    assert len(ts) <= 14


def test_what_is_not_finite_is_not_followed_and_noise_is_no_second_peak() -> None:
    ts, _ = followed(lambda t: math.nan if 0 < t < 1 else 0.0)
    assert ts.tolist() == list(STARTS)
    ts, _ = followed(lambda t: 1 + 1e-9 * math.cos(40 * t))
    assert len(ts) <= FULL_GRID


def test_the_double_well_is_exact_and_cheaper() -> None:
    one, other = (Endpoint(torch.tensor([t], dtype=torch.float64)) for t in (-1.0, 1.0))
    result = barrier_between(double_well(-1.0).objective(), one, other, num_points="adaptive")["loss"]
    assert (result.barrier, result.midpoint, result.peak_t) == (1, 1, 0.5)
    assert result.num_points <= 9
