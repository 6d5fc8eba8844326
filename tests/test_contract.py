"""What every callback of this package promises to any run: the same training, and results that survive."""

import copy
import inspect
import io
import json
import pickle
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import lmc_lightning
from lmc_lightning.callbacks.base import MeasurementCallback
from lmc_lightning.landscape.paths.curves import CurveTraining
from lmc_lightning.landscape.volume.llc import Langevin
from lmc_lightning.recording import Measurement
from tests.zoo import ZOO
from tests.zoo.batches import GraphNetwork
from tests.zoo.configurations import CONFIGURATIONS, Augmented, Configuration, shuffled
from tests.zoo.controls import NAIVE, CopiesAndForksTheGenerator
from tests.zoo.fingerprint import sha256
from tests.zoo.harness import Run, Setting, train
from tests.zoo.layers import BatchNormAndDropout
from tests.zoo.module import ZooModule, mlp
from tests.zoo.outputs import Plain
from tests.zoo.probe import Probe
from tests.zoo.state import OwnsGenerators, OwnsMetrics
from tests.zoo.test_zoo import marks_of, options_of, setting_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:More than half of the captured:UserWarning",  # of 16 examples
    "ignore:.*did not converge:UserWarning",  # within the few products that these tests spend
)

EXPORTED = [getattr(lmc_lightning, name) for name in lmc_lightning.__all__]
CALLBACKS = [c for c in EXPORTED if isinstance(c, type) and issubclass(c, Callback) and not inspect.isabstract(c)]
MEASURING = [c for c in CALLBACKS if issubclass(c, MeasurementCallback)]

CHEAP: dict[str, dict[str, Any]] = {
    "HessianSpectrum": {"num_eigenvalues": 1, "num_probes": 2, "num_steps": 2, "max_products": 4, "density": False},
    "EdgeOfStability": {"max_products": 4},
    "Sharpness": {"num_samples": 2},
    "LossSurface": {"num_points": 3},
    "InterpolationBarrier": {"num_points": 3, "reference": "initial", "align": "weights"},
    "ModeConnectivity": {"num_points": 3, "reference": "initial", "training": CurveTraining(num_epochs=1)},
    "MinimaVolume": {"num_directions": 4, "threshold": "rise", "rtol": 0.1},
    "LocalLearningCoefficient": {"sampling": Langevin(num_chains=2, num_burn_in=1, num_draws=4)},
    "CheckpointBranching": {"epochs": (1,)},
    "RepresentationSimilarity": {"reference": "initial"},
    "WeightTrajectory": {"record_every_n_train_steps": 1, "loss_points": 2},
}
"""Arguments that make a callback cheap, or that it cannot do without; others are taken as they are."""

FEW = [BatchNormAndDropout, OwnsGenerators, OwnsMetrics, GraphNetwork]


def make(cls: type[Callback], **options: Any) -> Any:
    """A cheap callback of this class, with those of the options that it knows."""
    if issubclass(cls, MeasurementCallback):
        options = {"num_examples": 16, "on_error": "raise", **options}
    else:
        options = {k: v for k, v in options.items() if k in inspect.signature(cls).parameters}
    return cls(**{**CHEAP.get(cls.__name__, {}), **options})


def of_each(classes: list[type], **kwargs: Any) -> Any:
    return pytest.mark.parametrize("cls", classes, ids=lambda c: c.__name__, **kwargs)


def assert_neutral(setting: Setting, make_ours: Callable[[], list[Callback]], **options: Any) -> list[Run]:
    """The training is the same bit for bit without ours, with ours first, and with ours last."""
    alone = train(setting, **options)
    runs = [train(setting, make_ours(), last=last, **options) for last in (False, True)]
    assert [run.differs_from(alone) for run in runs] == [[], []]
    return runs


# -- the same training -------------------------------------------------------------------------------------------------


