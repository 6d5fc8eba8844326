"""Barriers between two states of a network: how far a metric rises above its ends along a path, by every convention."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lmc_lightning.landscape.paths.line import NUM_POINTS, BatchStats, Endpoint, checked_ts, uniform_ts
from lmc_lightning.landscape.paths.profiles import Curve, Grid, Profile, profiles_along
from lmc_lightning.landscape.paths.states import StateEvaluator
from lmc_lightning.landscape.statistics.bands import standard_error, student_quantile, sup_t_quantile

NumPoints: TypeAlias = int | Literal["adaptive"]
"""How many points of a path are looked at, or that its peak decides."""

DEFINITIONS = (
    "barrier",
    "instability",
    "signed_deviation",
    "barrier_over_min",
    "barrier_over_max",
    "dip",
    "interior_max",
    "midpoint",
)
"""Names of the conventions of a :class:`Barrier`."""

_ROUNDINGS = 8.0


@dataclass(frozen=True)
class Barrier:
    """How far a metric L rises along a path from A (t = 0) to B (t = 1), by the conventions of the literature.

    Attributes:
        metric: ``"loss"``, ``"error"`` or the name of another one that is better when smaller.
        split: Name of the data.
        batch_stats: What BatchNorm normalised with on the path; ``None`` without BatchNorm.
        ts: ``(T,)`` float64.
        values: L(θ(t)), ``(T,)`` float64.
        own_ends: L of A and B with the BatchNorm statistics that they came with; equal to the ends of ``values`` unless
            statistics were recomputed.
        barrier: max_t L(θ(t)) − [(1−t)L_A + tL_B] ≥ 0 (Entezari et al., arXiv 2110.06296).
        instability: max_t L(θ(t)) − ½(L_A+L_B) (Frankle et al., arXiv 1912.05671).
        signed_deviation: ½(L_A+L_B) − L(θ(t*)), t* where its size is largest; negative is a ridge (mode connectivity
            of Yang et al., arXiv 2107.11228).
        barrier_over_min: max_t L(θ(t)) − min(L_A, L_B).
        barrier_over_max: max_t L(θ(t)) − max(L_A, L_B).
        dip: Smallest gap to the chord, ≤ 0.
        interior_max: Largest gap to the chord for 0 < t < 1, of either sign; NaN without such a point.
        midpoint: Gap to the chord at t = ½; NaN when ½ is not on the grid.
        peak_t: Where ``barrier`` is attained.
        stderr_data: Standard error of each definition over examples (or chunks), paired along the path and at its own
            fixed t. It speaks of a new sample of data, not of a new seed.
        gap_stderr: The same for the gap at each t, ``(T,)``.
        band_quantile: c of the sup-t band gap ± c·stderr, which covers the whole curve with 95 % confidence.
        barrier_lower: max_t(gap − c·stderr) ≥ 0, a lower confidence bound of ``barrier``; NaN below 8 samples.
        rounding: Gaps below are rounding of the computation, as far as its dtype tells.
        num_samples: Examples or chunks behind the standard errors.
        unit: Which of the two.
    """

    metric: str
    split: str
    batch_stats: BatchStats | None
    ts: Tensor = field(repr=False)
    values: Tensor = field(repr=False)
    own_ends: tuple[float, float]
    barrier: float
    instability: float
    signed_deviation: float
    barrier_over_min: float
    barrier_over_max: float
    dip: float
    interior_max: float
    midpoint: float
    peak_t: float
    stderr_data: Mapping[str, float] = field(repr=False)
    gap_stderr: Tensor = field(repr=False)
    band_quantile: float
    barrier_lower: float
    rounding: float
    num_samples: int
    unit: Literal["example", "chunk"] | None

    def __repr__(self) -> str:
        of = f"{self.split} {self.metric}".strip()
        stderr = self.stderr_data.get("barrier", nan)
        error = f" ± {stderr:.2g}" if isfinite(stderr) else ""
        return f"Barrier({of}: {self.barrier:.4g}{error} at t = {self.peak_t:.3g}, {self.num_points} points)"

    @property
    def num_points(self) -> int:
        """The number T of points on the path."""
        return len(self.ts)

    @property
    def chord(self) -> Tensor:
        """(1−t)L_A + tL_B, ``(T,)``."""
        return _chord(self.values, self.ts)

    @property
    def gaps(self) -> Tensor:
        """L(θ(t)) minus the chord, ``(T,)``; 0 at both ends."""
        return self.values - self.chord

    @property
    def losses(self) -> Tensor:
        """``values`` of a barrier of the loss."""
        if self.metric != "loss":
            raise AttributeError(f"This is a barrier of {self.metric!r}; its curve is .values.")
        return self.values

    @property
    def distinguishable_from_zero(self) -> bool:
        """Whether the data show a barrier: the sup-t band leaves 0 somewhere, by more than rounding."""
        return self.barrier_lower > self.rounding

    @property
    def finite(self) -> bool:
        """Whether the metric is finite everywhere on the path."""
        return bool(self.values.isfinite().all())

    def interval(self, definition: str = "barrier", confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided Student interval of one of ``DEFINITIONS`` at its own t; NaN below 8 samples."""
        value, stderr = getattr(self, definition), self.stderr_data[definition]
        half = student_quantile(self.num_samples, confidence) * stderr
        return value - half, value + half


@dataclass(frozen=True)
class _Height:
    """``sign`` · (L at grid point ``index`` − (1−s)L_A − sL_B): the form that every convention has."""

    index: int
    s: float
    sign: int = 1

    def of(self, rows: Tensor) -> Tensor:
        """The height of ``(T, …)`` values along the path, ``(…)``."""
        return self.sign * (rows[self.index] - torch.lerp(rows[0], rows[-1], self.s)) + 0.0  # +0.0: never −0


