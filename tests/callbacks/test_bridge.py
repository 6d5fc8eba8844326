import copy
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lmc_lightning.callbacks.bridge.logged import LogRecorder, logged_metrics
from lmc_lightning.callbacks.bridge.objectives import objective_of, replacements
from lmc_lightning.callbacks.bridge.step import StepBatch, loss_of, step_function
from lmc_lightning.callbacks.bridge.views import ReadOnly, optimizer_view, trainer_view
from tests.zoo.harness import QUIET, Setting, train
from tests.zoo.module import BATCH_SIZE, NUM_CLASSES, ZooModule, examples
from tests.zoo.optimization import Gan
from tests.zoo.outputs import Plain, TakesNoIndex

LOSS = torch.tensor(2.0)


# -- what a step returned ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output",
    [LOSS, {"loss": LOSS, "logits": None}, OrderedDict(loss=LOSS), SimpleNamespace(loss=LOSS), LOSS.reshape(1)],
    ids=["tensor", "dict", "mapping", "object", "one element"],
)
def test_the_loss_is_found_in_what_a_step_returned(output: Any) -> None:
    assert loss_of(output).item() == 2


@pytest.mark.parametrize(
    "output", ["2.0", 2.0, {"error": LOSS}, {"loss": 2.0}, (LOSS,), torch.ones(2)], ids=lambda o: type(o).__name__
)
def test_an_output_without_a_scalar_loss_is_refused_with_the_way_out(output: Any) -> None:
    with pytest.raises(TypeError, match=f"a scalar loss, a dict with 'loss' .* got {type(output).__name__}.*loss_fn="):
        loss_of(output)


def test_no_output_is_no_loss() -> None:
    assert loss_of(None) is None


def test_the_step_gets_the_index_of_its_batch_only_where_it_takes_one() -> None:
    batch = StepBatch(examples(4), 3)
    module, without = Plain(), TakesNoIndex()
    for m in (module, without):
        m.log = lambda *args, **kwargs: None
        expected = F.cross_entropy(m(batch.batch[0]), batch.batch[1])
        assert torch.equal(step_function(m, None)(m, batch), expected)
    assert step_function(module, lambda m, b: b[1].sum())(module, batch) == batch.batch[1].sum()


# -- the trainer as a step sees it -------------------------------------------------------------------------------------


class Ranged:
    """Something with state, as a trainer has."""

    epoch = 3

    def fit(self) -> None:
        raise AssertionError

    def describe(self) -> str:
        return f"epoch {self.epoch}"


def test_a_view_reads_through_and_keeps_to_itself_what_is_set_on_it() -> None:
    target = Ranged()
    view = ReadOnly(target, name="seen")
    assert (view.epoch, view.name, view.describe()) == (3, "seen", "epoch 3")
    view.epoch = 5
    assert (view.epoch, target.epoch) == (5, 3)
    with pytest.raises(AttributeError, match="missing"):
        view.missing  # noqa: B018


def test_a_copy_of_a_view_starts_from_the_same_attributes_and_goes_its_own_way() -> None:
    view = ReadOnly(Ranged(), count=1)
    first, second = copy.deepcopy(view), copy.deepcopy(view)
    first.count += 1
    assert (view.count, first.count, second.count) == (1, 2, 1)


@pytest.mark.parametrize("name", ["fit", "save_checkpoint", "step"])
def test_a_view_starts_nothing(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"called {name}\(\) while it was being measured; pass loss_fn="):
        getattr(ReadOnly(Ranged()), name)


def test_what_a_step_sets_in_the_groups_of_an_optimizer_is_lost() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    view = optimizer_view(optimizer)
    view.param_groups[0]["lr"] = 1.0
    assert (view.param_groups[0]["lr"], optimizer.param_groups[0]["lr"]) == (1.0, 0.1)
    with pytest.raises(RuntimeError, match="step"):
        view.step()


class Looks(Callback):
    """Keeps a view of the trainer after one step."""

    view: Any = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *outputs: Any) -> None:
        self.view = self.view or trainer_view(trainer)


def test_a_view_of_the_trainer_stays_at_its_position_and_logs_nowhere() -> None:
    looks = Looks()
    run = train(Setting(Plain), [looks])
    rows = list(run.logger.rows)
    looks.view.logger.log_metrics({"x": 1.0}, step=0)
    looks.view.loggers[0].experiment.add_scalar("x", 1.0)
    assert run.logger.rows == rows
    assert (looks.view.global_step, looks.view.current_epoch) == (1, 0)
    assert (run.trainer.global_step, run.trainer.current_epoch) == (6, 2)
    assert looks.view.max_epochs == 2


