"""Data sets as LightningDataModules whose training noise is a function of (seed, epoch)."""

from lmc_lightning.data.datamodule import VisionDataModule
from lmc_lightning.data.order import EpochOrder, derive_seed, epoch_order
from lmc_lightning.data.registry import build_datamodule
from lmc_lightning.data.replayable import ReplayableDataModule
from lmc_lightning.data.shift import DataShift
from lmc_lightning.data.synthetic import (
    ModularAdditionDataModule,
    SwissRollDataModule,
    SyntheticDataModule,
    TeacherStudentDataModule,
    TwoMoonsDataModule,
)
from lmc_lightning.data.vision import (
    CIFAR10DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    MNISTDataModule,
    SVHNDataModule,
    TinyImageNetDataModule,
)

__all__ = [
    "CIFAR10DataModule",
    "DataShift",
    "DigitsDataModule",
    "EpochOrder",
    "FashionMNISTDataModule",
    "ImageFolderDataModule",
    "MNISTDataModule",
    "ModularAdditionDataModule",
    "ReplayableDataModule",
    "SVHNDataModule",
    "SwissRollDataModule",
    "SyntheticDataModule",
    "TeacherStudentDataModule",
    "TinyImageNetDataModule",
    "TwoMoonsDataModule",
    "VisionDataModule",
    "build_datamodule",
    "derive_seed",
    "epoch_order",
]
