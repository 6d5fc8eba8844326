"""Loss, error and other metrics along the paths between states of a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lmc_lightning.core.evaluation import Evaluation
from lmc_lightning.core.leading import point_of
from lmc_lightning.landscape.paths.line import BatchStats, Endpoint, Line, Path, checked_ts, uniform_ts
from lmc_lightning.landscape.paths.refinement import next_points
from lmc_lightning.landscape.paths.states import Point, StateEvaluator, StateMetrics

Grid: TypeAlias = Tensor | Sequence[float] | Literal["adaptive"]


@dataclass(frozen=True)
class Curve:
    """One metric along a path. Means are over examples, in float64.

    Attributes:
        values: The metric at each t, ``(T,)``.
        own_ends: The metric of the two end states with the BatchNorm statistics that they came with.
        samples: The metric of each example ``(T, N)`` where the loss tap sees them, else of each chunk ``(T, B)``;
            ``None`` for a metric that has no parts.
        weights: Share of each sample in the mean, ``(N,)`` or ``(B,)``.
        unit: What a sample is.
    """

    values: Tensor
    own_ends: tuple[float, float]
    samples: Tensor | None = field(default=None, repr=False)
    weights: Tensor | None = field(default=None, repr=False)
    unit: Literal["example", "chunk"] | None = None


@dataclass(frozen=True)
class Profile:
    """Loss and error, or any other metrics, along one path on one split.

    Attributes:
        ts: Ascending from 0 to 1, ``(T,)`` float64.
        curves: By metric, ``"loss"`` and, where the loss tap sees a classification, ``"error"`` (1 − accuracy).
        split: Name of the data.
        batch_stats: What BatchNorm normalised with on the path; ``None`` without BatchNorm.
        eps: Relative rounding of the parameters' dtype.
    """

    ts: Tensor
    curves: Mapping[str, Curve]
    split: str = ""
    batch_stats: BatchStats | None = None
    eps: float = 0.0

    @property
    def losses(self) -> Tensor:
        """The mean loss at each t, ``(T,)``."""
        return self.curves["loss"].values

    @property
    def errors(self) -> Tensor | None:
        """1 − accuracy at each t, ``(T,)``, where it is known."""
        return self.curves["error"].values if "error" in self.curves else None


def profiles_along(
    states: StateEvaluator,
    path: Path,
    ts: Grid | None = None,
    *,
    ends: tuple[Endpoint, Endpoint] | None = None,
) -> dict[str, Profile]:
    """Every metric along a path, by split; costs T − 2 states and each end once.

    Args:
        states: what evaluates each point.
        path: gives θ and buffers at t.
        ts: ascending from 0 to 1; 25 equally spaced points by default. ``"adaptive"`` starts from five and refines
            around the peak of the loss on every split, until a parabola through it promises less than 0.2 % more, with
            two peaks to the full grid; other metrics are known at the same points.
        ends: the states at 0 and 1, where other paths share them.

    Raises:
        ValueError: ``ts`` does not ascend from 0 to 1.
    """
    fixed = None if isinstance(ts, str) else checked_ts(uniform_ts() if ts is None else ts).tolist()
    start, stop = ends or (_end(path, 0.0), _end(path, 1.0))
    found: dict[float, dict[str, StateMetrics]] = {}
    while due := [t for t in fixed if t not in found] if fixed else _refined(found):
        inner = [t for t in due if 0 < t < 1]
        found |= {t: states.end(stop if t else start) for t in due if not 0 < t < 1}
        found |= dict(zip(inner, states.along([_at(path, t) for t in inner]), strict=True))
    own_ends = [states.own(end) for end in (start, stop)]
    grid, eps = sorted(found), torch.finfo(start.theta.dtype).eps
    return {
        split: Profile(
            torch.tensor(grid, dtype=torch.float64),
            _curves(
                [found[t][split] for t in grid], [own[split] for own in own_ends], objective.weighting != "batch_weight"
            ),
            split,
            states.batch_stats,
            eps,
        )
        for split, objective in states.objectives.items()
    }


def _end(path: Path, t: float) -> Endpoint:
    theta, buffers = _at(path, t)
    return Endpoint(point_of(theta), buffers)


def _at(path: Path, t: float) -> Point:
    with torch.inference_mode(False):  # a step that differentiates by its inputs cannot save inference tensors
        return path.point(t) if isinstance(path, Line) else path(t)


def _refined(found: Mapping[float, Mapping[str, StateMetrics]]) -> list[float]:
    """The points that an adaptive grid lacks."""
    ts = sorted(found)
    splits = next(iter(found.values()), {})
    losses = [_vector([found[t][split].evaluation.loss for t in ts]) for split in splits]
    return next_points(torch.tensor(ts, dtype=torch.float64), losses)


def _curves(along: list[StateMetrics], own_ends: list[StateMetrics], by_example: bool) -> dict[str, Curve]:
    passes, ends = [m.evaluation for m in along], [m.evaluation for m in own_ends]
    curves = {"loss": _loss_curve(passes, ends, by_example)}
    errors = [e.error for e in passes + ends if e.error is not None]
    if len(errors) == len(passes) + 2:
        samples, weights = _samples([e.example_errors for e in passes], passes[0].example_weights)
        unit: Literal["example"] | None = None if samples is None else "example"
        curves["error"] = Curve(_vector(errors[:-2]), (errors[-2], errors[-1]), samples, weights, unit)
    for name in along[0].further:
        own = (own_ends[0].further[name], own_ends[1].further[name])
        curves[name] = Curve(_vector([m.further[name] for m in along]), own)
    return curves


def _loss_curve(along: list[Evaluation], own_ends: list[Evaluation], by_example: bool) -> Curve:
    values, ends = _vector([e.loss for e in along]), (own_ends[0].loss, own_ends[1].loss)
    if by_example:
        samples, weights = _samples([e.example_losses for e in along], along[0].example_weights)
        if samples is not None:
            return Curve(values, ends, samples, weights, "example")
    # A user's weights need not be additive over the examples of a batch: its mean is then the smallest part.
    samples, weights = _samples([e.chunk_losses for e in along], along[0].weights)
    return Curve(values, ends, samples, weights, None if samples is None else "chunk")


def _samples(parts: Sequence[Tensor | None], weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The parts stacked over t, without those of no weight, and their weights."""
    known = [p for p in parts if p is not None]
    if weights is None or len(known) < len(parts) or any(p.shape != weights.shape for p in known):
        return None, None
    return torch.stack(known)[:, weights > 0], weights[weights > 0]


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
