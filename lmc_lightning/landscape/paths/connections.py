"""Two networks joined by a trained curve and by the straight line: what the metrics do along both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan

import torch
from torch import Tensor

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.barrier import Barrier, NumPoints, barriers_on, grid_of, line_profiles
from lmc_lightning.landscape.paths.curves import CurvedPath, CurveTraining, train_curve
from lmc_lightning.landscape.paths.line import NUM_POINTS, Endpoint
from lmc_lightning.landscape.paths.profiles import Curve, Profile, profiles_along
from lmc_lightning.landscape.paths.states import StateEvaluator
from lmc_lightning.landscape.sharpness.perturbations import norm
from lmc_lightning.landscape.statistics.bands import standard_error
from lmc_lightning.types import Progress

LEVELS = ("max", "mean", "arc_mean")
"""What a metric is on a path as a whole."""


@dataclass(frozen=True)
class Levels:
    """One metric on a whole path.

    Attributes:
        max: the largest value on the grid.
        mean: ∫ L(γ(t)) dt, by the trapezoidal rule on the grid.
        arc_mean: ∫ L(γ(t)) ‖γ′(t)‖ dt / length, likewise: each stretch of the path counts by how long it is.
        stderr_data: standard error of each over examples (or chunks); NaN where these are not known.
    """

    max: float
    mean: float
    arc_mean: float
    stderr_data: Mapping[str, float] = field(repr=False)


def levels(curve: Curve, ts: Tensor, arc_length: Tensor) -> Levels:
    """The maximum and the means of one metric along a path.

    Args:
        curve: the metric at each t.
        ts: ``(T,)``.
        arc_length: length of the path from its start to each t, ``(T,)``.
    """
    peak = torch.zeros_like(ts)
    peak[int(curve.values.argmax())] = 1
    # A path of no length is one network; every average over it is the same.
    arc = arc_length if float(arc_length[-1]) > 0 else ts
    shares = {"max": peak, "mean": _trapezoid(ts), "arc_mean": _trapezoid(arc / arc[-1])}
    stderr = dict.fromkeys(LEVELS, nan)
    if curve.samples is not None and curve.weights is not None:
        stderr = {name: float(standard_error(s @ curve.samples, curve.weights)) for name, s in shares.items()}
    return Levels(**{name: float(s @ curve.values) for name, s in shares.items()}, stderr_data=stderr)


def _trapezoid(xs: Tensor) -> Tensor:
    """The weights of the trapezoidal rule, ``(T,)``."""
    half = xs.diff() / 2
    weights = torch.zeros_like(xs)
    weights[:-1] += half
    weights[1:] += half
    return weights


@dataclass(frozen=True)
class Connection:
    """Two networks, the straight line and a trained curve between them.

    Attributes:
        curve: the path itself.
        line_length: ‖θ_B − θ_A‖.
        on_line: barriers along the straight line, by split and metric.
        on_curve: barriers along the curve; ``signed_deviation`` is the mode connectivity of Yang et al.
        levels: maximum and means along the curve.
    """

    curve: CurvedPath
    line_length: float
    on_line: Mapping[str, Mapping[str, Barrier]]
    on_curve: Mapping[str, Mapping[str, Barrier]]
    levels: Mapping[str, Mapping[str, Levels]]

    def __repr__(self) -> str:
        split, metric = next((s, m) for s, found in self.on_curve.items() for m in found)
        curve, line = (found[split][metric].barrier for found in (self.on_curve, self.on_line))
        return f"Connection({self.curve.kind}: {split} {metric} barrier {curve:.4g}, {line:.4g} on the line)"


def connection(
    states: StateEvaluator,
    objective: Objective,
    end_a: Endpoint,
    end_b: Endpoint,
    training: CurveTraining | None = None,
    *,
    generator: torch.Generator,
    num_points: NumPoints = NUM_POINTS,
    metrics: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Connection:
    """Train a curve between two states and measure the metrics along it and along the straight line.

    Costs the training (:func:`~lmc_lightning.landscape.paths.curves.train_curve`) and 2(T − 2) states beside the two
    ends.

    Args:
        states: what evaluates a point of a path, BatchNorm by its policy.
        objective: the module on training examples, which the curve is trained on.
        end_a: at t = 0.
        end_b: at t = 1.
        training: kind of curve and how it is trained.
        generator: source of the randomness of the training.
        num_points: equally spaced points, both ends included, or ``"adaptive"``.
        metrics: ``"loss"``, ``"error"``; all that are known by default.
        progress: told after each epoch of the training.
    """
    line = states.line(end_a, end_b)
    curve = train_curve(objective, line, training, generator=generator, progress=progress)
    straight = line_profiles(states, end_a, end_b, num_points=num_points)
    curved = profiles_along(states, curve, grid_of(num_points), ends=(end_a, end_b))
    along = {split: _levels_of(profile, curve, metrics) for split, profile in curved.items()}
    length = norm(end_b.theta - end_a.theta)
    return Connection(curve, length, barriers_on(straight, metrics), barriers_on(curved, metrics), along)


def _levels_of(profile: Profile, curve: CurvedPath, metrics: Sequence[str] | None) -> dict[str, Levels]:
    arc = curve.arc_length(profile.ts)
    return {metric: levels(profile.curves[metric], profile.ts, arc) for metric in metrics or profile.curves}
