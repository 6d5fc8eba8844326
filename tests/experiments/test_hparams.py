"""What TensorBoard knows of a study: read back from the event files, and through its own hparams plugin."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from lmc_lightning.experiments.plans.study import Study
from lmc_lightning.experiments.results.hparams import write_hparams
from lmc_lightning.experiments.work.tasks import cell_folder, run_task, tasks_of
from tests.experiments.studies import PLAN


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cells: one with another network argument, which the others do not have, and one that fails."""
    folder = tmp_path_factory.mktemp("study")
    listed = [
        {"model.init_args.lr": 0.1},
        {
            "model.init_args.lr": 0.3,
            "model.init_args.network_kwargs.init": "xavier",
            "data.init_args.val_fraction": 0.5,
        },
        {"model.init_args.network": "no_such_network"},
    ]
    plan = Study.of({**PLAN, "grid": {}, "list": listed, "seeds": [0]})
    for task in tasks_of(plan):
        run_task(plan, task, folder)
    return folder


def summaries(folder: Path) -> list:
    """Tag and content of all that the hparams plugin is told in a folder's own event files."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    values = [v for file in files for event in EventFileLoader(str(file)).Load() for v in event.summary.value]
    return [(v.tag, v.metadata.plugin_data) for v in values if v.metadata.plugin_data.plugin_name == "hparams"]


def cells(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cells").iterdir() if (path / "weights.pt").is_file())


def test_each_run_has_a_session_and_the_root_one_experiment(study):
    for _ in range(2):  # a second call replaces what the first one wrote
        shown = write_hparams(study)
    assert shown == ["val_acc", "val_loss", "train_loss", "sharpness/worst_case", "sharpness/gradient_norm"]
    assert len(cells(study)) == 2
    for cell in cells(study):
        assert [tag for tag, _ in summaries(cell)] == [SESSION_START_INFO_TAG, SESSION_END_INFO_TAG]
    ((tag, data),) = summaries(study)
    assert tag == EXPERIMENT_TAG
    experiment = parse_experiment_plugin_data(data.content)
    assert [info.name.tag for info in experiment.metric_infos] == shown
    named = {info.name for info in experiment.hparam_infos}
    assert named == {"lr", "init", "val_fraction", "network", "seed"}


def test_no_run_has_a_gap_and_numbers_stay_numbers(study):
    write_hparams(study)
    found = {}
    for cell in cells(study):
        (start, _) = summaries(cell)
        info = parse_session_start_info_plugin_data(start[1].content)
        found[info.hparams["lr"].number_value] = {
            name: getattr(v, v.WhichOneof("kind")) for name, v in info.hparams.items()
        }
    first, second = found[0.1], found[0.3]
    assert first == {"lr": 0.1, "init": "–", "val_fraction": 0.2, "network": "mlp", "seed": 0}
    assert second == {"lr": 0.3, "init": "xavier", "val_fraction": 0.5, "network": "mlp", "seed": 0}


def test_metrics_are_tags_that_the_runs_logged(study):
    shown = write_hparams(study)
    for cell in cells(study):
        files = sorted(cell.glob("events.out.tfevents.*"))
        tags = {v.tag for f in files for event in EventFileLoader(str(f)).Load() for v in event.summary.value}
        assert set(shown) <= tags


def test_a_study_without_completed_runs_has_nothing_to_show(tmp_path):
    plan = Study.of({**PLAN, "grid": {"model.init_args.network": ["no_such_network"]}, "seeds": [0]})
    (task,) = tasks_of(plan)
    run_task(plan, task, tmp_path)
    assert write_hparams(tmp_path) == []
    assert not list(tmp_path.glob("events*"))
    assert not cell_folder(tmp_path, task.id).joinpath("weights.pt").exists()
