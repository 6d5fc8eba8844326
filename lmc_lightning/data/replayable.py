"""What all data modules share: training noise as a function of (seed, epoch), probe batches, shifted training data."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lmc_lightning.data.images import Augmentation, ExampleBatches, LabelledExamples, keep_batch
from lmc_lightning.data.order import EpochOrder, NoiseSeeds, derived_generator
from lmc_lightning.data.shift import DataShift
from lmc_lightning.data.sources import Splits

PROBE_BATCH_SIZE = 256


class ReplayableDataModule(LightningDataModule, ABC):
    """Labelled examples in memory, fetched batch by batch on the device, without worker processes.

    The order of an epoch is a function of (seed, epoch), augmentation of (seed, epoch, example): any epoch can be
    replayed by anyone, and no global generator is drawn from. Outside of Lightning call
    ``loader.sampler.set_epoch(epoch)`` before each pass. Evaluation neither shuffles nor augments. Deep copies share
    the examples; copies and pickles leave the trainer.

    ``noise_seed``, ``order_seed`` and ``augmentation_seed`` may be set at any time; the next pass over the training
    data uses them.

    Args:
        batch_size: of all loaders.
        val_fraction: share of the official training set that is held out for validation. 0: train on all of it, and
            validation is the official test set.
        split_seed: seed of that split.
        subset_seed: seed of ``max_train_examples``; None: ``split_seed``.
        noise_seed: seed of order and augmentation.
        order_seed: seed of the order alone; None: ``noise_seed``.
        augmentation_seed: seed of the augmentation alone; None: ``noise_seed``.
        max_train_examples: train on that many examples only, or on that share of them (a float up to 1); the subsets
            of one seed are nested. None: on all.
        shift: what is done to the training examples.
        drop_last: leave out the last, smaller training batch.
        device: where the examples are held; None: on the trainer's device, CPU without a trainer.
    """

    dataset_name: ClassVar[str]
    num_classes: int
    transform: Callable[[Tensor], Tensor]
    """From examples as they are held to those that the network sees."""

    def __init__(
        self,
        *,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        subset_seed: int | None = None,
        noise_seed: int = 0,
        order_seed: int | None = None,
        augmentation_seed: int | None = None,
        max_train_examples: int | float | None = None,
        shift: DataShift | None = None,
        drop_last: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"`val_fraction` is a share of the training set in [0, 1), got {val_fraction}.")
        if isinstance(max_train_examples, float) and not 0 < max_train_examples <= 1:
            raise ValueError(f"`max_train_examples` is a number, or a share in (0, 1], got {max_train_examples}.")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.subset_seed = subset_seed
        self.max_train_examples = max_train_examples
        self.shift = shift
        self.drop_last = drop_last
        self.device = device
        self._noise = NoiseSeeds(noise_seed, order_seed, augmentation_seed)
        self._sets: Splits = {}

    @abstractmethod
    def read_splits(self) -> Splits:
        """The official splits ``train`` and ``test``."""

    @property
    @abstractmethod
    def dims(self) -> tuple[int, ...]:
        """The shape of one example as the network sees it."""

    def augmentation(self) -> Augmentation | None:
        """What is done to training examples at each epoch."""
        return None

    @property
    def noise_seed(self) -> int:
        """Seed of order and augmentation, each unless it has its own."""
        return self._noise.noise_seed

    @noise_seed.setter
    def noise_seed(self, seed: int) -> None:
        self._noise.noise_seed = seed

    @property
    def order_seed(self) -> int | None:
        """Seed of the order alone; None: ``noise_seed``."""
        return self._noise.order_seed

    @order_seed.setter
    def order_seed(self, seed: int | None) -> None:
        self._noise.order_seed = seed

    @property
    def augmentation_seed(self) -> int | None:
        """Seed of the augmentation alone; None: ``noise_seed``."""
        return self._noise.augmentation_seed

    @augmentation_seed.setter
    def augmentation_seed(self, seed: int | None) -> None:
        self._noise.augmentation_seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Read the set into memory, once."""
        if not self._sets:
            self._sets = self.read_splits()
            self._rows = self._draw_rows()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Training batches in the order of ``loader.sampler``'s epoch."""
        order = EpochOrder(len(self._split("train")[1]), self._noise, **self._processes())
        return self._loader("train", self.augmentation(), order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The held-out training examples in their own order; with ``val_fraction=0`` the official test set."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The official test set in its own order."""
        return self._loader("test")

    def probe_batches(
        self, split: str = "train", num_examples: int | None = None, seed: int = 0
    ) -> list[tuple[Tensor, Tensor]]:
        """A fixed sample of a split in batches of 256, evaluation transform, on CPU; no generator is touched.

        Samples of one ``seed`` are nested: the first ``num_examples`` of one permutation of the split. Neither the
        noise seeds nor the device enter.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            num_examples: None: the whole split in its own order; at most the whole split.
            seed: shared by all runs that are to be compared.
        """
        source, rows = self._split(split)
        if num_examples is not None:
            rows = rows[torch.randperm(len(rows), generator=derived_generator(seed, "probe", split))[:num_examples]]
        chunks = (source[chunk] for chunk in rows.split(PROBE_BATCH_SIZE))
        return [(self.transform(images.cpu()), labels.cpu()) for images, labels in chunks]

    def without_data(self) -> "ReplayableDataModule":
        """A copy that reads its set again when it is next used."""
        light = copy.copy(self)
        light._sets = {}
        return light

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None}

    def _draw_rows(self) -> dict[str, Tensor]:
        """Which rows of the sets make up the splits, in official order; a shift changes the training set itself."""
        size = len(self._sets["train"])
        permutation = torch.randperm(size, generator=derived_generator(self.split_seed, "split"))
        num_val = round(self.val_fraction * size)
        train = permutation[num_val:]
        if self.subset_seed is not None:
            train = train[torch.randperm(len(train), generator=derived_generator(self.subset_seed, "subset"))]
        train = train[: self._num_train(len(train))]
        if self.shift is not None:
            self._sets["train"], train = self.shift.apply(self._sets["train"], train, self.num_classes)
        rows = {"train": train.sort().values, "test": torch.arange(len(self._sets["test"]))}
        return {**rows, "val": permutation[:num_val].sort().values} if num_val else rows

    def _num_train(self, available: int) -> int:
        most = self.max_train_examples
        return available if most is None else round(most * available) if isinstance(most, float) else most

    def _split(self, split: str, device: torch.device | None = None) -> tuple[LabelledExamples, Tensor]:
        """The set that a split is part of, moved to a device for good, and the split's rows in it."""
        if split not in ("train", "val", "test"):
            raise ValueError(f"`split` is 'train', 'val' or 'test', got {split!r}.")
        self.prepare_data()
        self.setup()
        split = split if split in self._rows else "test"
        name = "test" if split == "test" else "train"
        if device is not None:
            self._sets[name] = self._sets[name].to(device)
        return self._sets[name], self._rows[split]

    def _loader(
        self, split: str, augmentation: Augmentation | None = None, order: EpochOrder | None = None
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        source, rows = self._split(split, self._device())
        return DataLoader(
            ExampleBatches(source, rows, self.transform, augmentation, order),
            batch_size=self.batch_size,
            sampler=order,
            drop_last=self.drop_last and order is not None,
            collate_fn=keep_batch,
            # every `iter(DataLoader)` draws a number: from the global generator unless it has its own
            generator=torch.Generator(),
        )

    def _processes(self) -> dict[str, int]:
        """Number of processes that share the training data, and which one this is."""
        if self.trainer is not None:
            return self.trainer.distributed_sampler_kwargs or {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return {"num_replicas": torch.distributed.get_world_size(), "rank": torch.distributed.get_rank()}
        return {}

    def _device(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
