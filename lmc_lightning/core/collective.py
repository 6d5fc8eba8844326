"""Sums over the processes of a run, and the agreement that comes before them: all go on, or all raise."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class InterruptedMeasurementError(RuntimeError):
    """The run was asked to end while it was being measured."""


class Collective:
    """One process: every sum is its own.

    Args:
        interrupted: polled between computations; true ends the measurement.
    """

    def __init__(self, interrupted: Callable[[], bool] | None = None) -> None:
        self.interrupted = interrupted

    def agree(self, compute: Callable[[], T]) -> T:
        """``compute()`` of this process, if it succeeds on all.

        Raises:
            InterruptedMeasurementError: a process was asked to end.
        """
        if self.interrupted is not None and self.interrupted():
            raise InterruptedMeasurementError("The run was asked to end during the measurement.")
        return compute()

    def total(self, compute: Callable[[], Tensor]) -> Tensor:
        """The sum over processes of ``compute()``."""
        return self.agree(compute)

    def gather(self, compute: Callable[[], Tensor]) -> Tensor:
        """The rows of ``compute()`` of all processes, in their order, on the CPU."""
        return self.agree(compute).cpu()


class ProcessGroup(Collective):
    """The processes of ``torch.distributed``'s default group; every method is called by all of them, in one order.

    Args:
        device: where the group's backend takes tensors.
        interrupted: polled between computations; if true anywhere, the measurement ends everywhere.
    """

    def __init__(self, device: torch.device, interrupted: Callable[[], bool] | None = None) -> None:
        super().__init__(interrupted)
        self.device = device

    def agree(self, compute: Callable[[], T]) -> T:
        """``compute()`` of this process, if it succeeds on all.

        Raises:
            InterruptedMeasurementError: a process was asked to end.
            RuntimeError: the computation failed on another process; on the one where it failed, its own exception.
        """
        value: list[T] = []
        failure: Exception | None = None
        try:
            value.append(compute())
        except Exception as error:
            failure = error
        asked = self.interrupted is not None and self.interrupted()
        flags = torch.tensor([failure is not None, asked], dtype=torch.int64, device=self.device)
        dist.all_reduce(flags)
        failed, ended = flags.tolist()
        if failure is not None:
            raise failure
        if failed:
            raise RuntimeError(f"The measurement failed on {failed} other processes.")
        if ended:
            raise InterruptedMeasurementError("A process was asked to end during the measurement.")
        return value[0]

    def total(self, compute: Callable[[], Tensor]) -> Tensor:
        """The sum over processes of ``compute()``, whose shapes are equal."""
        value = self.agree(compute)
        summed = value.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(value.device)

    def gather(self, compute: Callable[[], Tensor]) -> Tensor:
        """The rows of ``compute()`` of all processes, in their order, on the CPU; their numbers may differ."""
        value = self.agree(compute).cpu()
        parts: list[Tensor | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, value)
        return torch.cat([part for part in parts if part is not None])
