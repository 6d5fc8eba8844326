"""Barriers on the straight line between the run and its children, its start, its last visit or a checkpoint."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmc_lightning.branching.lineage import Family, Node
from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.bridge import LogRecorder
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.callbacks.comparison import Comparison, needs_statistics
from lmc_lightning.callbacks.family_figures import family_figures, label_of
from lmc_lightning.callbacks.guards import check_choice
from lmc_lightning.callbacks.probe_store import Split
from lmc_lightning.callbacks.visits import Visit, probe_evidence
from lmc_lightning.core.glassbox import glass_box
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.params import ParameterLayout, parameter_layout
from lmc_lightning.landscape.barrier import Barrier
from lmc_lightning.landscape.paths import NUM_POINTS, BatchStats, endpoint_of
from lmc_lightning.recording import Measurement, slug
from lmc_lightning.schedule import Axis, Schedule

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

    Logged at x = step of the later epoch, each with ``<key>_stderr`` over examples (but not named metrics, whose parts
    are not known):

    =====================================  ==========================================================================
    ``barrier/{split}_loss/k1_{005}``      loss barrier of child and trunk, exactly 0 at the branch step
    ``barrier/{split}_error/k1_{005}``     error (1 − accuracy) barrier, for classification losses
    ``barrier/{metric}/k1_{005}``          a named metric that ``validation_step`` logs
    ``…/child_{j}``                        appended when a branch point has several children
    ``barrier/{split}_loss/{reference}``   without branching: ``initial``, ``previous`` or the checkpoint's name
    ``barrier/{split}_error/{reference}``  likewise
    ``barrier/{metric}/{reference}``       likewise
    ``barrier_curves/…``                   figure of the path to each child, a curve for each later epoch, at the end
    ``barrier_map/…``                      figure of all children of a metric, branch point × later epoch, at the end
    =====================================  ==========================================================================

    Args:
        num_points: equally spaced points on the line, both ends included.
        reference: ``"initial"``, ``"previous"`` (the last visit) or the path of a checkpoint; only without branching.
        metrics: further metrics by the name that ``validation_step`` logs, and which is better, ``"min"`` or ``"max"``.
        batch_stats: ``"recompute"`` (default with BatchNorm), ``"interpolate"`` or ``"endpoint"``.
        **common: see :class:`MeasurementCallback`. A ``probe_dataloader`` gives the training split, then the only one.
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
        if common.get("probe_dataloader") is not None:
            self.splits = ("train",)
        super().__init__(**common)
        if num_points < 3:
            raise ValueError(f"Expected num_points of at least 3, one of them between the ends, got {num_points}.")
        if batch_stats is not None:
            check_choice("batch_stats", batch_stats, ("recompute", "interpolate", "endpoint"))
        for name, better in (metrics or {}).items():
            check_choice(f"metrics[{name!r}]", better, ("min", "max"))
        if metrics and "val" not in self.splits:
            raise ValueError("metrics are of the validation split, which probe_dataloader= replaces. Leave one out.")
        self.num_points, self.reference = num_points, reference
        self.metrics, self.batch_stats = dict(metrics or {}), batch_stats
        self.barriers: dict[tuple[str, int], Barrier] = {}
        """Full results by (key, later step)."""
        self._reference: dict[str, Tensor] | None = None
        self._reference_step: int | None = None

    # -- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that there is something to compare with.

        Raises:
            ValueError: no reference without branching, or one beside it; steps for later epochs beside it; metrics
                without validation.
        """
        if stage == "fit":
            _check_reference(self.reference, self.schedule, _is_branching(trainer))
            if self.metrics and not trainer.enable_validation:
                raise ValueError(
                    f"metrics={self.metrics} are read from the validation of the run, and it has none. Give it a "
                    f"validation loader and the module a validation_step, or leave metrics out."
                )
            self.barriers.clear()
            if needs_statistics(pl_module, self.batch_stats):
                self._probes.reserve = STATISTICS_EXAMPLES
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the reference.

        Raises:
            ValueError: the checkpoint to compare with is of another architecture.
        """
        if trainer.global_step == 0:
            self._reference = self._reference_step = None
        if self.reference == "initial" and self._reference is None:
            self._reference, self._reference_step = _state(pl_module), trainer.global_step
            if trainer.global_step:
                self._recorder.warn_once(f"The start is not known; 'initial' is after {trainer.global_step} steps.")
        elif self.reference not in (None, "initial", "previous"):
            self._reference = _read_state(str(self.reference), parameter_layout(pl_module, self.parameters))
        super().on_train_start(trainer, pl_module)

    def is_due(self, axis: Axis, count: int) -> bool:
        """Whether to compare the run with its reference; children are compared when all are done."""
        return self.reference is not None and super().is_due(axis, count)

    # -- against a reference -----------------------------------------------------------------------------------------

    def measure(self, visit: Visit) -> Measurement:
        """Barriers between the reference (t = 0) and the state of this visit (t = 1)."""
        reference, state = self._reference, _state(visit.module)
        evidence = {"reference": self.reference, "reference_step": self._reference_step}
        pair: dict[str, Barrier] = {}
        if reference is not None:
            comparison = self._comparison(visit.module, visit.trainer, visit.objectives)
            pair = self._pair(comparison, reference, state, slug(Path(self.reference or "").stem))
        if self.reference == "previous":
            self._reference, self._reference_step = state, visit.step
        return replace(self._result(comparison, pair, visit.step), evidence=evidence) if pair else Measurement(())

    # -- against children --------------------------------------------------------------------------------------------

    def measure_family(self, family: Family, trainer: Any, pl_module: Any) -> None:
        """Barriers between the trunk (t = 0) and each child (t = 1) at the scheduled later epochs that they share.

        A further call adds what the earlier ones lack.
        """
        started = time.perf_counter()
        self._recorder.drop_failures()
        with self._recorded(self.kind, self._step, family.end.epoch):
            with glass_box():
                comparison = self._comparison(pl_module, trainer)
            for child in family.children:
                self._measure_child(family, child, comparison, trainer)
            drawn = Measurement((), figures=family_figures(family, self.barriers))
            self._recorder.add(drawn, step=self._step, epoch=family.end.epoch, loggers=trainer.loggers)
        for logger in trainer.loggers:
            logger.save()
        for error in self._recorder.errors:
            self._recorder.warn_once(error)
        self.seconds += time.perf_counter() - started

    def _measure_child(self, family: Family, child: Node, comparison: Comparison, trainer: Any) -> None:
        label = label_of(family, child)
        if child.status != "completed":
            reason = f"{child.name} is {child.status}: {child.reason}"
            self._lose(f"{self.kind}/{label}", reason, child.branch_step or 0, child.k1 or 0)
            return
        for epoch in sorted(e for e in child.epochs if e == child.k1 or self.schedule.is_due("epoch", e)):
            if (f"{self.key('train_loss')}/{label}", child.epochs[epoch]) not in self.barriers:
                with self._recorded(f"{self.kind}/{label}", child.epochs[epoch], epoch):
                    self._measure_pair(family, child, epoch, comparison, trainer)

    def _measure_pair(self, family: Family, child: Node, epoch: int, comparison: Comparison, trainer: Any) -> None:
        started, step = time.perf_counter(), child.epochs[epoch]
        with glass_box():
            trunk, state = family.state(family.trunk, epoch), family.state(child, epoch)
            pair = self._pair(comparison, trunk, state, label_of(family, child))
        lineage = {"k1": child.k1, "later_epoch": epoch, "child": child.child, "branch_step": child.branch_step}
        measurement = self._result(comparison, pair, step)
        measurement = replace(measurement, evidence={**lineage, "seconds": time.perf_counter() - started})
        self._recorder.add(measurement, step=step, epoch=epoch, loggers=trainer.loggers)

    @contextmanager
    def _recorded(self, name: str, step: int, epoch: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._lose(name, f"{type(error).__name__}: {error}", step, epoch)

    def _lose(self, name: str, reason: str, step: int, epoch: int) -> None:
        self._recorder.add_failure(reason, step=step, epoch=epoch, name=name)
        self._recorder.warn_once(reason, f"{name} at step {step} failed: {reason}")

    # -- pairs -------------------------------------------------------------------------------------------------------

    def _comparison(
        self, module: nn.Module, trainer: Any, objectives: Mapping[Split, Objective] | None = None
    ) -> Comparison:
        """On the probe sets that there are; with the ``objectives`` of a visit, its state is part of the evidence."""
        sets, recorder = self._probe_sets(trainer, final=True), LogRecorder() if self.metrics else None
        if sets is None:
            raise RuntimeError("There is no training probe set: the run ended before a batch was seen.")
        if self.metrics and "val" not in sets:
            raise RuntimeError(f"No validation batch was seen, from which {', '.join(self.metrics)} could be had.")
        skipped = () if objectives else ("probe_loss", "probe_error", "mean_max_probability")
        if recorder or objectives is None:
            options = {"trainer": trainer, "recorder": recorder}
            objectives = {s: self.objective(module, p.batches, **options) for s, p in sets.items()}
        evidence = {s: probe_evidence(sets[s], objective) for s, objective in objectives.items()}
        return Comparison(
            {str(split): objective for split, objective in objectives.items()},
            self._statistics(module, trainer),
            self.num_points,
            self.batch_stats,
            self.metrics,
            sets["val"].batches if "val" in sets else (),
            recorder,
            {s: {name: value for name, value in e.items() if name not in skipped} for s, e in evidence.items()},
        )

    def _statistics(self, module: nn.Module, trainer: Any) -> Objective | None:
        """The module on the training batches that BatchNorm statistics are recomputed from."""
        pool = self._probes.get("train", STATISTICS_EXAMPLES)
        if pool is None or not needs_statistics(module, self.batch_stats):
            return None
        return self.objective(module, pool.batches, trainer=trainer, mode="train", keep_batches=True)

    def _pair(
        self, comparison: Comparison, state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor], label: str
    ) -> dict[str, Barrier]:
        objective = comparison.objectives["train"]
        found = comparison.between(endpoint_of(objective, state_a), endpoint_of(objective, state_b))
        return {f"{self.key(name)}/{label}": result for name, result in found.items()}

    def _result(self, comparison: Comparison, pair: Mapping[str, Barrier], step: int) -> Measurement:
        self.barriers |= {(key, step): result for key, result in pair.items()}
        return Measurement(tuple(comparison.quantity(key, result) for key, result in pair.items()))

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The records, and the weights that later visits are compared with."""
        kept = dict(self._reference or {}) if self.reference in ("initial", "previous") else {}
        return super().state_dict() | {"reference": kept or None, "reference_step": self._reference_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the records of a checkpoint, against the same reference."""
        super().load_state_dict(state_dict)
        self._reference, self._reference_step = state_dict.get("reference"), state_dict.get("reference_step")


def _is_branching(trainer: Any) -> bool:
    return any(isinstance(c, CheckpointBranching) for c in trainer.callbacks)


def _check_reference(reference: str | None, schedule: Schedule, branching: bool) -> None:
    if branching and schedule.axis == "step":
        raise ValueError(
            "Beside CheckpointBranching, children are compared with the trunk after later epochs; got a schedule of "
            "steps. Pass epochs= or every_n_epochs=."
        )
    if reference is None and not branching:
        raise ValueError(
            "InterpolationBarrier has nothing to compare with. Add CheckpointBranching to the callbacks, or pass "
            "reference='initial', 'previous' or the path of a checkpoint."
        )
    if reference is not None and branching:
        raise ValueError(
            f"Beside CheckpointBranching, InterpolationBarrier compares children with the trunk; got reference="
            f"{reference!r} too. Leave it out, and compare with it in another run."
        )
    if reference not in (None, "initial", "previous") and not Path(str(reference)).is_file():
        raise ValueError(f"Expected reference to be 'initial', 'previous' or a checkpoint file, got {reference!r}.")


def _state(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _read_state(path: str, layout: ParameterLayout) -> dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in state or state[name].shape != shape:
            found = list(state[name].shape) if name in state else "missing"
            raise ValueError(
                f"{path} is no checkpoint of this module: {name!r} of shape {list(shape)} is {found} there. Only "
                f"networks of one architecture can be interpolated."
            )
    return dict(state)
