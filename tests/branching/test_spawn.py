import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lmc_lightning.branching.children.blueprint import (
    Blueprint,
    curve_loggers,
    make_logger,
    trainer_arguments,
    trainer_class,
)
from tests.branching.runs import Net, loader

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_epochs": 3, "min_epochs": 2, "limit_train_batches": 0.5, "limit_val_batches": 3, "limit_test_batches": 0},
        {"max_steps": 7, "max_epochs": -1, "min_steps": 5, "accumulate_grad_batches": 4, "log_every_n_steps": 0},
        {"overfit_batches": 2, "precision": "bf16-mixed", "detect_anomaly": True, "inference_mode": False},
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value", "reload_dataloaders_every_n_epochs": 2},
        {"val_check_interval": 0.25, "check_val_every_n_epoch": 2, "precision": "64-true"},
        {"val_check_interval": 5, "check_val_every_n_epoch": None, "use_distributed_sampler": False},
        {"val_check_interval": timedelta(minutes=5), "check_val_every_n_epoch": None, "sync_batchnorm": True},
        {"barebones": True, "enable_checkpointing": None, "logger": None, "enable_progress_bar": None},
    ],
)
def test_arguments_are_read_back(namespace: str, arguments: dict[str, Any]) -> None:
    kind = pytest.importorskip(namespace).Trainer
    trainer = kind(**QUIET | arguments)
    assert trainer_class(trainer) is kind
    read = trainer_arguments(trainer)
    for name, value in arguments.items():
        if value is not None and name in read:
            assert read[name] == value, name
    again = kind(**{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | read)
    assert trainer_arguments(again) == read


class OwnTrainer(pl.Trainer):
    pass


class OwnStrategy(pl.strategies.SingleDeviceStrategy):
    pass


class OwnAccelerator(pl.accelerators.CPUAccelerator):
    pass


@pytest.mark.parametrize(
    ("kind", "arguments", "what"),
    [
        (OwnTrainer, {}, "the Trainer subclass OwnTrainer"),
        (pl.Trainer, {"strategy": OwnStrategy(torch.device("cpu"))}, "the strategy OwnStrategy"),
        (pl.Trainer, {"accelerator": OwnAccelerator()}, "the accelerator OwnAccelerator"),
        (pl.Trainer, {"plugins": pl.plugins.TorchCheckpointIO()}, "the plugin TorchCheckpointIO"),
        (
            OwnTrainer,
            {"plugins": pl.plugins.MixedPrecision("bf16-mixed", "cpu")},
            "the Trainer subclass OwnTrainer, the plugin MixedPrecision",
        ),
    ],
)
def test_everything_that_cannot_be_read_back_is_named(kind: Any, arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=f"children: {what} cannot be read back. Pass make_trainer=f, a function"):
        trainer_arguments(kind(**QUIET | arguments))


def test_own_loops_are_named() -> None:
    trainer = pl.Trainer(**QUIET)

    class OwnLoop(type(trainer.fit_loop)):  # type: ignore[misc]
        pass

    trainer.fit_loop = OwnLoop(trainer)
    with pytest.raises(ValueError, match="the loop OwnLoop cannot be read back"):
        trainer_arguments(trainer)


class Owner(pl.Callback):
    pass


class Pointing(pl.Callback):
    """Holds parts of the module, as pruning does."""

    def __init__(self, module: Net, trainer_log: Any = None) -> None:
        self.layer, self.weight, self.mean = module.net[0], module.net[0].weight, module.net[1].running_mean
        self.log_to = module.log


def attached(module: pl.LightningModule, datamodule: Any = None, callbacks: Any = ()) -> pl.Trainer:
    trainer = pl.Trainer(**QUIET, callbacks=[*callbacks, Owner()], enable_model_summary=False, max_epochs=1)
    trainer._data_connector.attach_data(module, None if datamodule else loader(), datamodule=datamodule)
    trainer.strategy.connect(module)
    return trainer


class Big(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.sets = {"train": (torch.zeros(1 << 18), np.zeros(1 << 18)), "small": torch.zeros(3)}
        self.generator = torch.Generator().manual_seed(4)


def built(trainer: pl.Trainer, module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, ...]:
    """What a child's `fit` is called with: trainer, module, datamodule."""
    calls: list[Any] = []
    blueprint = Blueprint(trainer, module, trainer.callbacks[-1])
    monkeypatch.setattr(pl.Trainer, "fit", lambda self, module, **data: calls.append((self, module, data)))
    blueprint.build(Owner(), tmp_path)(tmp_path / "fork.ckpt")
    ((child, copied, data),) = calls
    return child, copied, data


def test_children_share_large_arrays_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, datamodule = Net(), Big()
    trainer = attached(module, datamodule, [Pointing(module)])
    child, copied, data = built(trainer, module, monkeypatch, tmp_path)
    mine = data["datamodule"]
    assert mine is not datamodule
    assert mine.sets["train"][0] is datamodule.sets["train"][0]
    assert mine.sets["train"][1] is datamodule.sets["train"][1]
    assert mine.sets["small"] is not datamodule.sets["small"]
    assert mine.generator is not datamodule.generator
    assert torch.equal(mine.generator.get_state(), datamodule.generator.get_state())
    assert mine.trainer is trainer  # until the child's own fit
    assert mine.setup("fit") is None
    theirs = {tensor.data_ptr() for tensor in module.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in copied.state_dict().values()}
    pointing = child.callbacks[0]
    assert pointing.layer is copied.net[0]
    assert pointing.weight is copied.net[0].weight
    assert pointing.mean is copied.net[1].running_mean
    assert pointing.log_to.__self__ is copied


def test_loaders_are_the_trunks_and_callbacks_of_the_module_come_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Configuring(Net):
        def configure_callbacks(self) -> list[Any]:
            return [pl.callbacks.EarlyStopping("val_loss")]

    module = Configuring()
    trainer = attached(module)
    _, copied, data = built(trainer, module, monkeypatch, tmp_path)
    assert data["train_dataloaders"] is trainer.fit_loop._data_source.instance
    assert data["val_dataloaders"] is data["datamodule"] is None  # the copied module makes its own
    assert data["weights_only"] is False
    assert copied.configure_callbacks() == []


@pytest.fixture
def file() -> Iterator[Any]:
    with open(os.devnull) as file:
        yield file


def test_what_refuses_to_be_copied_is_named(file: Any) -> None:
    datamodule = Big()
    datamodule.file = file  # type: ignore[attr-defined]
    module = Net()
    with pytest.raises(TypeError, match=r"the datamodule Big cannot be copied \(TypeError: cannot pickle"):
        Blueprint(trainer := attached(module, datamodule), module, trainer.callbacks[-1])


def test_loggers_of_children(tmp_path: Path) -> None:
    class Derived(CSVLogger):
        pass

    loggers = [Derived(tmp_path), TensorBoardLogger(tmp_path), TensorBoardLogger(tmp_path, "again"), object()]
    assert curve_loggers(loggers) == [CSVLogger, TensorBoardLogger]
    for kind in curve_loggers(loggers):
        assert make_logger(kind, tmp_path / "branches" / "k1_000_child_0").log_dir == str(
            tmp_path / "branches" / "k1_000_child_0"
        )
