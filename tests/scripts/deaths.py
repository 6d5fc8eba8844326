"""Runs that are ended while they measure."""

import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lmc_lightning import MeasurementCallback
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.core.files import write_atomic
from lmc_lightning.core.glassbox import seed_everything
from lmc_lightning.recording import Measurement, Quantity

MINUTES = 20_000
"""How often a gradient is taken that takes minutes in all."""
SIGN = Path("measuring")


class Slow(MeasurementCallback):
    """The gradient norm, which at one step is measured again and again once a sign has been given.

    Args:
        lingers_at: the step.
        times: how often.
        **common: see :class:`MeasurementCallback`.
    """

    kind = "slow"

    def __init__(self, lingers_at: int | None = None, times: int = MINUTES, **common: Any) -> None:
        super().__init__(num_examples=common.pop("num_examples", 20), **common)
        self.lingers_at, self.times = lingers_at, times

    def measure(self, visit: Visit) -> Measurement:
        norm = float(visit.objective.grad(visit.theta).norm())
        if visit.step == self.lingers_at:
            SIGN.touch()
            for _ in range(self.times):
                visit.objective.grad(visit.theta)
        return Measurement((Quantity("slow/norm", norm),))


class Net(pl.LightningModule):
    """A classifier; with dropout, a random stream takes part in its training."""

    def __init__(self, lr: float = 0.1, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader() -> Any:
    """4 batches of 10, in order, so that a resumed run needs no random stream to go on as the other would."""
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))
    labels = (inputs.sum(1) > 0).long()
    return DataLoader(TensorDataset(inputs, labels), batch_size=10)


def make_trainer(root: str, ours: list[Any], **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"max_epochs": 4, "logger": CSVLogger(root, name="", version=0)}
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        callbacks=ours,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **options},
    )


def fit(
    root: str,
    ours: list[Any],
    *,
    resumes: bool = False,
    validates: bool = False,
    checkpoints: dict[str, Any] | None = None,
    make_module: Callable[[], Net] = Net,
    **options: Any,
) -> pl.Trainer:
    """A run of 4 epochs of 4 steps from the same start, or from its last checkpoint."""
    folder = Path(root) / "checkpoints"
    saved = [] if checkpoints is None else [ModelCheckpoint(folder, save_last=True, **checkpoints)]
    trainer = make_trainer(root, [*ours, *saved], enable_checkpointing=bool(saved), **options)
    seed_everything(5)
    module = make_module()
    path = str(folder / "last.ckpt") if resumes else None
    trainer.fit(module, loader(), loader() if validates else None, ckpt_path=path)
    return trainer


def lingering(root: str, step: int, schedule: dict[str, Any], options: dict[str, Any]) -> None:
    """A run that is to be ended while it measures at ``step``."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in jobs of the background
    fit(root, [Slow(step, **schedule)], **options)


class FullDisk(pl.Callback):
    """From an epoch on, no file can become larger than our table is then."""

    def __init__(self, table: Path, epoch: int) -> None:
        self.table, self.epoch, self.content = table, epoch, b""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.content = self.table.read_bytes() if self.table.exists() else b""
            limit_file_size(len(self.content))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        limit_file_size(resource.RLIM_INFINITY)


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def full_disk(root: str, epoch: int) -> dict[str, Any]:
    """A run whose disk is full from an epoch on."""
    ours, full = Slow(), FullDisk(Path(root) / "lmc" / "slow.jsonl", epoch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(root, [ours, full], logger=False)
    return {
        "kept": full.content,
        "steps": [r.step for r in ours.results],
        "state": [r["step"] for r in ours.state_dict()["records"]],
        "warnings": [str(w.message) for w in caught if "slow:" in str(w.message)],
    }


def rewriting(path: Path, size: int) -> None:
    """Replaces a file for ever, by all a's or all b's."""
    for turn in range(10**9):
        content = (b"a" if turn % 2 else b"b") * size
        write_atomic(path, lambda file: file.write(content))  # noqa: B023
        if turn == 3:
            SIGN.touch()
