"""Little runs with every kind of randomness, and a fingerprint of what each did."""

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.core.glassbox import rng_state, seed_everything

SIZE = 40


def points(dtype: torch.dtype = torch.float32) -> TensorDataset:
    inputs = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(11))
    return TensorDataset(inputs.to(dtype), (inputs.sum(1) > 0).long())


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Jitters with the global generators of python, numpy and torch."""

    def __init__(self) -> None:
        self.points = points()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, label = self.points[index]
        return inputs + 0.1 * torch.randn(4) + 0.1 * float(np.random.randn()) + 0.1 * random.random(), label  # noqa: NPY002


class OwnGenerators(Dataset[tuple[Tensor, Tensor]]):
    """Jitters with generators of its own, one of each kind."""

    def __init__(self) -> None:
        self.points = points()
        self.torch = torch.Generator().manual_seed(1)
        self.sources: dict[str, Any] = {
            "numpy": np.random.default_rng(2),
            "legacy": np.random.RandomState(3),
            "python": random.Random(4),
        }

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, label = self.points[index]
        own = self.sources
        jitter = float(own["numpy"].normal()) + float(own["legacy"].randn()) + own["python"].random()
        return inputs + 0.1 * torch.randn(4, generator=self.torch) + 0.1 * jitter, label


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Without a length; in random order."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = points()
        return iter([data[i] for i in torch.randperm(len(data)).tolist()])


class Seeded(Dataset[tuple[Tensor, Tensor]]):
    """Jitter as a function of ``noise_seed`` and the index alone."""

    def __init__(self, noise_seed: int = 5) -> None:
        self.points, self.noise_seed = points(), noise_seed

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, label = self.points[index]
        generator = torch.Generator().manual_seed((self.noise_seed * 1009 + index) % 2**63)
        return inputs + 0.1 * torch.randn(4, generator=generator), label


def loader(data: Any = None, **arguments: Any) -> DataLoader[Any]:
    data = points() if data is None else data
    shuffle = None if isinstance(data, IterableDataset) or "sampler" in arguments else True
    return DataLoader(data, **({"batch_size": 8, "shuffle": shuffle} | arguments))


class Net(pl.LightningModule):
    """BatchNorm, dropout, SGD with momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2), nn.Dropout(0.1)
        )

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Cosine(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class OneCycle(Net):
    """Asks how many steps there will be, for which Lightning makes the loaders before `on_fit_start`."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StepDecay(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.3)]


class Plateau(Net):
    """Halves the rate at every epoch that brings no improvement."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss", "strict": False}}


class TwoOptimizers(Net):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, last = self.net[0].parameters(), self.net[4].parameters()
        return [torch.optim.SGD(first, lr=0.1, momentum=0.9), torch.optim.Adam(last, lr=0.01)]


