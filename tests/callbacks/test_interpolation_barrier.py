"""Barriers of a run: against its children, its start, its last visit or a checkpoint."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MeanMetric

from lmc_lightning import CheckpointBranching, InterpolationBarrier, interpolation_barrier
from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.callbacks.pairs.family_table import COLUMNS
from lmc_lightning.data import build_datamodule
from lmc_lightning.landscape.paths.barrier import DEFINITIONS
from lmc_lightning.models import ImageClassifier
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

    def __init__(self, root: Path, children: int, val: Any, k1s: tuple[int, ...] = (0, 1), **options: Any) -> None:
        self.logger = TensorBoardLogger()
        self.module = Classifier()
        self.branching = CheckpointBranching(epochs=k1s, children=children)
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
    return Branched(tmp_path_factory.mktemp("one_child"), 1, val_loader(), metrics={"val_acc": "max"})


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Branched:
    return Branched(tmp_path_factory.mktemp("two_children"), 2, None, epochs=[3])


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Branched:
    """Everything that can be asked for, of two children."""
    return Branched(
        tmp_path_factory.mktemp("complete"),
        2,
        None,
        (1,),
        epochs=[3],
        num_points=3,
        pairs=("trunk", "siblings"),
        definitions=("barrier", "instability"),
        extras=("distances", "soup", "layers", "attribution", "figures"),
    )


SCALARS = {key for key, text in documented(InterpolationBarrier).items() if not is_picture(text)}
PICTURES = documented(InterpolationBarrier).keys() - SCALARS
DEFAULT_PICTURES = {"barrier_curves/…", "barrier_map/…"}
ERRORS = r"(_stderr)?"


def pattern(keys: set[str], **values: str) -> str:
    """What the keys of the table stand for, as a regular expression."""
    written = [re.escape(key).replace(re.escape("{005}"), r"\d{3}") for key in keys]
    for name, value in values.items():
        written = [key.replace(re.escape(f"{{{name}}}"), value) for key in written]
    return "|".join(f"(?:{key})" for key in written)


def test_every_pair_is_logged_under_the_keys_of_the_table_at_the_step_of_its_later_epoch(run: Branched) -> None:
    metrics = ["train_loss", "train_error", "val_loss", "val_error", "val_acc"]
    expected = {
        step: {
            f"barrier/{metric}/{k1}{suffix}"
            for k1 in branches
            for metric in metrics
            for suffix in ([""] if metric == "val_acc" else ["", "_stderr"])
        }
        for step, branches in {0: ["k1_000"], 3: ["k1_001"], 6: ["k1_000", "k1_001"], 9: ["k1_000", "k1_001"]}.items()
    }
    assert run.logger.by_step("barrier") == expected
    table = pattern({k for k in SCALARS if "k1_" in k}, split="(train|val)", metric="val_acc") + ERRORS
    assert all(re.fullmatch(f"({table}){ERRORS}", key) for keys in expected.values() for key in keys)


def test_several_children_have_keys_of_their_own(siblings: Branched) -> None:
    assert {"…/child_{j}", "…/siblings_{i}_{j}", "…/{definition}"} <= SCALARS
    keys = siblings.logger.by_step("barrier")[9]
    assert keys == {
        f"barrier/train_{metric}/k1_{k1:03d}/child_{child}{suffix}"
        for metric in ("loss", "error")
        for k1 in (0, 1)
        for child in (0, 1)
        for suffix in ("", "_stderr")
    }


LABEL = r"k1_001/(child_[01]|siblings_0_1)"
METRIC = r"train_(loss|error)"
DISTANCES = r"l2|relative|cosine|train_(disagreement|kl|jsd|logit_cosine|ensemble_accuracy)"


def test_all_that_can_be_asked_for_has_keys_of_its_own(complete: Branched) -> None:
    expected = {
        "barrier": rf"barrier/{METRIC}/{LABEL}(/instability)?",
        "distance": rf"distance/({DISTANCES})/{LABEL}",
        "soup_gain": rf"soup_gain/{METRIC}/({LABEL}|family)",
        "barrier_layer": rf"barrier_layer/{METRIC}/{LABEL}/net\.[046](/at_b|/cumulative)?",
    }
    table = {re.sub(r"/.*", "", key) for key in SCALARS} - {"…"}
    assert table == set(expected)
    for family, keys in expected.items():
        found = complete.logger.by_step(family)[9]
        assert [key for key in found if not re.fullmatch(f"{keys}{ERRORS}", key)] == []
        names = {key.split("/")[1] for key in found}
        assert all(f"{family}/{name}/k1_001/siblings_0_1" in " ".join(found) for name in names)
    assert len({r.name for r in complete.barrier.results}) == len([r for r in complete.barrier.results if r.step == 9])
    assert {re.sub(r"/.*", "/…", key) for _, key in complete.logger.figures} == PICTURES | {"family_tree"}


def test_siblings_are_compared_with_each_other(complete: Branched) -> None:
    family: Family = complete.branching.family
    ends = [loaded(complete.module, family.state(f"k1_001_child_{j}", 3)) for j in (0, 1)]
    exact = interpolation_barrier(*ends, train_loader(), num_points=3)
    assert complete.value("train_loss/k1_001/siblings_0_1", 9) == pytest.approx(exact.barrier, rel=1e-4, abs=1e-7)
    (record,) = [r for r in complete.barrier.results if r.name == "barrier/train_loss/k1_001/siblings_0_1"]
    named = {name: record.evidence[name] for name in ("pair", "run", "parent", "k1", "child", "branch_step")}
    assert named == {
        "pair": "siblings",
        "run": "k1_001_child_1",
        "parent": "k1_001_child_0",
        "k1": 1,
        "child": "0 and 1",
        "branch_step": 3,
    }
    assert all(r.step == 9 for r in complete.barrier.results if "siblings" in r.name)


def test_distances_are_taken_from_the_start_of_the_trunk(complete: Branched) -> None:
    family: Family = complete.branching.family
    start, trunk, child = (
        torch.cat([t.reshape(-1) for t in family.state(name, epoch).values()])
        for name, epoch in (("trunk", 0), ("trunk", 3), ("k1_001_child_0", 3))
    )
    found = {r.name: r.value for r in complete.barrier.results if r.name.endswith("k1_001/child_0") and r.step == 9}
    assert found["distance/l2/k1_001/child_0"] == pytest.approx(float((trunk - child).norm()), rel=1e-5)
    relative = float((trunk - child).norm() / (trunk - start).norm())
    assert found["distance/relative/k1_001/child_0"] == pytest.approx(relative, rel=1e-5)
    cosine = float(torch.cosine_similarity(trunk - start, child - start, dim=0))
    assert found["distance/cosine/k1_001/child_0"] == pytest.approx(cosine, rel=1e-5)


def test_the_average_is_that_of_the_trunk_and_all_children(complete: Branched) -> None:
    family: Family = complete.branching.family
    names = ["trunk", "k1_001_child_0", "k1_001_child_1"]
    states = [family.state(name, 3) for name in names]
    mean = {key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]}
    losses = []
    for state in [*states, mean]:
        with torch.no_grad():
            data = [(F.cross_entropy(loaded(complete.module, state)(x), y), len(y)) for x, y in train_loader()]
        losses.append(float(sum(loss * n for loss, n in data) / NUM_EXAMPLES))
    (record,) = [r for r in complete.barrier.results if r.name == "soup_gain/train_loss/family"]
    assert record.evidence["runs"] == names
    assert record.value == pytest.approx(min(losses[:-1]) - losses[-1], rel=1e-3, abs=1e-6)


def test_the_table_has_a_row_for_every_definition_and_is_written_beside_the_family(complete: Branched) -> None:
    table = complete.barrier.to_table()
    folder = complete.branching.family.folder
    written = pd.read_csv(folder / "barriers.csv")
    assert len(written) == len(table)
    assert list(written.columns) == list(COLUMNS) == list(table.columns)
    assert set(table["family"]) == {str(folder)}
    main = table[(table["definition"] == "barrier") & table["group"].isna()]
    for row in main.itertuples():
        label = f"k1_{row.k1:03.0f}/" + (row.run[-7:] if row.pair == "trunk" else "siblings_0_1")
        assert row.value == complete.value(f"train_{row.metric}/{label}", row.step)
    assert len(main) == 2 * (2 + 1 + 2)  # metrics × (with the trunk and siblings at the end, at the branch)
    cells = table[
        (table["later_epoch"] == 3) & (table["metric"] == "loss") & (table["k1"] == 1) & table["group"].isna()
    ]
    counts = cells.groupby("pair")["definition"].nunique().to_dict()
    assert counts == {"siblings": len(DEFINITIONS) + 1, "trunk": len(DEFINITIONS) + 1}  # and the gain of the average
    means = pd.read_csv(folder / "barriers_mean.csv")
    assert set(means["num_pairs"]) == {1, 2}
    assert means["stderr_seed"].isna().all()  # two children are no sample of seeds


def test_attributions_sum_to_their_barriers(complete: Branched) -> None:
    assert complete.barrier.attributions.keys() == complete.barrier.barriers.keys()
    for key, found in complete.barrier.attributions.items():
        barrier_there = complete.barrier.barriers[key].barrier
        assert float(found.shares.sum()) == pytest.approx(barrier_there, abs=1e-12)
        assert sum(found.by_class.values()) == pytest.approx(barrier_there, abs=1e-12)


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
            for metric in ("loss", "error"):
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
    assert {re.sub(r"/.*", "/…", key) for key in shown} == DEFAULT_PICTURES
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


def test_the_points_may_be_chosen_by_the_curve() -> None:
    ours = barrier(reference="initial", epochs=[2], num_points="adaptive", probe_dataloader=batches())
    exact = barrier(reference="initial", epochs=[2], num_points=97, probe_dataloader=batches(), name="fine")
    fit(Classifier(), ours, exact)
    found, fine = ours.barriers["barrier/train_loss/initial", 6], exact.barriers["barrier/train_loss/fine/initial", 6]
    assert found.num_points <= 25
    assert found.barrier == pytest.approx(fine.barrier, rel=5e-3, abs=1e-6)
    assert {r.evidence["num_points"] for r in ours.results} == {found.num_points}


def test_a_test_split_comes_from_the_datamodule() -> None:
    data = build_datamodule("digits", batch_size=64)
    module = ImageClassifier(network="mlp", network_kwargs={"hidden_sizes": [4], "in_features": 784}, optimizer="sgd")
    ours = barrier(reference="initial", epochs=[0], splits=("train", "test"), num_examples=40, num_points=3)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(max_epochs=1, limit_train_batches=1, accelerator="cpu", callbacks=[ours], **quiet).fit(module, data)
    assert {r.name.split("/")[1] for r in ours.results} == {"train_loss", "train_error", "test_loss", "test_error"}
    digests = {r.evidence["eval_split"]: r.evidence["probe_digest"] for r in ours.results}
    assert digests["train"] != digests["test"]


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
            {"metrics": {"val_loss": "min"}},
            r"'val_loss' in metrics would be logged under the key of the val split's own loss.*Leave it out",
        ),
        ({"pairs": "trunk"}, r"Expected pairs to list some of 'trunk', 'siblings', got 'trunk'"),
        ({"splits": ("train", "dev")}, r"Expected splits to list some of 'train', 'val', 'test', got"),
        ({"splits": ("val",)}, r"Expected splits to hold 'train'.* got \('val',\)"),
        ({"definitions": ["height"]}, r"Expected definitions to list some of 'barrier', 'instability'"),
        ({"extras": ("layer",)}, r"Expected extras to list some of 'distances', 'soup', 'layers'"),
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
        (
            lambda: [barrier()],
            r"nothing to compare with. Add CheckpointBranching .*'initial', 'previous', 'average' or the path",
        ),
        (
            lambda: [barrier(reference="first")],
            r"Expected reference to be 'initial', 'previous', 'average' or a checkpoint file",
        ),
        (
            lambda: [CheckpointBranching(epochs=(0,)), barrier(reference="initial")],
            r"compares children with the trunk; got reference='initial' too. Leave it out",
        ),
        (
            lambda: [CheckpointBranching(epochs=(0,)), barrier(every_n_train_steps=2)],
            r"after later epochs; got a schedule of steps. Pass epochs= or every_n_epochs=",
        ),
        (
            lambda: [barrier(reference="initial", splits=("train", "test"))],
            r"A run sees no test batches .* Give it a datamodule with probe_batches",
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
