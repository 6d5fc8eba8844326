"""Two states of a network compared along a path between them."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.callbacks.bridge.guards import check_choice, check_listed
from lmc_lightning.callbacks.bridge.logged import LogRecorder
from lmc_lightning.callbacks.bridge.objectives import in_samples
from lmc_lightning.callbacks.bridge.probe_set import Split
from lmc_lightning.callbacks.bridge.probes import STATISTICS_EXAMPLES
from lmc_lightning.callbacks.pairs.comparison import (
    NamedMetrics,
    Pairing,
    check_metrics,
    metrics_of,
    needs_statistics,
)
from lmc_lightning.callbacks.pairs.family_figures import Figures
from lmc_lightning.callbacks.pairs.family_table import family_table, write_tables
from lmc_lightning.callbacks.pairs.pair import PairKind
from lmc_lightning.callbacks.pairs.state_pairs import StatePairs
from lmc_lightning.callbacks.visits.common import Common, Unpack
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.barrier import DEFINITIONS, Barrier, NumPoints
from lmc_lightning.landscape.paths.line import NUM_POINTS, BatchStats, endpoint_of
from lmc_lightning.landscape.paths.states import Metrics, StateEvaluator
from lmc_lightning.recording import Measurement


class PathOptions(Common, total=False):
    """The arguments of :class:`PathPairs`, as editors and type checkers see them behind ``**common``."""

    num_points: NumPoints
    reference: str | None
    pairs: Sequence[PairKind]
    splits: Sequence[Split]
    metrics: NamedMetrics | None
    definitions: Sequence[str]
    batch_stats: BatchStats | None


class PathPairs(StatePairs):
    """Compares two states of a network along a path between them.

    Leaves say what a pair is asked for (:meth:`_comparison`) and what is drawn (:meth:`_figures`); for the arguments
    see :class:`~lmc_lightning.callbacks.interpolation_barrier.InterpolationBarrier`.
    """

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
        self._family = ""

    @property
    def barriers(self) -> dict[tuple[str, int], Barrier]:
        """Full results by (key, later step)."""
        return self._by_key("barriers")

    def _by_key(self, attribute: str) -> dict[tuple[str, int], Any]:
        """Something that was found of all pairs, by name, as it is kept by key."""
        return {
            (f"{self.key(name)}/{label}", step): found
            for (label, step), pairing in self._found.items()
            for name, found in getattr(pairing, attribute).items()
        }

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

    def _finish(self, family: Family, trainer: Any) -> None:
        """Draw, and write ``barriers.csv`` (:meth:`to_table`) and its means over pairs to the family's folder."""
        self._family = str(family.folder)
        loggers = trainer.loggers if trainer.is_global_zero else ()
        drawn = Measurement((), figures=self._figures(family))
        self._recorder.add(drawn, step=family.end.step, epoch=family.end.epoch, loggers=loggers)
        if trainer.is_global_zero:
            write_tables(self.to_table(), family.folder, self.table_name)

    def _shared(self, visit: Visit, start: Mapping[str, Tensor] | None) -> dict[str, Any]:
        """The arguments that every :class:`Comparison` along a path has."""
        objectives, recorder, further = visit.objectives, LogRecorder(), dict[str, Metrics]()
        sets = self._sets(visit.trainer)
        if self.metrics:
            if "val" not in sets:
                raise RuntimeError(f"No validation batch was seen, from which {', '.join(self.metrics)} could be had.")
            logging = visit.loss_on(sets["val"].batches, recorder=recorder)
            further["val"] = metrics_of(self.metrics, logging, sets["val"].batches, recorder)
        objectives = {split: in_samples(of, visit.loss_on, sets[split].batches) for split, of in objectives.items()}
        states = StateEvaluator(
            {str(split): objective for split, objective in objectives.items()},
            batch_stats=self.batch_stats,
            stats_objective=self._statistics(visit),
            further=further,
        )
        return {
            "states": states,
            "num_points": self.num_points,
            "metrics": self.metrics,
            "definitions": self.definitions,
            "evidence": {split: self._data(sets[split], of) for split, of in objectives.items()},
            "start": None if start is None else endpoint_of(states.objective, start),
        }

    def _statistics(self, visit: Visit) -> Objective | None:
        """The module on the training batches that BatchNorm statistics are recomputed from."""
        pool = self._probes.get("train", STATISTICS_EXAMPLES)
        if pool is None or not needs_statistics(visit.module, self.batch_stats):
            return None
        return visit.loss_on(pool.batches, mode="train", keep_batches=True)

    def _result(self, pairing: Pairing, label: str, names: tuple[str, str]) -> Measurement:
        return Measurement(tuple(finding.recorded(label, self.name) for finding in pairing.findings))

    def to_table(self) -> pd.DataFrame:
        """One row for each pair, later epoch, split, metric and definition; see :func:`family_table`."""
        return family_table(self.results, self._family)
