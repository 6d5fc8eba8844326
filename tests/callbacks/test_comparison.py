"""What two states of one module are compared on: splits, named metrics, statistics of BatchNorm."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lmc_lightning.callbacks.bridge import LogRecorder, StepBatch, objective_of
from lmc_lightning.callbacks.comparison import Comparison, needs_statistics
from lmc_lightning.landscape.barrier import DEFINITIONS
from lmc_lightning.landscape.paths import endpoint_of
from tests.callbacks.runs import Classifier, conv_net, loader


class Well(pl.LightningModule):
    """(θ² − 1)² as the training loss; validation logs height, depth, an unlike pair of batches and a maximum."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta], dtype=torch.float64))

    def training_step(self, batch: Tensor) -> Tensor:
        return ((self.theta**2 - 1) ** 2).sum()

    def on_validation_epoch_start(self) -> None:
        self.seen = 0

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen += len(batch)
        height = self.training_step(batch)
        self.log_dict({"height": height, "depth": 1 - height})
        self.log("index", float(batch_idx))
        self.log("largest", height * batch_idx, reduce_fx="max")

    def on_validation_epoch_end(self) -> None:
        self.log("seen", float(self.seen))


VALIDATION = (StepBatch(torch.zeros(3, 1), 0), StepBatch(torch.zeros(1, 1), 1))


def comparison(**metrics: Any) -> Comparison:
    recorder = LogRecorder()
    objectives = {s: objective_of(Well(-1.0), VALIDATION, recorder=recorder) for s in ("train", "val")}
    return Comparison(objectives, num_points=5, metrics=metrics, validation=VALIDATION, recorder=recorder)


def between(found: Comparison, a: float, b: float) -> Any:
    ends = [endpoint_of(found.objectives["train"], {"theta": torch.tensor([t], dtype=torch.float64)}) for t in (a, b)]
    return found.between(*ends)


HEIGHTS = [0.0, (0.25 - 1) ** 2, 1.0, (0.25 - 1) ** 2, 0.0]


def test_a_metric_that_is_better_when_small_rises_and_one_that_is_better_when_large_falls() -> None:
    found = between(comparison(height="min", depth="max"), -1.0, 1.0)
    assert found.keys() == {"train_loss", "val_loss", "height", "depth"}
    for name in ("train_loss", "val_loss", "height", "depth"):
        assert (found[name].barrier, found[name].peak_t) == (1.0, 0.5)
    assert found["height"].values.tolist() == HEIGHTS
    assert found["depth"].values.tolist() == [h - 1 for h in HEIGHTS]
    assert (found["depth"].metric, found["depth"].split, found["depth"].own_ends) == ("−depth", "val", (-1.0, -1.0))
    assert all(torch.isnan(torch.tensor(found["depth"].stderr_data[d])) for d in DEFINITIONS)


def test_values_of_batches_are_averaged_by_their_sizes_or_as_their_log_call_says() -> None:
    found = between(comparison(index="min", largest="min", seen="min"), -1.0, 1.0)
    assert set(found["index"].values.tolist()) == {0.25}
    assert found["largest"].values.tolist() == HEIGHTS
    assert set(found["seen"].values.tolist()) == {4.0}


def test_the_second_pair_does_not_see_the_first() -> None:
    compared = comparison(height="min", seen="min")
    first, _, again = (between(compared, *ends) for ends in ((-1.0, 1.0), (0.5, 2.0), (-1.0, 1.0)))
    assert {n: b.values.tolist() for n, b in first.items()} == {n: b.values.tolist() for n, b in again.items()}


def test_a_metric_that_is_not_logged_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="logs 'height', 'depth', 'index', 'largest', 'seen', not 'f1'"):
        between(comparison(f1="max"), -1.0, 1.0)


def test_a_quantity_carries_every_definition_and_the_data_of_its_split() -> None:
    compared = Comparison(comparison().objectives, num_points=5, evidence={"val": {"probe_digest": "abc"}})
    found = between(compared, -1.0, 1.0)
    quantities = {name: compared.quantity(f"barrier/{name}/x", result) for name, result in found.items()}
    train, val = quantities["train_loss"], quantities["val_loss"]
    assert (val.name, val.value, val.evidence["probe_digest"]) == ("barrier/val_loss/x", 1.0, "abc")
    assert "probe_digest" not in train.evidence
    assert all(val.evidence[name] == getattr(found["val_loss"], name) for name in DEFINITIONS)
    assert (val.evidence["ends"], val.evidence["own_ends"], val.evidence["peak_t"]) == ([0.0, 0.0], [0.0, 0.0], 0.5)


@pytest.mark.parametrize(
    ("batch_norm", "policy", "needed"),
    [(True, None, True), (True, "recompute", True), (True, "interpolate", False), (False, None, False)],
)
def test_statistics_are_needed_where_batch_norm_is_to_be_recomputed(
    batch_norm: bool, policy: Any, needed: bool
) -> None:
    assert needs_statistics(conv_net(batch_norm), policy) is needed


@pytest.mark.parametrize("policy", [None, "interpolate", "endpoint"])
def test_named_metrics_see_the_statistics_that_losses_see(policy: Any) -> None:
    modules = [Classifier(batch_norm=True) for _ in range(2)]
    with torch.no_grad():
        modules[1].net[1].running_mean.fill_(1.0)
        modules[1].net[-1].weight.neg_()
    batches = [StepBatch(batch, index) for index, batch in enumerate(loader())]
    recorder = LogRecorder()
    compared = Comparison(
        {split: objective_of(modules[0], batches, recorder=recorder) for split in ("train", "val")},
        objective_of(modules[0], batches, mode="train", keep_batches=True) if policy is None else None,
        num_points=3,
        batch_stats=policy,
        metrics={"val_loss": "min", "val_acc": "max"},
        validation=batches,
        recorder=recorder,
    )
    objective = compared.objectives["train"]
    states = {**dict(modules[1].named_parameters()), **dict(modules[1].named_buffers())}
    found = compared.between(endpoint_of(objective), endpoint_of(objective, states))
    assert found["val_loss"].values.tolist() == pytest.approx(found["train_loss"].values.tolist(), rel=1e-6)
    assert found["val_loss"].own_ends == pytest.approx(found["train_loss"].own_ends, rel=1e-6)
    assert {b.batch_stats for b in found.values()} == {policy or "recompute"}
    ends = found["val_loss"].values[[0, -1]].tolist()
    assert (list(found["val_loss"].own_ends) != ends) is (policy is None)
