"""The LightningDataModule that all image sets share."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lmc_lightning.data.download import download
from lmc_lightning.data.images import Augmentation, ImageBatches, ImageTransform, LabelledImages, keep_batch
from lmc_lightning.data.order import EpochOrder, NoiseSeeds, derived_generator
from lmc_lightning.data.sources import Splits

PROBE_BATCH_SIZE = 256


class VisionDataModule(LightningDataModule, ABC):
    """A set of labelled images, held as uint8 and turned into float batches on the device, without worker processes.

    Batches are ``(images, labels)``: float32 ``(B, C, H, W)``, normalised, and int64 ``(B,)``. The order of an epoch
    is a function of (seed, epoch), the augmentation of (seed, epoch, example): any epoch can be replayed by anyone,
    and no global generator is drawn from. Outside of Lightning call ``loader.sampler.set_epoch(epoch)`` before each
    pass. Evaluation neither shuffles nor augments. Deep copies share the images; copies and pickles leave the trainer.

    ``noise_seed``, ``order_seed`` and ``augmentation_seed`` may be set at any time; the next pass over the training
    data uses them.

    Args:
        data_dir: the folder that holds the set, or that it is downloaded into.
        batch_size: of all loaders.
        val_fraction: share of the official training set that is held out for validation. 0: train on all of it, and
            validation is the official test set.
        split_seed: seed of that split and of ``max_train_examples``.
        noise_seed: seed of order and augmentation.
        order_seed: seed of the order alone; None: ``noise_seed``.
        augmentation_seed: seed of the augmentation alone; None: ``noise_seed``.
        image_size: edge of the images that the network sees [pixels]; None: as resized.
        resize: edge that images are resized to before the centre is cropped, or padded with black, to ``image_size``
            [pixels]; None: ``image_size``, and where that is None too, their own size.
        augment: random crops of the image zero-padded by an eighth of its edge, and, where a mirrored image keeps its
            class, random horizontal flips; before resizing.
        max_train_examples: train on that many examples only, nested for a given ``split_seed``; None: on all.
        drop_last: leave out the last, smaller training batch.
        mean: per channel, of images in [0, 1]; None: the constants that are usual for the set.
        std: per channel; None: the constants that are usual for the set.
        device: where the images are held; None: on the trainer's device, CPU without a trainer.
        download: fetch the set if it is missing.
    """

    dataset_name: ClassVar[str]
    native_dims: tuple[int, int, int]
    default_mean: ClassVar[tuple[float, ...]]
    default_std: ClassVar[tuple[float, ...]]
    flip: ClassVar[bool] = False
    num_classes: int

    def __init__(
        self,
        data_dir: str | Path = "data",
        *,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        noise_seed: int = 0,
        order_seed: int | None = None,
        augmentation_seed: int | None = None,
        image_size: int | None = None,
        resize: int | None = None,
        augment: bool = False,
        max_train_examples: int | None = None,
        drop_last: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: str | torch.device | None = None,
        download: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"`val_fraction` is a share of the training set in [0, 1), got {val_fraction}.")
        self.data_dir = Path(data_dir).expanduser()
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.augment = augment
        self.max_train_examples = max_train_examples
        self.drop_last = drop_last
        self.device = device
        self.download = download
        self.transform = self._make_transform(image_size, resize, mean, std)
        self._noise = NoiseSeeds(noise_seed, order_seed, augmentation_seed)
        self._sets: Splits = {}

    def _make_transform(
        self, image_size: int | None, resize: int | None, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> ImageTransform:
        resize = resize or image_size or self.native_dims[-1]
        statistics = tuple(mean or self.default_mean), tuple(std or self.default_std)
        if any(len(values) not in (1, self.native_dims[0]) for values in statistics):
            raise ValueError(f"`mean` and `std` need one value per channel ({self.native_dims[0]}), got {statistics}.")
        return ImageTransform(*statistics, resize=resize, image_size=image_size or resize)

    @abstractmethod
    def locate(self) -> Path:
        """The folder of the set.

        Raises:
            FileNotFoundError: it is in none of the folders looked in; the message names them and the remedy.
        """

    @abstractmethod
    def read(self, folder: Path) -> Splits:
        """The official splits ``train`` and ``test``, uint8."""

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

    @property
    def dims(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the network sees."""
        return self.native_dims[0], self.transform.image_size, self.transform.image_size

    def prepare_data(self) -> None:
        """Fetch the set if it is missing and ``download`` is set."""
        if not self.download:
            return
        try:
            self.locate()
        except FileNotFoundError:
            download(self.dataset_name, self.data_dir)

    def setup(self, stage: str | None = None) -> None:
        """Read the set into memory, once."""
        if not self._sets:
            self._sets = self.read(self.locate())
            self._rows = self._draw_rows()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Training batches in the order of ``loader.sampler``'s epoch."""
        order = EpochOrder(len(self._split("train")[1]), self._noise, **self._processes())
        augmentation = Augmentation(self.native_dims[-1] // 8, self.flip) if self.augment else None
        return self._loader("train", augmentation, order)

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

    def without_data(self) -> "VisionDataModule":
        """A copy that reads its set again when it is next used."""
        light = copy.copy(self)
        light._sets = {}
        return light

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None}

    def _draw_rows(self) -> dict[str, Tensor]:
        """Which rows of the sets make up the splits, in official order."""
        size = len(self._sets["train"])
        permutation = torch.randperm(size, generator=derived_generator(self.split_seed, "split"))
        num_val = round(self.val_fraction * size)
        rows = {
            "train": permutation[num_val:][: self.max_train_examples].sort().values,
            "test": torch.arange(len(self._sets["test"])),
        }
        return {**rows, "val": permutation[:num_val].sort().values} if num_val else rows

    def _split(self, split: str, device: torch.device | None = None) -> tuple[LabelledImages, Tensor]:
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
            ImageBatches(source, rows, self.transform, augmentation, order),
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
