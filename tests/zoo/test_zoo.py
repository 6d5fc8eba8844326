"""Every module of the zoo trains bit-identically beside a measuring callback, and is measured truly or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, TensorDataset

from tests.zoo import ZOO
from tests.zoo.harness import Run, Setting, train
from tests.zoo.module import BATCH_SIZE, Expected, ZooModule, examples
from tests.zoo.probe import Probe, Truth

pytestmark = pytest.mark.filterwarnings("ignore:More than half of the captured:UserWarning")  # of 16 examples


def inhabitants(chosen: Callable[[Expected], Any] = lambda expected: True) -> list[Any]:
    return [pytest.param(c, id=c.__name__, marks=marks_of(c.expected)) for c in ZOO if chosen(c.expected)]


def marks_of(expected: Expected) -> list[pytest.MarkDecorator]:
    return [pytest.mark.filterwarnings(f) for f in expected.ignore] + [pytest.mark.slow] * expected.slow


def setting_of(cls: type[ZooModule]) -> Setting:
    expected = cls.expected
    return Setting(cls, trainer=expected.trainer, others=expected.others, compiled=expected.compiled)


def options_of(cls: type[ZooModule]) -> dict[str, Any]:
    options = dict(cls.expected.options)
    if options.get("probe_dataloader") == "own":
        options["probe_dataloader"] = DataLoader(TensorDataset(*examples(16)), batch_size=BATCH_SIZE)
    return {"num_examples": 16, "on_error": "raise", **options}


def is_measured(expected: Expected) -> bool:
    return not expected.failure or bool(expected.options)


def visited_steps(run: Run) -> list[int]:
    """The points of ``every_n_train_steps=2``: 0, 2, … of the batches after which an optimizer had stepped."""
    changes = sum(b != a for a, b in zip([0, *run.witness.steps], run.witness.steps, strict=False))
    return list(range(0, 1 + changes, 2))


def test_the_documentation_has_a_line_for_each() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    summaries = [(cls.__doc__ or "").strip().splitlines()[0] for cls in ZOO]
    assert [s for s in summaries if f"| {s} |" not in lines] == []
    assert len(set(summaries)) == len(ZOO)


@pytest.mark.parametrize("cls", inhabitants(is_measured))
def test_training_is_bit_identical(cls: type[ZooModule]) -> None:
    setting = setting_of(cls)
    alone = train(setting)
    for last in (False, True):
        options = options_of(cls)
        by_steps = Probe(every_n_train_steps=2, **options)
        by_epochs = Probe(every_n_epochs=1, name="train", **{**options, "mode": "train"})
        beside = train(setting, [by_steps, by_epochs], last=last)
        assert beside.differs_from(alone) == []
        assert [r.step for r in by_steps.results if r.name == "probe/loss"] == visited_steps(beside)
        assert {r.epoch for r in by_epochs.results} == set(range(beside.witness.epochs + 1))
        assert not by_steps.failures + by_epochs.failures


@pytest.mark.parametrize("cls", inhabitants(lambda e: e.failure))
def test_a_visit_that_fails_is_recorded_with_its_reason(cls: type[ZooModule]) -> None:
    setting = setting_of(cls)
    alone = train(setting)
    for last in (False, True):
        probe = Probe(every_n_train_steps=1, num_examples=16)
        with pytest.warns(UserWarning, match=cls.expected.failure):
            beside = train(setting, [probe], last=last)
        assert beside.differs_from(alone) == []
        assert len(probe.failures) == cls.expected.failures


@pytest.mark.parametrize("cls", inhabitants(lambda e: e.refusal))
def test_what_cannot_be_measured_is_refused_before_the_first_step(cls: type[ZooModule]) -> None:
    with pytest.raises(RuntimeError, match=cls.expected.refusal):
        train(setting_of(cls), [Probe()])


@pytest.mark.parametrize("cls", inhabitants(lambda e: not (e.failure or e.refusal or e.unlike_run)))
def test_the_loss_of_a_visit_is_what_the_step_returned(cls: type[ZooModule]) -> None:
    start = Probe(steps=[0], num_examples=BATCH_SIZE, mode="train", on_error="raise")
    run = train(setting_of(cls), [start], max_steps=1)
    (loss,) = (r.value for r in start.results if r.name == "probe/loss")
    assert loss == pytest.approx(run.witness.losses[0], rel=1e-2 if cls.expected.inexact else 1e-6)


@pytest.mark.parametrize("cls", inhabitants(lambda e: is_measured(e) or e.verdict == "finite_differences"))
def test_products_are_derivatives_of_gradients_and_these_of_losses(cls: type[ZooModule]) -> None:
    truth = Truth(steps=[2], **options_of(cls))
    train(setting_of(cls), [truth])
    found = {r.name.removeprefix("truth/"): r.value for r in truth.results}
    assert {r.evidence["verdict"] for r in truth.results} == {cls.expected.verdict}
    assert found["noise"] == 0
    if cls.expected.verdict == "no_hessian":
        assert found["gradient_error"] > 1e-3
        return
    assert cls.expected.inexact or found["gradient_error"] < 1e-6
    assert found["product_error"] < 1e-6
    assert found["asymmetry"] < 1e-9
