"""Correlations over runs against scipy, closed forms and planted structure."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lmc_lightning.landscape.statistics.correlations import correlations, group_means, holm

FEW = {"num_resamples": 200}


def gaussian_pairs(rho: float, n: int, seed: int = 0) -> pd.DataFrame:
    z = np.random.default_rng(seed).standard_normal((n, 2))
    return pd.DataFrame({"x": z[:, 0], "y": rho * z[:, 0] + np.sqrt(1 - rho**2) * z[:, 1]})


def row(result: pd.DataFrame, method: str = "pearson", scope: str = "all", **where: str) -> pd.Series:
    chosen = result[(result["method"] == method) & (result["scope"] == scope)]
    for column, value in where.items():
        chosen = chosen[chosen[column] == value]
    return chosen.iloc[0]


def test_coefficients_are_those_of_scipy():
    table = gaussian_pairs(0.6, 30)
    result = correlations(table, ["x"], ["y"], **FEW)
    assert row(result)["r"] == pytest.approx(stats.pearsonr(table.x, table.y).statistic, rel=1e-12)
    assert row(result, "spearman")["r"] == pytest.approx(stats.spearmanr(table.x, table.y).statistic, rel=1e-12)
    assert row(result, "kendall")["r"] == pytest.approx(stats.kendalltau(table.x, table.y).statistic, rel=1e-12)
    assert (result["n"] == 30).all()


def test_below_five_runs_there_is_a_coefficient_alone():
    found = row(correlations(gaussian_pairs(0.6, 4), ["x"], ["y"], **FEW))
    assert np.isfinite(found["r"])
    assert np.isnan(found[["low", "high", "p", "p_holm"]].astype(float)).all()
    assert found["n"] == 4


def test_intervals_cover_the_truth_and_p_values_are_uniform_under_the_null():
    covered, small = [], []
    for seed in range(60):
        found = row(correlations(gaussian_pairs(0.5, 40, seed), ["x"], ["y"], methods=["pearson"], **FEW))
        covered.append(found["low"] <= 0.5 <= found["high"])
        null = row(
            correlations(gaussian_pairs(0.0, 12, 1000 + seed), ["x"], ["y"], methods=["kendall"], **FEW), "kendall"
        )
        small.append(null["p"] <= 0.2)
    assert 0.85 <= np.mean(covered) <= 0.99
    assert abs(np.mean(small) - 0.2) < 3.3 * np.sqrt(0.16 / 60)


def simpson(num_cells: int = 6, seeds: int = 8) -> pd.DataFrame:
    """Within each cell y falls with x; over the cells it rises."""
    rng = np.random.default_rng(3)
    cell = np.repeat(np.arange(num_cells), seeds)
    deviation = rng.standard_normal(len(cell))
    noise = 0.1 * rng.standard_normal(len(cell))
    return pd.DataFrame({"width": cell, "x": 5.0 * cell + deviation, "y": 5.0 * cell - deviation + noise})


def test_within_and_between_cells_are_told_apart():
    result = correlations(simpson(), ["x"], ["y"], cells=["width"], given=["width"], **FEW)
    assert row(result)["r"] > 0.9
    assert row(result, scope="between_cells")["r"] > 0.99
    for scope in ("within_cells", "partial"):
        found = row(result, scope=scope)
        assert found["r"] < -0.9
        assert found["high"] < 0
        assert found["p"] == pytest.approx(1 / 201)
    assert np.isnan(row(result)["p"])
    assert (result["num_cells"] == 6).all()


def test_the_partial_coefficient_is_the_textbook_one():
    rng = np.random.default_rng(0)
    z = rng.standard_normal(50)
    table = pd.DataFrame({"z": z, "x": z + rng.standard_normal(50), "y": 2 * z + rng.standard_normal(50)})
    xy, xz, yz = (stats.pearsonr(table[a], table[b]).statistic for a, b in ("xy", "xz", "yz"))
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert row(correlations(table, ["x"], ["y"], given=["z"], **FEW), scope="partial")["r"] == pytest.approx(expected)


def test_pairs_that_share_networks_are_resampled_by_network():
    rng = np.random.default_rng(1)
    effect = rng.standard_normal(12)  # of each network, so that pairs are far from independent
    pairs = [(a, b) for a in range(12) for b in range(a)]
    x = [effect[a] + effect[b] for a, b in pairs]
    y = [effect[a] + effect[b] + 0.5 * rng.standard_normal() for a, b in pairs]
    table = pd.DataFrame({"a": [a for a, _ in pairs], "b": [b for _, b in pairs], "x": x, "y": y})
    by_row = row(correlations(table, ["x"], ["y"], methods=["pearson"], **FEW))
    by_node = row(correlations(table, ["x"], ["y"], nodes=["a", "b"], methods=["pearson"], **FEW))
    assert by_node["high"] - by_node["low"] > 1.3 * (by_row["high"] - by_row["low"])


def test_holm_is_over_the_table_and_keeps_unknowns():
    assert holm([0.01, 0.04, 0.03, np.nan]).tolist()[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert np.isnan(holm([0.01, np.nan])[1])
    assert holm([0.6, 0.9]).tolist() == [1.0, 1.0]
    table = gaussian_pairs(0.8, 20).assign(w=np.random.default_rng(2).standard_normal(20))
    result = correlations(table, ["x", "w"], ["y"], methods=["pearson"], **FEW)
    assert result["p_holm"].tolist() == pytest.approx(holm(result["p"]).tolist())
    assert row(result, metric="x")["p_holm"] == pytest.approx(2 * row(result, metric="x")["p"])


def test_rows_without_a_value_are_left_out_and_constants_have_no_coefficient():
    table = gaussian_pairs(0.6, 10).assign(c=1.0)
    table.loc[0, "x"] = np.nan
    result = correlations(table, ["x", "c"], ["y"], methods=["spearman"], **FEW)
    assert row(result, "spearman", metric="x")["n"] == 9
    assert np.isnan(row(result, "spearman", metric="c")["r"])


def test_unknown_columns_are_named():
    with pytest.raises(ValueError, match=r"no column \['nope'\]"):
        correlations(gaussian_pairs(0.5, 5), ["nope"], ["y"])


@pytest.mark.parametrize(("error", "half"), [("std", 2.0), ("stderr", 1.0), ("ci95", np.nan)])
def test_error_bars_are_of_the_named_kind(error, half):
    table = pd.DataFrame({"g": ["a"] * 4, "v": [1.0, 1.0, 4.0, 4.0 + 0.0]})
    found = group_means(table, ["v"], ["g"], error=error).iloc[0]
    assert found["mean"] == 2.5
    assert found["high"] - found["mean"] == pytest.approx(half * np.sqrt(3) / 2, nan_ok=True)
    assert (found["error"], found["n"]) == (error, 4)


def test_student_intervals_of_means():
    values = np.array([1.0, 2.0, 3.0, 4.0, 6.0])
    found = group_means(pd.DataFrame({"g": 1, "v": values}), ["v"], ["g"], error="ci95").iloc[0]
    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))


def test_other_error_bars_are_refused():
    with pytest.raises(ValueError, match="'std', 'stderr' or 'ci95'"):
        group_means(pd.DataFrame({"g": [1], "v": [1.0]}), ["v"], ["g"], error="sem")
