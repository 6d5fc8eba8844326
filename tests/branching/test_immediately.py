"""Children trained in the middle of the trunk's training, which does not notice."""

from typing import Any

import pytest

from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from tests.branching import runs
from tests.branching.runs import RUNS, Steps, fit, fit_beside, loader, net, plain, stop_early


@pytest.mark.parametrize(
    "name",
    [
        "user generator",
        "own generators",
        "iterable without length",
        "random split, reloaded",
        "module that draws",
        "validation in between",
        "manual optimization",
    ],
)
def test_the_trunk_does_not_notice_and_the_children_are_exact(name: str) -> None:
    kind, data, arguments, others = RUNS[name]
    branching = CheckpointBranching(epochs=[1], steps=[2, 8], noise="same", when="immediately")
    fit_beside(branching, kind, data, others, **arguments)
    trunk, *children = Steps.runs
    assert len(children) == 3
    assert all(prints == {moment: trunk[moment] for moment in prints} for prints in children)
    assert [(child.status, child.exact_replay) for child in branching.family.children] == [("completed", True)] * 3


def test_two_workers() -> None:
    data = loader(runs.Augmented(), num_workers=2, batch_size=14)
    branching = CheckpointBranching(epochs=[1], steps=[1], noise="same", when="immediately")
    fit(net(), (data, None), branching, Steps(), max_epochs=2)
    trunk, *children = Steps.runs
    assert all(prints == {moment: trunk[moment] for moment in prints} for prints in children)
    assert [child.exact_replay for child in branching.family.children] == [True, True]


def test_a_child_that_went_on_longer_ends_where_the_trunk_stopped_early() -> None:
    branching = CheckpointBranching(epochs=[0], steps=[3], noise="same", when="immediately")
    fit(net(), plain(), stop_early(1), branching, Steps(), max_epochs=5)
    assert len(Steps.runs) == 3  # none is trained again
    for child in branching.family.children:
        assert (child.status, child.end_step, max(child.epochs), child.exact_replay) == ("completed", 10, 2, True)


def test_persistent_workers_raise() -> None:
    data = loader(num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="whose persistent workers they would take over"):
        fit(net(), (data, None), CheckpointBranching(epochs=[0], when="immediately"), max_epochs=1)


def test_a_loader_that_cannot_be_copied_raises() -> None:
    data: Any = runs.points()
    endless = (([x], [y]) for x, y in [data[0]])
    with pytest.raises(TypeError, match="the loader generator cannot be copied"):
        fit(net(), (endless, None), CheckpointBranching(epochs=[0], when="immediately"), max_epochs=1)


def test_impossible_moments_raise() -> None:
    with pytest.raises(ValueError, match="when to be 'end', 'immediately' or 'never', got 'now'"):
        CheckpointBranching(when="now")  # type: ignore[arg-type]