def barrier(profile: Profile, metric: str = "loss", *, num_bootstrap: int = 1000) -> Barrier:
    """The barrier of one metric along a measured path, with its 95 % sup-t band.

    Args:
        profile: from :func:`~lmc_lightning.landscape.paths.profiles.profiles_along`.
        metric: one of its curves.
        num_bootstrap: resamples of the examples behind the band.

    Raises:
        ValueError: the profile has no such metric, or its grid does not ascend from 0 to 1.
    """
    if metric not in profile.curves:
        raise ValueError(
            f"The profile has {', '.join(map(repr, profile.curves))}, not {metric!r}. An error is known when the step "
            "calls one of torch's classification losses, once, on all examples of the batch."
        )
    curve, ts = profile.curves[metric], checked_ts(profile.ts)
    values = curve.values.double()
    gaps, heights = values - _chord(values, ts), _heights(values, ts)
    gap_stderr, quantile = torch.full_like(ts, nan), nan
    if curve.samples is not None and curve.weights is not None:
        sample_gaps = curve.samples - _chord(curve.samples, ts)
        gap_stderr = standard_error(sample_gaps, curve.weights)
        quantile = sup_t_quantile(sample_gaps, curve.weights, num_bootstrap=num_bootstrap)
    return Barrier(
        metric=metric,
        split=profile.split,
        batch_stats=profile.batch_stats,
        ts=ts,
        values=values,
        own_ends=curve.own_ends,
        peak_t=float(ts[gaps.argmax()]),
        stderr_data={name: _stderr_of(curve, h) for name, h in heights.items()},
        gap_stderr=gap_stderr,
        band_quantile=quantile,
        barrier_lower=_lower_bound(gaps, gap_stderr, quantile),
        rounding=_ROUNDINGS * profile.eps * float(values.abs().amax()),
        num_samples=0 if curve.weights is None else len(curve.weights),
        unit=curve.unit,
        **_found(heights, values),
    )


def on_fewer_points(found: Barrier, num_points: int) -> dict[str, float]:
    """Every convention of a barrier on ``num_points`` of its T points, equally spaced, as if no others were known.

    Raises:
        ValueError: the T points hold no such grid.
    """
    step, rest = divmod(found.num_points - 1, max(1, num_points - 1))
    if num_points < 2 or rest or not torch.equal(found.ts[::step], uniform_ts(num_points)):
        raise ValueError(f"{num_points} equally spaced points are not among {found.num_points} on this path.")
    values, ts = found.values[::step], found.ts[::step]
    return _found(_heights(values, ts), values)


def line_profiles(
    states: StateEvaluator, end_a: Endpoint, end_b: Endpoint, *, num_points: NumPoints = NUM_POINTS
) -> dict[str, Profile]:
    """Every metric along the straight line from A to B, by split; costs T − 2 states and each endpoint once."""
    line = states.line(end_a, end_b)
    return profiles_along(states, line, grid_of(num_points), ends=(end_a, end_b))


def grid_of(num_points: NumPoints) -> Grid:
    """The points that are looked at."""
    return "adaptive" if num_points == "adaptive" else uniform_ts(num_points)


def barriers_on(profiles: Mapping[str, Profile], metrics: Sequence[str] | None = None) -> dict[str, dict[str, Barrier]]:
    """The barriers of measured paths, by split and metric."""
    return {split: {m: barrier(p, m) for m in metrics or p.curves} for split, p in profiles.items()}


def _chord(rows: Tensor, ts: Tensor) -> Tensor:
    # lerp is exact at both ends and when they are equal, (1−t)a + tb is not.
    return torch.lerp(rows[:1], rows[-1:], ts.reshape(-1, *[1] * (rows.ndim - 1)))


def _found(heights: Mapping[str, _Height | None], values: Tensor) -> dict[str, float]:
    return {name: nan if height is None else float(height.of(values)) for name, height in heights.items()}


def _heights(values: Tensor, ts: Tensor) -> dict[str, _Height | None]:
    """What each convention compares, ``None`` where the grid lacks its point."""
    gaps = values - _chord(values, ts)
    first, last = float(values[0]), float(values[-1])
    lower_end = 0.0 if first <= last else 1.0
    peak, low, top = int(gaps.argmax()), int(gaps.argmin()), int(values.argmax())
    inside = int(gaps[1:-1].argmax()) + 1 if len(ts) > 2 else None
    middle = next((i for i, t in enumerate(ts.tolist()) if t == 0.5), None)
    farthest = int((values - torch.lerp(values[0], values[-1], 0.5)).abs().argmax())
    return {
        "barrier": _Height(peak, float(ts[peak])),
        "instability": _Height(top, 0.5),
        "signed_deviation": _Height(farthest, 0.5, sign=-1),
        "barrier_over_min": _Height(top, lower_end),
        "barrier_over_max": _Height(top, 1 - lower_end),
        "dip": _Height(low, float(ts[low])),
        "interior_max": None if inside is None else _Height(inside, float(ts[inside])),
        "midpoint": None if middle is None else _Height(middle, 0.5),
    }


def _stderr_of(curve: Curve, height: _Height | None) -> float:
    if height is None or curve.samples is None or curve.weights is None:
        return nan
    return float(standard_error(height.of(curve.samples), curve.weights))


def _lower_bound(gaps: Tensor, gap_stderr: Tensor, quantile: float) -> float:
    lower = gaps - quantile * gap_stderr
    known = lower[lower.isfinite()]
    return float(known.amax()) if len(known) else nan
