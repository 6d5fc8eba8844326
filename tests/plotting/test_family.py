import math

import numpy as np
import pytest

from lmc_lightning.plotting.family import plot_family_tree, plot_lines


def labels(ax: object) -> list[str]:
    return [line.get_label() for line in ax.lines if not line.get_label().startswith("_")]  # type: ignore[attr-defined]


def test_lines_are_joined_in_the_order_given_and_have_bars_where_there_are_errors() -> None:
    lines = {"4": [(2.0, 0.5, 0.1), (1.0, 0.2, math.nan)], "8": [(1.0, 0.1, 0.0)]}
    ax = plot_lines(
        lines, title="t", xlabel="k₁", ylabel="barrier", caption="data", legend="later epoch", threshold=0.02
    )
    by_label = {line.get_label(): line for line in ax.lines}
    np.testing.assert_array_equal(by_label["4"].get_xdata(), [2, 1])
    np.testing.assert_array_equal(by_label["4"].get_ydata(), [0.5, 0.2])
    assert by_label["0.02"].get_ydata() == [0.02, 0.02]
    (bars,) = ax.containers
    assert len(bars.lines[2][0].get_segments()) == 1
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")) == ("k₁", "barrier", "t")
    assert ax.get_legend().get_title().get_text() == "later epoch"
    assert "data" in ax.texts[0].get_text()


def test_one_line_needs_no_legend_and_what_is_not_finite_is_left_out() -> None:
    ax = plot_lines({"a": [(1, math.nan, 0), (2, 3, 0)], "b": [(math.nan, 1, 0)]}, title="t", xlabel="x", ylabel="y")
    assert labels(ax) == ["a"]
    assert ax.get_legend() is None
    with pytest.raises(ValueError, match="2 lines without a finite point"):
        plot_lines({"a": [(1, math.inf, 0)], "b": []}, title="t", xlabel="x", ylabel="y")


def test_every_child_starts_on_the_trunk() -> None:
    runs = [("trunk", 0, 9, ""), ("k1_001_child_0", 3, 9, ""), ("k1_002_child_0", 6, 7, "failed")]
    ax = plot_family_tree(runs, marks=[0, 3, 6, 9], caption="noise fresh")
    assert labels(ax) == ["trunk", "k1_001_child_0", "k1_002_child_0"]
    forks = [line for line in ax.lines if line.get_label() == "_fork"]
    assert [(list(f.get_xdata()), list(f.get_ydata())) for f in forks] == [([3, 3], [0, 1]), ([6, 6], [0, 2])]
    kept = [list(line.get_xdata()) for line in ax.lines if line.get_label() == "_kept"]
    assert kept == [[0, 3, 6, 9], [3, 6, 9], [6]]
    assert [t.get_text() for t in ax.get_yticklabels()][-1] == "k1_002_child_0 (failed)"
    assert ax.lines[-3].get_linestyle() == "--"
    ax.figure.canvas.draw()


def test_a_family_of_many_is_a_tall_figure() -> None:
    few, many = (plot_family_tree([("trunk", 0, 9, "")] + [(f"c{i}", i, 9, "") for i in range(n)]) for n in (1, 40))
    assert many.figure.get_figheight() > 2 * few.figure.get_figheight()
    with pytest.raises(ValueError, match="at least the trunk"):
        plot_family_tree([])
