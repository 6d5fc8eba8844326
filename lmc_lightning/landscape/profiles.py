"""Loss, error and other metrics of states of a network, and along the paths between them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lmc_lightning.core.evaluation import Evaluation
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.adaptive import next_points
from lmc_lightning.landscape.batchnorm import has_batch_norm, running_statistics
from lmc_lightning.landscape.paths import BatchStats, Endpoint, Path, checked_ts, linear_path, uniform_ts

Progress: TypeAlias = Callable[[int, int], None]
"""Called as ``progress(done, total)``; the total of an adaptive grid is its present size."""

Metrics: TypeAlias = Callable[[Tensor, Mapping[str, Tensor]], Mapping[str, float]]
"""θ ``(P,)`` and buffers ↦ metrics by name, each better when smaller."""

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


@dataclass(frozen=True)
class Measured:
    """One state on one split."""

    evaluation: Evaluation
    further: Mapping[str, float] = field(default_factory=dict)


class StateEvaluator:
    """Loss, error and other metrics of any state of a module on several splits, BatchNorm's statistics by one policy.

    What is found at an endpoint is kept as long as the endpoint lives, so that many paths share it.

    Args:
        objectives: one for each split, over one module.
        batch_stats: ``"recompute"`` takes BatchNorm's statistics of every state, endpoints included, from the batches
            of ``stats_objective``; under ``"interpolate"`` and ``"endpoint"`` they are those that a path gives. Without
            BatchNorm, or where its layers do not use running statistics, there is no policy.
        stats_objective: the module on training batches, with ``mode="train"``.
        further: metrics other than loss and error, by split.

    Raises:
        ValueError: ``"recompute"`` without ``stats_objective``.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        *,
        batch_stats: BatchStats | None = None,
        stats_objective: Objective | None = None,
        further: Mapping[str, Metrics] | None = None,
    ) -> None:
        if batch_stats == "recompute" and stats_objective is None:
            raise ValueError(
                "batch_stats='recompute' needs training batches: pass stats_objective=Objective(module, batches, "
                "loss_fn, mode='train'), or choose batch_stats='interpolate'."
            )
        self.objectives, self.batch_stats = objectives, batch_stats
        self._stats_objective, self._further = stats_objective, further or {}
        self._ends: WeakKeyDictionary[Endpoint, dict[str, Measured]] = WeakKeyDictionary()
        self._own: WeakKeyDictionary[Endpoint, dict[str, Measured]] = WeakKeyDictionary()

    @classmethod
    def with_default_policy(
        cls,
        objectives: Mapping[str, Objective],
        *,
        batch_stats: BatchStats | None = None,
        stats_objective: Objective | None = None,
        further: Mapping[str, Metrics] | None = None,
    ) -> "StateEvaluator":
        """One that recomputes statistics unless told otherwise, where the module has any."""
        policy = (batch_stats or "recompute") if any(map(_uses_running_statistics, objectives.values())) else None
        return cls(objectives, batch_stats=policy, stats_objective=stats_objective, further=further)

    @property
    def objective(self) -> Objective:
        """The module on the first of the splits."""
        return next(iter(self.objectives.values()))

    def at(self, theta: Tensor, buffers: Mapping[str, Tensor]) -> dict[str, Measured]:
        """One state by split; a pass over each, and one over the training batches where statistics are recomputed."""
        return self._measure(theta, self.buffers_at(theta, buffers))

    def buffers_at(self, theta: Tensor, buffers: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The buffers that a state is evaluated with."""
        if self.batch_stats == "recompute" and self._stats_objective is not None:
            return running_statistics(self._stats_objective, theta, buffers)
        return buffers

    def end(self, end: Endpoint) -> dict[str, Measured]:
        """An endpoint by split, evaluated once."""
        if self.batch_stats != "recompute":
            return self.own(end)
        return _remembered(self._ends, end, lambda: self.at(end.theta, end.buffers))

    def own(self, end: Endpoint) -> dict[str, Measured]:
        """An endpoint by split with the statistics that it came with, evaluated once."""
        return _remembered(self._own, end, lambda: self._measure(end.theta, end.buffers))

    def line(self, end_a: Endpoint, end_b: Endpoint) -> Path:
        """The straight line between two states, buffers by the policy."""
        return linear_path(end_a, end_b, buffers="endpoint" if self.batch_stats == "endpoint" else "interpolate")

    def _measure(self, theta: Tensor, buffers: Mapping[str, Tensor]) -> dict[str, Measured]:
        return {
            split: Measured(
                objective.evaluate(theta, buffers=buffers),
                self._further[split](theta, buffers) if split in self._further else {},
            )
            for split, objective in self.objectives.items()
        }


def _remembered(
    known: WeakKeyDictionary[Endpoint, dict[str, Measured]], end: Endpoint, measure: Callable[[], dict[str, Measured]]
) -> dict[str, Measured]:
    if end not in known:
        known[end] = measure()
    return known[end]


def _uses_running_statistics(objective: Objective) -> bool:
    return objective.mode == "eval" and has_batch_norm(objective.module_at(objective.theta()))


def loss_profile(
    objective: Objective,
    path: Path,
    ts: Grid | None = None,
    *,
    split: str = "",
    batch_stats: BatchStats | None = None,
    stats_objective: Objective | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Loss and error of one objective along a path: :func:`loss_profiles` for one split."""
    profiles = loss_profiles(
        {split: objective}, path, ts, batch_stats=batch_stats, stats_objective=stats_objective, progress=progress
    )
    return profiles[split]


def loss_profiles(
    objectives: Mapping[str, Objective],
    path: Path,
    ts: Grid | None = None,
    *,
    batch_stats: BatchStats | None = None,
    stats_objective: Objective | None = None,
    progress: Progress | None = None,
) -> dict[str, Profile]:
    """Loss and error along a path, on several splits that share the work on BatchNorm statistics.

    Costs T forward passes over each split; ``"recompute"`` adds T passes over the training batches and two evaluations
    of the ends as they came.

    Args:
        objectives: one for each split, over one module.
        path: gives θ and buffers at t.
        ts: ascending from 0 to 1, or ``"adaptive"``; 25 equally spaced points by default.
        batch_stats: ``"recompute"`` takes BatchNorm's statistics at each t, the ends included, from the batches of
            ``stats_objective``. ``"interpolate"`` and ``"endpoint"`` record how ``path`` itself treats them; ``None``
            records that there is no BatchNorm.
        stats_objective: the module on training batches, with ``mode="train"``.
        progress: told after each point.

    Raises:
        ValueError: ``ts`` does not ascend from 0 to 1, or ``"recompute"`` has no ``stats_objective``.
    """
    states = StateEvaluator(objectives, batch_stats=batch_stats, stats_objective=stats_objective)
    return profiles_along(states, path, ts, progress=progress)


def profiles_along(
    states: StateEvaluator,
    path: Path,
    ts: Grid | None = None,
    *,
    ends: tuple[Endpoint, Endpoint] | None = None,
    progress: Progress | None = None,
) -> dict[str, Profile]:
    """Every metric along a path, by split.

    Args:
        states: what evaluates each point.
        path: gives θ and buffers at t.
        ts: ascending from 0 to 1; 25 equally spaced points by default. ``"adaptive"`` starts from five and refines
            around the peak of the loss on every split, until a parabola through it promises less than 0.2 % more, with
            two peaks to the full grid; other metrics are known at the same points.
        ends: the states at 0 and 1, where other paths share them.
        progress: told after each point.

    Raises:
        ValueError: ``ts`` does not ascend from 0 to 1.
    """
    fixed = None if isinstance(ts, str) else checked_ts(uniform_ts() if ts is None else ts).tolist()
    start, stop = ends or (Endpoint(*_at(path, 0.0)), Endpoint(*_at(path, 1.0)))
    found: dict[float, dict[str, Measured]] = {}
    while due := [t for t in fixed if t not in found] if fixed else _refined(found):
        for t in due:
            found[t] = states.at(*_at(path, t)) if 0 < t < 1 else states.end(stop if t else start)
            if progress is not None:
                progress(len(found), len(fixed) if fixed else len(found) - 1 + len(due) - due.index(t))
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


def _at(path: Path, t: float) -> tuple[Tensor, Mapping[str, Tensor]]:
    with torch.inference_mode(False):  # a step that differentiates by its inputs cannot save inference tensors
        return path(t)


def _refined(found: Mapping[float, Mapping[str, Measured]]) -> list[float]:
    """The points that an adaptive grid lacks."""
    ts = sorted(found)
    splits = next(iter(found.values()), {})
    losses = [_vector([found[t][split].evaluation.loss for t in ts]) for split in splits]
    return next_points(torch.tensor(ts, dtype=torch.float64), losses)


def _curves(along: list[Measured], own_ends: list[Measured], by_example: bool) -> dict[str, Curve]:
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