@of_each(CALLBACKS)
@pytest.mark.parametrize("module", FEW, ids=lambda m: m.__name__)
def test_training_is_bit_identical(cls: type[Callback], module: type[ZooModule]) -> None:
    for run in assert_neutral(setting_of(module), lambda: [make(cls)]):
        assert not getattr(run.ours[0], "failures", [])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*failed and training goes on:UserWarning")  # as the zoo's own tests say
@pytest.mark.filterwarnings("ignore:CheckpointBranching. .* failed:UserWarning")
@pytest.mark.filterwarnings("ignore:HessianSpectrum, self-check:UserWarning")
@of_each(CALLBACKS)
@pytest.mark.parametrize("module", [pytest.param(m, id=m.__name__, marks=marks_of(m.expected)) for m in ZOO])
def test_training_is_bit_identical_beside_every_module(cls: type[Callback], module: type[ZooModule]) -> None:
    options = {**options_of(module), "on_error": "record"}
    if module.expected.compiled and cls is lmc_lightning.CheckpointBranching:
        with pytest.raises(ValueError, match=r"cannot copy torch\.compile\(module\)"):
            train(setting_of(module), [make(cls)])
        return
    assert_neutral(setting_of(module), lambda: [make(cls, every_n_train_steps=2, **options)])


def configurations() -> list[Any]:
    """Every configuration with three modules, of which the default suite takes one."""
    rows = []
    for index, (name, configuration) in enumerate(CONFIGURATIONS.items()):
        for module in (Plain, BatchNormAndDropout, OwnsGenerators):
            marks = () if module is (BatchNormAndDropout, Plain, OwnsGenerators)[index % 3] else pytest.mark.slow
            rows.append(pytest.param(configuration, module, id=f"{name}-{module.__name__}", marks=marks))
    return rows


@pytest.mark.parametrize(("configuration", "module"), configurations())
def test_training_is_bit_identical_in_every_configuration(
    configuration: Configuration, module: type[ZooModule]
) -> None:
    options: dict[str, Any] = {"num_examples": 16, "on_error": "raise"}

    def ours() -> list[Callback]:
        return [Probe(every_n_train_steps=2, **options), Probe(every_n_epochs=2, name="b", mode="train", **options)]

    for run in assert_neutral(configuration.of(module), ours, max_epochs=3):
        assert all(len(visited) > 1 for visited in ({r.step for r in c.results} for c in run.ours))


@pytest.mark.slow
@of_each(CALLBACKS)
@pytest.mark.parametrize(("configuration", "module"), configurations())
def test_training_is_bit_identical_with_every_callback_in_every_configuration(
    cls: type[Callback], configuration: Configuration, module: type[ZooModule]
) -> None:
    reason = configuration.failing.get(cls.__name__)
    with nullcontext() if reason is None else pytest.warns(UserWarning, match=reason):
        assert_neutral(configuration.of(module), lambda: [make(cls, on_error="record" if reason else "raise")])


@of_each(NAIVE)
def test_the_gate_catches_callbacks_as_they_are_commonly_written(cls: type[Callback]) -> None:
    augmented = Configuration(train_dataloader=lambda: shuffled(Augmented()))
    setting = (augmented if cls is CopiesAndForksTheGenerator else Configuration()).of(BatchNormAndDropout)
    alone = train(setting)
    for last in (False, True):
        assert {"weights", "every hook"} <= set(train(setting, [cls()], last=last).differs_from(alone))
    assert train(setting).differs_from(alone) == []


@of_each(CALLBACKS)
def test_checkpoints_are_the_same_but_for_the_state_of_the_callback(cls: type[Callback]) -> None:
    def saved(ours: list[Callback]) -> dict[str, str]:
        setting = Setting(BatchNormAndDropout, others=lambda: [ModelCheckpoint("root/saved", save_last=True)])
        train(setting, ours, enable_checkpointing=True)
        content = torch.load("root/saved/last.ckpt", weights_only=True)
        for callback in ours:
            del content["callbacks"][callback.state_key]
        for state in content["callbacks"].values():
            state.pop("last_model_path", None)
        return {name: sha256(value) for name, value in content.items()}

    assert saved([make(cls)]) == saved([])


