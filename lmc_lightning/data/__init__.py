"""Image sets as LightningDataModules whose training noise is a function of (seed, epoch)."""

from lmc_lightning.data.datamodule import VisionDataModule
from lmc_lightning.data.order import EpochOrder, derive_seed, epoch_order
from lmc_lightning.data.vision import (
    CIFAR10DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    MNISTDataModule,
    SVHNDataModule,
    TinyImageNetDataModule,
    build_datamodule,
)

__all__ = [
    "CIFAR10DataModule",
    "DigitsDataModule",
    "EpochOrder",
    "FashionMNISTDataModule",
    "ImageFolderDataModule",
    "MNISTDataModule",
    "SVHNDataModule",
    "TinyImageNetDataModule",
    "VisionDataModule",
    "build_datamodule",
    "derive_seed",
    "epoch_order",
]
