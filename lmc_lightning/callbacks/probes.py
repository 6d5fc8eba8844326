"""The probe set: the same tensors at every visit, got without disturbing the loaders that train."""

import contextlib
import copy
import io
import pickle
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lmc_lightning.callbacks.bridge import StepBatch
from lmc_lightning.core.files import write_atomic
from lmc_lightning.core.glassbox import glass_box, seed_everything
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
        return ProbeSet(self.split, self.source, tuple(_first(self.batches, num_examples)))

    def label_counts(self) -> dict[int, int]:
        """How often each integer label occurs, if the batches hold a tensor of labels."""
        labels = [t for b in self.batches for t in tensors_in(b.batch) if t.ndim == 1 and not t.is_floating_point()]
        if not labels:
            return {}
        values, counts = torch.cat([t.cpu().long() for t in labels]).unique(return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _first(batches: Sequence[StepBatch], num_examples: int | None) -> Iterable[StepBatch]:
    left = num_examples
    for step_batch in batches:
        if left is not None and left <= 0:
            return
        size = leading_size(step_batch.batch) or 1
        if left is not None and size > left:
            with contextlib.suppress(NotSliceableError):
                step_batch = step_batch._replace(batch=cut(step_batch.batch, 0, left))
        yield step_batch
        left = None if left is None else left - size


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
        if split in self._complete and (self._complete[split].covers(num_examples)):
            return
        device = trainer.strategy.root_device
        batches = trainer.datamodule.probe_batches(split, num_examples, seed)
        moved = [move_data_to_device(trainer.precision_plugin.convert_input(b), device) for b in batches]
        self._complete[split] = ProbeSet(split, "datamodule", tuple(StepBatch(b, i) for i, b in enumerate(moved)))

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
            batches = tuple(_first(self._captured[split], self._wanted[split]))
            self._complete[split] = ProbeSet(split, "captured", batches)
            self._captured[split] = []
            self.save()

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.restore()
        self.store.receive(self.split, (*args, *kwargs.values()))
        return self.original(*args, **kwargs)


def draw(loader: Iterable[Any], num_examples: int | None, seed: int) -> list[StepBatch]:
    """Batches of a user's own loader, read with a private random stream; a dataset's own state is left untouched.

    A ``DataLoader`` is read in one worker process, which holds a copy of the dataset.
    """
    with glass_box(match_precision=True):
        seed_everything(seed)
        iterable = _private_loader(loader, seed) if isinstance(loader, DataLoader) else loader
        batches, seen = [], 0
        for index, batch in enumerate(iterable):
            batches.append(StepBatch(clone(batch), index))
            seen += leading_size(batch) or 1
            if num_examples is not None and seen >= num_examples:
                break
    return list(_first(batches, num_examples))


def _private_loader(loader: DataLoader[Any], seed: int) -> DataLoader[Any]:
    common: dict[str, Any] = {
        "num_workers": 1,
        "collate_fn": loader.collate_fn,
        "worker_init_fn": loader.worker_init_fn,
        "generator": torch.Generator().manual_seed(seed),
    }
    if isinstance(loader.dataset, IterableDataset):
        return DataLoader(loader.dataset, batch_size=loader.batch_size, drop_last=loader.drop_last, **common)
    # The sampler may own a generator, which the user may share with the training loader.
    order = copy.deepcopy((loader.batch_sampler, loader.sampler), {id(loader.dataset): loader.dataset})
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, batch_size=None, sampler=order[1], **common)
    return DataLoader(loader.dataset, batch_sampler=order[0], **common)


