"""The search for the radius at which a ray leaves a set, against closed forms and against bisection."""

import math
from collections.abc import Callable

import pytest
import torch

from lmc_lightning.landscape.volume.radii import MAX_EVALUATIONS, Exit, RadiusSearch, bisected, drive
from tests.problems import normal

Rise = Callable[[float], float]


def exits(search: RadiusSearch, *rises: Rise) -> list[list[Exit]]:
    """One ray after the other."""
    return [drive([search.ray()], lambda _, radii, rise=rise: [rise(r) for r in radii])[0] for rise in rises]


def exit_of(rise: Rise, limit: float, **options: object) -> Exit:
    settings = {"start": 1.0, "r_max": 1e6, "rtol": 1e-3, **options}
    return exits(RadiusSearch([limit], **settings), rise)[0][0]  # type: ignore[arg-type]


SMOOTH: dict[str, tuple[Rise, Callable[[float], float]]] = {
    "quadratic": (lambda r: 3 * r**2, lambda t: math.sqrt(t / 3)),
    "quartic": (lambda r: r**4, lambda t: t**0.25),
    "linear": (lambda r: 0.2 * r, lambda t: t / 0.2),
    "slope and curvature": (lambda r: r + r * r, lambda t: (math.sqrt(1 + 4 * t) - 1) / 2),
    "down first": (lambda r: r * r - r, lambda t: (math.sqrt(1 + 4 * t) + 1) / 2),
    "exponential": (math.expm1, math.log1p),
    "saturating": (lambda r: r**2 / (1 + r**2) * 10, lambda t: math.sqrt(t / (10 - t))),
}


@pytest.mark.parametrize("limit", [1e-6, 0.1, 7.0])
@pytest.mark.parametrize("start", [1e-4, 1.0, 500.0])
@pytest.mark.parametrize("name", SMOOTH)
def test_exits_of_smooth_rises_are_those_of_closed_forms(name: str, start: float, limit: float) -> None:
    rise, radius = SMOOTH[name]
    found = exit_of(rise, limit, start=start)
    assert found.radius == pytest.approx(radius(limit), rel=1e-3)
    assert (found.censored, found.converged) == (False, True)


def test_a_wall_is_found_by_its_bracket() -> None:
    for wall in (0.013, 2.0, 900.0):
        found = exit_of(lambda r, wall=wall: 1e-9 * r if r < wall else math.nan, 0.5)  # type: ignore[misc]
        assert found.radius == pytest.approx(wall, rel=1e-3)


def test_a_plateau_on_the_way_is_crossed() -> None:
    found = exit_of(lambda r: min(r, 0.4) - 0.01 * min(r, 5.0) if r < 20 else r - 19.0, 0.5, start=0.3)
    assert 19 < found.radius < 20.0 * 1.001
    assert found.converged


def test_the_first_of_two_exits_is_kept_once_it_has_been_seen() -> None:
    found = exit_of(lambda r: r if r < 1 or r > 3 else 0.1, 0.9, start=0.5)
    assert found.radius == pytest.approx(0.9, rel=1e-3)


def test_rays_that_stay_inside_are_censored_at_r_max() -> None:
    for rise in (lambda r: -r, lambda r: 0.0, lambda r: 1e-9 * r):
        assert exit_of(rise, 0.5, r_max=100.0) == Exit(pytest.approx(100.0), censored=True)


def test_a_point_that_no_radius_leaves_inside_is_flagged() -> None:
    found = exit_of(lambda r: math.inf, 0.5)
    assert not found.converged


def test_steps_are_bisected() -> None:
    for edge in (0.02, 1.0, 77.0):
        found = exit_of(lambda r, edge=edge: float(r > edge), 0.5, smooth=False)  # type: ignore[misc]
        assert found.radius == pytest.approx(edge, rel=1e-3)


def test_several_limits_in_one_search_are_the_exits_of_each() -> None:
    limits = [0.01, 0.05, 0.1, 2.0]
    search = RadiusSearch(limits, start=1.0, r_max=1e6)
    for curvature in (0.5, 3.0, 1.0, 40.0):
        (found,) = exits(search, lambda r, c=curvature: c * r * r)  # type: ignore[misc]
        for limit, e in zip(limits, found, strict=True):
            assert e.radius == pytest.approx(math.sqrt(limit / curvature), rel=1e-3)


def rough(seed: int) -> Rise:
    """A rise of slope between 2 and 4 in log–log coordinates, with a scale of its own: as those of networks."""
    scale, share = math.exp(0.25 * float(normal(1, seed=seed))), 0.5 + 0.5 * math.sin(seed)
    return lambda r: share * (r / scale) ** 2 + (1 - share) * (r / scale) ** 4 + 0.02 * r * math.sin(seed + r)


def test_it_agrees_with_bisection_and_needs_a_third_of_its_passes() -> None:
    search, counts = RadiusSearch([0.3], start=0.01, r_max=1e4), [0, 0]

    def counted(rise: Rise, who: int) -> Rise:
        def count(r: float) -> float:
            counts[who] += 1
            return rise(r)

        return count

    for seed in range(100):
        ours = exits(search, counted(rough(seed), 0))[0][0]
        reference = bisected(rough(seed), 0.3, start=0.01, r_max=1e4, rtol=1e-10)
        assert ours.radius == pytest.approx(reference.radius, rel=1e-3)
        bisected(counted(rough(seed), 1), 0.3, start=1.0, r_max=1e4)
    assert search.num_evaluations == counts[0]
    assert counts[1] > 3 * counts[0]
    assert counts[0] < 400


def test_rays_side_by_side_find_what_they_find_one_after_the_other() -> None:
    rises = [rough(seed) for seed in range(8)]
    one, many = (RadiusSearch([0.3, 1.0], start=1.0, r_max=1e4) for _ in range(2))
    apart = exits(one, *rises)
    together = drive([many.ray() for _ in rises], lambda which, radii: [rises[i](r) for i, r in zip(which, radii)])  # noqa: B905
    for a, b in zip(apart, together, strict=True):
        assert [e.radius for e in a] == pytest.approx([e.radius for e in b], rel=2e-3)


def test_bisection_itself_is_exact_and_censors() -> None:
    assert bisected(lambda r: r * r, 4.0, start=0.1, r_max=1e3, rtol=1e-9).radius == pytest.approx(2.0, rel=1e-8)
    assert bisected(lambda r: r * r, 4.0, start=100.0, r_max=1e3, rtol=1e-9).radius == pytest.approx(2.0, rel=1e-8)
    assert bisected(lambda r: 0.0, 4.0, start=0.1, r_max=10.0) == Exit(10.0, censored=True)


def test_no_ray_is_endless() -> None:
    search = RadiusSearch([0.5], start=1.0, r_max=1e3)
    noise = torch.rand(10 * MAX_EVALUATIONS, generator=torch.Generator().manual_seed(0)).tolist()
    exits(search, lambda r: noise.pop())
    assert search.num_evaluations <= MAX_EVALUATIONS
