"""What two states of one module are compared on: splits, named metrics, statistics of BatchNorm."""

import math
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lmc_lightning.callbacks.bridge.logged import LogRecorder
from lmc_lightning.callbacks.bridge.objectives import objective_of
from lmc_lightning.callbacks.bridge.step import StepBatch
from lmc_lightning.callbacks.pairs.comparison import (
    EXTRAS,
    Comparison,
    Finding,
    Pairing,
    metrics_of,
    needs_statistics,
)
from lmc_lightning.landscape.paths.barrier import DEFINITIONS, Barrier
from lmc_lightning.landscape.paths.line import endpoint_of
from lmc_lightning.landscape.paths.states import StateEvaluator
from tests.callbacks.runs import Classifier, conv_net, loader
from tests.problems import normal


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
    further = {"val": metrics_of(metrics, objectives["val"], VALIDATION, recorder)} if metrics else None
    return Comparison(StateEvaluator(objectives, further=further), num_points=5, metrics=metrics)


def pairing_of(found: Comparison, a: float, b: float) -> Pairing:
    ends = [endpoint_of(found.states.objective, {"theta": torch.tensor([t], dtype=torch.float64)}) for t in (a, b)]
    return found.between(*ends)


def between(found: Comparison, a: float, b: float) -> dict[str, Barrier]:
    return dict(pairing_of(found, a, b).barriers)


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


def test_a_finding_carries_every_definition_and_the_data_of_its_split() -> None:
    pairing = pairing_of(replace(comparison(), evidence={"val": {"probe_digest": "abc"}}), -1.0, 1.0)
    train, val = (f.recorded("x") for f in pairing.findings)
    assert (val.name, val.value, val.evidence["probe_digest"]) == ("barrier/val_loss/x", 1.0, "abc")
    assert "probe_digest" not in train.evidence
    assert all(val.evidence[name] == getattr(pairing.barriers["val_loss"], name) for name in DEFINITIONS)
    assert val.evidence["stderrs"].keys() == set(DEFINITIONS)
    assert (val.evidence["ends"], val.evidence["own_ends"], val.evidence["peak_t"]) == ([0.0, 0.0], [0.0, 0.0], 0.5)


def by_key(pairing: Pairing) -> dict[str, Finding]:
    return {"/".join(p for p in (f.family, f.quantity, f.qualifier) if p): f for f in pairing.findings}


def test_further_definitions_are_findings_of_their_own() -> None:
    compared = replace(comparison(), definitions=("barrier", "dip", "instability"))
    found = by_key(pairing_of(compared, -1.0, 1.0))
    assert len(found) == 6
    assert found["barrier/val_loss/instability"].value == 1.0
    assert found["barrier/val_loss/dip"].value == 0.0
    assert found["barrier/val_loss/dip"].evidence["definition"] == "dip"


def classifiers(**options: Any) -> tuple[Comparison, list[Any]]:
    """A comparison of two classifiers with BatchNorm, and them."""
    modules = [Classifier(batch_norm=True) for _ in range(2)]
    with torch.no_grad():
        for index, parameter in enumerate(modules[1].parameters()):
            parameter.add_(normal(*parameter.shape, seed=index))
    batches = [StepBatch(batch, index) for index, batch in enumerate(loader())]
    objective = objective_of(modules[0], batches)
    statistics = objective_of(modules[0], batches, mode="train", keep_batches=True)
    states = StateEvaluator({"train": objective}, stats_objective=statistics)
    return Comparison(states, 3, **options), [endpoint_of(objective, m.state_dict()) for m in modules]


def test_nothing_is_found_that_is_not_asked_for() -> None:
    compared, ends = classifiers()
    pairing = compared.between(*ends)
    assert by_key(pairing).keys() == {"barrier/train_loss", "barrier/train_error"}
    assert not pairing.attributions


def test_all_extras_at_once_agree_with_the_barrier() -> None:
    compared, ends = classifiers(extras=EXTRAS)
    pairing = replace(compared, start=ends[0]).between(*ends)
    found = by_key(pairing)
    loss, errors = found["barrier/train_loss"], pairing.barriers["train_error"].values
    assert {key.split("/")[0] for key in found} == {"barrier", "distance", "soup_gain", "barrier_layer"}
    assert float(pairing.attributions["train_loss"].shares.sum()) == pytest.approx(loss.value, rel=1e-9)
    assert sum(loss.evidence["class_shares"].values()) == pytest.approx(loss.value, rel=1e-9)
    modules = compared.states.objective.layout.names[-1].rpartition(".")[0]
    assert found[f"barrier_layer/train_loss/{modules}/cumulative"].value == loss.value
    assert found["barrier_layer/train_loss/net.0"].evidence["rest"] == "at_a"
    assert found["barrier_layer/train_loss/net.0/at_b"].evidence["order"] == ("net.0", "net.1", "net.5", "net.7")
    assert found["distance/l2"].value == pytest.approx(float((ends[0].theta - ends[1].theta).norm()), rel=1e-6)
    assert math.isnan(found["distance/relative"].value)  # the first network is the start itself
    assert 0 < found["distance/train_disagreement"].value < 1
    assert found["soup_gain/train_error"].value == pytest.approx(float(errors[[0, 2]].amin() - errors[1]), abs=1e-9)
    assert found["soup_gain/train_error"].evidence["batch_stats"] == "recompute"


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
    objectives = {split: objective_of(modules[0], batches, recorder=recorder) for split in ("train", "val")}
    objective, names = objectives["train"], {"val_loss": "min", "val_acc": "max"}
    statistics = objective_of(modules[0], batches, mode="train", keep_batches=True) if policy is None else None
    evaluator = StateEvaluator(
        objectives,
        batch_stats=policy,
        stats_objective=statistics,
        further={"val": metrics_of(names, objectives["val"], batches, recorder)},
    )
    # Two metrics of one name: that of the pass and that which validation logs.
    assert evaluator.own(endpoint_of(objective))["val"].further.keys() == {"val_loss", "−val_acc"}
    compared = Comparison(evaluator, 3, metrics=names)
    states = {**dict(modules[1].named_parameters()), **dict(modules[1].named_buffers())}
    found = compared.between(endpoint_of(objective), endpoint_of(objective, states)).barriers
    assert found["val_loss"].values.tolist() == pytest.approx(found["train_loss"].values.tolist(), rel=1e-6)
    assert found["val_loss"].own_ends == pytest.approx(found["train_loss"].own_ends, rel=1e-6)
    assert {b.batch_stats for b in found.values()} == {policy or "recompute"}
    ends = found["val_loss"].values[[0, -1]].tolist()
    assert (list(found["val_loss"].own_ends) != ends) is (policy is None)
