"""Barriers on the straight line between the run and its children, its start, its last visit or a checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pandas as pd
from torch import nn

from lmc_lightning.branching.averaging import averaging
from lmc_lightning.branching.lineage import Family
from lmc_lightning.callbacks.barrier_charts import barrier_charts
from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.bridge import LogRecorder, collective_of
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.callbacks.comparison import (
    EXTRAS,
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
from lmc_lightning.callbacks.family_figures import family_figures
from lmc_lightning.callbacks.family_table import family_table, write_tables
from lmc_lightning.callbacks.guards import check_choice, check_listed
from lmc_lightning.callbacks.memory import Meter
from lmc_lightning.callbacks.pairs import PAIR_KINDS, Pair, PairKind, Work, pairs_of, start_of, work_on
from lmc_lightning.callbacks.probe_store import Split
from lmc_lightning.callbacks.references import Reference, check_reference, state_of_module
from lmc_lightning.callbacks.visits import NO_DERIVATIVES, Visit, probe_evidence
from lmc_lightning.core.glassbox import glass_box
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.attribution import Attribution
from lmc_lightning.landscape.barrier import DEFINITIONS, Barrier, NumPoints
from lmc_lightning.landscape.paths import NUM_POINTS, BatchStats, endpoint_of
from lmc_lightning.landscape.states import Metrics, StateEvaluator
from lmc_lightning.loggers import Chart
from lmc_lightning.recording import Measurement
from lmc_lightning.schedule import Axis

STATISTICS_EXAMPLES = 5000
"""Training examples from which BatchNorm statistics are recomputed on the path."""


class InterpolationBarrier(MeasurementCallback):
    """How far loss and error rise on the straight line between two states of a network.

    Beside :class:`CheckpointBranching`, the children of each branch point k1 are compared with the trunk, or with each
    other, at the same later epochs (``epochs``), when all have been trained. Without it, the run is compared with
    ``reference``.

    With BatchNorm, statistics are recomputed at each point from training examples, in train mode without dropout.
    Costs ``num_points`` forward passes a pair over each split, the ends once for all pairs. The ``barrier`` is that of
    Entezari et al. (arXiv 2110.06296), max over t of the gap to the chord; ``instability`` (arXiv 1912.05671) and the
    other conventions, with their errors, are in the evidence of each record, in ``barriers`` and in :meth:`to_table`.

    Logged at x = step of the later epoch, each with ``<key>_stderr`` over examples (but not named metrics, whose parts
    are not known):

    ==========================================  =====================================================================
    ``barrier/{split}_loss/k1_{005}``           loss barrier of child and trunk, exactly 0 at the branch step
    ``barrier/{split}_error/k1_{005}``          error (1 − accuracy) barrier, for classification losses
    ``barrier/{metric}/k1_{005}``               a named metric that ``validation_step`` logs
    ``…/{lr_x0.5}``                             appended for children to which something is done at the fork
    ``…/child_{j}``                             appended when a branch point has several children
    ``…/siblings_{i}_{j}``                      appended for two children of it, with ``pairs=("siblings",)``
    ``…/{definition}``                          appended for further ``definitions``
    ``barrier/{split}_loss/{reference}``        without branching: ``initial``, ``previous``, ``average``, the file
    ``barrier/{split}_error/{reference}``       likewise
    ``barrier/{metric}/{reference}``            likewise
    ``distance/{l2}/…``                         extra ``distances``, of parameters: ``l2``, ``relative`` to the way
                                                from the start, ``cosine`` of the two ways
    ``distance/{split}_{disagreement}/…``       of predictions: ``disagreement``, ``kl`` and ``jsd`` [nats],
                                                ``logit_cosine``, ``ensemble_accuracy`` of the averaged softmax
    ``soup_gain/{split}_{metric}/…``            extra ``soup``: how much better the midpoint is than the better end
    ``soup_gain/{split}_{metric}/family``       the average of the trunk and all its children than the best of them
    ``barrier_layer/{split}_{metric}/…``        extra ``layers``, then ``/{module}``: only this module's tensors move
                                                and the rest is the first network's; ``/{module}/at_b``: the second's;
                                                ``/{module}/cumulative``: this module and all before it move
    ``barrier_curves/…``                        figure of the path of each pair, a curve for each later epoch, at the
                                                end
    ``barrier_map/…``                           figure of all pairs of a metric, branch point × later epoch, at the end
    ``barrier_gaps/…``                          figure, with the extra ``figures``: the gaps to the chord alone
    ``barrier_branch_points/…``                 figure, likewise: barrier against k1
    ``barrier_pretraining/…``                   figure, likewise: barrier against the trunk's metric at k1
    ``distance_curves/…``                       figure, likewise, with ``distances``: against the step
    ``family_tree``                             figure, likewise: which run left which, and when
    ==========================================  =====================================================================

    Args:
        num_points: equally spaced points on the line, both ends included, or ``"adaptive"``: about ten, refined around
            the peaks of the losses, and 25 for curves with two peaks.
        reference: ``"initial"``, ``"previous"`` (the last visit), ``"average"`` (of the weights, at the same moment, by
            one of Lightning's averaging callbacks) or the path of a checkpoint; only without branching.
        pairs: ``"trunk"``: each child with the trunk; ``"siblings"``: the children of a branch point with each other.
        splits: of ``"train"``, ``"val"`` and ``"test"``; the last needs a datamodule with ``probe_batches``.
        metrics: further metrics by the name that ``validation_step`` logs, and which is better, ``"min"`` or ``"max"``.
        definitions: conventions of the barrier that are logged under keys of their own.
        batch_stats: ``"recompute"`` (default with BatchNorm), ``"interpolate"`` or ``"endpoint"``.
        extras: ``"distances"`` (2 more passes a pair), ``"soup"`` (1), ``"layers"`` (3G paths for G modules),
            ``"attribution"`` (1 in all: shares of examples in ``attributions``, those of classes in the evidence),
            ``"figures"``.
        **common: see :class:`MeasurementCallback`. A ``probe_dataloader`` gives the training split, then the only one.

    Raises:
        ValueError: unknown names, fewer than 3 points, or a metric that would share the key of a split's loss or error.
    """

    kind = "barrier"

    def __init__(
        self,
        *,
        num_points: NumPoints = NUM_POINTS,
        reference: str | None = None,
        pairs: Sequence[PairKind] = ("trunk",),
        splits: Sequence[Split] = ("train", "val"),
        metrics: NamedMetrics | None = None,
        definitions: Sequence[str] = ("barrier",),
        batch_stats: BatchStats | None = None,
        extras: Sequence[Extra] = (),
        **common: Any,
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
        check_listed("definitions", definitions, DEFINITIONS)
        check_listed("extras", extras, EXTRAS)
        check_metrics(metrics or {}, self.splits)
        self.num_points, self.reference, self.pairs = num_points, reference, tuple(pairs)
        self.metrics, self.definitions = dict(metrics or {}), tuple(definitions)
        self.batch_stats, self.extras = batch_stats, tuple(extras)
        self.barriers: dict[tuple[str, int], Barrier] = {}
        """Full results by (key, later step)."""
        self.attributions: dict[tuple[str, int], Attribution] = {}
        """With the extra ``attribution``: shares by (key, later step)."""
        self._reference = Reference(reference)
        self._family = ""
        if reference is None and "distances" in extras and self.schedule.every is None:  # relative to the start
            self.schedule = replace(self.schedule, points=self.schedule.points | {0})

    # -- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that there is something to compare with.

        Raises:
            ValueError: no reference without branching, or one beside it; steps for later epochs beside it; metrics
                without validation; a test split that no datamodule gives.
        """
        if stage == "fit":
            branching = any(isinstance(c, CheckpointBranching) for c in trainer.callbacks)
            check_reference(self.reference, self.schedule, branching, averaging(trainer.callbacks))
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
            self.attributions.clear()
            if needs_statistics(pl_module, self.batch_stats):
                self._probes.reserve = STATISTICS_EXAMPLES
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
            comparison = self._comparison(visit.module, visit.trainer, visit.objectives)
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
            records = self.results if "figures" in self.extras else None
            drawn = family_figures(family, self.barriers, records, self.name)
            self._recorder.add(Measurement((), figures=drawn), step=self._step, epoch=family.end.epoch, loggers=loggers)
            if trainer.is_global_zero:
                write_tables(self.to_table(), family.folder, self.name)
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
            evidence = {**work.lineage, "later_epoch": work.epoch, **NO_DERIVATIVES, **meter.evidence}
            measurement = replace(self._result(pairing, work.label, work.step), evidence=evidence)
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
        self, module: nn.Module, trainer: Any, objectives: Mapping[Split, Objective] | None = None
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
        keys = {name: f"{self.key(name)}/{label}" for name in pairing.barriers}
        self.barriers |= {(keys[name], step): found for name, found in pairing.barriers.items()}
        self.attributions |= {(keys[name], step): found for name, found in pairing.attributions.items()}
        return Measurement(tuple(quantity_of(f, self._key_of(f, label)) for f in pairing.findings))

    def _key_of(self, finding: Finding, label: str) -> str:
        parts = finding.family, finding.quantity, self.name, label, finding.qualifier
        return "/".join(part for part in parts if part)

    def to_table(self) -> pd.DataFrame:
        """One row for each pair, later epoch, split, metric and definition; see :func:`family_table`."""
        return family_table(self.results, self._family)

    def charts(self) -> list[Chart]:
        """All branch points in one chart for each split and metric."""
        return barrier_charts(self.tag, self.splits, self.metrics, self.definitions)

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The records, and the weights that later visits are compared with."""
        return super().state_dict() | self._reference.saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the records of a checkpoint, against the same reference."""
        super().load_state_dict(state_dict)
        self._reference.load(state_dict)
