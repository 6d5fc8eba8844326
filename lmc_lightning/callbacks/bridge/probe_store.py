"""The probe set: the same tensors at every visit, got without disturbing the loaders that train."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lmc_lightning.callbacks.bridge.probe_set import Named, ProbeSet, Split, between, count, share
from lmc_lightning.callbacks.bridge.step import StepBatch
from lmc_lightning.core.collective import Collective, joint_digest
from lmc_lightning.core.files import write_atomic
from lmc_lightning.core.structure import clone

_STEPS: dict[Split, str] = {"train": "training_step", "val": "validation_step"}


class ProbeStore:
    """The probe sets of one trainer, shared by all measuring callbacks.

    Batches come from the datamodule's ``probe_batches(split, num_examples, seed)`` where it has that, else they are
    cloned as the steps receive them, until enough examples for the largest request are there or the first epoch ends;
    smaller requests are served as soon as their examples are there.
    """

    _stores: ClassVar["weakref.WeakKeyDictionary[Any, ProbeStore]"] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self.directory: Path | None = None
        """Where side files are written, if they are to be."""
        self.process, self.num_processes = 0, 1
        self.digests: dict[Split, Named] = {}
        """Of the captured sets that visits were made on, over all processes."""
        self.errors: list[str] = []
        """Why batches could not be captured, or their side file not be written."""
        self._wanted: dict[Split, int] = {}
        self._captured: dict[Split, list[StepBatch]] = {"train": [], "val": []}
        self._attached: dict[Split, _CaptureOnce] = {}
        self._complete: dict[Split, ProbeSet] = {}
        self._sets: dict[tuple[Split, int | None], ProbeSet] = {}

    @classmethod
    def of(cls, trainer: Any) -> "ProbeStore":
        """The store of this trainer, made at the first call."""
        return cls._stores.setdefault(trainer, cls())

    @property
    def file_name(self) -> str:
        """Of this process's side file."""
        return f"probes_{self.process}.pt" if self.num_processes > 1 else "probes.pt"

    def request(self, split: Split, num_examples: int) -> None:
        """Announce before training how many examples of all processes will be needed."""
        self._wanted[split] = max(self._share(num_examples), self._wanted.get(split, 0))

    def _share(self, num_examples: int) -> int:
        before, after = (share(num_examples, self.process + i, self.num_processes) for i in (0, 1))
        return after - before

    def is_ready(self, split: Split, num_examples: int | None) -> bool:
        """Whether this process has its part of the first ``num_examples`` examples, or all that there will be."""
        if split in self._complete or num_examples is None:
            return split in self._complete
        captured = self._captured[split]
        return bool(captured) and count(captured) >= self._share(num_examples)

    def get(self, split: Split, num_examples: int | None) -> ProbeSet:
        """This process's part of the first ``num_examples`` probe examples of a split that is ready for so many."""
        if (split, num_examples) not in self._sets:
            found = self._complete.get(split) or ProbeSet(split, "captured", tuple(self._captured[split]))
            if found.source != "captured":
                found = found.first(num_examples).part(self.process, self.num_processes)
            else:
                found = found.first(None if num_examples is None else self._share(num_examples))
            self._sets[split, num_examples] = found
        return self._sets[split, num_examples]

    def load_from(self, trainer: Any, split: Split, num_examples: int | None, seed: int) -> None:
        """Take the datamodule's own probe batches; no random number of the run is drawn."""
        if split in self._complete and self._complete[split].covers(num_examples):
            return
        device = trainer.strategy.root_device
        batches = trainer.datamodule.probe_batches(split, num_examples, seed)
        moved = [move_data_to_device(trainer.precision_plugin.convert_input(b), device) for b in batches]
        self._complete[split] = ProbeSet(split, "datamodule", tuple(StepBatch(b, i) for i, b in enumerate(moved)))

    def name(self, split: Split, num_examples: int | None, collective: Collective) -> None:
        """Give the captured examples of a visit a digest over all processes, by which a resumed run knows them."""
        named = self.digests.get(split, (0, ""))[0]
        if named is None or (split in self._complete and self._complete[split].source != "captured"):
            return
        size = None if collective.everywhere(split in self._complete) else num_examples
        if size is None or size > named:
            self.digests[split] = size, joint_digest(self.get(split, size).digest, collective)
            self.save()

    def resume(self, directory: Path, digests: Mapping[Split, Named], collective: Collective) -> None:
        """Take the captured examples of the run that is resumed from its side files, if they are those it measured.

        Of a capture that had not ended, what no visit was made on is captured anew.

        Raises:
            ValueError: the files hold other data than the digests name.
        """
        missing = sorted(digests.keys() - self._complete.keys() - self.digests.keys())
        if not missing:
            return
        path = directory / self.file_name
        saved = collective.agree(lambda: _read(path))
        for split in missing:
            size, expected = digests[split]
            found = saved.get(split, ProbeSet(split, "captured", ())).first(None if size is None else self._share(size))
            if joint_digest(found.digest, collective) != expected:
                raise ValueError(f"{path} does not hold the {split} probe set of this run.")
            self.digests[split] = size, expected
            if size is None:
                self._complete[split] = found
            else:
                self._captured[split] = list(found.batches)
        self.save()

    def adopt(self, directory: Path) -> None:
        """Take the examples that another run has captured, where its side file has as many as are needed."""
        path = directory / self.file_name
        for split, found in (_read(path) if path.is_file() else {}).items():
            if split in self._wanted and split not in self._complete and count(found.batches) >= self._wanted[split]:
                self._complete[split] = found

    def capture(self, pl_module: nn.Module, split: Split) -> None:
        """Clone the arguments of the next call of the split's step, where nothing can edit them any more."""
        if split in self._complete or split not in self._wanted or split in self._attached:
            return
        name, attributes = _STEPS[split], pl_module.__dict__
        original, before = getattr(pl_module, name), attributes.get(name)

        def restore() -> None:
            if before is None:
                attributes.pop(name, None)
            else:
                attributes[name] = before

        self._attached[split] = attributes[name] = _CaptureOnce(self, split, original, restore)

    def detach(self, split: Split) -> None:
        """Give the module its own step back."""
        if split in self._attached:
            self._attached.pop(split).restore()

    def receive(self, split: Split, arguments: tuple[Any, ...]) -> None:
        """Keep a clone of the batch that a step was called with."""
        batch = arguments[0]
        index = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], int) else len(self._captured[split])
        if split == "val" and len(arguments) > 2 and arguments[2] != 0:
            return  # further validation loaders are other splits
        try:
            self._captured[split].append(StepBatch(clone(batch), index))
        except Exception as error:  # we are inside the user's step
            self.errors.append(f"A batch cannot be copied: {type(error).__name__}: {error}. Pass probe_dataloader=.")
            del self._wanted[split]
        else:
            if count(self._captured[split]) >= self._wanted[split]:
                self.close(split)

    def close(self, split: Split) -> None:
        """End the capture: what is there is the probe set from now on."""
        self.detach(split)
        if split not in self._complete and split in self._wanted and self._captured[split]:
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
        """Write what was captured to the side file, from which a resumed run takes it; a full disk is remembered."""
        complete = {s: p.batches for s, p in self._complete.items() if p.source == "captured"}
        named = {s: tuple(self._captured[s]) for s in self.digests}
        captured = {s: [tuple(b) for b in batches] for s, batches in (named | complete).items()}
        if self.directory is None or not captured:
            return
        try:
            write_atomic(self.directory / self.file_name, lambda file: torch.save(captured, file))
        except Exception as error:  # we may be inside the user's step; torch.save has other errors for a full disk
            self.errors.append(f"The probe set cannot be kept for a resumed run: {type(error).__name__}: {error}")


def _read(path: Path) -> dict[Split, ProbeSet]:
    """What :meth:`ProbeStore.save` has written."""
    content = torch.load(path, weights_only=True)
    return {s: ProbeSet(s, "captured", tuple(StepBatch(*b) for b in batches)) for s, batches in content.items()}


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
        self.store.detach(self.split)
        self.store.receive(self.split, (*args, *kwargs.values()))
        return self.original(*args, **kwargs)
