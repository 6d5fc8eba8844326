"""Curves between the networks of a family, or between a run and its reference, as they are logged."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lmc_lightning import CheckpointBranching, CurveTraining, InterpolationBarrier, ModeConnectivity, connect, measure
from lmc_lightning.branching.family.lineage import Family
from tests.callbacks.runs import (
    Classifier,
    TensorBoardLogger,
    batches,
    documented,
    fit,
    is_picture,
    loader,
    train_loader,
)

TRAINING = CurveTraining(num_epochs=4, lr=0.05)


def curves(**options: Any) -> ModeConnectivity:
    defaults: dict[str, Any] = {"training": TRAINING, "num_points": 5, "batch_size": 8, "on_error": "raise"}
    return ModeConnectivity(**{**defaults, **options})


class Branched:
    """Two epochs with two children after none of them, compared by lines and by curves."""

    def __init__(self, root: Path) -> None:
        self.logger, self.module = TensorBoardLogger(), Classifier(batch_norm=True)
        self.branching = CheckpointBranching(epochs=(0,), children=2)
        self.curves = curves(epochs=[2], definitions=("barrier", "signed_deviation"))
        self.lines = InterpolationBarrier(num_points=5, epochs=[2], on_error="raise")
        ours = (self.branching, self.curves, self.lines)
        val = loader(12, seed=40)
        self.trainer = fit(self.module, *ours, val=val, logger=self.logger, default_root_dir=root)

    def record(self, name: str) -> Any:
        (found,) = [r for r in self.curves.results if (r.name, r.step) == (name, 6)]
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Branched:
    return Branched(tmp_path_factory.mktemp("curves"))


ROWS = documented(ModeConnectivity)
QUALIFIERS = {key.removeprefix("…/") for key in ROWS if key.startswith("…/")} - {"{definition}"}
PAIR = r"k1_000/child_[01]"


def test_every_pair_is_logged_under_the_keys_of_the_table(run: Branched) -> None:
    keys = run.logger.by_step("path")[6]
    metrics = r"path/(train|val)_(loss|error)"
    qualifier = "|".join(sorted(QUALIFIERS | {"signed_deviation"}))
    whole = "|".join(re.escape(k.split("/")[1]) for k in ROWS if re.match(r"path/[a-z_]+/k1", k))
    pattern = rf"{metrics}/{PAIR}(/({qualifier}))?(_stderr)?|path/({whole})/{PAIR}"
    assert [key for key in keys if not re.fullmatch(pattern, key)] == []
    assert {"max", "mean", "arc_mean", "line"} == QUALIFIERS
    assert len(keys) == 2 * (4 * (1 + 5) * 2 + 3)  # children × (metrics × kinds × value and error + of the curve)
    assert {key for _, key in run.logger.figures if key.startswith("path_")} == {
        f"path_curves/{s}_{m}/k1_000/child_{c}" for s in ("train", "val") for m in ("loss", "error") for c in (0, 1)
    }
    assert {k for k, text in ROWS.items() if is_picture(text)} == {"path_curves/…"}


def test_the_line_is_that_of_the_interpolation_barrier(run: Branched) -> None:
    lines = {r.name: r for r in run.lines.results if r.step == 6}
    for metric in ("train_loss", "val_loss", "train_error"):
        own = run.record(f"path/{metric}/k1_000/child_1/line")
        other = lines[f"barrier/{metric}/k1_000/child_1"]
        assert (own.value, own.stderr) == (other.value, other.stderr)
        assert own.evidence["probe_digest"] == other.evidence["probe_digest"]


def test_records_tell_the_curve_the_pair_and_the_policy(run: Branched) -> None:
    evidence = run.record("path/train_loss/k1_000/child_0").evidence
    assert (evidence["path"], evidence["num_bends"], evidence["diverged"]) == ("bezier", 1, False)
    assert (evidence["pair"], evidence["k1"], evidence["later_epoch"]) == ("trunk", 0, 2)
    assert (evidence["batch_stats"], evidence["num_points"], evidence["num_gradients"]) == ("recompute", 5, 4)
    assert len(run.record("path/training_loss/k1_000/child_0").evidence["losses"]) == 4
    assert run.record("path/length_ratio/k1_000/child_0").value >= 1


def test_the_tables_of_curves_and_of_lines_lie_side_by_side(run: Branched) -> None:
    family: Family = run.branching.family
    assert {"barriers.csv", "barriers_path.csv", "barriers_path_mean.csv"} <= {p.name for p in family.folder.iterdir()}
    table = run.curves.to_table()
    assert {"barrier", "signed_deviation", "max", "mean", "arc_mean", "line", "length"} <= set(table["definition"])
    assert table[table["definition"] == "barrier"]["n"].dropna().min() > 1


def test_offline_finds_the_same_curve(run: Branched) -> None:
    family: Family = run.branching.family
    ends = [Classifier(batch_norm=True) for _ in range(2)]
    for end, name in zip(ends, ("trunk", "k1_000_child_1"), strict=True):
        end.load_state_dict(family.state(name, 2))
    seen = run.curves._probes.get("train")
    assert seen is not None
    found = connect(*ends, [b.batch for b in seen.batches], TRAINING, batch_size=8, num_points=5)
    record = run.record("path/train_loss/k1_000/child_1")
    assert found.on_curve["train"]["loss"].barrier == pytest.approx(record.value, rel=1e-4, abs=1e-7)
    assert found.curve.length == pytest.approx(run.record("path/length/k1_000/child_1").value, rel=1e-5)


def test_a_run_is_joined_with_its_start_and_its_last_visit() -> None:
    initial, previous = curves(reference="initial"), curves(reference="previous", name="steps", epochs=[1, 2])
    fit(Classifier(), initial, previous)
    assert {r.name for r in initial.results} >= {"path/train_loss/initial", "path/length/initial"}
    assert {(r.step, r.name) for r in previous.results if "length" in r.name} >= {(6, "path/length/steps/previous")}
    (start,) = [r for r in initial.results if (r.name, r.step) == ("path/train_loss/initial", 0)]
    assert start.value == 0
    assert not [r for r in initial.results if (r.name, r.step) == ("path/length_ratio/initial", 0)]


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected positive batch_size and curve_examples"):
        ModeConnectivity(batch_size=0)
    with pytest.raises(ValueError, match="ModeConnectivity has nothing to compare with"):
        fit(Classifier(), ModeConnectivity())
    with pytest.raises(ValueError, match=r"Call connect\(module_a, module_b, dataloader\)"):
        measure(Classifier(), batches(), [curves(reference="initial")])


def test_offline_needs_modules_of_one_architecture_and_a_loss() -> None:
    with pytest.raises(ValueError, match="module_a and module_b differ"):
        connect(Classifier(), Classifier(batch_norm=True), train_loader())
    with pytest.raises(ValueError, match="has no training_step"):
        connect(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), batches())
