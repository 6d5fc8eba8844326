"""Barriers on the straight line between the run and its children, its start, its last visit or a checkpoint."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lmc_lightning.branching.lineage import Family, Node
from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.bridge import LogRecorder
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.callbacks.comparison import Comparison, needs_statistics
from lmc_lightning.callbacks.probe_store import Split
from lmc_lightning.callbacks.visits import Visit, probe_evidence
from lmc_lightning.core.glassbox import glass_box
from lmc_lightning.landscape.barrier import DEFINITIONS, Barrier
from lmc_lightning.landscape.paths import NUM_POINTS, BatchStats, endpoint_of
from lmc_lightning.plotting.barriers import plot_barrier_curves, plot_barrier_heatmap
from lmc_lightning.plotting.style import figure_of
from lmc_lightning.recording import Measurement, Quantity, slug
from lmc_lightning.schedule import Axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATISTICS_EXAMPLES = 5000
"""Training examples from which BatchNorm statistics are recomputed on the path."""


class InterpolationBarrier(MeasurementCallback):
    """How far loss and error rise on the straight line between two states of a network.

    Beside :class:`CheckpointBranching`, the children of each branch point k1 are compared with the trunk at the same
    later epochs (``epochs``), when all have been trained. Without it, the run is compared with ``reference``.

    With BatchNorm, statistics are recomputed at each point from training examples, in train mode without dropout.
    Costs ``num_points`` forward passes a pair over each split. The ``barrier`` is that of Entezari et al. (arXiv
    2110.06296), max over t of the gap to the chord; ``instability`` (arXiv 1912.05671) and the other conventions are
    in the evidence of each record and in ``barriers``.

    Logged at x = step of the later epoch, each with ``<key>_stderr`` over examples:

    ====================================  ===========================================================================
    ``barrier/{split}_loss/k1_{005}``     loss barrier of child and trunk, exactly 0 at the branch step
    ``barrier/{split}_error/k1_{005}``    error (1 − accuracy) barrier, for classification losses
    ``…/child_{j}``                       appended when a branch point has several children
    ``barrier/{split}_loss/{reference}``  without branching: ``initial``, ``previous`` or the checkpoint's name
    ``barrier/{metric}/…``                a named metric that ``validation_step`` logs
    ====================================  ===========================================================================

    Args:
        num_points: equally spaced points on the line, both ends included.
        reference: ``"initial"``, ``"previous"`` (the last visit) or the path of a checkpoint; only without branching.
        metrics: further metrics by the name that ``validation_step`` logs, and which is better, ``"min"`` or ``"max"``.
        batch_stats: ``"recompute"`` (default with BatchNorm), ``"interpolate"`` or ``"endpoint"``.
        **common: see :class:`MeasurementCallback`.
    """

    kind = "barrier"
    splits: tuple[Split, ...] = ("train", "val")

    def __init__(
        self,
        *,
        num_points: int = NUM_POINTS,
        reference: str | None = None,
        metrics: dict[str, Literal["min", "max"]] | None = None,
        batch_stats: BatchStats | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if num_points < 3:
            raise ValueError(f"Expected num_points of at least 3, one of them between the ends, got {num_points}.")
        self.num_points, self.reference = num_points, reference
        self.metrics, self.batch_stats = dict(metrics or {}), batch_stats
        self.barriers: dict[tuple[str, int], Barrier] = {}
        """Full results by (key, later step)."""
        self._reference: dict[str, Tensor] | None = None

    # -- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that there is something to compare with.

        Raises:
            ValueError: no reference without branching, or a reference beside it.
        """
        if stage == "fit":
            _check_reference(self.reference, any(isinstance(c, CheckpointBranching) for c in trainer.callbacks))
            self.barriers.clear()
            if needs_statistics(pl_module, self.batch_stats):
                self._probes.reserve = STATISTICS_EXAMPLES
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the reference."""
        if self.reference == "initial" and self._reference is None:
            self._reference = _state(pl_module)
        elif self.reference not in (None, "initial", "previous"):
            content = torch.load(str(self.reference), map_location="cpu", weights_only=True)
            self._reference = content.get("state_dict", content)
        super().on_train_start(trainer, pl_module)

    def is_due(self, axis: Axis, count: int) -> bool:
        """Whether to compare the run with its reference; children are compared when all are done."""
        return self.reference is not None and super().is_due(axis, count)

    # -- against a reference -----------------------------------------------------------------------------------------

    def measure(self, visit: Visit) -> Measurement:
        """Barriers between the reference (t = 0) and the state of this visit (t = 1)."""
        reference, state = self._reference, _state(visit.module)
        if self.reference == "previous":
            self._reference = state
        if reference is None:
            return Measurement(())
        comparison = self._comparison(visit.module, visit.trainer)
        label = slug(Path(self.reference or "").stem)
        return self._result(self._pair(comparison, reference, state, label), visit.step)

    # -- against children --------------------------------------------------------------------------------------------

    def measure_family(self, family: Family, trainer: Any, pl_module: Any) -> None:
        """Barriers between the trunk (t = 0) and each child (t = 1) at the scheduled later epochs that they share."""
        started = time.perf_counter()
        with glass_box():
            comparison = self._comparison(pl_module, trainer)
            probes = self._probes.get()
            shared = {} if probes is None else probe_evidence(probes, comparison.objectives["train"])
        for child in family.children:
            if child.status != "completed":
                self._fail(f"{child.name} is {child.status}: {child.reason}", child.branch_step or 0, child.k1 or 0)
                continue
            for epoch in sorted(e for e in child.epochs if e == child.k1 or self.schedule.is_due("epoch", e)):
                self._measure_child(family, child, epoch, comparison, shared, trainer)
        self._draw(family, trainer)
        self.seconds += time.perf_counter() - started

    def _measure_child(
        self,
        family: Family,
        child: Node,
        epoch: int,
        comparison: Comparison,
        shared: Mapping[str, Any],
        trainer: Any,
    ) -> None:
        started, step = time.perf_counter(), child.epochs[epoch]
        try:
            with glass_box():
                trunk, state = family.state(family.trunk, epoch), family.state(child, epoch)
                measurement = self._result(self._pair(comparison, trunk, state, _label(family, child)), step)
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._fail(f"{child.name} at epoch {epoch}: {type(error).__name__}: {error}", step, epoch)
            return
        lineage = {"k1": child.k1, "later_epoch": epoch, "child": child.child, "branch_step": child.branch_step}
        seconds = {"seconds": time.perf_counter() - started}
        measurement = replace(measurement, evidence={**shared, **lineage, **seconds})
        self._recorder.add(measurement, step=step, epoch=epoch, loggers=trainer.loggers)

    def _draw(self, family: Family, trainer: Any) -> None:
        """One figure of curves for each child, and one map of branch point × later epoch, for each metric."""
        figures: dict[str, Callable[[], Figure]] = {}
        completed = [child for child in family.children if child.status == "completed"]
        for key in sorted({key.rsplit("/k1_")[0] for key, _ in self.barriers}):
            table: dict[int, dict[int, list[float]]] = {}
            for child in completed:
                full = f"{key}/{_label(family, child)}"
                found = {e: self.barriers[full, s] for e, s in child.epochs.items() if (full, s) in self.barriers}
                if not found:
                    continue
                curves = full.replace("barrier/", "barrier_curves/", 1)
                figures[curves] = partial(_draw_curves, found, child)
                for epoch, result in found.items():
                    table.setdefault(child.k1 or 0, {}).setdefault(epoch, []).append(result.barrier)
            figures[f"{key.replace('barrier/', 'barrier_map/', 1)}"] = partial(_draw_map, table, key)
        if figures:
            self._recorder.add(
                Measurement((), figures=figures), step=self._step, epoch=family.end.epoch, loggers=trainer.loggers
            )

    # -- pairs -------------------------------------------------------------------------------------------------------

    def _comparison(self, module: nn.Module, trainer: Any) -> Comparison:
        recorder = LogRecorder() if self.metrics else None
        sets = self._probe_sets(trainer, final=True)
        if sets is None:
            raise RuntimeError("There is no training probe set: the run ended before a batch was seen.")
        if self.metrics and "val" not in sets:
            raise ValueError(f"metrics={self.metrics} need a validation loader, and the run has none.")
        statistics = None
        if needs_statistics(module, self.batch_stats):
            pool = self._probes.get("train", STATISTICS_EXAMPLES) or sets["train"]
            statistics = self.objective(module, pool.batches, trainer=trainer, mode="train", keep_batches=True)
        return Comparison(
            {s: self.objective(module, p.batches, trainer=trainer, recorder=recorder) for s, p in sets.items()},
            statistics,
            self.num_points,
            self.batch_stats,
            self.metrics,
            sets["val"].batches if "val" in sets else (),
            recorder,
        )

    def _pair(
        self, comparison: Comparison, state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor], label: str
    ) -> dict[str, Barrier]:
        objective = comparison.objectives["train"]
        found = comparison.between(endpoint_of(objective, state_a), endpoint_of(objective, state_b))
        return {f"{self.key(name)}/{label}": result for name, result in found.items()}

    def _result(self, pair: Mapping[str, Barrier], step: int) -> Measurement:
        self.barriers |= {(key, step): result for key, result in pair.items()}
        return Measurement(tuple(_quantity(key, result) for key, result in pair.items()))

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The records, and the weights that later visits are compared with."""
        return super().state_dict() | {"reference": None if self._reference is None else dict(self._reference)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the records of a checkpoint, against the same reference."""
        super().load_state_dict(state_dict)
        self._reference = state_dict.get("reference")


def _check_reference(reference: str | None, branching: bool) -> None:
    if reference is None and not branching:
        raise ValueError(
            "InterpolationBarrier has nothing to compare with. Add CheckpointBranching to the callbacks, or pass "
            "reference='initial', 'previous' or the path of a checkpoint."
        )
    if reference is not None and branching:
        raise ValueError(
            f"Beside CheckpointBranching, InterpolationBarrier compares children with the trunk; got reference="
            f"{reference!r} too. Leave it out, or give the run two InterpolationBarriers with different name=."
        )
    if reference not in (None, "initial", "previous") and not Path(str(reference)).is_file():
        raise ValueError(f"Expected reference to be 'initial', 'previous' or a checkpoint file, got {reference!r}.")


def _state(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _label(family: Family, child: Node) -> str:
    siblings = sum(other.k1 == child.k1 for other in family.children)
    return f"k1_{child.k1:03d}" + (f"/child_{child.child}" if siblings > 1 else "")


def _quantity(key: str, result: Barrier) -> Quantity:
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
    return Quantity(key, result.barrier, result.stderr_data["barrier"], evidence=evidence)


def _draw_curves(found: Mapping[int, Barrier], child: Node) -> "Figure":
    """The path between trunk and child at each later epoch."""
    curves = [(f"epoch {epoch}", result) for epoch, result in found.items()]
    return figure_of(plot_barrier_curves(curves, title=f"Branched at epoch {child.k1}", ends=("trunk", "child")))


def _draw_map(table: Mapping[int, Mapping[int, Sequence[float]]], key: str) -> "Figure":
    """Branch point × later epoch, the mean over the children of a branch point."""
    k1s, epochs = sorted(table), sorted({epoch for row in table.values() for epoch in row})
    values = np.full((len(k1s), len(epochs)), np.nan)
    for i, k1 in enumerate(k1s):
        for j, epoch in enumerate(epochs):
            if epoch in table[k1]:
                values[i, j] = float(np.mean(table[k1][epoch]))
    return figure_of(plot_barrier_heatmap(values, k1s, epochs, title=f"{key}: child against trunk"))
