"""Where along a path to look next for its peak."""

from collections.abc import Sequence

import torch
from torch import Tensor

STARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
TOLERANCE = 2e-3
"""Of the height of a peak: what a grid of 25 misses of a parabola's."""
FULL_GRID = 24
"""Steps of the equally spaced grid of a curve with two peaks."""

_WIDEST_BRACKET = 0.25
_CLOSEST = 1 / 96
_DIP = 0.05
_ROUNDING = 1e-6


def next_points(ts: Tensor, curves: Sequence[Tensor]) -> list[float]:
    """The points at which curves are to be evaluated next, so that their peaks become known; none when they are.

    Each curve is followed to its largest height above the chord and to its largest value. The bracket of a peak is
    halved to a width of ¼, then the vertex of the parabola through it is looked at, until that promises a gain below
    0.2 % of the range of the curve. Curves with two peaks (a dip of 5 % of the range between them) are given
    the full grid of 25, which also bounds the number of points of others.

    Args:
        ts: where the curves are known, ascending ``(T,)``; empty at the beginning.
        curves: their values ``(T,)`` each.
    """
    known = ts.tolist()
    if not known:
        return list(STARTS)
    if len(known) > FULL_GRID:
        return []
    found: list[float] = []
    for values in curves:
        if not bool(values.isfinite().all()):
            continue
        gaps = values - torch.lerp(values[0], values[-1], ts)
        inside = 0 < int(values.argmax()) < len(known) - 1  # else the largest value is known already
        for rows in (gaps, values) if inside else (gaps,):
            if _has_two_peaks(rows, _ROUNDING * float(values.abs().amax())):
                return sorted({i / FULL_GRID for i in range(FULL_GRID + 1)} - set(known))
            proposed = _around_peak(known, rows.tolist())
            found += [t for t in proposed if min(abs(t - other) for other in known + found) >= _CLOSEST]
    return sorted(found)


def _has_two_peaks(rows: Tensor, rounding: float) -> bool:
    """Whether a point lies clearly below peaks on both of its sides, the ends being none."""
    least = max(rounding, _DIP * float(rows.amax() - rows.amin()))
    for middle in range(2, len(rows) - 2):
        left, right = rows[1:middle].amax(), rows[middle + 1 : -1].amax()
        if left > rows[0] and right > rows[-1] and torch.minimum(left, right) - rows[middle] > least:
            return True
    return False


def _around_peak(ts: Sequence[float], rows: Sequence[float]) -> list[float]:
    """The middles of a wide bracket of the highest inner point, or the vertex of the parabola through a narrow one."""
    peak = max(range(1, len(ts) - 1), key=rows.__getitem__)
    (a, b, c), (low, high, last) = ts[peak - 1 : peak + 2], rows[peak - 1 : peak + 2]
    if c - a > _WIDEST_BRACKET:
        return [(a + b) / 2, (b + c) / 2]
    slope = (high - low) / (b - a)
    curvature = ((last - high) / (c - b) - slope) / (c - a)
    if curvature >= 0:
        return []
    vertex = (a + b) / 2 - slope / (2 * curvature)
    gain = low + slope * (vertex - a) + curvature * (vertex - a) * (vertex - b) - high
    return [vertex] if a < vertex < c and gain > TOLERANCE * (max(rows) - min(rows)) else []
