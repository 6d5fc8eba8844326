"""Runs a setting with and without callbacks under one seed."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger

from tests.zoo.fingerprint import fingerprint, global_random_state, sha256

SEED = 7


@dataclass(frozen=True)
class Setting:
    """A run that can be repeated: how its module is made, its Trainer's arguments, its other callbacks."""

    make_module: Callable[[], LightningModule]
    trainer: Mapping[str, Any] = field(default_factory=dict)
    others: Callable[[], list[Callback]] = list
    make_datamodule: Callable[[], Any] = lambda: None
    make_trainer: Callable[..., Any] = Trainer
    compiled: bool = False


@dataclass
class Run:
    """A run after ``fit``, and its fingerprint."""

    trainer: Any
    module: Any
    logger: "MemoryLogger"
    witness: "Witness"
    others: Sequence[Callback]
    ours: Sequence[Callback]
    error: BaseException | None = None
    fingerprint: dict[str, str] = field(default_factory=dict)

    def differs_from(self, other: "Run") -> list[str]:
        """What is not the same, bit for bit."""
        return [name for name, digest in other.fingerprint.items() if self.fingerprint[name] != digest]


def train(
    setting: Setting,
    ours: Sequence[Callback] = (),
    *,
    last: bool = False,
    ckpt_path: Path | None = None,
    raises: type[BaseException] | None = None,
    **options: Any,
) -> Run:
    """One ``fit`` in the folder ``root``, emptied unless a run is resumed, our callbacks before or after all others.

    Args:
        setting: what is trained.
        ours: the measuring callbacks.
        last: whether they come last.
        ckpt_path: a checkpoint to resume from.
        raises: what a ``fit`` raises that does not come to its end.
        **options: further arguments of the Trainer.
    """
    if ckpt_path is None:
        shutil.rmtree("root", ignore_errors=True)
    with _environment():
        seed_everything(SEED, workers=True, verbose=False)
        module, datamodule = setting.make_module(), setting.make_datamodule()
        witness, others, logger = Witness(), setting.others(), MemoryLogger()
        callbacks = [witness, *others, *ours] if last else [*ours, witness, *others]
        arguments = {**QUIET, "logger": logger, **setting.trainer, **options}
        if callable(arguments["logger"]):
            arguments["logger"] = [logger, *arguments["logger"]()]
        trainer = setting.make_trainer(callbacks=callbacks, default_root_dir="root", **arguments)
        run = Run(trainer, module, logger, witness, others, ours)
        # A backend whose graphs cannot be differentiated twice.
        fitted = torch.compile(module, backend="aot_eager") if setting.compiled else module
        try:
            trainer.fit(fitted, datamodule=datamodule, ckpt_path=ckpt_path)
        except BaseException as error:
            if raises is None or not isinstance(error, raises):
                raise
            run.error = error
        run.fingerprint = fingerprint(run)
    return run


QUIET: dict[str, Any] = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "devices": 1,
    "log_every_n_steps": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@contextmanager
def _environment() -> Iterator[None]:
    """What a Trainer leaves set in the process is undone."""
    before, deterministic = dict(os.environ), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        torch.use_deterministic_algorithms(deterministic)


class MemoryLogger(Logger):
    """Keeps every row that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step, {name: float(value) for name, value in metrics.items()}))

    def rows_of(self, callback: Any) -> list[tuple[int | None, dict[str, float]]]:
        """The rows that a measuring callback has logged."""
        return [row for row in self.rows if all(name.startswith(f"{callback.kind}/") for name in row[1])]

    def rows_without(self, callbacks: Sequence[Any]) -> list[tuple[int | None, dict[str, float]]]:
        """The rows that none of these callbacks has logged."""
        logged = [row for c in callbacks if hasattr(c, "kind") for row in self.rows_of(c)]
        return [row for row in self.rows if row not in logged]


class Witness(Callback):
    """Looks at every hook: what any other callback would see that runs beside ours."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.losses: list[float] = []
        self.steps: list[int] = []
        """The value of ``global_step`` after each batch."""
        self.epochs = 0
        """Epochs that were completed."""

    def _look(self, trainer: Any, pl_module: Any, *more: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters()]
        modes = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), [m.training for m in pl_module.modules()]]
        self.seen.append(sha256([global_random_state(), gradients, modes, trainer.global_step, *more]))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._look(trainer, pl_module, batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._look(trainer, pl_module, outputs, batch)
        self.steps.append(trainer.global_step)
        if outputs and "loss" in outputs:
            self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs += trainer.is_last_batch
        self._look(trainer, pl_module, dict(trainer.callback_metrics))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer, pl_module, dict(trainer.callback_metrics))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer, pl_module)
