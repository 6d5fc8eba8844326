"""Phases of a study that is planted: each corner of the map has the one that its numbers are made for."""

import numpy as np
import pandas as pd
import pytest

from lmc_lightning.experiments.phases import COLUMNS, Thresholds, phase_maps, phase_table, with_phases
from lmc_lightning.plotting.phases import plot_phases
from lmc_lightning.plotting.style import pixels

WIDTHS, SIZES, SEEDS = (1, 2, 4, 8), (16, 64, 256), (0, 1, 2)
CELLS = {"test_accuracy", "train_loss", "lambda_max", "trace"}


def planted(width: int, size: int, seed: int) -> dict[str, float]:
    """Connected from width 4 on, sharp below batch size 64, alike at width 8."""
    wobble = 0.01 * (seed - 1)
    return {
        "test_accuracy": 0.5 + 0.05 * width + wobble,
        "train_loss": 1 / width,
        "lambda_max": (1000.0 if size < 64 else 10.0) * 10**wobble,
        "trace": 1e4 * 10**wobble,
        "connectivity": (-0.1 if width < 4 else 0.005) + wobble,
        "similarity": 0.1 * width + wobble,
        "distance": 10.0,
    }


def collected() -> pd.DataFrame:
    rows = []
    for width in WIDTHS:
        for size in SIZES:
            for seed in SEEDS:
                common = {"width": width, "batch_size": size}
                for name, value in planted(width, size, seed).items():
                    kind = "cell" if name in CELLS else "pair"
                    task = f"{kind}-{width}-{size}-{seed}"
                    own = {"kind": kind, "task": task, "cell": task, "name": COLUMNS[name], "value": value, "step": 9}
                    rows.append({**common, **own, "seed": seed if kind == "cell" else np.nan})
                    # An earlier visit, and a failed one, do not count.
                    rows.append({**rows[-1], "value": 1e9, "step": 3})
                    rows.append({**rows[-1], "value": np.nan, "step": 12})
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_numbers_are_means_over_seeds_and_of_logarithms():
    points = phase_table(collected(), "width", "batch_size")
    assert len(points) == len(WIDTHS) * len(SIZES)
    assert set(points["num_runs"]) == {3}
    for row in points.to_dict("records"):
        exact = planted(row["width"], row["batch_size"], 1)
        exact |= {name: np.log10(exact[name]) for name in ("lambda_max", "trace")}
        assert {name: row[name] for name in exact} == pytest.approx(exact, abs=1e-12)


def test_each_corner_has_its_phase():
    points, used = with_phases(phase_table(collected(), "width", "batch_size"), Thresholds(similarity=0.6))
    found = points.set_index(["width", "batch_size"])["phase"]
    assert found[1, 16] == found[2, 16] == "I"
    assert found[1, 64] == found[2, 256] == "II"
    assert found[4, 16] == found[8, 16] == "III"
    assert found[4, 64] == found[4, 256] == "IV-A"
    assert found[8, 64] == found[8, 256] == "IV-B"
    assert used.lambda_max == pytest.approx(100)  # the geometric middle of 10 and 1,000
    assert with_phases(points)[1].similarity == pytest.approx((0.1 + 0.8) / 2)


def test_thresholds_decide_and_a_positive_connectivity_is_connected():
    points = pd.DataFrame({"lambda_max": [1.0] * 3, "connectivity": [-0.03, -0.01, 0.2], "similarity": [0.5] * 3})
    assert with_phases(points, Thresholds(lambda_max=5))[0]["phase"].tolist() == ["I", "III", "III"]
    assert with_phases(points, Thresholds(50, similarity=0.4))[0]["phase"].tolist() == ["II", "IV-B", "IV-B"]
    assert with_phases(points, Thresholds(50, -0.05, 0.6))[0]["phase"].tolist() == ["IV-A"] * 3


def test_what_is_not_known_has_no_phase():
    points = pd.DataFrame(
        {"lambda_max": [1.0, np.nan, 1.0], "connectivity": [0.0, 0.0, -1.0], "similarity": [np.nan, 1.0, np.nan]}
    )
    assert with_phases(points, Thresholds(50, similarity=0.5))[0]["phase"].tolist() == ["", "", "II"]


def test_a_curvature_that_is_not_positive_has_no_logarithm():
    table = collected()
    table.loc[table["name"] == COLUMNS["trace"], "value"] = -1.0
    assert phase_table(table, "width", "batch_size")["trace"].isna().all()


def test_all_maps_are_on_one_figure_and_hold_the_numbers():
    table = collected()
    table = table[~((table["width"] == 8) & (table["kind"] == "pair"))]
    maps = phase_maps(table, "width", "batch_size")
    assert maps.loads == list(WIDTHS)
    assert maps.temperatures == list(SIZES)
    assert maps.phases[:, 3].tolist() == ["", "", ""]
    assert maps.values["test_accuracy"].shape == (3, 4)
    assert maps.values["test_accuracy"][0] == pytest.approx([0.5 + 0.05 * w for w in WIDTHS])
    figure = plot_phases(maps)
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    assert titles == [
        "test accuracy",
        "training loss",
        "log₁₀ λ_max",
        "log₁₀ trace",
        "connectivity",
        "CKA",
        "distance ‖Δθ‖",
        "phase",
    ]
    assert "λ_max ≥ 100" in figure.get_supxlabel()
    (phase_axes,) = (ax for ax in figure.axes if ax.get_title(loc="left") == "phase")
    assert {text.get_text() for text in phase_axes.texts} == {"I", "II", "III", "IV-B"}
    assert pixels(figure).shape[2] == 3


def test_lists_are_in_the_order_of_their_numbers():
    table = collected().assign(hidden_sizes=lambda t: t["width"].map(lambda w: f"[{4 * w}]"))
    maps = phase_maps(table, "hidden_sizes", "batch_size")
    assert maps.loads == ["[4]", "[8]", "[16]", "[32]"]
    assert maps.values["train_loss"][0] == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8])


def test_an_unknown_axis_is_named():
    with pytest.raises(ValueError, match=r"varies no 'depth'\. Its columns: width, batch_size"):
        phase_table(collected(), "depth", "batch_size")
