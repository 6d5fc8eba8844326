"""Under weight averaging the weights themselves are forked, and children average on as the trunk does."""

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import nn

from lmc_lightning.branching.traces.averaging import average_of
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.callbacks.interpolation_barrier import InterpolationBarrier
from tests.branching import runs
from tests.branching.runs import Steps, assert_equals_trunk, fit, fit_beside, loader, net, plain, sha

pytestmark = [
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`"),
    pytest.mark.filterwarnings("ignore:More than half of the captured:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step\\(\\)`"),
]


class Averages(Steps):
    """And the average of the weights."""

    def _take(self, trainer: Any, pl_module: Any, moment: Any, *more: Any) -> None:
        average = average_of(trainer, pl_module)
        super()._take(trainer, pl_module, moment, average and (average.count, sha(average.state)), *more)


class Smooth(runs.StepDecay):
    """Without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2))


class Seldom(WeightAveraging):
    """At every second step, and at the end of each epoch."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None or (step_idx or 0) % 2 == 1


AVERAGING: dict[str, Callable[[], pl.Callback]] = {
    "EMA": lambda: EMAWeightAveraging(decay=0.8),
    "seldom": Seldom,
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=2),
}


@pytest.mark.parametrize("first", [False, True], ids=["before ours", "after ours"])
@pytest.mark.parametrize(
    "kind", [runs.StepDecay, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (runs.Net, Smooth))]
)
@pytest.mark.parametrize("name", AVERAGING)
def test_children_average_as_the_trunk_does(name: str, kind: type[runs.Net], first: bool) -> None:
    branching = CheckpointBranching(epochs=[0, 1, 2, 3], steps=[3, 8, 17], noise="same")
    fit_beside(branching, kind, others=lambda: [AVERAGING[name]()], first=first, prints=Averages, max_epochs=4)
    assert_equals_trunk(branching)
    family = branching.family
    assert family.trunk.reason is None
    assert family.configuration["averaging"] == [type(AVERAGING[name]()).__name__]
    # Kept are the weights as they were trained, not the average that ends the run, nor that of validation.
    last = {epoch: Steps.runs[0][5 * epoch - 1][1] for epoch in range(1, 5)}
    assert {epoch: sha(family.state("trunk", epoch)) for epoch in last} == last


def test_a_child_without_averaging_starts_from_the_weights_and_not_from_the_average() -> None:
    def make_trainer(**overrides: Any) -> pl.Trainer:
        overrides["callbacks"] = [c for c in overrides["callbacks"] if not isinstance(c, WeightAveraging)]
        return pl.Trainer(**{"max_epochs": 3, "accelerator": "cpu"} | overrides)

    branching = CheckpointBranching(epochs=[1], steps=[3], noise="same", make_trainer=make_trainer)
    fit(net(), plain(), EMAWeightAveraging(decay=0.8), branching, Steps())
    assert [child.exact_replay for child in branching.family.children] == [True, True]
    trunk, *children = Steps.runs
    for prints in children:
        assert {at: prints[at] for at in prints if at != "end"} == {at: trunk[at] for at in prints if at != "end"}


def live_and_average(**arguments: Any) -> tuple[InterpolationBarrier, dict[int, Any]]:
    """A run that is compared with its average, and both after each epoch."""
    states = {}

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            average = average_of(trainer, pl_module)
            states[trainer.global_step] = copy.deepcopy(pl_module.state_dict()), average

    barrier = InterpolationBarrier(reference="average", num_points=5, num_examples=40, **arguments)
    fit(net(Smooth).double(), double(), EMAWeightAveraging(decay=0.8), barrier, Keep(), precision="64-true")
    return barrier, states


def double() -> Any:
    return loader(runs.points(torch.float64)), None


def test_the_average_is_an_end_of_barriers() -> None:
    barrier, states = live_and_average(splits=["train"])
    assert not barrier.failures
    inputs, labels = runs.points(torch.float64).tensors
    module = net(Smooth).double().eval()
    assert sorted(step for _, step in barrier.barriers if _ == "barrier/train_loss/average") == [5, 10, 15] == [*states]
    for step, (live, average) in states.items():
        for t, found in zip(
            (0.0, 0.25, 0.5, 0.75, 1.0), barrier.barriers["barrier/train_loss/average", step].values, strict=True
        ):
            mixed = {name: (1 - t) * average.state[name] + t * live[name] for name in live}
            mixed = {name.removeprefix("net."): tensor for name, tensor in mixed.items()}
            loss = F.cross_entropy(torch.func.functional_call(module.net, mixed, inputs), labels)
            assert float(found) == pytest.approx(float(loss), rel=1e-12)
    counts = {r.step: r.evidence["num_averaged"] for r in barrier.results}
    assert counts == {5: 5, 10: 10, 15: 15}
    assert {r.evidence["reference_step"] for r in barrier.results} == {5, 10, 15}


def test_statistics_of_the_average_are_recomputed() -> None:
    """SWA leaves those of its copy as they were at the start of the run."""
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    barrier = InterpolationBarrier(reference="average", num_points=3, num_examples=40, epochs=[2, 3])
    fit(net(), plain(), swa, barrier)
    assert not barrier.failures
    assert {r.evidence["batch_stats"] for r in barrier.results} == {"recompute"}
    # At the end of the second epoch it is the average of the starts of both.
    assert [r.evidence["num_averaged"] for r in barrier.results if r.name == "barrier/train_loss/average"] == [2, 3]


def test_no_average_raises_in_setup() -> None:
    with pytest.raises(ValueError, match=r"reference='average' needs a run that averages its weights. Add"):
        fit(net(), plain(), InterpolationBarrier(reference="average"))
