"""Data sets as LightningDataModules whose training noise is a function of (seed, epoch)."""

from collections.abc import Mapping
from typing import Any

from lmc_lightning.data.datamodule import VisionDataModule
from lmc_lightning.data.order import EpochOrder, derive_seed, epoch_order
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
    "DATA_MODULES",
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

DATA_MODULES: Mapping[str, type[ReplayableDataModule]] = {
    module.dataset_name: module
    for module in (
        DigitsDataModule,
        MNISTDataModule,
        FashionMNISTDataModule,
        CIFAR10DataModule,
        SVHNDataModule,
        TinyImageNetDataModule,
        ImageFolderDataModule,
        TwoMoonsDataModule,
        SwissRollDataModule,
        ModularAdditionDataModule,
        TeacherStudentDataModule,
    )
}
"""The data modules by the names that `build_datamodule` knows."""


def build_datamodule(name: str, **kwargs: Any) -> ReplayableDataModule:
    """The data module called ``name`` in `DATA_MODULES`, e.g. ``"mnist"`` or ``"two_moons"``.

    Raises:
        ValueError: no set has that name.
    """
    if name not in DATA_MODULES:
        raise ValueError(f"Expected one of {', '.join(DATA_MODULES)}, got {name!r}.")
    return DATA_MODULES[name](**kwargs)
