"""The processes that train a family together: each trains its share of every batch, and all do the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lmc_lightning.core.collective import Collective, ProcessGroup, is_known

PATIENCE = timedelta(minutes=5)
"""How long a process whose child has come to its end, or failed, waits for the others to come to theirs."""


class LostProcessError(RuntimeError):
    """A child has failed on some of the processes, and the others wait in its training for them."""


def processes_of(trainer: Any) -> Collective:
    """Those of a run, asked in ``setup`` or later."""
    return ProcessGroup(trainer.strategy.root_device) if trainer.world_size > 1 else Collective()


class Meeting:
    """Where processes meet after the training of a child, whose own collective calls they may not disturb.

    Args:
        processes: that train together.
    """

    def __init__(self, processes: Collective) -> None:
        self._processes = processes
        self._group: Any = None
        if isinstance(processes, ProcessGroup):
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    @contextmanager
    def after(self) -> Iterator[None]:
        """A block that trains: all processes end it, or all raise.

        Raises:
            LostProcessError: the block raised here, and elsewhere it does not end.
        """
        try:
            yield
        except Exception as error:
            if not is_known(error):
                self._wait(error)
            with self._processes.agreed():
                raise
        self._wait(None)
        with self._processes.agreed():
            pass

    def _wait(self, error: Exception | None) -> None:
        if self._group is not None:
            try:
                dist.barrier(self._group)
            except RuntimeError as lost:
                raise LostProcessError(
                    f"A child's training failed on some processes only ({error or 'not here'}), and the others wait in "
                    "it. Resume the run to train the children that are left."
                ) from lost