# -- when, and under which names ---------------------------------------------------------------------------------------


@of_each(MEASURING)
@pytest.mark.parametrize(
    ("schedule", "steps"),
    [({"steps": [0, 2, 5]}, [0, 2, 5]), ({"epochs": [0, 2]}, [0, 6]), ({"every_n_epochs": 1}, [0, 3, 6])],
    ids=str,
)
def test_numbers_are_logged_at_the_scheduled_steps(
    cls: type[MeasurementCallback], schedule: dict[str, Any], steps: list[int]
) -> None:
    run = train(Configuration().of(Plain), [ours := make(cls, **schedule)])
    rows = run.logger.rows_of(ours)
    assert sorted({step for step, _ in rows}) == steps
    assert {r.step for r in ours.results} == set(steps)
    assert {name for _, row in rows for name in row} == set(named(ours))


def named(callback: Any) -> list[str]:
    """The keys that a callback logs, by its records."""
    shown = [r for r in callback.results if r.log != "none"]
    errors = {r.name: [f"{r.name}_stderr"] for r in shown if r.stderr is not None and r.log == "all"}
    found = [n for r in shown for n in (r.name, *errors.get(r.name, []))]
    return list(dict.fromkeys(found))


@of_each(MEASURING)
def test_two_instances_side_by_side_log_under_names_of_their_own(cls: type[MeasurementCallback]) -> None:
    def both() -> list[Any]:
        return [make(cls), make(cls, name="late", seed=1, epochs=[2])]

    for run in assert_neutral(Configuration().of(Plain), both):
        first, second = run.ours
        assert set(named(first)).isdisjoint(named(second))
        assert {r.step for r in first.results} == {0, 3, 6}
        assert {r.step for r in second.results} == {6}
        assert first.state_key != second.state_key
    assert len(list(Path("root").rglob("*.jsonl"))) == 2


# -- what it costs -----------------------------------------------------------------------------------------------------


@of_each(MEASURING)
def test_every_record_says_what_it_cost(cls: type[MeasurementCallback]) -> None:
    train(Configuration().of(Plain), [ours := make(cls)])
    assert ours.results
    for evidence in (r.evidence for r in ours.results):
        assert evidence["seconds"] > 0
        assert evidence["effort"] == 1.0
        assert {type(evidence[n]) for n in ("num_matvecs", "num_gradients", "peak_bytes")} == {int}


