"""Callbacks that do something at the start of an epoch do it once in a child that starts there, as in the trunk."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from tests.branching import runs
from tests.branching.runs import assert_equals_trunk, fit_beside


class Intruding(pl.Callback):
    """Changes everything that a checkpoint holds, at the start of each epoch."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.count += 1
        (optimizer,) = trainer.optimizers
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(1 - 0.1 * torch.rand(1) / self.count)
            pl_module.net[1].running_mean.add_(0.1 * self.count)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        for state in optimizer.state.values():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].mul_(0.5)
        trainer.lr_scheduler_configs[0].scheduler.base_lrs[0] *= 0.9

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Scheduled(runs.Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)]


@pytest.mark.parametrize("first", [True, False])
def test_what_changes_all_at_the_start_of_an_epoch_does_so_once(first: bool) -> None:
    branching = CheckpointBranching(epochs=[0, 1, 2], steps=[7], noise="same")
    fit_beside(branching, Scheduled, others=lambda: [Intruding()], first=first)
    assert_equals_trunk(branching)
