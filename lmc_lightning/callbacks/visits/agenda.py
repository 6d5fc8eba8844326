"""Visits that are due: which wait for their probe set, which are not recorded yet, and what came of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lmc_lightning.callbacks.visits.tolerance import OnError, tolerated
from lmc_lightning.callbacks.visits.visit import MAX_PENDING, Pending, fits_in_memory, too_many_pending
from lmc_lightning.core.collective import InterruptedMeasurementError
from lmc_lightning.core.glassbox import glass_box
from lmc_lightning.core.shadow import copy_module
from lmc_lightning.recording import Measurement, Recorder


class Agenda:
    """The visits of one callback from when they are due until they are recorded, whatever came of them.

    Args:
        recorder: of the callback.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.waiting: list[Pending] = []
        """Visits that have not been tried."""
        self.open: list[tuple[int, int]] = []
        """Step and epoch of each visit that has left no record, or only that it was interrupted."""

    def add(self, visit: Pending) -> None:
        """Note that a visit is due."""
        self.waiting.append(visit)
        self.open.append((visit.step, visit.epoch))

    def postpone(self, num_examples: int | None) -> None:
        """Let the last visit wait on a copy of the module and its optimizers' state, which are about to change.

        Raises:
            RuntimeError: there are too many copies already.
        """
        visit = self.waiting[-1]
        if len(self.waiting) > MAX_PENDING or not fits_in_memory(visit.module, visit.optimizers, len(self.waiting)):
            raise RuntimeError(too_many_pending(num_examples))
        with glass_box(match_precision=True):
            visit.module = copy_module(visit.module, {})
            visit.optimizers = [state.copy() for state in visit.optimizers]

    def take(self) -> list[Pending]:
        """All waiting visits, in the order of their steps; they wait no longer."""
        taken, self.waiting = self.waiting, []
        return taken

    @contextmanager
    def attempt(self, visit: Pending, on_error: OnError) -> Iterator[None]:
        """Try to make a visit; one that was interrupted stays open for a resumed run."""
        with tolerated(lambda reason: self.fail(reason, visit.step, visit.epoch), on_error):
            try:
                yield
            except InterruptedMeasurementError as error:
                self._recorder.add_failure(str(error), step=visit.step, epoch=visit.epoch)
                self.waiting = []

    def record(self, visit: Pending, measurement: Measurement, loggers: Iterable[Any], advice: str) -> None:
        """Note what a visit has found, with advice where something has not converged."""
        self._recorder.warn_of_unconverged(measurement, visit.step, advice)
        self._recorder.add(measurement, step=visit.step, epoch=visit.epoch, loggers=loggers)
        self._close(visit.step, visit.epoch)

    def skip(self, visit: Pending, reason: str) -> None:
        """Note that a visit is not made."""
        self._recorder.add_failure(reason, step=visit.step, epoch=visit.epoch, status="skipped")
        self._close(visit.step, visit.epoch)
        self._recorder.tell_once(reason, f"skips the visit at step {visit.step}: {reason}")

    def fail(self, reason: str, step: int, epoch: int) -> None:
        """Note that a visit has failed."""
        self._recorder.add_failure(reason, step=step, epoch=epoch)
        self._recorder.warn_once(reason, f"at step {step} failed and training goes on: {reason}")
        self._close(step, epoch)

    def _close(self, step: int, epoch: int) -> None:
        self.waiting = [v for v in self.waiting if (v.step, v.epoch) != (step, epoch)]
        self.open = [v for v in self.open if v != (step, epoch)]

    def reopen(self, step: int) -> list[int]:
        """The epochs of those open visits that a run resumed at ``step`` can still make; earlier ones are lost."""
        left_open, self.open, self.waiting = self.open, [], []
        for lost, epoch in left_open:
            if lost < step and lost not in self._recorder.steps:
                self.fail("The run was interrupted before this visit was made.", lost, epoch)
        again = [epoch for at, epoch in left_open if at == step]
        if again:
            self._recorder.drop_failures(step)
        return again

    def state(self) -> list[list[int]]:
        """The open visits as plain values."""
        return [list(visit) for visit in self.open]

    def load_state(self, state: Any) -> None:
        """Take over the open visits of a checkpoint."""
        self.open = [(int(step), int(epoch)) for step, epoch in state]
