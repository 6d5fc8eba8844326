from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader, TensorDataset

import lmc_lightning
from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.recording import Measurement
from tests.zoo.batches import GraphNetwork
from tests.zoo.harness import Setting, train
from tests.zoo.module import BATCH_SIZE, ZooModule, examples
from tests.zoo.optimization import Gan
from tests.zoo.outputs import IgnoresTargets, Plain
from tests.zoo.parameters import TiesItsWeights
from tests.zoo.probe import Probe


def visited(probe: Probe) -> list[int]:
    return sorted({r.step for r in probe.results})


def own_loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*examples(16)), batch_size=BATCH_SIZE)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": [1], "every_n_epochs": 2}, "Expected one schedule, got every_n_epochs and steps"),
        ({"every_n_train_steps": 0}, "Expected every_n_train_steps to be an integer of at least 1, got 0"),
        ({"epochs": [-1]}, r"Expected epochs to list integers of at least 0, got \[-1\]"),
        ({"num_examples": 0}, r"Expected num_examples to be at least 1 or None \(the whole split\), got 0"),
        ({"on_error": "ignore"}, "Expected on_error to be 'record' or 'raise', got 'ignore'"),
        ({"mode": "test"}, "Expected mode to be 'eval' or 'train', got 'test'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_arguments_are_refused_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Probe(**arguments)


def test_impossible_parameter_patterns_are_a_recorded_failure_that_names_the_parameters() -> None:
    probe = Probe(parameters=["head.*"], steps=[0])
    with pytest.warns(UserWarning, match=r"No trainable parameter matches \['head\.\*'\]. The first names are: net\.0"):
        train(Setting(Plain), [probe])


# -- when --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, [0, 3, 6]),
        ({"every_n_epochs": 2}, [0, 6]),
        ({"every_n_train_steps": 4}, [0, 4]),
        ({"steps": [1, 5, 100]}, [1, 5]),
        ({"epochs": [1, 9]}, [3]),
    ],
    ids=str,
)
def test_visits_are_where_the_schedule_says(arguments: dict[str, Any], steps: list[int]) -> None:
    probe = Probe(on_error="raise", **arguments)
    train(Setting(Plain), [probe])
    assert visited(probe) == steps


def test_a_step_is_a_step_of_the_optimizer() -> None:
    probe = Probe(every_n_train_steps=1, on_error="raise")
    run = train(Setting(Plain), [probe], accumulate_grad_batches=2)
    assert visited(probe) == [0, 1, 2, 3, 4]
    assert run.trainer.global_step == 4


def test_batches_count_once_however_many_optimizers_step_in_them() -> None:
    probe = Probe(every_n_train_steps=2, on_error="raise", **Gan.expected.options)
    run = train(Setting(Gan), [probe])
    assert run.trainer.global_step == 12
    assert visited(probe) == [0, 2, 4, 6]
    assert [step for step, _ in run.logger.rows_of(probe)] == [0, 2, 4, 6]