@of_each(MEASURING)
def test_fewer_random_probes_give_the_same_keys_and_the_same_training(
    cls: type[MeasurementCallback], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, whole, less = Configuration().of(BatchNormAndDropout), make(cls), make(cls)
    alone = train(setting, [whole])
    monkeypatch.setattr("lmc_lightning.callbacks.visits.budget.Budget.effort", lambda *arguments: 0.25)
    assert train(setting, [less]).differs_from(alone) == []
    assert named(less) == named(whole)
    assert {r.evidence["effort"] for r in less.results} == {0.25}
    digests = [{r.evidence["probe_digest"] for r in c.results if "probe_digest" in r.evidence} for c in (less, whole)]
    assert digests[0] == digests[1]
    assert len(digests[0]) <= len(less.splits)


@of_each(MEASURING)
def test_a_limit_of_time_skips_visits_and_leaves_the_others_as_they_were(cls: type[MeasurementCallback]) -> None:
    setting, free, limited = Configuration().of(OwnsGenerators), make(cls), make(cls, max_overhead=1e-9)
    assert train(setting, [limited]).differs_from(train(setting, [free])) == []
    assert {r.step: r.status for r in limited.results if not r.is_measured} == {3: "skipped", 6: "skipped"}
    first = [r for r in records(free) if r[0] == 0]
    assert [r for r in records(limited) if r[0] == 0] == first != []
    assert not limited.failures


# -- failures ----------------------------------------------------------------------------------------------------------


def failing_at(cls: type[Callback], error: BaseException, **options: Any) -> Any:
    """A callback whose second measurement raises after it has drawn random numbers and switched modes."""
    ours = make(cls, every_n_train_steps=2, **options)
    measure, calls = ours.measure, []

    def fail(visit: Any) -> Measurement:
        calls.append(visit.step)
        if len(calls) != 2:
            return measure(visit)  # type: ignore[no-any-return]
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        visit.objective.grad(visit.theta)
        raise error

    ours.measure = fail
    return ours


@of_each(MEASURING)
def test_a_failed_measurement_is_recorded_and_training_goes_on(cls: type[MeasurementCallback]) -> None:
    alone = train(Configuration().of(OwnsGenerators))
    ours = failing_at(cls, ValueError("no luck"), on_error="record")
    with pytest.warns(UserWarning, match="at step 2 failed and training goes on: ValueError: no luck"):
        beside = train(Configuration().of(OwnsGenerators), [ours])
    assert beside.differs_from(alone) == []
    (failure,) = ours.failures
    assert (failure.step, failure.evidence["reason"]) == (2, "ValueError: no luck")
    assert {r.step for r in ours.results} == {0, 2, 4, 6}


class Interrupts(Callback):
    """Ends a run like Ctrl-C, in the hook and after the steps at which another was ended."""

    def __init__(self, run: Run) -> None:
        assert run.error is not None
        assert isinstance(run.error.__context__, KeyboardInterrupt)
        frames = traceback.extract_tb(run.error.__context__.__traceback__)
        hook = next(f.name for f in frames if hasattr(Callback, f.name))
        setattr(self, hook, partial(self.interrupt, run.trainer.global_step))

    def interrupt(self, step: int, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == step:
            raise KeyboardInterrupt


@of_each(MEASURING)
def test_an_interrupted_measurement_leaves_everything_as_it_was(cls: type[MeasurementCallback]) -> None:
    setting = Configuration().of(OwnsGenerators)
    ours = failing_at(cls, KeyboardInterrupt(), on_error="record")
    beside = train(setting, [ours], raises=SystemExit)
    alone = train(setting, [Interrupts(beside)], raises=SystemExit)
    assert beside.differs_from(alone) == []
    assert {r.step for r in ours.results} <= {0}


# -- results survive ---------------------------------------------------------------------------------------------------


def records(callback: Any) -> list[tuple[int, str, float | None]]:
    return sorted((r.step, r.name, r.value) for r in callback.results)


@of_each(MEASURING)
def test_a_resumed_run_has_the_records_of_an_uninterrupted_one(cls: type[MeasurementCallback], tmp_path: Path) -> None:
    setting = Configuration().of(Plain)
    saving = {"enable_checkpointing": True}
    whole = make(cls, every_n_train_steps=2)
    train(setting, [whole], max_epochs=3)
    train(setting, [make(cls, every_n_train_steps=2), ModelCheckpoint(tmp_path, filename="half")], **saving)
    resumed = make(cls, every_n_train_steps=2)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):  # ours are not there
        alone = train(setting, max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):  # ModelCheckpoint is not there
        beside = train(setting, [resumed], max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert beside.differs_from(alone) == []
    assert {r.step for r in resumed.results} == {0, 2, 4, 6, 8}
    assert [r for r in records(resumed) if r[0] <= 6] == [r for r in records(whole) if r[0] <= 6]


@of_each(CALLBACKS)
def test_state_survives_loading_of_weights_only(cls: type[Callback]) -> None:
    run = train(Configuration().of(BatchNormAndDropout), [ours := make(cls)])
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = make(cls)
    fresh.load_state_dict(state)
    if isinstance(ours, MeasurementCallback):
        assert fresh.results == ours.results
    assert ours.state_key == fresh.state_key
    assert run.trainer.state.finished


@of_each(CALLBACKS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_a_copy_runs_like_the_original(cls: type[Callback], copied: Callable[[Any], Any]) -> None:
    setting = Configuration().of(BatchNormAndDropout)
    original = make(cls)
    alone = train(setting)
    assert train(setting, [duplicate := copied(original)]).differs_from(alone) == []
    assert train(setting, [original]).differs_from(alone) == []
    if isinstance(original, MeasurementCallback):
        assert records(copied(original)) == records(original) == records(duplicate) != []


class BringsItsCallbacks(Plain):
    """Holds callbacks on itself, so that who copies the module copies them."""

    def __init__(self, *callbacks: Callback) -> None:
        super().__init__()
        self.own = list(callbacks)

    def configure_callbacks(self) -> list[Callback]:
        return self.own


@of_each(CALLBACKS)
def test_a_callback_that_is_copied_with_its_module_writes_its_results(cls: type[Callback]) -> None:
    held = make(cls)
    module = copy.deepcopy(BringsItsCallbacks(held))
    train(Setting(lambda: module))
    if isinstance(held, MeasurementCallback):
        (written,) = Path("root").rglob("*.jsonl")
        found = [json.loads(line) for line in written.read_text().splitlines()]
        assert sorted((r["step"], r["name"], r["value"]) for r in found) == records(module.own[0])
        assert held.results == []


@of_each(CALLBACKS)
def test_one_instance_serves_two_runs(cls: type[Callback]) -> None:
    setting = Configuration().of(BatchNormAndDropout)
    alone, ours = train(setting), make(cls)
    assert train(setting, [ours]).differs_from(alone) == []
    first = records(ours) if isinstance(ours, MeasurementCallback) else []
    assert train(setting, [ours]).differs_from(alone) == []
    assert (records(ours) if isinstance(ours, MeasurementCallback) else []) == first


# -- other trainers ----------------------------------------------------------------------------------------------------


@of_each(CALLBACKS)
def test_a_run_without_logger_keeps_its_records_in_a_file(cls: type[Callback]) -> None:
    train(Configuration().of(Plain), [ours := make(cls)], logger=False)
    if isinstance(ours, MeasurementCallback):
        (written,) = Path("root/lmc").glob("*.jsonl")
        assert len(written.read_text().splitlines()) == len(ours.results) > 0


@of_each(CALLBACKS)
def test_a_fast_dev_run_takes_every_path_once_and_leaves_no_files(cls: type[Callback]) -> None:
    run = train(Configuration().of(BatchNormAndDropout), [ours := make(cls)], fast_dev_run=True)
    assert run.trainer.global_step == 1
    assert [p for p in Path("root").rglob("*") if p.is_file()] == []
    if isinstance(ours, MeasurementCallback):
        assert ours.results
        assert not ours.failures


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")  # which barebones do not allow
@of_each(CALLBACKS)
@pytest.mark.parametrize(
    "options", [{"max_epochs": 0}, {"limit_train_batches": 0}, {"max_steps": 1}, {"barebones": True}], ids=str
)
def test_runs_that_hardly_run(cls: type[Callback], options: dict[str, Any]) -> None:
    barebones = {"logger": None, "log_every_n_steps": 0, "num_sanity_val_steps": 0} if "barebones" in options else {}
    assert_neutral(Configuration().of(Plain), lambda: [make(cls, epochs=[0])], **options, **barebones)


def module_of(namespace: Any) -> type[Any]:
    """A module of either class tree."""

    class Classifier(namespace.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        training_step, validation_step, loss = Plain.training_step, Plain.validation_step, Plain.loss
        train_dataloader, val_dataloader, dataset = Plain.train_dataloader, Plain.val_dataloader, Plain.dataset
        configure_optimizers, forward = Plain.configure_optimizers, Plain.forward

    return Classifier


@of_each(CALLBACKS)
def test_both_lightnings_give_the_same_numbers(cls: type[Callback]) -> None:
    found = []
    for namespace in (lightning.pytorch, pytorch_lightning):
        setting = Setting(module_of(namespace), make_trainer=namespace.Trainer)
        found += [run.ours[0] for run in assert_neutral(setting, lambda: [make(cls)])]
    if issubclass(cls, MeasurementCallback):
        assert len({json.dumps(records(ours)) for ours in found}) == 1
