"""Loss, error and other metrics of states of a network, on several splits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor

from lmc_lightning.core.evaluation import Evaluation
from lmc_lightning.core.leading import Theta, point_of
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.batchnorm import has_batch_norm, running_statistics
from lmc_lightning.landscape.paths.line import BatchStats, Endpoint, Line, linear_path

Metrics: TypeAlias = Callable[[Tensor, Mapping[str, Tensor]], Mapping[str, float]]
"""θ ``(P,)`` and buffers ↦ metrics by name, each better when smaller."""

Point: TypeAlias = tuple[Theta, Mapping[str, Tensor]]
"""θ and buffers of a state."""

RECOMPUTED_TOGETHER = 4
"""Points whose BatchNorm statistics are held at a time."""


@dataclass(frozen=True)
class StateMetrics:
    """One state on one split."""

    evaluation: Evaluation
    further: Mapping[str, float] = field(default_factory=dict)


class StateEvaluator:
    """Loss, error and other metrics of any state of a module on several splits, BatchNorm's statistics by one policy.

    What is found at an endpoint is kept as long as the endpoint lives, so that many paths share it.

    Args:
        objectives: one for each split, over one module.
        batch_stats: ``"recompute"``, the default, takes BatchNorm's statistics of every state, endpoints included, from
            the batches of ``stats_objective``; under ``"interpolate"`` and ``"endpoint"`` they are those that a path
            gives. Without BatchNorm, or where its layers do not use running statistics, there is no policy.
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
        uses = any(map(_uses_running_statistics, objectives.values()))
        self.batch_stats: BatchStats | None = (batch_stats or "recompute") if uses else None
        if self.batch_stats == "recompute" and stats_objective is None:
            raise ValueError(
                "batch_stats='recompute' needs training batches: pass stats_objective=Objective(module, batches, "
                "loss_fn, mode='train'), or choose batch_stats='interpolate'."
            )
        self.objectives = objectives
        self._stats_objective, self._further = stats_objective, further or {}
        self._ends: WeakKeyDictionary[Endpoint, dict[str, StateMetrics]] = WeakKeyDictionary()
        self._own: WeakKeyDictionary[Endpoint, dict[str, StateMetrics]] = WeakKeyDictionary()

    @property
    def objective(self) -> Objective:
        """The module on the first of the splits."""
        return next(iter(self.objectives.values()))

    def at(self, theta: Tensor, buffers: Mapping[str, Tensor]) -> dict[str, StateMetrics]:
        """One state by split; a pass over each, and one over the training batches where statistics are recomputed."""
        return self.along([(theta, buffers)])[0]

    def along(self, points: Sequence[Point]) -> list[dict[str, StateMetrics]]:
        """Many states, each by split, for less than one after another: see :meth:`Objective.evaluate_many`.

        Args:
            points: θ and buffers as a path gives them.
        """
        size = len(points) if self.batch_stats != "recompute" else RECOMPUTED_TOGETHER
        found: list[dict[str, StateMetrics]] = []
        for first in range(0, len(points), size or 1):
            states = [(theta, self.buffers_at(theta, buffers)) for theta, buffers in points[first : first + size]]
            found += self._measure(states)
        return found

    def buffers_at(self, theta: Theta, buffers: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The buffers that a state is evaluated with."""
        if self.batch_stats == "recompute" and self._stats_objective is not None:
            return running_statistics(self._stats_objective, point_of(theta), buffers)
        return buffers

    def end(self, end: Endpoint) -> dict[str, StateMetrics]:
        """An endpoint by split, evaluated once."""
        if self.batch_stats != "recompute":
            return self.own(end)
        return _remembered(self._ends, end, lambda: self.at(end.theta, end.buffers))

    def own(self, end: Endpoint) -> dict[str, StateMetrics]:
        """An endpoint by split with the statistics that it came with, evaluated once."""
        return _remembered(self._own, end, lambda: self._measure([(end.theta, end.buffers)])[0])

    def line(self, end_a: Endpoint, end_b: Endpoint) -> Line:
        """The straight line between two states, buffers by the policy."""
        return linear_path(end_a, end_b, buffers="endpoint" if self.batch_stats == "endpoint" else "interpolate")

    def _measure(self, states: Sequence[Point]) -> list[dict[str, StateMetrics]]:
        found: list[dict[str, StateMetrics]] = [{} for _ in states]
        for split, objective in self.objectives.items():
            evaluations = _evaluations(objective, states)
            for by_split, evaluation, (theta, buffers) in zip(found, evaluations, states, strict=True):
                further = self._further[split](point_of(theta), buffers) if split in self._further else {}
                by_split[split] = StateMetrics(evaluation, further)
        return found


def _evaluations(objective: Objective, states: Sequence[Point]) -> list[Evaluation]:
    if len(states) == 1 and isinstance(states[0][0], Tensor):
        known = objective.known(states[0][0], states[0][1])
        if known is not None:
            return [known]
    thetas, buffers = zip(*states, strict=True)
    return objective.evaluate_many(thetas, buffers=buffers)


def _remembered(
    known: WeakKeyDictionary[Endpoint, dict[str, StateMetrics]],
    end: Endpoint,
    measure: Callable[[], dict[str, StateMetrics]],
) -> dict[str, StateMetrics]:
    if end not in known:
        known[end] = measure()
    return known[end]


def _uses_running_statistics(objective: Objective) -> bool:
    return objective.mode == "eval" and has_batch_norm(objective.module_at(objective.theta()))
