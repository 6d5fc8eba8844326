"""Sums over the processes of a run, and the agreement that comes before them: all go on, or all raise."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
            RuntimeError: the computation failed on another process; on the one where it failed, its own exception.
        """
        with self.agreed():
            return compute()

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A block that succeeds on all processes or raises on all, as the argument of :meth:`agree` does."""
        self.poll()
        yield

    def first(self, compute: Callable[[], T]) -> T:
        """What ``compute()`` gives on the first process, where alone it is called."""
        return self.agree(compute)

    def poll(self) -> None:
        """Within a long computation: ends it if the run was asked to end; several processes wait to agree on that.

        Raises:
            InterruptedMeasurementError: the run was asked to end.
        """
        if self.interrupted is not None and self.interrupted():
            raise InterruptedMeasurementError("The run was asked to end during the measurement.")

    def total(self, compute: Callable[[], Tensor]) -> Tensor:
        """The sum over processes of ``compute()``."""
        return self.agree(compute)

    def gather(self, compute: Callable[[], Tensor]) -> Tensor:
        """The rows of ``compute()`` of all processes, in their order, on the CPU."""
        return self.agree(compute).cpu()

    def everywhere(self, condition: bool) -> bool:
        """Whether ``condition`` holds on all processes. Never interrupted."""
        return condition


class ProcessGroup(Collective):
    """The processes of ``torch.distributed``'s default group; every method is called by all of them, in one order.

    A process that fails elsewhere than inside :meth:`agree` is missed by the others at their next agreement, so a whole
    measurement is one too: agreements may be nested, and an error that all know of passes through the outer ones.

    Args:
        device: where the group's backend takes tensors.
        interrupted: polled between computations; if true anywhere, the measurement ends everywhere.
    """

    def __init__(self, device: torch.device, interrupted: Callable[[], bool] | None = None) -> None:
        super().__init__(interrupted)
        self.device = device

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A block that succeeds on all processes or raises on all, as the argument of :meth:`agree` does."""
        try:
            yield
        except Exception as error:
            if not is_known(error):
                self._compare(error)
            _known(error)
            raise
        ended, _ = self._compare(None)
        if ended:
            raise _known(InterruptedMeasurementError("A process was asked to end during the measurement."))

    def first(self, compute: Callable[[], T]) -> T:
        """What ``compute()`` gives on the first process, where alone it is called; a value that pickles."""
        values = [self.agree(lambda: compute() if dist.get_rank() == 0 else None)]
        self._call(lambda: dist.broadcast_object_list(values, device=self.device))
        return values[0]  # type: ignore[return-value]

    def poll(self) -> None:
        """Nothing: one process alone must not end."""

    def total(self, compute: Callable[[], Tensor]) -> Tensor:
        """The sum over processes of ``compute()``, whose shapes are equal."""
        value = self.agree(compute)
        summed = value.to(self.device, copy=True)
        self._call(lambda: dist.all_reduce(summed))
        return summed.to(value.device)

    def gather(self, compute: Callable[[], Tensor]) -> Tensor:
        """The rows of ``compute()`` of all processes, in their order, on the CPU; their numbers may differ."""
        return torch.cat(self._gathered(self.agree(compute).cpu()))

    def everywhere(self, condition: bool) -> bool:
        """Whether ``condition`` holds on all processes. Never interrupted, so that all act on it together.

        Raises:
            RuntimeError: another process has failed meanwhile.
        """
        return self._compare(None, condition)[1]

    def _compare(self, failure: Exception | None, condition: bool = True) -> tuple[bool, bool]:
        """Whether a process is asked to end, and whether ``condition`` holds on all; every agreement is this one."""
        asked = self.interrupted is not None and self.interrupted()
        flags = torch.tensor([failure is not None, asked, not condition], dtype=torch.int64, device=self.device)
        self._call(lambda: dist.all_reduce(flags))
        failed, ended, missing = flags.tolist()
        if failed:
            reasons = self._gathered("" if failure is None else f"{type(failure).__name__}: {failure}")
            if failure is None:
                named = [f"process {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
                raise _known(RuntimeError(f"The measurement failed on {', '.join(named)}"))
        return bool(ended), not missing

    def _gathered(self, own: T) -> list[T]:
        values: list[T] = [own] * dist.get_world_size()
        self._call(lambda: dist.all_gather_object(values, own))
        return values

    def _call(self, operation: Callable[[], object]) -> None:
        try:
            operation()
        except Exception as error:  # the group is broken: nothing more can be agreed
            _known(error)
            raise


def is_known(error: BaseException | None) -> bool:
    """Whether all processes have this error, or the one that it was raised from."""
    return error is not None and ("known_to_all" in vars(error) or is_known(error.__cause__))


def _known(error: Exception) -> Exception:
    vars(error)["known_to_all"] = True
    return error


def joint_digest(own: str, collective: Collective) -> str:
    """One sha256 for what all processes hold, each with the sha256 of its ``own``; of one process, that."""
    digests = collective.gather(lambda: torch.tensor([list(bytes.fromhex(own))], dtype=torch.uint8))
    return own if len(digests) == 1 else hashlib.sha256(digests.numpy().tobytes()).hexdigest()
