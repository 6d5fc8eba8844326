"""The probe set: the same tensors at every visit, got without disturbing the loaders that train."""

import contextlib
import io
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lmc_lightning.callbacks.bridge import StepBatch
from lmc_lightning.core.files import write_atomic
from lmc_lightning.core.structure import NotSliceableError, clone, cut, digest, leading_size, tensors_in

Split: TypeAlias = Literal["train", "val"]
Source: TypeAlias = Literal["probe_dataloader", "datamodule", "captured"]

_STEPS: dict[Split, str] = {"train": "training_step", "val": "validation_step"}


@dataclass(frozen=True)
class ProbeSet:
    """Fixed batches of one split, where they come from and the digest that names them."""

    split: Split
    source: Source
    batches: tuple[StepBatch, ...] = field(repr=False)

    @property
    def digest(self) -> str:
        """The sha256 of all tensors; equal digests mean the same probe set."""
        return digest([b.batch for b in self.batches])

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

    def label_counts(self) -> dict[int, int]:
        """How often each integer label occurs, if the batches hold a tensor of labels."""
        labels = [t for b in self.batches for t in tensors_in(b.batch) if t.ndim == 1 and not t.is_floating_point()]
        if not labels:
            return {}
        values, counts = torch.cat([t.cpu().long() for t in labels]).unique(return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))


def between(batches: Sequence[StepBatch], start: int, stop: int | None) -> Iterator[StepBatch]:
    """Examples ``start`` to ``stop`` of all batches in a row; whole batches where these cannot be cut."""
    position = 0
    for step_batch in batches:
        size = leading_size(step_batch.batch) or 1
        first, last = max(start - position, 0), size if stop is None else min(stop - position, size)
        position += size
        if first >= last:
            continue
        if (first, last) != (0, size):
            with contextlib.suppress(NotSliceableError):
                step_batch = step_batch._replace(batch=cut(step_batch.batch, first, last))
        yield step_batch


def share(trainer: Any, num_examples: int, rank: int | None = None) -> int:
    """How many of ``num_examples`` the processes before ``rank`` hold together; by default, what this process holds."""
    if rank is None:
        return share(trainer, num_examples, trainer.global_rank + 1) - share(trainer, num_examples, trainer.global_rank)
    return num_examples * rank // int(trainer.world_size)


def own_part(trainer: Any, batches: Sequence[StepBatch]) -> tuple[StepBatch, ...]:
    """This process's part of a probe set that every process has read whole."""
    total = sum(leading_size(b.batch) or 1 for b in batches)
    start, stop = (share(trainer, total, trainer.global_rank + i) for i in (0, 1))
    return tuple(between(batches, start, stop))


