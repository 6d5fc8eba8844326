"""The private names that exact forks rely on are still there; this fails first when Lightning renames one."""

import importlib
from typing import Any

import pytest

from lmc_lightning.branching import internals


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_private_names_exist(namespace: str) -> None:
    pl = pytest.importorskip(namespace)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    owners: dict[str, Any] = {
        "trainer": trainer,
        "fit_loop": trainer.fit_loop,
        "epoch_loop": trainer.fit_loop.epoch_loop,
        "val_loop": trainer.fit_loop.epoch_loop.val_loop,
        "connector": trainer._accelerator_connector,
        "logger_connector": trainer._logger_connector,
        "signal_connector": trainer._signal_connector,
        "module": pl.LightningModule(),
        "ddp": importlib.import_module(f"{namespace}.strategies").DDPStrategy(),
    }
    assert internals.PRIVATE_NAMES.keys() <= owners.keys()
    missing = [
        f"{owner}.{name}"
        for owner, names in internals.PRIVATE_NAMES.items()
        for name in names
        if not hasattr(owners[owner], name)
    ]
    assert missing == []


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_loop_state_has_the_keys_that_are_rewound(namespace: str) -> None:
    pl = pytest.importorskip(namespace)
    state = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop.state_dict()
    assert state["epoch_progress"]["total"].keys() == {"ready", "started", "processed", "completed"}
    assert state["epoch_loop.batch_progress"].keys() == {"total", "current", "is_last_batch"}
    assert state["epoch_loop.scheduler_progress"]["current"].keys() == {"ready", "completed"}


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_class_names_that_are_told_apart(namespace: str) -> None:
    pl = pytest.importorskip(namespace)
    for name in ("Checkpoint", "EarlyStopping", "ProgressBar", "ModelSummary", "Timer", "LearningRateFinder"):
        assert getattr(pl.callbacks, name).__module__.startswith(namespace)
    for name in ("BatchSizeFinder", "LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor"):
        assert getattr(pl.callbacks, name).__module__.startswith(namespace)
    strategies = importlib.import_module(f"{namespace}.strategies")
    assert strategies.SingleDeviceStrategy.__module__.startswith(namespace)


def test_loops_are_wrapped_and_unwrapped() -> None:
    pl = pytest.importorskip("lightning.pytorch")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    loop, calls = trainer.fit_loop, []
    originals = loop.setup_data, loop._load_combined_loader_states, loop.epoch_loop.advance
    internals.wrap_setup_data(trainer, lambda setup_data: calls.append(setup_data), lambda: calls.append("ready"))
    internals.wrap_advance(trainer, lambda: calls.append("between") or 1 / 0)
    loop.setup_data()
    loop._load_combined_loader_states()
    with pytest.raises(ZeroDivisionError):
        loop.epoch_loop.advance(None)
    assert calls == [originals[0], "ready", "between"]
    for _ in range(2):
        internals.unwrap_setup_data(trainer)
        internals.unwrap_advance(trainer)
    assert (loop.setup_data, loop._load_combined_loader_states, loop.epoch_loop.advance) == originals
