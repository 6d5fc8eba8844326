import numpy as np
import pytest

from lmc_lightning.plotting.differences import plot_differences
from lmc_lightning.plotting.zoom import plot_zoom


def test_long_curves_are_averaged_over_a_fortieth_and_short_ones_drawn_as_they_are() -> None:
    steps = np.arange(400.0)
    long = np.stack([steps, steps % 2], axis=1)
    ax = plot_differences({"a": long, "b": long[:5]}, title="t", ylabel="y", caption="c", forks=[3.0, 4.0])
    zero, faint, mean, short, *_ = (line for line in ax.lines if line.get_linestyle() == "-")
    np.testing.assert_array_equal(zero.get_ydata(), [0, 0])
    np.testing.assert_array_equal(faint.get_xydata(), long)
    np.testing.assert_allclose(mean.get_ydata(), 0.5)  # of ten alternating values
    np.testing.assert_allclose(mean.get_xdata(), np.arange(391) + 4.5)
    np.testing.assert_array_equal(short.get_xydata(), long[:5])
    assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"] == [3, 4]
    assert ax.get_yscale() == "linear"
    assert "c" in ax.texts[0].get_text()
    with pytest.raises(ValueError, match="at least one curve"):
        plot_differences({}, title="t", ylabel="y")


def test_a_spike_does_not_hide_the_rest() -> None:
    curve = np.stack([np.arange(10.0), [0.1] * 9 + [300.0]], axis=1)
    ax = plot_differences({"a": curve}, title="t", ylabel="loss")
    assert ax.get_yscale() == "symlog"
    assert ax.get_ylabel() == "loss (log beyond ±0.1)"
    assert ax.get_legend() is None
    zeros = plot_differences({"a": curve * [1, 0]}, title="t", ylabel="loss")
    assert zeros.get_yscale() == "linear"


def test_a_zoom_has_a_panel_for_each_quantity_and_shades_the_span() -> None:
    curve = np.stack([np.arange(5.0), np.ones(5)], axis=1)
    figure = plot_zoom({"train_loss": curve, "hessian/lambda_max": curve[1:3]}, (1, 2), title="t", caption="exact")
    first, second = figure.axes
    assert [ax.get_ylabel() for ax in figure.axes] == ["train_loss", "hessian/\nlambda_max"]
    assert [ax.patches[0].get_x() for ax in figure.axes] == [1, 1]
    assert (first.get_title(loc="left"), "exact" in first.texts[0].get_text()) == ("t", True)
    np.testing.assert_array_equal(second.lines[0].get_xydata(), curve[1:3])
    with pytest.raises(ValueError, match="at least one curve"):
        plot_zoom({}, (0, 1), title="t")
