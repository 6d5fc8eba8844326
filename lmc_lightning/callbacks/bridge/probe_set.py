"""Fixed batches of a split, on which numbers are taken."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch

from lmc_lightning.callbacks.bridge.step import StepBatch
from lmc_lightning.core.structure import NotSliceableError, cut, digest, leading_size, tensors_in

Split: TypeAlias = Literal["train", "val", "test"]
Source: TypeAlias = Literal["probe_dataloader", "datamodule", "captured"]

Named: TypeAlias = tuple[int | None, str]
"""How many of the first captured examples, ``None`` for all that there will be, and their digest."""


@dataclass(frozen=True)
class ProbeSet:
    """Fixed batches of one split, where they come from and the digest that names them."""

    split: Split
    source: Source
    batches: tuple[StepBatch, ...] = field(repr=False)
    part_of: str | None = None
    """The digest of the set that all processes have read and these batches are one's part of."""

    @cached_property
    def digest(self) -> str:
        """The sha256 of all tensors; equal digests mean the same probe set."""
        return self.part_of or digest([b.batch for b in self.batches])

    @property
    def num_examples(self) -> int | None:
        """The number of examples, where batches have a size."""
        sizes = [leading_size(b.batch) for b in self.batches]
        return None if None in sizes else sum(n for n in sizes if n is not None)

    def covers(self, num_examples: int | None) -> bool:
        """Whether at least ``num_examples`` examples are there."""
        return num_examples is not None and (self.num_examples or 0) >= num_examples

    def first(self, num_examples: int | None) -> "ProbeSet":
        """The first ``num_examples`` examples; whole batches where these cannot be cut."""
        return ProbeSet(self.split, self.source, tuple(between(self.batches, 0, num_examples)))

    def part(self, process: int, num_processes: int) -> "ProbeSet":
        """What one of the processes measures, when each has read the whole set."""
        if num_processes == 1:
            return self
        total = count(self.batches)
        start, stop = (share(total, process + i, num_processes) for i in (0, 1))
        return replace(self, batches=tuple(between(self.batches, start, stop)), part_of=self.digest)

    def label_counts(self) -> dict[int, int]:
        """How often each integer label occurs, if the batches hold a tensor of labels."""
        labels = [t for b in self.batches for t in tensors_in(b.batch) if t.ndim == 1 and not t.is_floating_point()]
        if not labels:
            return {}
        values, counts = torch.cat([t.cpu().long() for t in labels]).unique(return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))


def between(batches: Sequence[StepBatch], start: int, stop: int | None) -> Iterator[StepBatch]:
    """Examples ``start`` to ``stop`` of all batches in a row; of what cannot be cut, the batches that begin there."""
    position = 0
    for step_batch in batches:
        size = leading_size(step_batch.batch) or 1
        first, last = max(start - position, 0), size if stop is None else min(stop - position, size)
        begins, position = start <= position, position + size
        if first >= last:
            continue
        if (first, last) != (0, size):
            try:
                step_batch = step_batch._replace(batch=cut(step_batch.batch, first, last))
            except NotSliceableError:
                if not begins:
                    continue
        yield step_batch


def count(batches: Iterable[StepBatch]) -> int:
    """How many examples can be told apart; a batch of unknown size is one."""
    return sum(leading_size(b.batch) or 1 for b in batches)


def share(num_examples: int, process: int, num_processes: int) -> int:
    """How many of ``num_examples`` the processes before ``process`` hold together."""
    return num_examples * process // num_processes
