"""Measurements of pairs of networks: the run and its children, its start, its last visit or a checkpoint."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pandas as pd
from torch import nn

from lmc_lightning.branching.averaging import averaging
from lmc_lightning.branching.lineage import Family
from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.bridge import LogRecorder, collective_of
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.callbacks.common import Common, Unpack
from lmc_lightning.callbacks.comparison import (
    Comparison,
    Extra,
    Finding,
    NamedMetrics,
    Pairing,
    check_metrics,
    metrics_of,
    needs_statistics,
    quantity_of,
)
from lmc_lightning.callbacks.family_figures import Figures
from lmc_lightning.callbacks.family_table import family_table, write_tables
from lmc_lightning.callbacks.guards import check_choice, check_listed
from lmc_lightning.callbacks.memory import Meter
from lmc_lightning.callbacks.pairs import PAIR_KINDS, Pair, PairKind, Work, pairs_of, start_of, work_on
from lmc_lightning.callbacks.probe_store import Split
from lmc_lightning.callbacks.references import Reference, check_reference, state_of_module
from lmc_lightning.callbacks.visits import NO_DERIVATIVES, Visit, probe_evidence
from lmc_lightning.core.glassbox import glass_box
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.barrier import Barrier, NumPoints
from lmc_lightning.landscape.paths import BatchStats, endpoint_of
from lmc_lightning.landscape.states import Metrics, StateEvaluator
from lmc_lightning.recording import Measurement
from lmc_lightning.schedule import Axis
from lmc_lightning.types import Progress

STATISTICS_EXAMPLES = 5000
"""Training examples from which BatchNorm statistics are recomputed on the path."""


class PairMeasurement(MeasurementCallback):
    """Compares two states of a network along a path between them.

    Beside :class:`CheckpointBranching`, the children of each branch point with the trunk or with each other at common
    later epochs, when all have been trained; without it, the run with ``reference``. Leaves say what a pair is asked
    for (:meth:`_comparison`) and what is drawn (:meth:`_figures`); for the arguments see
    :class:`~lmc_lightning.callbacks.interpolation_barrier.InterpolationBarrier`.
    """

    extras: tuple[Extra, ...] = ()
    offline: str
    """The function that does the same for two modules without a run."""

    def __init__(
        self,
        *,
        num_points: NumPoints,
        reference: str | None,
        pairs: Sequence[PairKind],
        splits: Sequence[Split],
        metrics: NamedMetrics | None,
        definitions: Sequence[str],
        batch_stats: BatchStats | None,
        **common: Unpack[Common],
    ) -> None:
        self.splits = tuple(splits) if common.get("probe_dataloader") is None else ("train",)
        super().__init__(**common)
        if num_points != "adaptive" and num_points < 3:
            raise ValueError(f"Expected num_points of at least 3, one of them between the ends, got {num_points}.")
        if batch_stats is not None:
            check_choice("batch_stats", batch_stats, ("recompute", "interpolate", "endpoint"))
        check_listed("pairs", pairs, PAIR_KINDS)
        check_listed("splits", splits, ("train", "val", "test"))
        if "train" not in self.splits:
            raise ValueError(f"Expected splits to hold 'train', on which all visits are made, got {self.splits}.")
        check_metrics(metrics or {}, self.splits)
        self.num_points, self.reference, self.pairs = num_points, reference, tuple(pairs)
        self.metrics, self.definitions, self.batch_stats = dict(metrics or {}), tuple(definitions), batch_stats
        self.barriers: dict[tuple[str, int], Barrier] = {}
        """Full results by (key, later step)."""
        self._reference = Reference(reference)
        self._family = ""

    @abstractmethod
    def _figures(self, family: Family) -> Figures:
        """What is drawn when all children have been compared."""

    @property
    def table_name(self) -> str | None:
        """Of the files of a family's tables."""
        return self.name

    # -- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that there is something to compare with.

        Raises:
            ValueError: no reference without branching, or one beside it; steps for later epochs beside it; metrics
                without validation; a test split that no datamodule gives.
        """
        if stage == "fit":
            branching = any(isinstance(c, CheckpointBranching) for c in trainer.callbacks)
            check_reference(self.reference, self.schedule, branching, averaging(trainer.callbacks), type(self).__name__)
            if self.metrics and not trainer.enable_validation:
                raise ValueError(
                    f"metrics={self.metrics} are read from the validation of the run, and it has none. Give it a "
                    f"validation loader and the module a validation_step, or leave metrics out."
                )
            if "test" in self.splits and self._probes.captures(trainer):
                raise ValueError(
                    "A run sees no test batches from which the test split could be captured. Give it a datamodule "
                    "with probe_batches(split, num_examples, seed), or leave 'test' out of splits."
                )
            self.barriers.clear()
            if needs_statistics(pl_module, self.batch_stats):
                self._probes.reserve = max(self._probes.reserve, STATISTICS_EXAMPLES)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the reference.

        Raises:
            ValueError: the checkpoint to compare with is of another architecture.
        """
        self._reference.begin(pl_module, trainer.global_step, self.parameters)
        if self.reference == "initial" and self._reference.step:
            steps = self._reference.step
            self._recorder.warn_once(f"The start is not known; 'initial' is after {steps} steps.")
        super().on_train_start(trainer, pl_module)

    def is_due(self, axis: Axis, count: int) -> bool:
        """Whether to compare the run with its reference; children are compared when all are done."""
        if self.reference is None or (self.reference == "average" and not count):
            return False
        return super().is_due(axis, count)

    # -- against a reference -----------------------------------------------------------------------------------------

    def measure(self, visit: Visit) -> Measurement:
        """Barriers between the reference (t = 0) and the state of this visit (t = 1)."""
        reference, state, measurement = self._reference, state_of_module(visit.module), Measurement(())
        if self.reference == "average":
            reference.take_average(visit.step, self._step, visit.trainer, visit.module)
        evidence = {"reference": self.reference, "reference_step": reference.step, **NO_DERIVATIVES}
        evidence |= {"num_averaged": reference.count} if reference.count else {}
        if reference.state is not None:
            comparison = self._comparison(visit.module, visit.trainer, visit.objectives, visit.progress)
            ends = [endpoint_of(comparison.states.objective, s) for s in (reference.state, state)]
            start = ends[0] if self.reference == "initial" else None
            measurement = self._result(replace(comparison, start=start).between(*ends), reference.label, visit.step)
        if self.reference == "previous":
            reference.take(state, visit.step)
        return replace(measurement, evidence=evidence)

    # -- against children --------------------------------------------------------------------------------------------

    def measure_family(self, family: Family, trainer: Any, pl_module: Any) -> None:
        """Barriers between the pairs of a family at the scheduled later epochs that they share.

        A further call adds what the earlier ones lack. The results are written to the family's folder too, as
        ``barriers.csv`` (:meth:`to_table`) and, averaged over pairs, ``barriers_mean.csv``.
        """
        started, self._family = self.clock(), str(family.folder)
        self._recorder.drop_failures()
        loggers = trainer.loggers if trainer.is_global_zero else ()
        with self._recorded(self.kind, self._step, family.end.epoch), collective_of(trainer).agreed():
            with glass_box():
                comparison = self._comparison(pl_module, trainer)
                comparison = replace(comparison, start=start_of(family, comparison.states.objective))
            pairs = [pair for pair in pairs_of(family, self.pairs) if self._is_complete(pair)]
            for work in work_on(family, pairs, comparison, self._is_wanted):
                self._do(work, trainer)
            drawn = Measurement((), figures=self._figures(family))
            self._recorder.add(drawn, step=self._step, epoch=family.end.epoch, loggers=loggers)
            if trainer.is_global_zero:
                write_tables(self.to_table(), family.folder, self.table_name)
        for logger in loggers:
            logger.save()
        for error in self._recorder.errors:
            self._recorder.warn_once(error)
        self.seconds += self.clock() - started

    def _is_complete(self, pair: Pair) -> bool:
        child = pair.second
        if pair.kind == "trunk" and child.status != "completed":
            reason = f"{child.name} is {child.status}: {child.reason}"
            self._lose(f"{self.kind}/{pair.label}", reason, child.branch_step or 0, child.k1 or 0)
        return child.status == "completed"

    def _is_wanted(self, pair: Pair, epoch: int) -> bool:
        step, known = pair.second.epochs[epoch], f"{self.key('train_loss')}/{pair.label}"
        at_branch = step == pair.second.branch_step  # where siblings are one network
        due = pair.kind == "trunk" if at_branch else self.schedule.is_due("epoch", epoch)
        return due and (known, step) not in self.barriers

    def _do(self, work: Work, trainer: Any) -> None:
        loggers = trainer.loggers if trainer.is_global_zero else ()
        with self._recorded(f"{self.kind}/{work.label}", work.step, work.epoch), collective_of(trainer).agreed():
            with glass_box(), Meter(trainer.strategy.root_device, self.clock) as meter:
                pairing = work.measure()
            measurement = self._result(pairing, work.label, work.step)
            evidence = {**work.lineage, "later_epoch": work.epoch, **NO_DERIVATIVES, **meter.evidence}
            measurement = replace(measurement, evidence=evidence)
            self._recorder.add(measurement, step=work.step, epoch=work.epoch, loggers=loggers)

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
        self,
        module: nn.Module,
        trainer: Any,
        objectives: Mapping[Split, Objective] | None = None,
        progress: Progress | None = None,
    ) -> Comparison:
        """On the probe sets that there are; with the ``objectives`` of a visit, its state is part of the evidence."""
        sets, recorder = self._probe_sets(trainer, final=True), LogRecorder()
        if sets is None:
            raise RuntimeError("There is no training probe set: the run ended before a batch was seen.")
        if self.metrics and "val" not in sets:
            raise RuntimeError(f"No validation batch was seen, from which {', '.join(self.metrics)} could be had.")
        skipped = () if objectives else ("probe_loss", "probe_error", "mean_max_probability")
        if self.metrics or objectives is None:
            options = {"trainer": trainer, "recorder": recorder if self.metrics else None}
            objectives = {s: self.objective(module, p.batches, **options) for s, p in sets.items()}
        evidence = {s: probe_evidence(sets[s], objective) for s, objective in objectives.items()}
        further: dict[str, Metrics] = {}
        if self.metrics:
            further["val"] = metrics_of(self.metrics, objectives["val"], sets["val"].batches, recorder)
        return Comparison(
            StateEvaluator.with_default_policy(
                {str(split): objective for split, objective in objectives.items()},
                batch_stats=self.batch_stats,
                stats_objective=self._statistics(module, trainer),
                further=further,
            ),
            self.num_points,
            self.metrics,
            self.definitions,
            self.extras,
            {s: {name: value for name, value in e.items() if name not in skipped} for s, e in evidence.items()},
        )

    def _statistics(self, module: nn.Module, trainer: Any) -> Objective | None:
        """The module on the training batches that BatchNorm statistics are recomputed from."""
        pool = self._probes.get("train", STATISTICS_EXAMPLES)
        if pool is None or not needs_statistics(module, self.batch_stats):
            return None
        return self.objective(module, pool.batches, trainer=trainer, mode="train", keep_batches=True)

    def _result(self, pairing: Pairing, label: str, step: int) -> Measurement:
        self.barriers |= {(f"{self.key(name)}/{label}", step): found for name, found in pairing.barriers.items()}
        return Measurement(tuple(quantity_of(f, self._key_of(f, label)) for f in pairing.findings))

    def _key_of(self, finding: Finding, label: str) -> str:
        parts = finding.family, finding.quantity, self.name, label, finding.qualifier
        return "/".join(part for part in parts if part)

    def to_table(self) -> pd.DataFrame:
        """One row for each pair, later epoch, split, metric and definition; see :func:`family_table`."""
        return family_table(self.results, self._family)

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The records, and the weights that later visits are compared with."""
        return super().state_dict() | self._reference.saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the records of a checkpoint, against the same reference."""
        super().load_state_dict(state_dict)
        self._reference.load(state_dict)
