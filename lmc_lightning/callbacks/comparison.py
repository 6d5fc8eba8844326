"""Two states of a network compared on several splits: loss, error and named metrics along the line between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lmc_lightning.callbacks.bridge import LogRecorder, StepBatch, logged_metrics
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.barrier import DEFINITIONS, Barrier, barrier, barriers_between
from lmc_lightning.landscape.batchnorm import has_batch_norm, running_statistics
from lmc_lightning.landscape.paths import (
    BatchStats,
    Curve,
    Endpoint,
    Path,
    Profile,
    linear_path,
    uniform_ts,
)
from lmc_lightning.recording import Quantity


@dataclass(frozen=True)
class Comparison:
    """What two states are compared on, prepared once for all pairs of states of one module."""

    objectives: Mapping[str, Objective]
    """The module's loss on each split."""
    statistics: Objective | None = None
    """The module in train mode on the training batches that BatchNorm statistics are recomputed from."""
    num_points: int = 25
    batch_stats: BatchStats | None = None
    metrics: Mapping[str, Literal["min", "max"]] = field(default_factory=dict)
    """Named metrics of ``validation_step``, and which end of each is better."""
    validation: Sequence[StepBatch] = ()
    recorder: LogRecorder | None = None
    """What the objectives' module logs to, where there are named metrics."""
    evidence: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of the data of each split."""

    def between(self, end_a: Endpoint, end_b: Endpoint) -> dict[str, Barrier]:
        """Barriers from A (t = 0) to B (t = 1) by ``{split}_{metric}``, and by name for named metrics."""
        by_split = barriers_between(
            self.objectives,
            end_a,
            end_b,
            num_points=self.num_points,
            batch_stats=self.batch_stats,
            stats_objective=self.statistics,
        )
        found = {f"{split}_{m}": b for split, barriers in by_split.items() for m, b in barriers.items()}
        return found | (self._named(end_a, end_b) if self.metrics else {})

    def quantity(self, key: str, result: Barrier) -> Quantity:
        """A barrier with its evidence, to be logged as ``key``."""
        evidence = {name: getattr(result, name) for name in DEFINITIONS} | {
            "metric": result.metric,
            "eval_split": result.split,
            "peak_t": result.peak_t,
            "barrier_lower": result.barrier_lower,
            "distinguishable_from_zero": result.distinguishable_from_zero,
            "batch_stats": result.batch_stats,
            "num_points": result.num_points,
            "num_samples": result.num_samples,
            "ends": [float(result.values[0]), float(result.values[-1])],
            "own_ends": list(result.own_ends),
        }
        of_data = self.evidence.get(result.split, {})
        return Quantity(key, result.barrier, result.stderr_data["barrier"], evidence={**of_data, **evidence})

    def _named(self, end_a: Endpoint, end_b: Endpoint) -> dict[str, Barrier]:
        ts = uniform_ts(self.num_points)
        path = linear_path(end_a, end_b, buffers="endpoint" if self.batch_stats == "endpoint" else "interpolate")
        recompute = self.statistics is not None and self.batch_stats in (None, "recompute")
        rows = [self._metrics_at(path, t, recompute) for t in ts.tolist()]
        own_ends = [self._metrics_at(path, t, False) for t in (0.0, 1.0)] if recompute else [rows[0], rows[-1]]
        policy: BatchStats | None = "recompute" if recompute else self.batch_stats
        return {name: self._named_barrier(name, ts, rows, own_ends, policy) for name in self.metrics}

    def _metrics_at(self, path: Path, t: float, recompute: bool) -> dict[str, float]:
        theta, buffers = path(t)
        if recompute and self.statistics is not None:
            buffers = running_statistics(self.statistics, theta, buffers)
        recorder = self.recorder or LogRecorder()
        return logged_metrics(self.objectives["val"], theta, self.validation, recorder, buffers)

    def _named_barrier(
        self,
        name: str,
        ts: torch.Tensor,
        rows: Sequence[Mapping[str, float]],
        own_ends: Sequence[Mapping[str, float]],
        policy: BatchStats | None,
    ) -> Barrier:
        if name not in rows[0]:
            raise ValueError(f"validation_step logs {', '.join(map(repr, rows[0])) or 'nothing'}, not {name!r}.")
        # A metric that is better when larger has a barrier where it dips: that of its negative.
        sign, label = (-1.0, f"−{name}") if self.metrics[name] == "max" else (1.0, name)
        values = sign * torch.tensor([row[name] for row in rows], dtype=torch.float64)
        first, last = (sign * row[name] for row in own_ends)
        return barrier(Profile(ts, {label: Curve(values, (first, last))}, "val", policy), label)


def needs_statistics(module: torch.nn.Module, batch_stats: BatchStats | None) -> bool:
    """Whether BatchNorm statistics have to be recomputed on a path between states of ``module``."""
    return batch_stats in (None, "recompute") and has_batch_norm(module)