class ProbeStore:
    """The probe sets of one trainer, shared by all measuring callbacks.

    Batches come from the datamodule's ``probe_batches(split, num_examples, seed)`` where it has that, else they are
    cloned as the steps receive them, until enough examples are there or the first epoch ends.
    """

    _stores: ClassVar["weakref.WeakKeyDictionary[Any, ProbeStore]"] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self.path: Path | None = None
        self._wanted: dict[Split, int] = {}
        self._captured: dict[Split, list[StepBatch]] = {"train": [], "val": []}
        self._complete: dict[Split, ProbeSet] = {}
        self._sets: dict[tuple[Split, int | None], ProbeSet] = {}

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each captured set."""
        return {split: p.digest for split, p in self._complete.items() if p.source == "captured"}

    @classmethod
    def of(cls, trainer: Any) -> "ProbeStore":
        """The store of this trainer, made at the first call."""
        return cls._stores.setdefault(trainer, cls())

    def request(self, split: Split, num_examples: int) -> None:
        """Announce before training how many examples will be needed."""
        self._wanted[split] = max(num_examples, self._wanted.get(split, 0))

    def is_complete(self, split: Split) -> bool:
        """Whether the probe set of a split is there."""
        return split in self._complete

    def get(self, split: Split, num_examples: int | None) -> ProbeSet:
        """The first ``num_examples`` probe examples of a split."""
        if (split, num_examples) not in self._sets:
            self._sets[split, num_examples] = self._complete[split].first(num_examples)
        return self._sets[split, num_examples]

    def load_from(self, trainer: Any, split: Split, num_examples: int | None, seed: int) -> None:
        """Take the datamodule's own probe batches; no random number of the run is drawn."""
        if split in self._complete and self._complete[split].covers(num_examples and share(trainer, num_examples)):
            return
        device = trainer.strategy.root_device
        batches = trainer.datamodule.probe_batches(split, num_examples, seed)
        moved = [move_data_to_device(trainer.precision_plugin.convert_input(b), device) for b in batches]
        step_batches = own_part(trainer, [StepBatch(b, i) for i, b in enumerate(moved)])
        self._complete[split] = ProbeSet(split, "datamodule", step_batches)

    def resume(self, path: Path, digests: Mapping[str, str]) -> None:
        """Take the captured sets of the run that is resumed from its side file, if they are the ones it measured.

        Raises:
            ValueError: the file holds other data than the digests name.
        """
        captured = torch.load(path, weights_only=True)
        for split, batches in captured.items():
            probe_set = ProbeSet(split, "captured", tuple(StepBatch(*b) for b in batches))
            if probe_set.digest != digests.get(split):
                raise ValueError(f"{path} does not hold the {split} probe set of this run.")
            self._complete.setdefault(split, probe_set)

    def capture(self, pl_module: nn.Module, split: Split) -> None:
        """Clone the arguments of the next call of the split's step, where nothing can edit them any more."""
        if split in self._complete or split not in self._wanted:
            return
        name = _STEPS[split]
        attributes = pl_module.__dict__
        if isinstance(getattr(attributes.get(name), "__self__", None), ProbeStore):
            return
        original = getattr(pl_module, name)
        before = attributes.get(name)

        def restore() -> None:
            if before is None:
                attributes.pop(name, None)
            else:
                attributes[name] = before

        attributes[name] = _CaptureOnce(self, split, original, restore)

    def receive(self, split: Split, arguments: tuple[Any, ...]) -> None:
        """Keep a clone of the batch that a step was called with."""
        batch = arguments[0]
        index = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], int) else len(self._captured[split])
        if split == "val" and len(arguments) > 2 and arguments[2] != 0:
            return  # further validation loaders are other splits
        self._captured[split].append(StepBatch(clone(batch), index))
        if sum(leading_size(b.batch) or 1 for b in self._captured[split]) >= self._wanted[split]:
            self.close(split)

    def close(self, split: Split) -> None:
        """End the capture: what is there is the probe set from now on."""
        if split not in self._complete and self._captured[split]:
            batches = tuple(between(self._captured[split], 0, self._wanted[split]))
            self._complete[split] = ProbeSet(split, "captured", batches)
            self._warn_of_imbalance(self._complete[split])
            self._captured[split] = []
            self.save()

    def _warn_of_imbalance(self, probe_set: ProbeSet) -> None:
        counts = probe_set.label_counts()
        if len(counts) > 1 and 2 * max(counts.values()) > sum(counts.values()):
            rank_zero_warn(f"More than half of the captured {probe_set.split} probe examples have one label: {counts}.")

    def save(self) -> None:
        """Write captured sets to the side file, from which a resumed run takes them."""
        captured = {s: [tuple(b) for b in p.batches] for s, p in self._complete.items() if p.source == "captured"}
        if self.path is None or not captured:
            return
        buffer = io.BytesIO()
        torch.save(captured, buffer)
        write_atomic(self.path, buffer.getvalue())


@dataclass
class _CaptureOnce:
    """Takes the place of a step for one call."""

    store: ProbeStore
    split: Split
    original: Callable[..., Any]
    restore: Callable[[], None]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Lightning reads off the signature which arguments the step takes."""
        return getattr(self.original, "__wrapped__", self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.restore()
        self.store.receive(self.split, (*args, *kwargs.values()))
        return self.original(*args, **kwargs)
