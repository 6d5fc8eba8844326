"""Pictures of whole studies show the numbers that they were given."""

import numpy as np
import pandas as pd
import pytest
import torch

from lmc_lightning.landscape.statistics.correlations import correlations
from lmc_lightning.landscape.trajectory.convergence import convergence
from lmc_lightning.plotting.studies import plot_correlations, plot_ends, plot_settings, plot_volume_sizes


def test_each_number_of_a_setting_is_where_it_belongs():
    means = pd.DataFrame(
        {
            "setting": ["a", "b", "a"],
            "value": ["val_loss", "val_loss", "hessian/trace"],
            "mean": [0.5, 0.25, 40.0],
            "stderr": [0.1, np.nan, 3.0],
            "n": [3, 1, 3],
        }
    )
    figure = plot_settings(means)
    shown = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.axison}
    assert [*shown] == ["val_loss", "hessian/trace"]
    points = shown["val_loss"].lines[0].get_xydata()
    assert points.tolist() == [[0.5, 0], [0.25, 1]]
    assert [t.get_text() for t in shown["val_loss"].get_yticklabels()] == ["a", "b"]


def test_correlations_are_written_with_what_the_runs_can_tell_in_bold():
    x = np.arange(12.0)
    noise = np.random.default_rng(0).normal(size=12)
    table = pd.DataFrame({"x": x, "noise": noise, "y": -x})
    found = correlations(table, ["x", "noise"], ["y"], methods=("spearman",), num_resamples=200)
    ax = plot_correlations(found)
    texts = {t.get_text(): t.get_fontweight() for t in ax.texts[:2]}
    assert texts["-1.00"] == "bold"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["x", "noise"]
    assert ax.images[0].get_array()[0, 0] == pytest.approx(-1)


def test_volumes_are_lines_over_size_by_level():
    rows = [
        {"size": size, "level": level, "value": value, "mean": size + place, "stderr": 1.0, "n": 3}
        for size in (600.0, 60.0)
        for place, (level, value) in enumerate([("tau_0.1", "log_volume"), ("accuracy_0.95", "log_volume")])
    ]
    left, _ = plot_volume_sizes(pd.DataFrame(rows), "examples").axes
    drawn = {c.get_label(): c.lines[0].get_xydata().tolist() for c in left.containers}
    assert drawn == {"loss ≤ 0.1": [[60, 60], [600, 600]], "accuracy ≥ 0.95": [[60, 61], [600, 601]]}


def test_the_ends_are_distributions_of_loss_and_error():
    ends = [torch.zeros(3), torch.ones(3)]
    both = plot_ends(convergence(ends, [0.5, 0.25], [0.1, 0.2])).axes
    assert [ax.get_xlabel() for ax in both] == ["final loss", "final error"]
    assert [ax.lines[0].get_xdata().tolist() for ax in both] == [[0.25, 0.5], [0.1, 0.2]]
    (only,) = plot_ends(convergence(ends, [0.5, 0.25])).axes
    assert only.get_xlabel() == "final loss"
