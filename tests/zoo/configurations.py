"""How runs are set up: loaders, optimizers and Trainer flags, and Lightning's own callbacks beside ours."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch import callbacks as pl
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from tests.zoo.harness import Setting
from tests.zoo.module import BATCH_SIZE, NUM_FEATURES, ZooModule, examples


@dataclass(frozen=True)
class Configuration:
    """What a run is given beside its module."""

    trainer: Mapping[str, Any] = field(default_factory=dict)
    others: Callable[[], list[Callback]] = list
    train_dataloader: Callable[[], Any] | None = None
    configure_optimizers: Callable[[Any], Any] | None = None
    make_datamodule: Callable[[], Any] = lambda: None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Of the module."""
    failing: Mapping[str, str] = field(default_factory=dict)
    """Which callbacks cannot do their work here, and the reason that they give; the training goes on all the same."""

    def of(self, cls: type[ZooModule]) -> Setting:
        """The setting of a module in this configuration."""
        own: dict[str, Any] = {"__module__": cls.__module__, **self.attributes}
        make_loader, optimizers = self.train_dataloader, self.configure_optimizers
        if make_loader is not None:
            own["train_dataloader"] = lambda module: make_loader()
        if optimizers is not None:
            own["configure_optimizers"] = lambda module: optimizers(module)
        return Setting(type(cls.__name__, (cls,), own), self.trainer, self.others, self.make_datamodule)


class Augmented(Dataset[Any]):
    """Augmentation that draws from the three global generators."""

    def __init__(self) -> None:
        self.x, self.y = examples()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(NUM_FEATURES) + np.random.normal() + random.random()  # noqa: NPY002
        return self.x[index] + 0.1 * noise, self.y[index]


class OwnsItsNoise(Augmented):
    """Augmentation from a generator of the data set, which also counts and caches."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.reads = np.random.default_rng(3), 0
        self.cache: dict[int, float] = {}

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        self.cache[index] = self.generator.normal() + 0.01 * self.reads
        return self.x[index] + 0.1 * self.cache[index], self.y[index]


class Unsized(IterableDataset[Any]):
    """Examples in an order of their own, without a length; each worker yields its part."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = examples()
        for index in torch.randperm(len(x)).tolist():
            yield x[index], y[index]


class ReloadsItsLoaders(LightningDataModule):
    """A datamodule whose loaders are made anew each epoch, and which augments after the transfer."""

    def __init__(self) -> None:
        super().__init__()
        self.loads = 0

    def train_dataloader(self) -> Any:
        self.loads += 1
        return shuffled(generator=torch.Generator().manual_seed(self.loads))

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*examples(BATCH_SIZE)), batch_size=BATCH_SIZE)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]]


def shuffled(dataset: Dataset[Any] | None = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset or TensorDataset(*examples()), **{"batch_size": BATCH_SIZE, "shuffle": True, **options})


def weighted() -> DataLoader[Any]:
    sampler = WeightedRandomSampler(torch.linspace(0.1, 1, 3 * BATCH_SIZE).tolist(), 3 * BATCH_SIZE)
    return shuffled(shuffle=False, sampler=sampler)


def streamed() -> DataLoader[Any]:
    return DataLoader(Unsized(), batch_size=BATCH_SIZE)


def cosine_per_step(module: Any) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, T_max=9), "interval": "step"}]


def step_per_epoch(module: Any) -> Any:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    return [optimizer], [StepLR(optimizer, step_size=1, gamma=0.5)]


def on_plateau(module: Any) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    scheduler = {"scheduler": ReduceLROnPlateau(optimizer, patience=0, threshold=0.5), "monitor": "val_loss"}
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


