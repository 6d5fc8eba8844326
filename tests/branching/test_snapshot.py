from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lmc_lightning.branching.forks.snapshot import rewind_to_epoch_start
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from tests.branching.runs import Net, Plateau, fit, loader, net

pytestmark = [
    pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric val_loss which is not available"),
]


class Counter(pl.Callback):
    def __init__(self) -> None:
        self.batches: dict[int, int] = {}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.batches[trainer.current_epoch] = self.batches.get(trainer.current_epoch, 0) + 1


@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 12}])
@pytest.mark.parametrize("kind", [Net, Plateau])
def test_plain_resume_from_a_snapshot_runs_every_batch(tmp_path: Path, kind: type[Net], limits: dict[str, int]) -> None:
    branching = CheckpointBranching(epochs=[0, 2])
    data = loader(), loader(shuffle=False)
    fit(net(kind), data, branching, default_root_dir=tmp_path, **limits)
    counter = Counter()
    path = branching.family.folder / branching.family.forks["k1_002"].checkpoint
    trainer = fit(net(kind), data, counter, ckpt_path=path, default_root_dir=tmp_path, **limits)
    assert counter.batches == {2: 2 if limits else 5}
    assert trainer.global_step == branching.family.end.step


def test_without_the_rewinding_batches_are_lost(tmp_path: Path) -> None:
    class Naive(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "naive.ckpt", weights_only=False)

    data = loader(), loader(shuffle=False)
    fit(net(), data, Naive())
    counter = Counter()
    fit(net(), data, counter, ckpt_path=tmp_path / "naive.ckpt")
    assert sum(counter.batches.values()) < 5
    checkpoint = torch.load(tmp_path / "naive.ckpt", weights_only=True)
    rewind_to_epoch_start(checkpoint)
    torch.save(checkpoint, tmp_path / "rewound.ckpt")
    counter = Counter()
    fit(net(), data, counter, ckpt_path=tmp_path / "rewound.ckpt")
    assert counter.batches == {2: 5}
