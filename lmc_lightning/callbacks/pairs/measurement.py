"""Two states of a network compared along a path between them."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from torch import nn

from lmc_lightning.branching.lineage import Family
from lmc_lightning.callbacks.bridge.guards import check_choice, check_listed
from lmc_lightning.callbacks.bridge.logged import LogRecorder
from lmc_lightning.callbacks.bridge.probe_set import Split
from lmc_lightning.callbacks.pairs.comparison import (
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
from lmc_lightning.callbacks.pairs.family_figures import Figures
from lmc_lightning.callbacks.pairs.family_table import family_table, write_tables
from lmc_lightning.callbacks.pairs.pair import PairKind
from lmc_lightning.callbacks.pairs.state_pairs import StatePairs
from lmc_lightning.callbacks.visits.common import Common, Unpack
from lmc_lightning.callbacks.visits.visit import probe_evidence
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.barrier import DEFINITIONS, Barrier, NumPoints
from lmc_lightning.landscape.paths.line import NUM_POINTS, BatchStats, Endpoint
from lmc_lightning.landscape.paths.states import Metrics, StateEvaluator
from lmc_lightning.recording import Measurement
from lmc_lightning.types import Progress

STATISTICS_EXAMPLES = 5000
"""Training examples from which BatchNorm statistics are recomputed on the path."""


class PathOptions(Common, total=False):
    """The arguments of :class:`PairMeasurement`, as editors and type checkers see them behind ``**common``."""

    num_points: NumPoints
    reference: str | None
    pairs: Sequence[PairKind]
    splits: Sequence[Split]
    metrics: NamedMetrics | None
    definitions: Sequence[str]
    batch_stats: BatchStats | None


class PairMeasurement(StatePairs):
    """Compares two states of a network along a path between them.

    Leaves say what a pair is asked for (:meth:`_comparison`) and what is drawn (:meth:`_figures`); for the arguments
    see :class:`~lmc_lightning.callbacks.interpolation_barrier.InterpolationBarrier`.
    """

    extras: tuple[Extra, ...] = ()

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
        **common: Unpack[Common],
    ) -> None:
        self.splits = tuple(splits) if common.get("probe_dataloader") is None else ("train",)
        super().__init__(reference=reference, pairs=pairs, **common)
        if num_points != "adaptive" and num_points < 3:
            raise ValueError(f"Expected num_points of at least 3, one of them between the ends, got {num_points}.")
        if batch_stats is not None:
            check_choice("batch_stats", batch_stats, ("recompute", "interpolate", "endpoint"))
        check_listed("splits", splits, ("train", "val", "test"))
        check_listed("definitions", definitions, DEFINITIONS)
        if "train" not in self.splits:
            raise ValueError(f"Expected splits to hold 'train', on which all visits are made, got {self.splits}.")
        check_metrics(metrics or {}, self.splits)
        self.num_points, self.metrics, self.batch_stats = num_points, dict(metrics or {}), batch_stats
        self.definitions = tuple(definitions)
        self.barriers: dict[tuple[str, int], Barrier] = {}
        """Full results by (key, later step)."""
        self._family = ""

    @abstractmethod
    def _figures(self, family: Family) -> Figures:
        """What is drawn when all children have been compared."""

    @property
    def table_name(self) -> str | None:
        """Of the files of a family's tables."""
        return self.name

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that there is something to compare with and on.

        Raises:
            ValueError: as :class:`StatePairs`; metrics without validation; a test split that no datamodule gives.
        """
        if stage == "fit" and needs_statistics(pl_module, self.batch_stats):
            self._probes.reserve = max(self._probes.reserve, STATISTICS_EXAMPLES)
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
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

    def _starting(self, comparison: Comparison, start: Endpoint | None) -> Comparison:
        return replace(comparison, start=start)

    def _is_known(self, label: str, step: int) -> bool:
        return (f"{self.key('train_loss')}/{label}", step) in self.barriers

    def measure_family(self, family: Family, trainer: Any, pl_module: Any) -> None:
        """Barriers between the pairs of a family at the scheduled later epochs that they share.

        A further call adds what the earlier ones lack. The results are written to the family's folder too, as
        ``barriers.csv`` (:meth:`to_table`) and, averaged over pairs, ``barriers_mean.csv``.
        """
        self._family = str(family.folder)
        super().measure_family(family, trainer, pl_module)

    def _finish(self, family: Family, trainer: Any) -> None:
        loggers = trainer.loggers if trainer.is_global_zero else ()
        drawn = Measurement((), figures=self._figures(family))
        self._recorder.add(drawn, step=self._step, epoch=family.end.epoch, loggers=loggers)
        if trainer.is_global_zero:
            write_tables(self.to_table(), family.folder, self.table_name)

    def _comparison(
        self,
        module: nn.Module,
        trainer: Any,
        objectives: Mapping[Split, Objective] | None = None,
        progress: Progress | None = None,
    ) -> Comparison:
        """On the probe sets that there are; with the ``objectives`` of a visit, its state is part of the evidence."""
        sets, recorder = self._sets(trainer), LogRecorder()
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
            StateEvaluator(
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

    def _result(self, pairing: Pairing, label: str, step: int, names: tuple[str, str]) -> Measurement:
        self.barriers |= {(f"{self.key(name)}/{label}", step): found for name, found in pairing.barriers.items()}
        return Measurement(tuple(quantity_of(f, self._key_of(f, label)) for f in pairing.findings))

    def _key_of(self, finding: Finding, label: str) -> str:
        parts = finding.family, finding.quantity, self.name, label, finding.qualifier
        return "/".join(part for part in parts if part)

    def to_table(self) -> pd.DataFrame:
        """One row for each pair, later epoch, split, metric and definition; see :func:`family_table`."""
        return family_table(self.results, self._family)
