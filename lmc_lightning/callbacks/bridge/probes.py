"""Where the probe set of a callback comes from: its own loader, the datamodule, or the batches of the run itself."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lmc_lightning.callbacks.bridge.objectives import collective_of
from lmc_lightning.callbacks.bridge.probe_set import ProbeSet, Split, between
from lmc_lightning.callbacks.bridge.probe_store import ProbeStore
from lmc_lightning.callbacks.bridge.step import StepBatch
from lmc_lightning.core.glassbox import glass_box, seed_everything
from lmc_lightning.core.structure import clone, leading_size

STATISTICS_EXAMPLES = 5000
"""Training examples from which BatchNorm's statistics are recomputed in a run."""


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
    return list(between(batches, 0, num_examples))


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
    """Batches of a user's own loader, brought to the module as Lightning would bring them, under a fixed seed."""
    if not hasattr(module, "transfer_batch_to_device"):
        return list(batches)
    moved: list[StepBatch] = []
    with glass_box(match_precision=True):
        seed_everything(0)  # transfer hooks may augment
        for step_batch in batches:
            batch = step_batch.batch if trainer is None else trainer.precision_plugin.convert_input(step_batch.batch)
            # The module's own transfer hooks are private methods with no public caller outside a running loop.
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = module._apply_batch_transfer_handler(batch, device=module.device, dataloader_idx=0)
            moved.append(step_batch._replace(batch=batch))
    return moved


def read(loader: Iterable[Any], module: Any, num_examples: int | None, seed: int) -> list[StepBatch]:
    """Batches of a user's own loader on the device of a module that no trainer has."""
    return to_device(draw(loader, num_examples, seed), module)


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
        store.directory = directory
        store.process, store.num_processes = trainer.global_rank, trainer.world_size
        if not self.captures(trainer):
            return
        if self.num_examples is None:
            raise ValueError(
                "num_examples=None asks for a whole split, and no source knows it. Pass probe_dataloader=, or give the "
                "datamodule a method probe_batches(split, num_examples, seed)."
            )
        for split in self.splits:
            store.request(split, self._wanted(split) or 0)

    def start(self, trainer: Any, pl_module: Any) -> None:
        """Fetch whatever does not have to be captured."""
        if self.dataloader is not None:
            if self._own is None:
                drawn = to_device(draw(self.dataloader, self.num_examples, self.seed), pl_module, trainer)
                whole = ProbeSet("train", "probe_dataloader", tuple(drawn))
                self._own = whole.part(trainer.global_rank, trainer.world_size)
        elif not self.captures(trainer):
            with glass_box(match_precision=True):
                for split in self.splits:
                    self._store.load_from(trainer, split, self._wanted(split), self.seed)
        elif self._resumed.get("digests"):
            directory, digests = Path(self._resumed["directory"]), self._resumed["digests"]
            try:
                self._store.resume(directory, digests, collective_of(trainer, interruptible=False))
            except Exception as error:
                rank_zero_warn(f"The resumed run's probe set could not be read and is captured anew: {error}")

    def sets(self, trainer: Any, *, optional: tuple[Split, ...]) -> dict[Split, ProbeSet] | None:
        """The probe sets that all processes have; ``None`` while one that is not ``optional`` is awaited on any."""
        collective, sets = collective_of(trainer, interruptible=False), dict[Split, ProbeSet]()
        for split in self.splits:
            found = self.get(split)
            if collective.everywhere(found is not None) and found is not None:
                sets[split] = found
            elif split not in optional:
                return None
        if self._own is None:
            for split in sets:
                self._store.name(split, self._wanted(split), collective)
        return sets

    def _wanted(self, split: Split) -> int | None:
        if self.num_examples is None or split != "train":
            return self.num_examples
        return max(self.num_examples, self.reserve)

    def before_step(self, trainer: Any, pl_module: Any, split: Split) -> None:
        """Capture the next batch if the split still lacks examples."""
        if split in self.splits and self.captures(trainer):
            self._store.capture(pl_module, split)

    def close(self, split: Split) -> None:
        """End the capture of a split."""
        self._store.close(split)

    def detach(self) -> None:
        """Leave the module's steps alone."""
        for split in self.splits:
            self._store.detach(split)

    def get(self, split: Split = "train", num_examples: int | None = None) -> ProbeSet | None:
        """The probe set of a split, of ``num_examples`` if more are there; ``None`` while it is being captured."""
        if self._own is not None:
            return self._own
        wanted = self._wanted(split)
        most = None if wanted is None else max(wanted, num_examples or 0)
        return self._store.get(split, num_examples or self.num_examples) if self._store.is_ready(split, most) else None

    @property
    def errors(self) -> list[str]:
        """What went wrong with captured batches."""
        return self._store.errors

    def state(self) -> dict[str, Any]:
        """Where a resumed run finds captured sets: a folder, and digests by split."""
        if self._store.directory is None:
            return {}
        digests = {split: list(named) for split, named in self._store.digests.items()}
        return {"directory": str(self._store.directory), "digests": digests}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Remember where the resumed run keeps its captured sets."""
        self._resumed = dict(state)
