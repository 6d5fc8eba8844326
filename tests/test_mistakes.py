"""The mistakes that users are most likely to make: each is told with what is wrong, where, and the way out."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import IterableDataset

from lmc_lightning import (
    CheckpointBranching,
    InterpolationBarrier,
    LossSurface,
    Sharpness,
    interpolation_barrier,
    measure,
)
from lmc_lightning.experiments.plans.study import Study
from lmc_lightning.experiments.work.executors import run_on_ray
from tests.callbacks.runs import Classifier, batches, cross_entropy, fit, loader


class Endless(IterableDataset[Any]):
    """Data of which nobody knows how much there is."""

    def __iter__(self) -> Iterator[Any]:
        yield from loader().dataset


class ReturnsNothing(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class HoldsALock(Callback):
    def __init__(self) -> None:
        self.lock = threading.Lock()


def sharpness(**options: Any) -> Sharpness:
    return Sharpness(["gradient_norm"], on_error="raise", **options)


def of_two(first: nn.Module, second: nn.Module) -> Any:
    return interpolation_barrier(first, second, batches(), loss_fn=cross_entropy)


def plain() -> nn.Module:
    return nn.Linear(2, 3)


def compiled() -> Any:
    return torch.compile(Classifier(), backend="eager")


def frozen() -> Any:
    return measure(Classifier().requires_grad_(False), batches(), [sharpness()])


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a number of epochs in place of a list": (
        lambda: Sharpness(epochs=3),  # type: ignore[arg-type]
        ValueError,
        r"Expected epochs to list integers, got 3\. Pass epochs=\[3\], or every_n_epochs=\.",
    ),
    "an epoch that is no integer": (
        lambda: Sharpness(epochs=[0, 1.5]),  # type: ignore[list-item]
        ValueError,
        r"Expected epochs to list integers of at least 0, got \[0, 1\.5\]\.",
    ),
    "two schedules": (
        lambda: Sharpness(epochs=[1], every_n_train_steps=5),
        ValueError,
        r"Expected one schedule, got epochs and every_n_train_steps\. Keep one of them\.",
    ),
    "no examples": (
        lambda: Sharpness(num_examples=0),
        ValueError,
        r"Expected num_examples to be at least 1 or None \(the whole split\), got 0\.",
    ),
    "unknown measures": (
        lambda: Sharpness(["worst"]),
        ValueError,
        r"Expected measures to list some of worst_case, adaptive, .*got \['worst'\]\.",
    ),
    "another alignment": (
        lambda: InterpolationBarrier(align="permutation"),  # type: ignore[arg-type]
        ValueError,
        r"Expected align to be 'weights' or 'activations', got 'permutation'\.",
    ),
    "a grid without a centre": (
        lambda: LossSurface(num_points=10),
        ValueError,
        r"Expected an odd num_points of at least 3, so that the centre is one of them, .*got 10 and 1\.0\.",
    ),
    "nothing to compare with": (
        lambda: fit(Classifier(), InterpolationBarrier()),
        ValueError,
        r"InterpolationBarrier has nothing to compare with\. Add CheckpointBranching .*reference='initial'",
    ),
    "metrics without validation": (
        lambda: fit(Classifier(), InterpolationBarrier(reference="initial", metrics={"val_acc": "max"})),
        ValueError,
        r"read from the validation of the run, and it has none\. Give it a validation loader",
    ),
    "test data that a run does not see": (
        lambda: fit(Classifier(), InterpolationBarrier(reference="initial", splits=["train", "test"])),
        ValueError,
        r"sees no test batches.*Give it a datamodule with probe_batches.*or leave 'test' out of splits\.",
    ),
    "two callbacks under one name": (
        lambda: fit(Classifier(), Sharpness(epochs=[0]), Sharpness(["keskar"])),
        ValueError,
        r"Two callbacks log under 'sharpness/…': Sharpness and Sharpness\. Give one of them another name=",
    ),
    "a branch point past the end": (
        lambda: fit(Classifier(), CheckpointBranching(epochs=[0, 5])),
        ValueError,
        r"Expected branch points of at most max_epochs=2 epochs, got \[5\].*Leave them out, or train for longer\.",
    ),
    "branching off a compiled module": (
        lambda: fit(compiled(), CheckpointBranching(epochs=[0])),
        ValueError,
        r"CheckpointBranching cannot copy torch\.compile\(module\).*Give ",
    ),
    "a callback that cannot be copied beside branching": (
        lambda: fit(Classifier(), HoldsALock(), CheckpointBranching(epochs=[0])),
        TypeError,
        r"trains its children on copies, and .*HoldsALock cannot be copied.*Give it a `__deepcopy__`",
    ),
    "all of a loader that has no end": (
        lambda: fit(Classifier(), sharpness(num_examples=None)),
        ValueError,
        r"num_examples=None asks for a whole split, and no source knows it\. Pass probe_dataloader=",
    ),
    "an empty loader": (
        lambda: fit(Classifier(), sharpness(probe_dataloader=[])),
        ValueError,
        r"Expected at least one probe batch, got none\. Give a loader that yields batches\.",
    ),
    "losses of single examples": (
        lambda: fit(
            Classifier(), sharpness(loss_fn=lambda module, batch: module(batch[0]), probe_dataloader=batches())
        ),
        TypeError,
        r"Expected loss_fn to return a scalar loss.*got Tensor of shape \(8, 3\)\. Pass loss_fn=.*scalar mean loss",
    ),
    "a step without a loss": (
        lambda: fit(ReturnsNothing(), sharpness(probe_dataloader=batches())),
        ValueError,
        r"returned no loss for any of 3 batches in mode='eval'\. Return it, or pass loss_fn=",
    ),
    "manual optimization": (
        lambda: fit(Manual(), sharpness()),
        RuntimeError,
        r"Manual optimizes manually.*Pass the loss to measure, e\.g\. loss_fn=lambda module, batch",
    ),
    "parameters that are not there": (
        lambda: fit(Classifier(), sharpness(parameters=["encoder.*"], probe_dataloader=batches())),
        ValueError,
        r"No trainable parameter matches \['encoder\.\*'\]\. The first names are: net\.0\.weight, .*\* stands for any",
    ),
    "nothing but frozen parameters": (
        frozen,
        ValueError,
        r"Classifier has no parameter with requires_grad=True: nothing to measure\. Call requires_grad_\(\)",
    ),
    "a plain module without a loss": (
        lambda: measure(plain(), batches(), [sharpness()]),
        ValueError,
        r"Linear has no training_step, so its loss is unknown\. Pass loss_fn, e\.g\.",
    ),
    "one callback in place of a list": (
        lambda: measure(Classifier(), batches(), sharpness()),  # type: ignore[arg-type]
        ValueError,
        r"Expected a list of callbacks, got Sharpness\. Pass \[callback\]\.",
    ),
    "branching without a run": (
        lambda: measure(Classifier(), batches(), [CheckpointBranching()]),  # type: ignore[list-item]
        ValueError,
        r"Expected measuring callbacks, got CheckpointBranching\. Give it to the Trainer of a run\.",
    ),
    "a barrier of one network": (
        lambda: measure(Classifier(), batches(), [InterpolationBarrier(reference="initial")]),
        ValueError,
        r"compares two states and cannot measure a single module\. Call interpolation_barrier\(module_a, module_b",
    ),
    "networks of different shapes": (
        lambda: of_two(plain(), nn.Linear(2, 4)),
        ValueError,
        r"differ in 'bias', 'weight' \(\[3\] and \[4\]\)\. Only networks of one architecture can be interpolated\.",
    ),
    "a part of a network that is not there": (
        lambda: of_two(plain(), nn.Sequential(plain())),
        ValueError,
        r"module_a and module_b differ in '0\.bias', .*Only networks of one architecture",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_the_way_out(mistake: str) -> None:
    make, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message) as caught:
        make()
    text = str(caught.value)
    assert len(text) < 450
    assert re.search(r"[.…]$", text), "a sentence"
    assert re.search(r"Expected|Pass|Give|Keep|Leave|Add|Use|Call|Only|Return|The first", text), "the way out"


def test_an_optional_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs ray: pip install 'lmc-lightning\[ray\]'"):
        run_on_ray(cast(Study, None), [], tmp_path, lambda outcome: None)


def test_what_fails_in_a_visit_is_a_warning_and_a_record_and_the_training_goes_on() -> None:
    callback = Sharpness(["gradient_norm"], parameters=["encoder.*"], probe_dataloader=batches())
    with pytest.warns(UserWarning, match=r"sharpness: at step 0 failed and training goes on: ValueError: No trainable"):
        assert fit(Classifier(), callback).global_step == 6
    assert [r.step for r in callback.failures] == [0, 3, 6]


# -- what looks like a mistake and works -------------------------------------------------------------------------------


def test_a_callback_may_serve_one_run_after_the_other() -> None:
    callback = sharpness(probe_dataloader=batches())
    fit(Classifier(), callback)
    first = callback.results
    fit(Classifier(), callback, max_epochs=1)
    assert [r.step for r in callback.results] == [0, 3]
    assert [r.value for r in callback.results] == [r.value for r in first[:2]]


def test_fast_dev_run_makes_one_visit_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callback = sharpness()
    fit(Classifier(), callback, fast_dev_run=True)
    assert [r.step for r in callback.results] == [1]
    assert not list(tmp_path.iterdir())


def test_data_without_a_length_are_read_as_they_come() -> None:
    stream: Any = torch.utils.data.DataLoader(Endless(), batch_size=8)
    found = measure(Classifier(), stream, [sharpness(num_examples=10)])
    expected = measure(Classifier(), batches(), [sharpness(num_examples=10)])
    assert found == expected


def test_no_validation_loader_leaves_the_training_split() -> None:
    callback = InterpolationBarrier(reference="initial", num_points=3, on_error="raise")
    fit(Classifier(), callback, max_epochs=1)
    assert {r.name for r in callback.results} == {"barrier/train_loss/initial", "barrier/train_error/initial"}
