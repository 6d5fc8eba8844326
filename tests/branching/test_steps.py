"""Forks between two batches: a child with the trunk's noise is the trunk at every later step, bit for bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch

from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.core.glassbox import rng_state
from tests.branching.runs import fit, net, sha
from tests.callbacks.test_checkpoint_branching import RUNS

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric val_loss which is not available"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling"),
]


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Steps.runs.clear()
    before = rng_state()
    yield
    torch.set_rng_state(before["torch"])


class Steps(pl.Callback):
    """Weights, optimizers, schedulers and random states after every batch, of trunk and children alike."""

    runs: ClassVar[list[dict[Any, tuple[Any, ...]]]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.runs.append({})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._take(trainer, pl_module, trainer.fit_loop.total_batch_idx, sha(batch), batch_idx)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._take(trainer, pl_module, "end")

    def _take(self, trainer: Any, pl_module: Any, moment: Any, *more: Any) -> None:
        self.runs[-1][moment] = (
            trainer.global_step,
            sha(pl_module.state_dict()),
            sha([optimizer.state_dict() for optimizer in trainer.optimizers]),
            sha([config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]),
            sha(rng_state()),
            *more,
        )


def same(*steps: int, **arguments: Any) -> CheckpointBranching:
    return CheckpointBranching(steps=steps, noise="same", **arguments)


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


@pytest.mark.parametrize("name", RUNS)
def test_child_is_the_trunk_at_every_later_step_and_the_trunk_does_not_notice(name: str) -> None:
    kind, data, arguments, others = RUNS[name]
    fit(net(kind), data(), *others(), Steps(), **arguments)
    alone, after = Steps.runs.pop(), sha(rng_state())
    last = alone["end"][0]
    branching = same(1, last // 2, last - 2)
    fit(net(kind), data(), *others(), branching, Steps(), **arguments)
    assert Steps.runs[0] == alone
    assert sha(rng_state()) == after
    assert_equals_trunk(branching)
