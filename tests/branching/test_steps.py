"""Forks between two batches: a child with the trunk's noise is the trunk at every later step, bit for bit."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.core.glassbox import rng_state
from tests.branching import runs
from tests.branching.runs import RUNS, Steps, assert_equals_trunk, fit, loader, net, plain, sha, stop_early

pytestmark = [
    pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric val_loss which is not available"),
    pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling"),
]


def same(*steps: int, **arguments: Any) -> CheckpointBranching:
    return CheckpointBranching(steps=steps, noise="same", **arguments)


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


def test_two_workers() -> None:
    branching = same(2, 4)
    fit(net(), (loader(runs.Augmented(), num_workers=2, batch_size=14), None), branching, Steps(), max_epochs=2)
    assert_equals_trunk(branching)


class Stateful(torch.utils.data.DataLoader[Any]):
    """Visits the examples in an order that moves on with every epoch, and says where it is."""

    passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter([[t.roll(self.passes, 0) for t in batch] for batch in super().__iter__()])

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes = state["passes"]


@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 14}])
def test_a_loader_that_says_where_it_is(limits: dict[str, int]) -> None:
    data = Stateful(runs.points(), batch_size=8)
    branching = CheckpointBranching(epochs=[0, 1], steps=[2, 7], noise="same")
    fit(net(), (data, None), branching, Steps(), **limits)
    assert_equals_trunk(branching)


class Accumulating(runs.TwoOptimizers):
    """One optimizer steps at every batch, the other at every third, on the sum of the gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        often, seldom = self.optimizers()  # type: ignore[misc]
        self.manual_backward(self.loss(batch))
        often.step()
        often.zero_grad()
        if batch_idx % 3 == 2:
            seldom.step()
            seldom.zero_grad()


def test_gradients_accumulated_by_hand_are_part_of_a_fork() -> None:
    branching = same(2, 6)
    fit(net(Accumulating), plain(), branching, Steps())
    assert_equals_trunk(branching)


def test_a_plateau_scheduler_per_step_has_stepped() -> None:
    class PerStep(runs.Plateau):
        def configure_optimizers(self) -> Any:
            configuration = super().configure_optimizers()
            configuration["lr_scheduler"] |= {"interval": "step", "frequency": 2, "monitor": "train_loss"}
            return configuration

    branching = same(2, 7)
    fit(net(PerStep), plain(), branching, Steps())
    assert_equals_trunk(branching)


@pytest.mark.parametrize("limits", [{}, {"limit_train_batches": 3}, {"overfit_batches": 4, "val_check_interval": 0.5}])
def test_every_step_of_accumulating_epochs_whose_last_batch_steps(limits: dict[str, Any]) -> None:
    data = loader(runs.Augmented()), loader(runs.Augmented(), shuffle=False)
    last = {"overfit_batches": 4, "limit_train_batches": 4}.get(next(iter(limits), ""), 6)
    branching = CheckpointBranching(epochs=[0, 1], steps=range(last), noise="same")
    fit(net(runs.Cosine), data, branching, Steps(), accumulate_grad_batches=2, max_epochs=2, **limits)
    assert branching.family.end.step == last
    assert_equals_trunk(branching)


def test_step_forks_at_the_ends() -> None:
    branching = same(0, 5, 10, 15, 99)
    with pytest.warns(UserWarning, match="no snapshot after steps 99: the trunk ended after 3 epochs, 15 steps"):
        fit(net(), plain(), branching, Steps())
    start, second, third, end, missing = branching.family.children
    assert [c.name for c in branching.family.children][1] == "k1_step_000005_child_0"
    assert (missing.status, end.status, end.epochs, end.branch_step) == ("missing", "completed", {3: 15}, 15)
    assert list(start.epochs) == [0, 1, 2, 3]
    assert (list(second.epochs), list(third.epochs)) == ([1, 2, 3], [2, 3])
    assert branching.family.state(end, 3).keys() == branching.family.state("trunk", 3).keys()


def test_a_trunk_that_stops_early_ends_its_children_there() -> None:
    branching = CheckpointBranching(steps=[3])
    trainer = fit(net(), plain(), stop_early(1), branching, max_epochs=9)
    child = branching.family.children[0]
    assert branching.family.trunk.reason == "stopped early after 2 epochs, 10 steps"
    assert (child.status, child.branch_step, child.end_step, list(child.epochs)) == ("completed", 3, 10, [1, 2])
    assert trainer.global_step == 10


@pytest.mark.parametrize("point", [1, 7])
def test_fresh_noise_from_a_step_on_differs_and_repeats(point: int) -> None:
    def family(seed: int) -> Any:
        branching = CheckpointBranching(steps=[point], children=2, seed=seed)
        data = loader(generator=torch.Generator().manual_seed(3)), None
        fit(net(), data, branching, Steps())
        return branching.family

    first, again, other = family(1), family(1), family(2)
    digests = [[child.state_digests[3] for child in f.children] for f in (first, again, other)]
    assert digests[0] == digests[1]
    assert len({*digests[0], *digests[2], first.trunk.state_digests[3]}) == 5
    for child in first.children:
        assert child.shared == {"order": False, "batches": False}
        assert len(set(child.order_digests.values())) == len(child.order_digests)  # every epoch has an order of its own


def test_a_resumed_trunk_keeps_its_step_forks(tmp_path: Path) -> None:
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "checkpoints", "last", every_n_epochs=1)
    first = same(3, 8, when="never")
    with pytest.warns(UserWarning, match="no snapshot after steps 8: the trunk ended after 1 epochs, 5 steps"):
        fit(net(), plain(), first, saver, enable_checkpointing=True, max_epochs=1, default_root_dir=tmp_path)
    second = same(3, 8, when="never")
    fit(net(), plain(), second, max_epochs=3, ckpt_path=saver.best_model_path, default_root_dir=tmp_path)
    family = second.family
    assert sorted(family.forks) == ["k1_step_000003", "k1_step_000008"]
    Steps.runs.clear()
    assert [child.exact_replay for child in second.run_children().children] == [False, True]
    early = family.children[0]
    assert early.reason == "the examples of epoch 1 differ from the trunk's: the loader has state of its own"
    assert early.state_digests[1] == family.trunk.state_digests[1]


def test_steps_past_max_steps_raise() -> None:
    with pytest.raises(ValueError, match=r"at most max_steps=4 steps, got \[7\] in steps=\[2, 7\]"):
        fit(net(), plain(), same(2, 7), max_epochs=-1, max_steps=4)