def test_a_view_of_a_trainer_without_loggers_has_none() -> None:
    assert trainer_view(Trainer(logger=False, **QUIET)).logger is None


# -- what a shadow gets ------------------------------------------------------------------------------------------------


def test_a_plain_module_needs_no_replacements() -> None:
    assert replacements(nn.Linear(1, 1), None) == {}


def test_a_step_that_optimizes_by_itself_is_stopped_with_the_way_out() -> None:
    module = Gan()
    module.optimizers = lambda: [nn.Module(), nn.Module()]
    for optimizer in module.optimizers():
        optimizer.zero_grad = lambda: None
    with pytest.raises(RuntimeError, match=r"steps its optimizers itself\. Pass loss_fn="):
        objective_of(module, [StepBatch(examples(4))]).evaluate(torch.zeros(0))


def test_an_objective_is_the_mean_of_the_modules_own_loss_and_weighs_batches_as_asked() -> None:
    module = Plain()
    batches = [StepBatch(examples(8), 0), StepBatch(tuple(t[:4] for t in examples()), 1)]
    losses = [F.cross_entropy(module(b.batch[0]), b.batch[1]).item() for b in batches]
    by_examples = objective_of(module, batches)
    assert float(by_examples.loss(by_examples.theta())) == pytest.approx((2 * losses[0] + losses[1]) / 3, rel=1e-6)
    by_batches = objective_of(module, batches, batch_weight=lambda batch: 1.0, keep_batches=True)
    assert float(by_batches.loss(by_batches.theta())) == pytest.approx(sum(losses) / 2, rel=1e-6)


# -- what a validation logs --------------------------------------------------------------------------------------------


def test_logged_values_are_reduced_as_lightning_does() -> None:
    recorder = LogRecorder()
    for value, size in ((1.0, 3), (2.0, 1)):
        recorder.batch_size = size
        recorder.log("mean", torch.tensor(value))
        recorder.log("sized", value, batch_size=1)
        recorder.log("sum", value, reduce_fx="sum")
        recorder.log_dict({"max": torch.tensor(value), "min": -value}, reduce_fx="max")
        recorder.log("own", value, reduce_fx=lambda values: values.prod())
    expected = {"mean": 1.25, "sized": 1.5, "sum": 3.0, "max": 2.0, "min": -1.0, "own": 2.0}
    assert recorder.reduced() == expected


class Validates(ZooModule):
    """Values, metric objects, a ragged last batch, a batch that is consumed, and hooks around it all."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.mean = MulticlassAccuracy(NUM_CLASSES, average="micro"), MeanMetric()
        self.outputs: list[Tensor] = []

    def on_validation_epoch_start(self) -> None:
        self.outputs.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        y = batch.pop()
        logits = self(batch[0])
        loss = F.cross_entropy(logits, y)
        self.outputs.append(logits)
        self.accuracy(logits, y)
        self.mean(loss)
        self.log("val_loss", loss)
        self.log("val_acc", self.accuracy)
        self.log("val_largest", loss, reduce_fx="max")
        self.log_dict({"val_mean": self.mean, "val_index": float(batch_idx)})

    def on_validation_epoch_end(self) -> None:
        self.log("val_spread", torch.cat(self.outputs).std())

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*examples(3 * BATCH_SIZE - 5)), batch_size=BATCH_SIZE)


def test_a_pass_logs_what_lightnings_own_validation_logs() -> None:
    module, recorder = Validates(), LogRecorder()
    (expected,) = Trainer(logger=False, **QUIET).validate(module, verbose=False)
    module.accuracy.update(torch.ones(1, NUM_CLASSES), torch.ones(1, dtype=torch.long))  # of an earlier epoch
    batches = [StepBatch(batch, index) for index, batch in enumerate(module.val_dataloader())]
    objective = objective_of(module, [StepBatch(examples(4))], recorder=recorder)
    for _ in range(2):
        found = logged_metrics(objective, objective.theta(), batches, recorder)
        assert found == pytest.approx(expected, rel=1e-6)
    assert module.accuracy._update_count == 1
    assert len(module.outputs) == 3
