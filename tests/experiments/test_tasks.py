"""Tasks of a real study: done once, resumed exactly, and recorded however they end."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmc_lightning.experiments.collect import collect, runs, write_table
from lmc_lightning.experiments.plans import build
from lmc_lightning.experiments.plans.study import Study, with_overrides
from lmc_lightning.experiments.results.hparams import write_hparams
from lmc_lightning.experiments.work import tasks
from lmc_lightning.experiments.work.forecast import forecast, sample
from lmc_lightning.experiments.work.tasks import Task, outcome_of, run_task, tasks_of
from tests.experiments.studies import BRANCHED, PLAN, run_all


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("branched")
    return folder, run_all(BRANCHED, folder)


def test_all_tasks_of_a_study_complete(branched):
    _, outcomes = branched
    assert {o.reason for o in outcomes.values()} == {None}
    assert {o.status for o in outcomes.values()} == {"completed"}
    (pair,) = (o for o in outcomes.values() if o.kind == "pair")
    assert pair.metrics["barrier/test_loss"] >= 0
    assert pair.hyperparameters == {"seed_a": 0, "seed_b": 1}
    family = next(o for o in outcomes.values() if o.kind == "family")
    assert {"barrier/train_loss/k1_001@6", "barrier/val_error/k1_001@6"} <= set(family.metrics)


def test_what_is_shown_of_a_family_is_at_the_step_where_its_trunk_ended(branched):
    folder, _ = branched
    figures = [path.stem for path in folder.glob("cells/*/lmc/figures/barrier_*.png")]
    assert len(figures) > 4
    assert {name[-7:] for name in figures} == {"_000006"}
    assert {"barrier/val_error/k1_001", "sharpness/worst_case"} <= set(write_hparams(folder))
    for cell in (folder / "cells").iterdir():
        events = EventAccumulator(str(cell)).Reload()
        assert {i.step for tag in events.Tags()["images"] for i in events.Images(tag) if tag.startswith("barrier")} == {
            6
        }
        assert [found.step for found in events.Tensors("report/measured/text_summary")][-1] == 6


def test_done_tasks_are_not_done_again(branched, monkeypatch):
    folder, outcomes = branched
    monkeypatch.setattr(tasks, "_run", None)
    again = run_all(BRANCHED, folder)
    assert {i: o.metrics for i, o in again.items()} == {i: o.metrics for i, o in outcomes.items()}


def test_a_study_makes_one_tidy_table(branched, tmp_path):
    folder, _ = branched
    table = collect(folder)
    assert set(table["kind"]) == {"cell", "child", "family", "pair"}
    assert set(table.loc[table["kind"] == "cell", "seed"]) == {0, 1}
    sharpness = table[table["name"] == "sharpness/worst_case"]
    assert sharpness.groupby("cell")["step"].apply(list).tolist() == [[0, 6], [0, 6]]
    barriers = table[(table["kind"] == "family") & (table["name"] == "barrier/val_loss/k1_001")]
    assert set(barriers["child"]) == {"k1_001_child_0"}
    wide = runs(table)
    assert len(wide) == 2
    assert wide["val_acc"].between(0, 1).all()
    assert {"sharpness/worst_case@0", "sharpness/worst_case@2"} <= set(runs(table, epochs=[0, 2]).columns)
    for name in ("table.csv", "table.parquet"):
        write_table(table, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


SHARPNESS = {"class_path": "Sharpness", "init_args": {"num_examples": 32, "num_samples": 2}}
BEST = {  # the loss falls, so that the largest is that of the first epoch
    "class_path": "ModelCheckpoint",
    "init_args": {"monitor": "train_loss_epoch", "mode": "max", "save_on_train_epoch_end": True},
}


def test_the_network_of_a_monitored_checkpoint_is_the_one_that_is_kept_and_measured(tmp_path):
    one = {**PLAN, "grid": {}, "seeds": [0], "measured": [SHARPNESS], "pairs": []}
    one = with_overrides(one, {"base.trainer.callbacks": []})
    best = with_overrides(one, {"base.trainer.callbacks": [BEST], "seeds": [0, 1]})
    best["pairs"] = [{"measures": {"distance": {}}}]
    (first,) = run_all(with_overrides(one, {"base.trainer.max_epochs": 1}), tmp_path / "one").values()
    (last,) = run_all(one, tmp_path / "two").values()
    kept, _, pair = run_all(best, tmp_path / "best").values()
    assert kept.metrics["kept_epoch"] == 1
    assert kept.metrics["epochs"] == 2
    for name in ("sharpness/worst_case", "val_loss", "val_acc"):
        assert kept.metrics[name] == first.metrics[name] != last.metrics[name]
    paths = [tmp_path / name / "cells" / o.id / tasks.WEIGHTS for name, o in (("one", first), ("best", kept))]
    a, b = (torch.load(path) for path in paths)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert pair.status == "completed"


@pytest.mark.parametrize(
    ("measured", "words"),
    [([SHARPNESS, SHARPNESS], "Give one of them a name="), ([{"class_path": "Timer"}], "not by 'Timer'")],
)
def test_what_cannot_be_measured_fails_with_its_reason(measured, words, tmp_path):
    content = {**PLAN, "grid": {}, "seeds": [0], "measured": measured}
    (outcome,) = run_all(with_overrides(content, {"base.trainer.max_epochs": 1}), tmp_path).values()
    assert outcome.status == "failed"
    assert words in outcome.reason


class Interrupted(BaseException):
    """As abrupt as a kill: no task records it."""


def test_an_interrupted_cell_goes_on_to_the_same_bits(branched, tmp_path, monkeypatch):
    folder, outcomes = branched
    study = Study.of(BRANCHED)
    task = tasks_of(study)[0]

    class StopsAfterTheFirstEpoch(build.ResumableNoise):
        def on_train_epoch_start(self, trainer, pl_module):
            super().on_train_epoch_start(trainer, pl_module)
            if trainer.current_epoch == 1:
                raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(build, "ResumableNoise", StopsAfterTheFirstEpoch)
        with pytest.raises(Interrupted):
            run_task(study, task, tmp_path)
    home = tasks.cell_folder(tmp_path, task.id)
    assert (home / build.LAST).is_file()
    assert outcome_of(tmp_path, task.id) is None
    checkpoint = torch.load(home / build.LAST, weights_only=False)
    checkpoint["callbacks"] = {("ResumableNoise" if "Stops" in k else k): v for k, v in checkpoint["callbacks"].items()}
    torch.save(checkpoint, home / build.LAST)  # under the name that it has without this test
    resumed = run_task(study, task, tmp_path)
    assert resumed.reason is None
    assert resumed.metrics == outcomes[task.id].metrics
    first, second = (
        torch.load(tasks.cell_folder(f, task.id) / tasks.WEIGHTS, weights_only=True) for f in (folder, tmp_path)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (home / build.LAST).exists()


def test_a_cell_killed_after_its_last_epoch_still_has_its_metrics(branched, tmp_path, monkeypatch):
    _, outcomes = branched
    study = Study.of(BRANCHED)
    task = tasks_of(study)[0]

    def killed(path, write):
        if path.name == tasks.WEIGHTS:
            raise Interrupted
        write_atomic(path, write)

    write_atomic = tasks.write_atomic
    with monkeypatch.context() as patched:
        patched.setattr(tasks, "write_atomic", killed)
        with pytest.raises(Interrupted):
            run_task(study, task, tmp_path)
    again = run_task(study, task, tmp_path)
    assert again.reason is None
    assert again.metrics == outcomes[task.id].metrics


def test_a_torn_checkpoint_is_put_aside(tmp_path):
    study = Study.of(PLAN)
    task = tasks_of(study)[0]
    home = tasks.cell_folder(tmp_path, task.id)
    home.mkdir(parents=True)
    (home / build.LAST).write_bytes(b"half a checkp")
    assert run_task(study, task, tmp_path).reason is None
    assert (home / "last.damaged").is_file()


def test_failures_are_recorded_with_their_reason_and_tried_again(tmp_path):
    study = Study.of({**PLAN, "grid": {"model.init_args.network": ["no_such_network"]}, "seeds": [0]})
    (task,) = tasks_of(study)
    failed = run_task(study, task, tmp_path)
    assert failed.status == "failed"
    assert "network must be one of" in failed.reason
    assert collect(tmp_path)["task_status"].tolist() == ["failed"]
    assert json.loads(tasks.record_path(tmp_path, task.id).read_text())["about"]["traceback"].startswith("Traceback")
    waiting = run_task(study, Task("later", "family", task.cells, (task.id,)), tmp_path)
    assert (waiting.status, waiting.reason) == ("waiting", f"{task.id} is not completed")


def test_pairs_have_all_measures_and_unknown_ones_are_named(branched):
    folder, outcomes = branched
    cells = [o.id for o in outcomes.values() if o.kind == "cell"]
    study = Study.of(BRANCHED)
    known = {"curve": {"num_epochs": 1, "num_points": 3, "batch_size": 32}, "similarity": {}, "distance": {}}
    known["volume"] = {"thresholds": [10.0], "accuracies": [0.01], "num_directions": 4}
    known["aligned_barrier"] = {"num_points": 3, "num_examples": 32, "splits": ["test"]}
    found = run_task(study, Task("more", "pair", tuple(cells), measures=known), folder)
    assert found.reason is None
    assert found.metrics["curve/length"] >= found.metrics["curve/line_length"]
    assert found.metrics["distance/l2"] == pytest.approx(found.metrics["curve/line_length"], rel=1e-6)
    assert found.metrics["aligned_barrier/test_loss"] >= 0
    assert found.metrics["volume/cutoff/tau_10"] == found.metrics["volume/cutoff/accuracy_0.01"] == 0
    assert -0.2 < found.metrics["similarity/mean"] <= 1
    tasks.record_path(folder, "more").unlink()
    outcome = run_task(study, Task("odd", "pair", tuple(cells), measures={"nope": {}}), folder)
    assert (
        "A pair is measured by aligned_barrier, barrier, curve, distance, plane, similarity, volume, not"
        in outcome.reason
    )
    tasks.record_path(folder, "odd").unlink()


def test_a_forecast_counts_what_is_left(branched, tmp_path):
    folder, _ = branched
    every = tasks_of(Study.of(BRANCHED))
    done = forecast(every, folder)
    assert done.left_seconds == 0
    assert done.done == done.total == {"cell": 2, "child": 2, "family": 2, "pair": 1}
    assert done.bytes_per_cell > 1000
    nothing = forecast(every, tmp_path / "new" / "folder")
    assert nothing.left_seconds is None
    assert "2 cells (0 done)" in str(nothing)
    assert [task.kind for task in sample(every)] == ["cell", "child"]


def test_a_thousand_records_are_collected_fast_enough_to_be_read_whole(tmp_path):
    """The benchmark is in benchmarks/collect.py; here only that many records make one table."""
    (tmp_path / "records").mkdir()
    for i in range(200):
        content = {
            "id": f"{i:012x}",
            "kind": "cell",
            "status": "completed",
            "cells": [f"{i:012x}"],
            "hyperparameters": {"width": 2 ** (i % 8), "seed": i // 8},
            "metrics": {"val_acc": i / 200, "steps": 10, "epochs": 1},
        }
        tasks.record_path(tmp_path, content["id"]).write_text(json.dumps(content))
    wide = runs(collect(tmp_path))
    assert len(wide) == 200
    assert wide["val_acc"].sum() == pytest.approx(sum(range(200)) / 200)


def test_no_records_are_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"got {tmp_path}"):
        collect(tmp_path)
