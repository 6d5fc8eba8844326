"""Barriers of a run: against its children, its start, its last visit or a checkpoint."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MeanMetric

from lmc_lightning import CheckpointBranching, InterpolationBarrier, interpolation_barrier
from lmc_lightning.branching.lineage import Family
from tests.callbacks.runs import (
    NUM_EXAMPLES,
    Classifier,
    Rows,
    TensorBoardLogger,
    batches,
    documented,
    fit,
    is_picture,
    loader,
    train_loader,
)

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

POINTS = 5


def barrier(**options: Any) -> InterpolationBarrier:
    return InterpolationBarrier(**{"num_points": POINTS, "on_error": "raise", **options})


def loaded(module: torch.nn.Module, state: Any) -> Any:
    copied = copy.deepcopy(module)
    copied.load_state_dict(state)
    return copied


def val_loader() -> Any:
    return loader(12, seed=40)


# -- against children --------------------------------------------------------------------------------------------------


class Branched:
    """One run of three epochs with branch points after 0 and 1 of them, and one or two children of each."""

    def __init__(self, root: Path, children: int, val: Any, **options: Any) -> None:
        self.logger = TensorBoardLogger()
        self.module = Classifier()
        self.branching = CheckpointBranching(epochs=(0, 1), children=children)
        self.barrier = barrier(**{"epochs": [2, 3], **options})
        self.trainer = fit(
            self.module,
            self.branching,
            self.barrier,
            val=val,
            max_epochs=3,
            logger=self.logger,
            default_root_dir=root,
        )

    def value(self, key: str, step: int) -> float:
        (found,) = [r.value for r in self.barrier.results if (r.name, r.step) == (f"barrier/{key}", step)]
        assert found is not None
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Branched:
    metrics = {"val_acc": "max", "val_loss": "min"}
    return Branched(tmp_path_factory.mktemp("one_child"), 1, val_loader(), metrics=metrics)


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Branched:
    return Branched(tmp_path_factory.mktemp("two_children"), 2, None, epochs=[3])


SCALARS = {key for key, text in documented(InterpolationBarrier).items() if not is_picture(text)}
PICTURES = documented(InterpolationBarrier).keys() - SCALARS
ERRORS = r"(_stderr)?"


def pattern(keys: set[str], **values: str) -> str:
    """What the keys of the table stand for, as a regular expression."""
    written = [re.escape(key).replace(re.escape("{005}"), r"\d{3}") for key in keys]
    for name, value in values.items():
        written = [key.replace(re.escape(f"{{{name}}}"), value) for key in written]
    return "|".join(f"(?:{key})" for key in written)


def test_every_pair_is_logged_under_the_keys_of_the_table_at_the_step_of_its_later_epoch(run: Branched) -> None:
    metrics = ["train_loss", "train_error", "val_loss", "val_error", "val_acc"]
    # The named val_loss and the loss of the validation split are one key: the module's own log is what counts.
    expected = {
        step: {
            f"barrier/{metric}/{k1}{suffix}"
            for k1 in branches
            for metric in metrics
            for suffix in ([""] if metric in ("val_acc", "val_loss") else ["", "_stderr"])
        }
        for step, branches in {0: ["k1_000"], 3: ["k1_001"], 6: ["k1_000", "k1_001"], 9: ["k1_000", "k1_001"]}.items()
    }
    assert run.logger.by_step("barrier") == expected
    table = pattern({k for k in SCALARS if "k1_" in k}, split="(train|val)", metric="val_(acc|loss)") + ERRORS
    assert all(re.fullmatch(f"({table}){ERRORS}", key) for keys in expected.values() for key in keys)


def test_several_children_have_keys_of_their_own(siblings: Branched) -> None:
    assert "…/child_{j}" in SCALARS
    keys = siblings.logger.by_step("barrier")[9]
    assert keys == {
        f"barrier/train_{metric}/k1_{k1:03d}/child_{child}{suffix}"
        for metric in ("loss", "error")
        for k1 in (0, 1)
        for child in (0, 1)
        for suffix in ("", "_stderr")
    }


def test_at_the_branch_step_the_barrier_is_exactly_zero(run: Branched, siblings: Branched) -> None:
    for branched in (run, siblings):
        at_branch = [r for r in branched.barrier.results if r.step == r.evidence["branch_step"]]
        assert {r.step for r in at_branch} == {0, 3}
        assert {(r.value, r.stderr or 0.0, r.evidence["ends"][0] - r.evidence["ends"][1]) for r in at_branch} == {
            (0, 0, 0)
        }
    later = [r for r in run.barrier.results if r.step > r.evidence["branch_step"] and "loss" in r.name]
    assert all(r.evidence["ends"][0] != r.evidence["ends"][1] for r in later)


def test_a_barrier_is_that_of_the_kept_weights(run: Branched) -> None:
    family: Family = run.branching.family
    for k1, epoch in ((0, 2), (0, 3), (1, 3)):
        ends = [loaded(run.module, family.state(node, epoch)) for node in ("trunk", f"k1_{k1:03d}_child_0")]
        for split, data in {"train": train_loader(), "val": val_loader()}.items():
            for metric in ("error",) if split == "val" else ("loss", "error"):
                exact = interpolation_barrier(*ends, data, num_points=POINTS, metric=metric)
                found = run.value(f"{split}_{metric}/k1_{k1:03d}", 3 * epoch)
                assert found == pytest.approx(exact.barrier, rel=1e-4, abs=1e-7)


def test_named_metrics_are_read_from_what_validation_logs(run: Branched) -> None:
    for step in (6, 9):
        for k1 in ("k1_000", "k1_001"):
            # The mean of val_acc over batches of 8 and 4 examples is weighted by their sizes: 1 − val_error.
            assert run.value(f"val_acc/{k1}", step) == pytest.approx(run.value(f"val_error/{k1}", step), abs=1e-12)
    found = run.barrier.barriers["barrier/val_acc/k1_000", 9]
    assert found.metric == "−val_acc"
    assert all(-1 <= value <= 0 for value in found.values.tolist())


def test_every_record_names_its_pair_and_its_own_data(run: Branched) -> None:
    digests = {}
    for r in run.barrier.results:
        evidence = r.evidence
        split = r.name.split("/")[1].split("_")[0]
        assert (evidence["eval_split"], evidence["fit_split"]) == (split, "train")
        assert evidence["num_examples"] == {"train": NUM_EXAMPLES, "val": 12}[split]
        assert r.step == 3 * evidence["later_epoch"]
        assert evidence["branch_step"] == 3 * evidence["k1"]
        assert (evidence["child"], evidence["num_points"], evidence["batch_stats"]) == (0, POINTS, None)
        assert evidence["barrier"] == r.value
        assert evidence["seconds"] > 0
        assert "probe_loss" not in evidence
        digests[split] = evidence["probe_digest"]
    assert digests["train"] != digests["val"]
    lines = (Path(run.trainer.default_root_dir) / "lmc" / "barrier.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == [r.name for r in run.barrier.results]


def test_curves_and_maps_are_shown_at_the_end_and_kept_as_files(run: Branched, siblings: Branched) -> None:
    shown = {key for _, key in run.logger.figures}
    metrics = ["train_loss", "train_error", "val_loss", "val_error", "val_acc"]
    curves = {f"barrier_curves/{metric}/{k1}" for metric in metrics for k1 in ("k1_000", "k1_001")}
    assert shown == curves | {f"barrier_map/{metric}" for metric in metrics}
    assert {re.sub(r"/.*", "/…", key) for key in shown} == PICTURES
    assert {step for step, _ in run.logger.figures} == {9}
    folder = Path(run.trainer.default_root_dir) / "lmc" / "figures"
    assert {p.name for p in folder.iterdir()} == {f"{key.replace('/', '_')}_000009.png" for key in shown}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.iterdir())
    assert "barrier_curves/train_loss/k1_000/child_1" in {key for _, key in siblings.logger.figures}


class LosesItsSecondChild(Classifier):
    """Counts the runs of all copies; the third, after the trunk and its first child, fails."""

    fits = 0

    def on_fit_start(self) -> None:
        type(self).fits += 1

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if type(self).fits == 3:
            raise ValueError("no luck")


@pytest.mark.filterwarnings("ignore:CheckpointBranching. k1_001_child_0 failed")
def test_lost_children_are_recorded_and_made_up_for_by_run_children(tmp_path: Path) -> None:
    LosesItsSecondChild.fits = 0
    branching, ours, logger = CheckpointBranching(epochs=(0, 1)), barrier(epochs=[2]), Rows()
    csv = CSVLogger(tmp_path, name="csv")
    with pytest.warns(
        UserWarning, match=r"barrier/k1_001 at step 3 failed: k1_001_child_0 is failed: ValueError: no luck"
    ):
        fit(LosesItsSecondChild(), branching, ours, logger=[logger, csv])
    assert [(r.name, r.step) for r in ours.failures] == [("barrier/k1_001", 3)]
    first = logger.by_step("barrier")
    assert {key.split("/")[2].removesuffix("_stderr") for keys in first.values() for key in keys} == {"k1_000"}
    branching.run_children()
    assert not ours.failures
    assert {s: {k for k in keys if "k1_000" in k} for s, keys in logger.by_step("barrier").items() if s != 3} == first
    assert "barrier/train_loss/k1_001" in logger.by_step("barrier")[6]
    # A run that is over writes its loggers no more: what came later is there all the same.
    header, *rows = (Path(csv.log_dir) / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("barrier/train_loss/k1_001")
    assert [float(row.split(",")[column]) for row in rows if row.split(",")[column]] == [
        r.value for r in ours.results if r.name == "barrier/train_loss/k1_001"
    ]


class NanChild(Classifier):
    """Its weights are NaN after the second of three epochs, in trunk and children."""

    def on_train_epoch_end(self) -> None:
        if self.trainer.current_epoch == 1:
            torch.nn.init.constant_(self.net[-1].weight, math.nan)


def test_barriers_of_networks_of_nan_are_undefined_and_drawn_grey() -> None:
    logger, ours = TensorBoardLogger(), barrier(epochs=[1, 2])
    trainer = fit(NanChild(), CheckpointBranching(epochs=(0,)), ours, logger=logger)
    assert trainer.global_step == 6
    status = {r.step: (r.status, r.value is None) for r in ours.results if r.name == "barrier/train_loss/k1_000"}
    assert status == {0: ("ok", False), 3: ("ok", False), 6: ("undefined", True)}
    assert "barrier_map/train_loss" in {key for _, key in logger.figures}


def test_batch_norm_statistics_are_recomputed_for_children() -> None:
    module, ours, branching = Classifier(batch_norm=True), barrier(epochs=[2]), CheckpointBranching(epochs=(0,))
    fit(module, branching, ours, default_root_dir="root")
    assert {r.evidence["batch_stats"] for r in ours.results} == {"recompute"}
    ends = [loaded(module, branching.family.state(node, 2)) for node in ("trunk", "k1_000_child_0")]
    (found,) = [r for r in ours.results if (r.name, r.step) == ("barrier/train_loss/k1_000", 6)]
    captured = torch.load("root/lmc/probes.pt", weights_only=True)
    train = [batch for batch, _ in captured["train"]]
    exact = interpolation_barrier(*ends, train, num_points=POINTS)
    assert found.value == pytest.approx(exact.barrier, rel=1e-4)
    assert found.evidence["own_ends"] != found.evidence["ends"]


# -- against a reference -----------------------------------------------------------------------------------------------


def values(callback: InterpolationBarrier, key: str) -> dict[int, float | None]:
    return {r.step: r.value for r in callback.results if r.name == f"barrier/{key}"}


@pytest.mark.parametrize("reference", ["initial", "previous"])
def test_the_run_is_compared_with_its_start_or_its_last_visit(reference: str) -> None:
    states: dict[int, Any] = {}
    module, logger, ours = Classifier(), Rows(), barrier(reference=reference, probe_dataloader=batches())
    fit(module, KeepsStates(states), ours, logger=logger)
    steps = [0, 3, 6] if reference == "initial" else [3, 6]
    table = pattern(
        {k for k in SCALARS if "{reference}" in k and "metric" not in k}, split="train", reference=reference
    )
    for step, keys in logger.by_step("barrier").items():
        assert step in steps
        assert all(re.fullmatch(f"({table}){ERRORS}", key) for key in keys)
    assert set(logger.by_step("barrier")) == set(steps)
    for step in steps:
        other = 0 if reference == "initial" else step - 3
        pair = loaded(module, states[other]), loaded(module, states[step])
        exact = interpolation_barrier(*pair, loader(), num_points=POINTS)
        assert values(ours, f"train_loss/{reference}")[step] == pytest.approx(exact.barrier, rel=1e-5)
        assert {r.evidence["reference_step"] for r in ours.results if r.step == step} == {other}
    if reference == "initial":
        assert values(ours, "train_loss/initial")[0] == 0.0


class KeepsStates(Callback):
    """The weights at the start and after each epoch, by step."""

    def __init__(self, states: dict[int, Any]) -> None:
        self.states = states

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.states[trainer.global_step] = copy.deepcopy(pl_module.state_dict())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.states[trainer.global_step] = copy.deepcopy(pl_module.state_dict())


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Path]:
    """A Lightning checkpoint and a plain state dict of a trained module, and one of another architecture."""
    module, saver = Classifier(), ModelCheckpoint(tmp_path, filename="epoch=1")
    fit(module, saver, enable_checkpointing=True)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    torch.save(Classifier(batch_norm=True).state_dict(), tmp_path / "other.pt")
    return {path.stem: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize(("name", "label"), [("epoch=1", "epoch_1"), ("weights", "weights")])
def test_the_run_is_compared_with_a_checkpoint(saved: dict[str, Path], name: str, label: str) -> None:
    module, ours = Classifier(), barrier(reference=str(saved[name]), epochs=[0, 1], probe_dataloader=batches())
    fit(module, ours, max_epochs=1)
    state = torch.load(saved["weights"], weights_only=True)
    exact = interpolation_barrier(loaded(module, state), module, loader(), num_points=POINTS)
    assert values(ours, f"train_loss/{label}")[3] == pytest.approx(exact.barrier, rel=1e-5)
    assert {r.evidence["reference"] for r in ours.results} == {str(saved[name])}
    assert ours.state_dict()["reference"] is None


def test_a_checkpoint_of_another_architecture_is_refused_before_the_first_step(saved: dict[str, Path]) -> None:
    module = Classifier()
    start = copy.deepcopy(module.state_dict())
    with pytest.raises(
        ValueError, match=r"other\.pt is no checkpoint of this module: 'net.4.weight' of shape .4, 2. is missing there"
    ):
        fit(Classifier(), barrier(reference=str(saved["other"])))
    with pytest.raises(ValueError, match=r"other\.pt is no checkpoint of this module"):
        fit(module, barrier(reference=str(saved["other"])))
    assert all(torch.equal(start[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("reference", ["initial", "previous"])
def test_a_resumed_run_keeps_its_reference(reference: str, tmp_path: Path) -> None:
    def ours() -> InterpolationBarrier:
        return barrier(reference=reference, probe_dataloader=batches())

    def run_of(module: Classifier, callback: Any, *others: Any, **options: Any) -> None:
        torch.manual_seed(0)
        fit(module, callback, *others, **options)

    saver = ModelCheckpoint(tmp_path, filename="half")
    run_of(Classifier(), first := ours(), saver, enable_checkpointing=True)
    run_of(Classifier(), resumed := ours(), max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert values(resumed, f"train_loss/{reference}").items() >= values(first, f"train_loss/{reference}").items()
    (last,) = [r for r in resumed.results if (r.step, r.name) == (9, f"barrier/train_loss/{reference}")]
    assert last.evidence["reference_step"] == (0 if reference == "initial" else 6)


def test_a_start_that_was_not_seen_is_said_to_be_none(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="half")
    fit(Classifier(), saver, enable_checkpointing=True)
    ours = barrier(reference="initial", probe_dataloader=batches())
    with pytest.warns(UserWarning, match="The start is not known; 'initial' is after 6 steps"):
        fit(Classifier(), ours, max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert {r.evidence["reference_step"] for r in ours.results} == {6}


def test_a_second_run_of_one_instance_has_a_start_of_its_own() -> None:
    ours = barrier(reference="initial", probe_dataloader=batches(), epochs=[0, 2])
    fit(Classifier(), ours)
    other = Classifier()
    torch.nn.init.normal_(other.net[-1].weight)
    fit(other, ours)
    assert values(ours, "train_loss/initial")[0] == 0.0
    assert {r.evidence["reference_step"] for r in ours.results} == {0}


# -- metrics -----------------------------------------------------------------------------------------------------------


class WithMetricObject(Classifier):
    """Logs a torchmetrics object, which is read when the pass is over."""

    def __init__(self) -> None:
        super().__init__()
        self.mean_loss = MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.mean_loss.update(F.cross_entropy(self(batch[0]), batch[1], reduction="none"))
        self.log("mean_loss", self.mean_loss)


def test_a_metric_object_is_computed_over_the_whole_pass() -> None:
    ours = barrier(reference="initial", metrics={"mean_loss": "min"}, epochs=[2])
    fit(WithMetricObject(), ours, val=val_loader())
    assert values(ours, "mean_loss/initial")[6] == pytest.approx(values(ours, "val_loss/initial")[6], rel=1e-5)
    by_metric, by_loss = (ours.barriers[f"barrier/{m}/initial", 6] for m in ("mean_loss", "val_loss"))
    assert by_metric.values.tolist() == pytest.approx(by_loss.values.tolist(), rel=1e-6)


def test_named_metrics_of_a_network_with_batch_norm_are_taken_with_recomputed_statistics() -> None:
    ours = barrier(reference="initial", metrics={"val_acc": "max"}, epochs=[2])
    fit(Classifier(batch_norm=True), ours, val=val_loader())
    named, error = (ours.barriers[f"barrier/{m}/initial", 6] for m in ("val_acc", "val_error"))
    assert named.batch_stats == error.batch_stats == "recompute"
    assert (1 + named.values).tolist() == pytest.approx(error.values.tolist(), abs=1e-12)
    assert [1 + e for e in named.own_ends] == pytest.approx(error.own_ends, abs=1e-12)


def test_a_metric_that_is_not_logged_is_a_failure_that_names_those_that_are() -> None:
    ours = barrier(reference="initial", metrics={"f1": "max"}, epochs=[2], on_error="record")
    with pytest.warns(UserWarning, match=r"validation_step logs 'val_loss', 'val_acc', not 'f1'"):
        trainer = fit(Classifier(), ours, val=val_loader())
    assert trainer.global_step == 6
    assert [r.status for r in ours.results] == ["failed"]


def test_without_validation_there_are_training_barriers_only() -> None:
    ours = barrier(reference="initial", epochs=[2])
    fit(Classifier(), ours)
    assert {r.name for r in ours.results} == {"barrier/train_loss/initial", "barrier/train_error/initial"}


def test_a_loader_of_its_own_gives_the_training_split_and_no_other() -> None:
    ours = barrier(reference="initial", epochs=[2], probe_dataloader=batches())
    fit(Classifier(), ours, val=val_loader())
    assert {r.name for r in ours.results} == {"barrier/train_loss/initial", "barrier/train_error/initial"}


# -- misuse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_points": 2}, r"Expected num_points of at least 3, one of them between the ends, got 2"),
        ({"batch_stats": "none"}, r"Expected batch_stats to be 'recompute' or 'interpolate' or 'endpoint', got 'none'"),
        ({"metrics": {"val_acc": "high"}}, r"Expected metrics\['val_acc'\] to be 'min' or 'max', got 'high'"),
        (
            {"metrics": {"val_acc": "max"}, "probe_dataloader": [torch.zeros(1)]},
            r"metrics are of the validation split, which probe_dataloader= replaces",
        ),
    ],
)
def test_misuse_raises_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InterpolationBarrier(**arguments)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: [barrier()], r"nothing to compare with. Add CheckpointBranching .*'initial', 'previous' or the path"),
        (lambda: [barrier(reference="first")], r"Expected reference to be 'initial', 'previous' or a checkpoint file"),
        (
            lambda: [CheckpointBranching(epochs=(0,)), barrier(reference="initial")],
            r"compares children with the trunk; got reference='initial' too. Leave it out",
        ),
        (
            lambda: [CheckpointBranching(epochs=(0,)), barrier(every_n_train_steps=2)],
            r"after later epochs; got a schedule of steps. Pass epochs= or every_n_epochs=",
        ),
        (
            lambda: [barrier(reference="initial", metrics={"val_acc": "max"})],
            r"metrics=\{'val_acc': 'max'\} are read from the validation of the run, and it has none",
        ),
    ],
)
def test_misuse_raises_before_the_first_step(callbacks: Any, message: str) -> None:
    module = Classifier()
    start = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(module, *callbacks())
    assert all(torch.equal(start[name], tensor) for name, tensor in module.state_dict().items())