class Watches(Probe):
    """Keeps the parameters of each visit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.thetas: dict[int, torch.Tensor] = {}

    def measure(self, visit: Visit) -> Measurement:
        self.thetas[visit.step] = visit.theta
        return super().measure(visit)


def test_a_visit_sees_the_parameters_after_so_many_steps() -> None:
    watches = Watches(every_n_train_steps=1, on_error="raise")
    train(Setting(Plain), [watches])
    for step in range(1, 7):
        run = train(Setting(Plain), max_steps=step)
        expected = torch.cat([p.detach().reshape(-1) for p in run.module.parameters()])
        assert torch.equal(watches.thetas[step], expected)


# -- visits that wait --------------------------------------------------------------------------------------------------


def test_a_visit_that_waited_is_the_same_as_one_that_did_not() -> None:
    waited = Probe(every_n_train_steps=1, num_examples=2 * BATCH_SIZE, on_error="raise")
    run = train(Setting(Plain), [waited])
    batches = [b.batch for b in waited._probes.get("train").batches]
    at_once = Probe(every_n_train_steps=1, num_examples=None, probe_dataloader=batches, on_error="raise")
    assert train(Setting(Plain), [at_once]).differs_from(run) == []
    assert [(r.step, r.name, r.value) for r in at_once.results] == [(r.step, r.name, r.value) for r in waited.results]


def test_a_callback_gives_what_measure_gives_on_the_same_loader() -> None:
    probe = Probe(epochs=[2], probe_dataloader=own_loader(), on_error="raise")
    run = train(Setting(Plain), [probe])
    assert lmc_lightning.measure(run.module, own_loader(), [Probe()]) == {r.name: r.value for r in probe.results}


class ManySteps(ZooModule):
    """Twelve steps an epoch."""

    def train_dataloader(self) -> Any:
        return DataLoader(self.dataset(), batch_size=2, shuffle=True)


def test_at_most_four_visits_wait() -> None:
    probe = Probe(every_n_train_steps=2, num_examples=1000)
    with pytest.warns(UserWarning, match=r"at most 4 wait.*Pass a smaller num_examples, or probe_dataloader="):
        train(Setting(ManySteps), [probe], max_epochs=1)
    assert [r.step for r in probe.failures] == [8, 10, 12]
    assert visited(probe) == [0, 2, 4, 6, 8, 10, 12]


def test_an_epoch_that_is_cut_short_ends_the_wait() -> None:
    probe = Probe(every_n_train_steps=1, num_examples=1000, on_error="raise")
    train(Setting(Plain), [probe], max_steps=2)
    assert visited(probe) == [0, 1, 2]


# -- what a record says ------------------------------------------------------------------------------------------------


def test_all_visits_are_on_one_probe_set_and_say_on_which() -> None:
    probe = Probe(every_n_train_steps=1, num_examples=10, on_error="raise")
    train(Setting(Plain), [probe])
    evidence = [r.evidence for r in probe.results]
    assert len({e["probe_digest"] for e in evidence}) == 1
    assert {(e["num_examples"], e["probe_source"], e["mode"], e["fit_split"]) for e in evidence} == {
        (10, "captured", "eval", "train")
    }
    assert all(e["seconds"] > 0 for e in evidence)
    assert probe.seconds >= max(e["seconds"] for e in evidence)


def test_the_probe_loss_is_the_mean_of_the_modules_loss_over_the_set() -> None:
    probe = Probe(epochs=[2], probe_dataloader=own_loader(), on_error="raise")
    run = train(Setting(Plain), [probe])
    with torch.no_grad():
        expected = F.cross_entropy(run.module(examples(16)[0]), examples(16)[1])
    assert probe.results[0].evidence["probe_loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("cls", "options", "weighting"),
    [
        (Plain, {}, "examples"),
        (IgnoresTargets, {"probe_dataloader": [(torch.ones(2, 6), torch.zeros(2, dtype=torch.long))]}, "examples"),
        (IgnoresTargets, {}, "targets"),
        (GraphNetwork, {"batch_weight": lambda batch: batch.num_graphs}, "batch_weight"),
    ],
    ids=["plain", "no target ignored", "some ignored", "own weight"],
)
def test_the_record_says_what_a_mean_is_over(cls: type[ZooModule], options: dict[str, Any], weighting: str) -> None:
    probe = Probe(num_examples=20, on_error="raise", epochs=[0], **options)
    train(Setting(cls), [probe])
    assert {r.evidence["weighting"] for r in probe.results} == {weighting}


def test_parameters_choose_what_is_measured() -> None:
    whole, part = Watches(on_error="raise", steps=[2]), Watches(on_error="raise", steps=[2], parameters=["net.2.*"])
    part.name = "part"
    train(Setting(TiesItsWeights), [whole, part])
    assert torch.equal(part.thetas[2], whole.thetas[2][-len(part.thetas[2]) :])
    assert (len(whole.thetas[2]), len(part.thetas[2])) == (36 + 6 + 6, 6)


# -- others read the numbers -------------------------------------------------------------------------------------------


def test_exposed_numbers_are_metrics_that_early_stopping_can_watch() -> None:
    stop = EarlyStopping("probe/loss", patience=0, mode="max")
    setting = Setting(Plain, others=lambda: [stop])
    run = train(setting, [Probe(expose=True, on_error="raise")], max_epochs=5)
    assert stop.stopped_epoch == 1
    assert set(run.trainer.callback_metrics) >= {"probe/loss", "probe/gradient_norm", "probe/form"}


def test_numbers_are_no_metrics_unless_asked_for() -> None:
    run = train(Setting(Plain), [Probe(on_error="raise")])
    assert not [name for name in run.trainer.callback_metrics if name.startswith("probe")]


# -- failures and states -----------------------------------------------------------------------------------------------


class Unlucky(Probe):
    """Every measurement fails."""

    def measure(self, visit: Visit) -> Measurement:
        raise ZeroDivisionError("no luck")


def test_a_failure_is_raised_where_that_is_asked_for() -> None:
    with pytest.raises(ZeroDivisionError, match="no luck"):
        train(Setting(Plain), [Unlucky(on_error="raise")])


def test_a_reason_is_warned_of_once() -> None:
    probe = Unlucky(every_n_train_steps=1)
    with pytest.warns(UserWarning, match="no luck") as warned:
        train(Setting(Plain), [probe])
    assert sum("no luck" in str(w.message) for w in warned.list) == 1
    assert [r.step for r in probe.failures] == list(range(7))
    assert probe.to_pandas(wide=True).empty


def test_a_state_of_another_version_starts_empty() -> None:
    probe = Probe()
    with pytest.warns(UserWarning, match="Probe cannot read the state of version 99"):
        probe.load_state_dict({"version": 99})
    assert probe.results == []


def test_configurations_have_states_of_their_own() -> None:
    keys = {Probe(**options).state_key for options in ({}, {"name": "b"}, {"steps": [1]}, {"every_n_epochs": 2})}
    assert len(keys) == 4
    assert Probe(every_n_epochs=1).state_key == Probe().state_key
