"""Two states of a network compared on several splits: loss, error and named metrics along the line between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from lmc_lightning.callbacks.bridge import LogRecorder, StepBatch, logged_metrics
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.barrier import Barrier, barrier, barriers_between
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

    def _named(self, end_a: Endpoint, end_b: Endpoint) -> dict[str, Barrier]:
        ts = uniform_ts(self.num_points)
        path = linear_path(end_a, end_b, buffers="endpoint" if self.batch_stats == "endpoint" else "interpolate")
        rows = [self._metrics_at(path, t) for t in ts.tolist()]
        return {name: self._named_barrier(name, ts, rows) for name in self.metrics}

    def _metrics_at(self, path: Path, t: float) -> dict[str, float]:
        objective, recorder = self.objectives["val"], self.recorder or LogRecorder()
        theta, buffers = path(t)
        if self.statistics is not None and self.batch_stats in (None, "recompute"):
            buffers = running_statistics(self.statistics, theta, buffers)
        return logged_metrics(objective, theta, self.validation, recorder, buffers)

    def _named_barrier(self, name: str, ts: torch.Tensor, rows: Sequence[Mapping[str, float]]) -> Barrier:
        if name not in rows[0]:
            raise ValueError(f"validation_step logs {', '.join(map(repr, rows[0])) or 'nothing'}, not {name!r}.")
        # A metric that is better when larger has a barrier where it dips.
        sign = -1.0 if self.metrics[name] == "max" else 1.0
        values = sign * torch.tensor([row[name] for row in rows], dtype=torch.float64)
        curve = Curve(values, (float(values[0]), float(values[-1])))
        return barrier(Profile(ts, {name: curve}, "val", self.batch_stats), name)


def needs_statistics(module: torch.nn.Module, batch_stats: BatchStats | None) -> bool:
    """Whether BatchNorm statistics have to be recomputed on a path between states of ``module``."""
    return batch_stats in (None, "recompute") and has_batch_norm(module)
