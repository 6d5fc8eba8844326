"""The data modules by the names that configurations use."""

from collections.abc import Mapping
from typing import Any

from lmc_lightning.data.replayable import ReplayableDataModule
from lmc_lightning.data.synthetic import (
    ModularAdditionDataModule,
    SwissRollDataModule,
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


def build_datamodule(name: str, **kwargs: Any) -> ReplayableDataModule:
    """The data module called ``name`` in ``DATA_MODULES``, e.g. ``"mnist"`` or ``"two_moons"``.

    Raises:
        ValueError: no set has that name.
    """
    if name not in DATA_MODULES:
        raise ValueError(f"Expected one of {', '.join(DATA_MODULES)}, got {name!r}.")
    return DATA_MODULES[name](**kwargs)
