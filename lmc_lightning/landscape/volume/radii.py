"""How far a level stays below a limit along a ray: a secant search in log–log coordinates."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from math import exp, inf, isfinite, isnan, log
from statistics import median
from typing import TypeAlias

Ray: TypeAlias = Generator[float, float, "list[Exit]"]
"""Yields a radius, is sent how far the level has risen there, and returns the exit for each limit."""

MAX_EVALUATIONS = 80
"""Points on one ray for one limit."""

_FARTHEST_STEP = log(16.0)
_UNBRACKETED_WIDTH = 0.05
_SLOPE, _BEND = 2.0, 0.5  # of a minimum, and a guess, until the first rays are known
_MIN_SLOPE, _MAX_SLOPE = 0.25, 16.0
_SAFETY = 4.0
_APART = 0.01
_NEAR = 0.1  # farther away a second difference says nothing


@dataclass(frozen=True)
class Exit:
    """Where a ray leaves the set of points that have risen no more than a limit.

    Attributes:
        radius: to the relative tolerance; ``r_max`` where it is censored.
        censored: whether the ray is still inside at ``r_max``.
        converged: whether the tolerance was reached.
    """

    radius: float
    censored: bool = False
    converged: bool = True


@dataclass
class _Known:
    """What has been evaluated on one ray: rises by log radius."""

    rises: dict[float, float] = field(default_factory=dict)

    def bracket(self, limit: float) -> tuple[float | None, float | None]:
        """The first point outside, and the last one inside before it."""
        outside = [x for x, rise in self.rises.items() if _is_outside(rise, limit)]
        upper = min(outside, default=None)
        inside = [x for x in self.rises if upper is None or x < upper]
        return max(inside, default=None), upper

    def heights(self, limit: float) -> list[tuple[float, float]]:
        """(log r, log rise/limit) where there is one, the nearest to the limit first."""
        found = [(x, log(rise / limit)) for x, rise in self.rises.items() if 0 < rise < inf]
        return sorted(found, key=lambda point: abs(point[1]))


def _is_outside(rise: float, limit: float) -> bool:
    return isnan(rise) or rise > limit


class RadiusSearch:
    """The radii at which rays from one point leave {rise ≤ limit}, for several limits at once.

    Near a minimum a rise goes with r², so that log rise is almost a straight line over log r: the secant method there,
    from the median of the rays before, needs two or three points a ray. A ray ends when linear interpolation between
    its two nearest points is off by less than a quarter of the tolerance, as judged by the second difference of this
    ray and of those before; the bracket between the last point inside and the first point outside guards every step.
    Rises that are no smooth function of r (an error) are bisected from the median.

    The exit found is the first one if the level stays below the limit between the points that were evaluated.

    Args:
        limits: ascending; positive for smooth rises.
        start: a radius to begin with.
        r_max: where rays are censored.
        rtol: relative tolerance of a radius.
        smooth: whether to use the secant.
    """

    def __init__(
        self, limits: Sequence[float], *, start: float, r_max: float, rtol: float = 1e-3, smooth: bool = True
    ) -> None:
        self.limits, self.rtol, self.smooth = tuple(limits), rtol, smooth
        self._start, self._farthest = log(min(start, r_max)), log(r_max)
        self._found: list[list[float]] = [[] for _ in self.limits]
        self._slopes: list[float] = []
        self._bends: list[float] = []
        self.num_evaluations = 0

    def ray(self) -> Ray:
        """The search along one ray, to be driven by :func:`drive`; several may be driven side by side."""
        known, exits, shift = _Known(), list[Exit](), 0.0
        for index, limit in enumerate(self.limits):
            guess = self._guess(index, exits) + shift
            found = yield from self._exit(known, limit, guess)
            exits.append(found)
            if not found.censored and self._found[index]:
                shift = log(found.radius) - median(self._found[index])
        self._learn(known, exits)
        return exits

    def _guess(self, index: int, exits: list[Exit]) -> float:
        """Where the rays before had their exits, or where this one goes on to from its last exit."""
        if self._found[index]:
            return median(self._found[index])
        if exits and not exits[-1].censored and self.smooth:
            return log(exits[-1].radius) + log(self.limits[index] / self.limits[index - 1]) / self._slope
        return log(exits[-1].radius) if exits else self._start

    @property
    def _slope(self) -> float:
        return median(self._slopes) if self._slopes else _SLOPE

    @property
    def _bend(self) -> float:
        """What the second difference is at most on nine rays of ten, and not less than a guess: few rays tell it."""
        return max(_BEND, sorted(self._bends)[int(0.9 * len(self._bends))] if self._bends else _BEND)

    def _exit(self, known: _Known, limit: float, guess: float) -> Generator[float, float, Exit]:
        for _ in range(MAX_EVALUATIONS):
            lower, upper = known.bracket(limit)
            if upper is None and lower is not None and lower >= self._farthest:
                return Exit(exp(self._farthest), censored=True)
            x, error = self._proposal(known, limit, guess, lower, upper)
            if error <= self.rtol:
                return Exit(exp(x))
            x = min(x, self._farthest)
            self.num_evaluations += 1
            known.rises[x] = yield exp(x)
        lower, upper = known.bracket(limit)
        ends = [x for x in (lower, upper) if x is not None]
        return Exit(exp(sum(ends) / len(ends)), converged=False)

    def _proposal(
        self, known: _Known, limit: float, guess: float, lower: float | None, upper: float | None
    ) -> tuple[float, float]:
        """The next log radius, and a bound on its distance from the exit (infinite where nothing is known of it)."""
        if not known.rises:
            return guess, inf
        width = inf if lower is None or upper is None else upper - lower
        if isfinite(width) and width <= 2 * self.rtol * (0.5 if self.smooth else 1.0):
            return _middle(lower, upper), width / 2
        heights = known.heights(limit) if self.smooth else []
        if not heights:
            return self._without_slope(guess, lower, upper), inf
        x, error = self._secant(heights)
        advances = (lower is None or x > lower) and (upper is None or x < upper)
        if error > self.rtol and not advances:
            return self._without_slope(guess, lower, upper), inf
        nearest = heights[0][0]
        return min(max(x, nearest - _FARTHEST_STEP), nearest + _FARTHEST_STEP), error

    def _secant(self, heights: list[tuple[float, float]]) -> tuple[float, float]:
        """Where the line through the two nearest points meets the limit, and how far that may be off."""
        (x, height), *others = heights
        others = [point for point in others if abs(point[0] - x) > _APART * self.rtol]  # closer ones show rounding
        slope = _slope_between(heights[0], others[0]) if others else None
        following, certain = x - height / (slope or self._slope), abs(height) / _MIN_SLOPE
        if slope is None or abs(following - x) > _NEAR:
            return following, certain
        bend = abs(_bend_of([heights[0], *others[:2]]) or 0.0) if len(others) > 1 else 0.0
        away = abs(following - x) * abs(following - others[0][0])
        return following, min(certain, _SAFETY * max(bend, self._bend) * away)

    def _without_slope(self, guess: float, lower: float | None, upper: float | None) -> float:
        """The middle of the bracket, or an ever longer step towards the end that is missing."""
        if lower is not None and upper is not None:
            return _middle(lower, upper)
        end = upper if lower is None else lower
        assert end is not None
        step = min(_FARTHEST_STEP, max(_UNBRACKETED_WIDTH, 2 * abs(end - guess)))
        return end - step if lower is None else end + step

    def _learn(self, known: _Known, exits: list[Exit]) -> None:
        for index, found in enumerate(exits):
            if not found.censored and found.converged:
                self._found[index].append(log(found.radius))
        for heights in (known.heights(limit) for limit in self.limits if self.smooth):
            slope = _slope_between(heights[0], heights[1]) if len(heights) > 1 else None
            self._slopes += [] if slope is None else [slope]
            bend = _bend_of(heights[:3]) if len(heights) > 2 else None
            self._bends += [] if bend is None else [abs(bend)]


def _middle(lower: float | None, upper: float | None) -> float:
    assert lower is not None
    assert upper is not None
    return (lower + upper) / 2


def _slope_between(one: tuple[float, float], other: tuple[float, float]) -> float | None:
    distance = one[0] - other[0]
    slope = (one[1] - other[1]) / distance if distance else 0.0
    return slope if _MIN_SLOPE <= slope <= _MAX_SLOPE else None


def _bend_of(points: Sequence[tuple[float, float]]) -> float | None:
    """The second divided difference of three points over their slope."""
    a, b, c = sorted(points)
    one, two = _slope_between(a, b), _slope_between(b, c)
    if one is None or two is None:
        return None
    return (two - one) / (c[0] - a[0]) / ((one + two) / 2)


def drive(rays: Sequence[Ray], rises: Callable[[list[int], list[float]], list[float]]) -> list[list[Exit]]:
    """Run rays side by side to their ends.

    Args:
        rays: fresh ones.
        rises: of the rays with these indices at these radii.
    """
    asked = {index: next(ray) for index, ray in enumerate(rays)}
    found: dict[int, list[Exit]] = {}
    while asked:
        answers = rises(list(asked), list(asked.values()))
        for index, answer in zip(list(asked), answers, strict=True):
            try:
                asked[index] = rays[index].send(answer)
            except StopIteration as end:
                found[index] = end.value
                del asked[index]
    return [found[index] for index in range(len(rays))]


def bisected(rise: Callable[[float], float], limit: float, *, start: float, r_max: float, rtol: float = 1e-3) -> Exit:
    """The exit by doubling or halving until it is bracketed, then bisection of log r: the reference to compare with."""
    lower = upper = start
    if _is_outside(rise(start), limit):
        while _is_outside(rise(lower := lower / 2), limit):
            upper = lower
    else:
        while not _is_outside(rise(upper := min(2 * upper, r_max)), limit):
            if upper == r_max:
                return Exit(r_max, censored=True)
            lower = upper
    while upper / lower > 1 + 2 * rtol:
        middle = (lower * upper) ** 0.5
        lower, upper = (lower, middle) if _is_outside(rise(middle), limit) else (middle, upper)
    return Exit((lower * upper) ** 0.5)
