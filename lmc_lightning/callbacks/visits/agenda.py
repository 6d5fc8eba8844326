"""Visits that are due: which wait for their probe set, and which are not recorded yet."""

from typing import Any

from lmc_lightning.callbacks.visits.visit import MAX_PENDING, Pending, fits_in_memory, too_many_pending
from lmc_lightning.core.glassbox import glass_box
from lmc_lightning.core.shadow import copy_module


class Agenda:
    """The visits of one callback from when they are due until they are recorded."""

    def __init__(self) -> None:
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

    def close(self, step: int, epoch: int) -> None:
        """Note that a visit is recorded, whatever came of it."""
        self.waiting = [v for v in self.waiting if (v.step, v.epoch) != (step, epoch)]
        self.open = [v for v in self.open if v != (step, epoch)]

    def state(self) -> list[list[int]]:
        """The open visits as plain values."""
        return [list(visit) for visit in self.open]

    def load_state(self, state: Any) -> None:
        """Take over the open visits of a checkpoint."""
        self.open = [(int(step), int(epoch)) for step, epoch in state]