def to_device(batches: Iterable[StepBatch], module: Any, trainer: Any | None = None) -> list[StepBatch]:
    """Batches of a user's own loader, brought to the module as Lightning would bring them."""
    if not hasattr(module, "transfer_batch_to_device"):
        return list(batches)
    moved: list[StepBatch] = []
    with glass_box(match_precision=True):
        for step_batch in batches:
            batch = step_batch.batch if trainer is None else trainer.precision_plugin.convert_input(step_batch.batch)
            # The module's own transfer hooks are private methods with no public caller outside a running loop.
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = module._apply_batch_transfer_handler(batch, device=module.device, dataloader_idx=0)
            moved.append(step_batch._replace(batch=batch))
    return moved


class Probes:
    """The probe sets of one callback: its own loader's, or those that all callbacks of the trainer share.

    Args:
        splits: whose probe sets a visit needs.
        num_examples: size of each; ``None`` for the whole split.
        dataloader: the callback's own loader, or ``None``.
        seed: for examples of a datamodule and the random stream of ``dataloader``.
    """

    def __init__(
        self, splits: tuple[Split, ...], num_examples: int | None, dataloader: Iterable[Any] | None, seed: int
    ) -> None:
        self.splits, self.num_examples, self.dataloader, self.seed = splits, num_examples, dataloader, seed
        self.reserve = 0
        """Training examples to be kept for other uses than the numbers themselves."""
        self._own: ProbeSet | None = None
        self._store = ProbeStore()
        self._resumed: dict[str, Any] = {}

    def captures(self, trainer: Any) -> bool:
        """Whether the batches have to be cloned from the steps."""
        return self.dataloader is None and not hasattr(trainer.datamodule, "probe_batches")

    def setup(self, trainer: Any, directory: Path | None) -> None:
        """Announce what will be needed.

        Raises:
            ValueError: the whole split is asked for and nothing knows it.
        """
        self._store = store = ProbeStore.of(trainer)
        store.path = None if directory is None else directory / "probes.pt"
        if not self.captures(trainer):
            return
        if self.num_examples is None:
            raise ValueError(
                "num_examples=None asks for a whole split, and no source knows it. Pass probe_dataloader=, or give the "
                "datamodule a method probe_batches(split, num_examples, seed)."
            )
        for split in self.splits:
            store.request(split, max(self.num_examples, self.reserve if split == "train" else 0))

    def start(self, trainer: Any, pl_module: Any) -> None:
        """Fetch whatever does not have to be captured."""
        if self.dataloader is not None:
            if self._own is None:
                drawn = draw(self.dataloader, self.num_examples, self.seed)
                self._own = ProbeSet("train", "probe_dataloader", tuple(to_device(drawn, pl_module, trainer)))
        elif not self.captures(trainer):
            with glass_box(match_precision=True):
                for split in self.splits:
                    wanted = self.num_examples
                    if wanted is not None and split == "train":
                        wanted = max(wanted, self.reserve)
                    self._store.load_from(trainer, split, wanted, self.seed)
        elif self._resumed.get("digests"):
            try:
                self._store.resume(Path(self._resumed["path"]), self._resumed["digests"])
            except (OSError, ValueError, pickle.UnpicklingError) as error:
                rank_zero_warn(f"The resumed run's probe set could not be read and is captured anew: {error}")

    def before_step(self, trainer: Any, pl_module: Any, split: Split) -> None:
        """Capture the next batch if the split still lacks examples."""
        if split in self.splits and self.captures(trainer):
            self._store.capture(pl_module, split)

    def close(self, split: Split) -> None:
        """End the capture of a split."""
        self._store.close(split)

    def get(self, split: Split = "train", num_examples: int | None = None) -> ProbeSet | None:
        """The probe set of a split, of ``num_examples`` if more are there; ``None`` while it is being captured."""
        if self._own is not None:
            return self._own
        return self._store.get(split, num_examples or self.num_examples) if self._store.is_complete(split) else None

    def state(self) -> dict[str, Any]:
        """Where a resumed run finds captured sets: a path, and digests by split."""
        return {} if self._store.path is None else {"path": str(self._store.path), "digests": self._store.digests}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Remember where the resumed run keeps its captured sets."""
        self._resumed = dict(state)