LOADERS = {
    "default generator": Configuration(),
    "user generator": Configuration(train_dataloader=lambda: shuffled(generator=torch.Generator().manual_seed(5))),
    "augmentation": Configuration(train_dataloader=lambda: shuffled(Augmented())),
    "data set with noise of its own": Configuration(train_dataloader=lambda: shuffled(OwnsItsNoise())),
    "the same, 2 workers": Configuration(train_dataloader=lambda: shuffled(OwnsItsNoise(), num_workers=2)),
    "the same, persistent": Configuration(
        train_dataloader=lambda: shuffled(OwnsItsNoise(), num_workers=2, persistent_workers=True)
    ),
    "weighted sampler": Configuration(train_dataloader=weighted),
    "limited iterable": Configuration({"limit_train_batches": 2}, train_dataloader=streamed),
    "unsized iterable": Configuration(train_dataloader=streamed),
    "accumulation": Configuration({"accumulate_grad_batches": 3}, train_dataloader=lambda: shuffled(batch_size=4)),
    "AdamW, cosine per step": Configuration(configure_optimizers=cosine_per_step),
    "Adam, StepLR": Configuration(configure_optimizers=step_per_epoch),
    "ReduceLROnPlateau": Configuration(configure_optimizers=on_plateau),
    "bf16-mixed": Configuration({"precision": "bf16-mixed"}),
    "clipping, anomaly detection": Configuration({"gradient_clip_val": 0.1, "detect_anomaly": True}),
    "overfit_batches": Configuration(
        {"overfit_batches": 2},
        train_dataloader=lambda: shuffled(shuffle=False),
        failing={"CheckpointBranching": "the loader's order does not depend on any seed"},  # nor is there any noise
    ),
    "reloading datamodule": Configuration({"reload_dataloaders_every_n_epochs": 1}, make_datamodule=ReloadsItsLoaders),
    "validation twice per epoch": Configuration(
        {"val_check_interval": 0.5}, train_dataloader=lambda: shuffled(batch_size=4)
    ),
    "2 workers": Configuration(train_dataloader=lambda: shuffled(Augmented(), num_workers=2)),
    "2 persistent workers": Configuration(
        train_dataloader=lambda: shuffled(Augmented(), num_workers=2, persistent_workers=True)
    ),
}
"""Loaders, optimizers and the loop."""

LIGHTNINGS_OWN = {
    "EMAWeightAveraging": Configuration(others=lambda: [pl.EMAWeightAveraging(decay=0.9)]),
    "StochasticWeightAveraging": Configuration(
        others=lambda: [pl.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]
    ),
    "ModelPruning": Configuration(
        others=lambda: [pl.ModelPruning("l1_unstructured", parameters_to_prune=None, amount=0.3)],
        failing={"InterpolationBarrier": "weight_orig"},  # pruning replaces the parameters that it was begun with
    ),
    "EarlyStopping, ModelCheckpoint": Configuration(
        {"enable_checkpointing": True, "max_epochs": 4},
        others=lambda: [
            pl.EarlyStopping("val_loss", patience=0, min_delta=0.3),
            pl.ModelCheckpoint(monitor="val_loss"),
        ],
    ),
    "GradientAccumulationScheduler": Configuration(
        others=lambda: [pl.GradientAccumulationScheduler({0: 1, 1: 2})], train_dataloader=lambda: shuffled(batch_size=4)
    ),
    "LearningRateMonitor": Configuration(
        others=lambda: [pl.LearningRateMonitor()], configure_optimizers=cosine_per_step
    ),
    "LearningRateFinder": Configuration(
        others=lambda: [pl.LearningRateFinder(num_training_steps=4, update_attr=True)], attributes={"lr": 0.1}
    ),
    "BatchSizeFinder": Configuration(
        others=lambda: [pl.BatchSizeFinder(steps_per_trial=1, max_trials=1, init_val=4)], attributes={"batch_size": 4}
    ),
    "Timer": Configuration(others=lambda: [pl.Timer(duration="00:01:00:00")]),
    "64-true": Configuration({"precision": "64-true"}),
    "bf16-true": Configuration({"precision": "bf16-true"}),
    "two loggers": Configuration({"logger": lambda: [CSVLogger("root", name="csv", version=0)]}),
    "deterministic": Configuration({"deterministic": True}),
    "no inference mode": Configuration({"inference_mode": False}),
    "profiler": Configuration({"profiler": "simple"}),
    "sync_batchnorm": Configuration({"sync_batchnorm": True}),
}
"""Lightning's callbacks and flags beside ours."""

CONFIGURATIONS = LOADERS | LIGHTNINGS_OWN
