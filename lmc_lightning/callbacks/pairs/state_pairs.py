"""Two states of a network compared: those of a family, or the run with a reference."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.traces.averaging import averaging
from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.callbacks.bridge.guards import check_listed
from lmc_lightning.callbacks.bridge.objectives import collective_of
from lmc_lightning.callbacks.bridge.probe_set import ProbeSet, Split
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.callbacks.pairs.comparison import Extra
from lmc_lightning.callbacks.pairs.pair import PAIR_KINDS, Pair, PairKind, Work, pairs_of, work_on
from lmc_lightning.callbacks.pairs.reference import Reference, check_reference, state_of_module
from lmc_lightning.callbacks.visits.common import Common, Unpack
from lmc_lightning.callbacks.visits.memory import Meter
from lmc_lightning.callbacks.visits.tolerance import tolerated
from lmc_lightning.callbacks.visits.visit import NO_DERIVATIVES, Visit, probe_evidence
from lmc_lightning.core.glassbox import glass_box
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.line import endpoint_of
from lmc_lightning.recording import Measurement
from lmc_lightning.schedule import Axis

_OF_A_STATE = ("probe_loss", "probe_error", "mean_max_probability")
"""Evidence that a pair of a family has not."""


class StatePairs(MeasurementCallback):
    """Compares two states of a network.

    Beside :class:`CheckpointBranching`, the children of each branch point with the trunk or with each other at common
    later epochs, when all have been trained; without it, the run with ``reference``. Subclasses say by what a pair is
    compared (:meth:`_comparison`), what is recorded of it (:meth:`_result`) and what is made of a whole family
    (:meth:`_finish`).

    Args:
        reference: ``"initial"``, ``"previous"`` (the last visit), ``"average"`` (of the weights, by one of Lightning's
            averaging callbacks) or the path of a checkpoint; only without branching.
        pairs: ``"trunk"``: each child with the trunk; ``"siblings"``: the children of a branch point with each other.
        **common: see :class:`MeasurementCallback`.
    """

    offline: str
    """The function that does the same for two modules without a run."""
    extras: tuple[Extra, ...] = ()
    """What else is asked for."""

    def __init__(
        self, *, reference: str | None = None, pairs: Sequence[PairKind] = ("trunk",), **common: Unpack[Common]
    ) -> None:
        super().__init__(**common)
        check_listed("pairs", pairs, PAIR_KINDS)
        self.reference, self.pairs = reference, tuple(pairs)
        self._reference = Reference(reference)
        self._found: dict[tuple[str, int], Any] = {}
        """What the comparison has given, by the last part of the keys and the step."""

    @abstractmethod
    def _comparison(self, visit: Visit, start: Mapping[str, Tensor] | None) -> Any:
        """By what pairs of states of the visited module are compared; ``start`` is where the run began, if known."""

    @abstractmethod
    def _result(self, pairing: Any, label: str, names: tuple[str, str]) -> Measurement:
        """What is recorded of a pair under a label."""

    def _finish(self, family: Family, trainer: Any) -> None:
        """Make something of all pairs."""

    def forget(self) -> None:
        """Forget the pairs of another run too."""
        super().forget()
        self._found.clear()

    # -- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that there is something to compare with.

        Raises:
            ValueError: no reference without branching, or one beside it; steps for later epochs beside it.
        """
        if stage == "fit":
            branching = any(isinstance(c, CheckpointBranching) for c in trainer.callbacks)
            check_reference(self.reference, self.schedule, branching, averaging(trainer.callbacks), type(self).__name__)
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
        """The reference (first) compared with the state of this visit (second)."""
        reference, state, measurement = self._reference, state_of_module(visit.module), Measurement(())
        if self.reference == "average":
            reference.take_average(visit.step, self._step, visit.trainer, visit.module)
        evidence = {"reference": self.reference, "reference_step": reference.step, **NO_DERIVATIVES}
        evidence |= {"num_averaged": reference.count} if reference.count else {}
        if reference.state is not None:
            comparison = self._comparison(visit, reference.state if self.reference == "initial" else None)
            ends = [endpoint_of(comparison.states.objective, s) for s in (reference.state, state)]
            names = (str(self.reference), f"step {visit.step}")
            measurement = self._keep(comparison.between(*ends), reference.label, visit.step, names)
        if self.reference == "previous":
            reference.take(state, visit.step)
        return replace(measurement, evidence=evidence)

    # -- against children --------------------------------------------------------------------------------------------

    def measure_family(self, family: Family, trainer: Any, pl_module: Any) -> None:
        """Compare the pairs of a family at the scheduled later epochs that they share; a further call adds more."""
        started = self.clock()
        self._recorder.drop_failures()
        with self._tolerated(self.kind, family.end.step, family.end.epoch), collective_of(trainer).agreed():
            with glass_box():
                loss_on = partial(self.objective, pl_module, trainer=trainer)
                objectives = {split: loss_on(p.batches) for split, p in self._sets(trainer).items()}
                end, generator = family.end, torch.Generator()
                visit = Visit(objectives, loss_on, end.step, end.epoch, generator, pl_module, trainer)
                start = family.state(family.trunk, 0) if 0 in family.trunk.epochs else None
                comparison = self._comparison(visit, start)
            pairs = [pair for pair in pairs_of(family, self.pairs) if self._is_complete(pair)]
            for work in work_on(family, pairs, comparison, self._is_wanted, with_soup="soup" in self.extras):
                self._do(work, trainer)
            self._finish(family, trainer)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.save()
        for error in self._recorder.errors:
            self._recorder.warn_once(error)
        self.seconds += self.clock() - started

    def _is_complete(self, pair: Pair) -> bool:
        child = pair.second
        if pair.kind == "trunk" and child.status != "completed":
            reason = f"{child.name} is {child.status}: {child.reason}"
            self._lose(f"{self.kind}/{pair.label}", child.branch_step or 0, child.k1 or 0, reason)
        return child.status == "completed"

    def _is_wanted(self, pair: Pair, epoch: int) -> bool:
        step = pair.second.epochs[epoch]
        at_branch = step == pair.second.branch_step  # where siblings are one network
        due = pair.kind == "trunk" if at_branch else self.schedule.is_due("epoch", epoch)
        return due and (pair.label, step) not in self._found

    def _do(self, work: Work, trainer: Any) -> None:
        loggers = trainer.loggers if trainer.is_global_zero else ()
        with self._tolerated(f"{self.kind}/{work.label}", work.step, work.epoch), collective_of(trainer).agreed():
            with glass_box(), Meter(trainer.strategy.root_device, self.clock) as meter:
                pairing = work.measure()
            names = (work.lineage["parent"], work.lineage["run"])
            measurement = self._keep(pairing, work.label, work.step, names)
            evidence = {**work.lineage, "later_epoch": work.epoch, **NO_DERIVATIVES, **meter.evidence}
            self._recorder.add(
                replace(measurement, evidence=evidence), step=work.step, epoch=work.epoch, loggers=loggers
            )

    def _keep(self, pairing: Any, label: str, step: int, names: tuple[str, str]) -> Measurement:
        measurement = self._result(pairing, label, names)
        self._found[label, step] = pairing
        return measurement

    def _data(self, probes: ProbeSet, objective: Objective) -> dict[str, Any]:
        """The evidence of a probe set, with the state that is visited unless there is a whole family of them."""
        evidence = probe_evidence(probes, objective)
        return {name: value for name, value in evidence.items() if self.reference or name not in _OF_A_STATE}

    def _sets(self, trainer: Any) -> dict[Split, ProbeSet]:
        """The probe sets that there are.

        Raises:
            RuntimeError: not even one of training examples.
        """
        sets = self._probe_sets(trainer, final=True)
        if sets is None:
            raise RuntimeError("There is no training probe set: the run ended before a batch was seen.")
        return sets

    def _tolerated(self, name: str, step: int, epoch: int) -> AbstractContextManager[None]:
        return tolerated(partial(self._lose, name, step, epoch), self.on_error)

    def _lose(self, name: str, step: int, epoch: int, reason: str) -> None:
        self._recorder.add_failure(reason, step=step, epoch=epoch, name=name)
        self._recorder.warn_once(reason, f"{name} at step {step} failed: {reason}")

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The records, and the weights that later visits are compared with."""
        return super().state_dict() | self._reference.saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the records of a checkpoint, against the same reference."""
        super().load_state_dict(state_dict)
        self._reference.load(state_dict)