class Drawing(Net):
    """Draws wherever it can: in hooks, from a generator of its own, and for the split of its own data."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(9)

    def setup(self, stage: str) -> None:
        self.train_set, self.val_set = random_split(points(), [32, 8])

    def train_dataloader(self) -> DataLoader[Any]:
        torch.rand(1)
        return loader(self.train_set, num_workers=0)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, batch_size=8)

    def on_train_epoch_start(self) -> None:
        self.scale = 1 + 0.1 * float(torch.rand(1, generator=self.own)) + 0.1 * random.random()

    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch[0] * getattr(self, "scale", 1.0), batch[1]))


class TwoLoaders(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch["a"]) + self.loss(batch["b"])


class SplitData(pl.LightningDataModule):
    """Splits in `setup` and makes loaders under whatever random state there is."""

    def setup(self, stage: str) -> None:
        self.train_set, self.val_set = random_split(Augmented(), [32, 8])

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.train_set)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, batch_size=8)


class SeededData(pl.LightningDataModule):
    """Order and jitter follow from `noise_seed` alone; no generator is drawn from."""

    def __init__(self) -> None:
        super().__init__()
        self.noise_seed = 5

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(Seeded(self.noise_seed), shuffle=False)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(shuffle=False)


def sha(value: Any) -> str:
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key in part:
                add(part[key])
        elif isinstance(part, list | tuple):
            for element in part:
                add(element)
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()


class DrawingTimer(pl.callbacks.Timer):
    """Moves the random state between `setup` and the first iterator, in the trunk only: children get no timers."""

    def on_fit_start(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        super().on_fit_start(trainer, *args, **kwargs)
        torch.rand(1)


class Fingerprint(pl.Callback):
    """Weights, optimizers, schedulers and random states at every epoch's end, of trunk and children alike."""

    runs: ClassVar[list[dict[Any, tuple[Any, ...]]]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.mine: dict[Any, tuple[Any, ...]] = {}
        self.runs.append(self.mine)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._take(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._take(trainer, pl_module, "end")

    def _take(self, trainer: Any, pl_module: Any, moment: Any, *more: Any) -> None:
        self.mine[moment] = (
            trainer.global_step,
            sha(pl_module.state_dict()),
            sha([optimizer.state_dict() for optimizer in trainer.optimizers]),
            sha([config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]),
            sha(rng_state()),
            *more,
        )


class Steps(Fingerprint):
    """The same after every batch, and the batch."""

    runs: ClassVar[list[dict[Any, tuple[Any, ...]]]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._take(trainer, pl_module, trainer.fit_loop.total_batch_idx, sha(batch), batch_idx)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Nothing: its last batch is there."""


def fit(module: pl.LightningModule, data: Any, *callbacks: Any, ckpt_path: Any = None, **arguments: Any) -> Any:
    """Train under seed 0; ``data`` is (train, val), or a datamodule, or None. Returns the trainer."""
    defaults = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**defaults | quiet | arguments, callbacks=list(callbacks))
    seed_everything(0)
    if isinstance(data, pl.LightningDataModule):
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    elif data is None:
        trainer.fit(module, ckpt_path=ckpt_path)
    else:
        trainer.fit(module, *data, ckpt_path=ckpt_path)
    return trainer


def net(kind: type[Net] = Net) -> Net:
    seed_everything(1)
    return kind()


def plain() -> tuple[Any, Any]:
    return loader(), loader(shuffle=False)


def stop_early(patience: int = 1) -> EarlyStopping:
    """Stops after the second validation, or after ``patience + 1`` of them."""
    return EarlyStopping("val_loss", patience=patience, min_delta=10.0)


RUNS: dict[str, tuple[type[Net], Callable[[], Any], dict[str, Any], Callable[[], list[Any]]]] = {
    "shuffled": (Net, plain, {}, list),
    "user generator": (
        Net,
        lambda: (loader(generator=torch.Generator().manual_seed(3)), loader(Augmented(), shuffle=False)),
        {},
        list,
    ),
    "augmented": (Net, lambda: (loader(Augmented()), loader(Augmented(), shuffle=False)), {}, list),
    "own generators": (Net, lambda: (loader(OwnGenerators()), loader(shuffle=False)), {}, list),
    "iterable without length": (Net, lambda: (loader(Stream()), loader(shuffle=False)), {}, list),
    "two loaders": (TwoLoaders, lambda: ({"a": loader(), "b": loader(batch_size=6)}, None), {}, list),
    "random split, reloaded": (Net, SplitData, {"reload_dataloaders_every_n_epochs": 2}, list),
    "module that draws": (Drawing, lambda: None, {}, list),
    "AdamW, cosine per step": (Cosine, plain, {}, list),
    "one cycle": (OneCycle, lambda: (loader(Augmented()), None), {}, list),
    "step decay": (StepDecay, plain, {}, list),
    "plateau": (Plateau, plain, {}, list),
    "plateau on an old metric": (Plateau, plain, {"check_val_every_n_epoch": 2}, list),
    "plateau, max_steps": (Plateau, plain, {"max_epochs": -1, "max_steps": 15}, list),
    "manual optimization": (TwoOptimizers, plain, {}, list),
    "accumulation": (Net, plain, {"accumulate_grad_batches": 3}, list),
    "scheduled accumulation": (Net, plain, {}, lambda: [GradientAccumulationScheduler({0: 1, 2: 2})]),
    "validation in between": (
        Net,
        lambda: (loader(Augmented()), loader(Augmented(), shuffle=False)),
        {"val_check_interval": 2},
        list,
    ),
    "max_steps amid an epoch": (OneCycle, plain, {"max_epochs": -1, "max_steps": 12}, list),
    "stopped early": (Net, plain, {"max_epochs": 9}, lambda: [stop_early(2)]),
    "stopped early amid an epoch": (
        Net,
        plain,
        {"max_epochs": 9, "val_check_interval": 3, "check_val_every_n_epoch": None, "accumulate_grad_batches": 3},
        lambda: [stop_early(3)],
    ),
    "limited and clipped": (
        Net,
        plain,
        {
            "limit_train_batches": 3,
            "limit_val_batches": 0.5,
            "gradient_clip_val": 0.1,
            "accumulate_grad_batches": 2,
        },
        list,
    ),
    "overfit": (Net, plain, {"overfit_batches": 2}, list),
    "64-true": (Net, lambda: (loader(points(torch.float64)), None), {"precision": "64-true"}, list),
    "bf16-mixed": (Net, plain, {"precision": "bf16-mixed"}, list),
}


def fit_beside(
    branching: CheckpointBranching,
    kind: type[Net] = Net,
    data: Callable[[], Any] = plain,
    others: Callable[[], list[Any]] = list,
    *,
    first: bool = False,
    prints: type[Fingerprint] = Steps,
    **arguments: Any,
) -> Any:
    """Train without a branching and then with it, which the trunk does not notice; returns the trainer.

    Args:
        first: whether the branching comes before the other callbacks.
    """
    fit(net(kind), data(), *others(), prints(), **arguments)
    alone, after = prints.runs.pop(), sha(rng_state())
    callbacks = [branching, *others()] if first else [*others(), branching]
    trainer = fit(net(kind), data(), *callbacks, prints(), **arguments)
    assert prints.runs[0] == alone
    assert sha(rng_state()) == after
    return trainer


def assert_equals_trunk(branching: CheckpointBranching) -> None:
    trunk, *children = Steps.runs
    family = branching.family
    assert len(children) == len(family.children)
    for child, prints in zip(family.children, children, strict=True):
        start = family.forks[child.label].position.batches
        assert prints == {moment: trunk[moment] for moment in trunk if moment == "end" or moment >= start}
        assert (child.status, child.reason, child.exact_replay) == ("completed", None, True)
        assert (child.branch_step or 0) >= (child.k1_step or 0)
        assert all(child.shared.values())
