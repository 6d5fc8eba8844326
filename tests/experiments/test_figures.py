"""What a study's numbers say for each setting, and that each kind of study has its figures."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lmc_lightning.experiments.collect import collect, runs
from lmc_lightning.experiments.results.figures import draw_study
from lmc_lightning.experiments.results.settings import (
    run_correlations,
    setting_means,
    setting_table,
    size_volumes,
    varied,
)
from lmc_lightning.landscape.surface.slices import load_surface
from tests.experiments.studies import BASE, run_all

TRAJECTORY = {"class_path": "WeightTrajectory", "init_args": {"every_n_epochs": 1, "num_examples": 32}}
QUIET = {**BASE, "trainer": {**BASE["trainer"], "callbacks": []}}
SEED_KEYS = ["seed_everything", "model.init_args.init_seed", "data.init_args.noise_seed"]
LINE = {"num_points": 5, "num_examples": 32, "splits": ["train"]}


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates")
    content = {
        "base": QUIET,
        "grid": {"model.init_args.lr": [0.03, 0.1, 0.3]},
        "seeds": [0, 1],
        "seed_keys": SEED_KEYS,
        "measured": [{"class_path": "Sharpness", "init_args": {"num_examples": 32, "num_samples": 2}}],
        "pairs": [
            {"measures": {"barrier": LINE}},
            {"where": {"model.init_args.lr": 0.1}, "measures": {"plane": {"num_points": 3, "num_examples": 32}}},
        ],
    }
    outcomes = run_all(content, folder)
    assert {o.reason for o in outcomes.values()} == {None}
    return folder


def test_means_are_over_the_seeds_of_a_setting_and_over_its_pairs(rates):
    table = collect(rates)
    assert varied(table) == ["lr"]
    means = setting_means(table)
    own = means.set_index(["setting", "value"])
    cells = runs(table).groupby("lr")["val_acc"].agg(["mean", "sem", "count"])
    for lr in (0.03, 0.1, 0.3):
        found = own.loc[(f"lr {lr:g}", "val_acc")]
        assert found[["mean", "stderr", "n"]].tolist() == pytest.approx(cells.loc[lr].tolist())
        assert own.loc[(f"lr {lr:g}", "barrier/train_loss"), "n"] == 1
    shown = setting_table(means).set_index("value")
    assert [*shown.columns] == ["lr 0.03", "lr 0.1", "lr 0.3"]
    mean, stderr = (float(text) for text in shown.loc["sharpness/worst_case", "lr 0.1"].split(" ± "))
    expected = own.loc[("lr 0.1", "sharpness/worst_case")]
    assert mean == pytest.approx(expected["mean"], abs=expected["stderr"])
    assert stderr == pytest.approx(expected["stderr"], rel=0.5)


def test_correlations_are_over_all_runs(rates):
    rows = runs(collect(rates))
    found = run_correlations(collect(rates), num_resamples=20).set_index(["metric", "target", "scope"])
    expected = rows["sharpness/worst_case"].rank().corr(rows["val_loss"].rank())
    assert found.loc[("sharpness/worst_case", "val_loss", "all"), "r"] == pytest.approx(expected)
    assert set(found["n"]) == {6, 3}


def test_a_study_of_settings_has_their_figures(rates):
    assert [path.stem for path in draw_study(rates)] == ["settings", "correlations", "plane_0"]
    assert all(path.stat().st_size > 5000 for path in (rates / "figures").glob("*.png"))
    (file,) = rates.glob("pairs/*/plane.npz")
    surface = load_surface(file)
    pair = collect(rates).set_index("name")["value"]
    assert pair["plane/loss_max"] == float(surface.losses.max())
    assert [mark.label for mark in surface.marks] == ["A", "B"]


def test_runs_that_differ_in_the_seed_have_their_ways_and_ends(tmp_path):
    base = {**BASE, "trainer": {**BASE["trainer"], "callbacks": [TRAJECTORY]}}
    run_all({"base": base, "seeds": [0, 1], "seed_keys": SEED_KEYS}, tmp_path)
    assert [path.stem for path in draw_study(tmp_path)] == ["ways", "ends"]


def test_volumes_are_against_the_size_of_the_data_their_own_included(tmp_path):
    volume = {"thresholds": [5.0], "num_directions": 4}
    key = "data.init_args.max_train_examples"
    pair = {"across": key, "against": 32, "itself": True, "measures": {"volume": volume}}
    outcomes = run_all({"base": QUIET, "grid": {key: [32, 96]}, "seeds": [0], "pairs": [pair]}, tmp_path)
    name, found = size_volumes(collect(tmp_path))
    assert name == "max_train_examples"
    log_volumes = found[found["value"] == "log_volume"].set_index("size")["mean"]
    pairs = [o for o in outcomes.values() if o.kind == "pair"]
    expected = {32: pairs[0].metrics, 96: pairs[1].metrics}
    assert log_volumes.to_dict() == {size: m["volume/log_volume/tau_5"] for size, m in expected.items()}
    assert "volumes" in [path.stem for path in draw_study(tmp_path)]


def test_a_study_without_such_numbers_has_no_table():
    empty = pd.DataFrame({"kind": ["cell"], "name": ["val_acc"], "value": [np.nan], "cell": ["a"], "lr": [0.1]})
    assert varied(empty) == []
    assert size_volumes(empty)[1].empty
