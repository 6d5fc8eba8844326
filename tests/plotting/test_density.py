import numpy as np
import pytest
import torch

from lmc_lightning.plotting.density import plot_densities, plot_density
from lmc_lightning.plotting.style import new_axes

GRID = np.linspace(-3, 3, 61)
DENSITY = np.exp(-20 * GRID**2)


def test_the_curve_is_the_density_on_a_logarithmic_axis() -> None:
    ax = plot_density(torch.from_numpy(GRID), torch.from_numpy(DENSITY), caption="8 probes")
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), GRID)
    np.testing.assert_array_equal(line.get_ydata(), DENSITY)
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("eigenvalue λ", "density")
    assert ax.get_title(loc="left") == "Eigenvalue density of the Hessian"
    assert ax.texts[0].get_text() == "8 probes"


def test_the_axis_ends_where_the_tails_say_nothing() -> None:
    assert plot_density(GRID, DENSITY).get_ylim() == pytest.approx((1e-8, 3))
    assert plot_density(GRID, 50 * DENSITY, floor=1e-3).get_ylim() == pytest.approx((0.05, 150))


def test_what_is_zero_is_left_out_and_nothing_at_all_is_drawn_empty() -> None:
    ax = plot_density(GRID, np.where(GRID < 0, 0, DENSITY))
    assert np.isnan(ax.lines[0].get_ydata()[:30]).all()
    empty = plot_density(GRID, 0 * GRID)
    empty.figure.canvas.draw()
    assert np.isnan(empty.lines[0].get_ydata()).all()


def test_computed_eigenvalues_are_marked_where_they_are() -> None:
    ax = plot_density(GRID, DENSITY, new_axes(), eigenvalues=[-1.5, 2.0])
    (marks,) = ax.collections
    assert [segment[0][0] for segment in marks.get_segments()] == [-1.5, 2.0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["computed eigenvalues"]


def test_an_axes_of_the_caller_is_used() -> None:
    ax = new_axes()
    assert plot_density(GRID, DENSITY, ax) is ax


def test_densities_of_several_matrices_share_one_axis() -> None:
    curves = {"head": (GRID, DENSITY), "body": (0.01 * GRID, 100 * np.where(GRID < 0, 0, DENSITY))}
    ax = plot_densities(curves, caption="1 probe each")
    assert [line.get_label() for line in ax.lines] == ["head", "body"] == [t.get_text() for t in ax.get_legend().texts]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), DENSITY)
    assert np.isnan(ax.lines[1].get_ydata()[:30]).all()
    assert (ax.get_xscale(), ax.get_yscale()) == ("symlog", "log")
    assert ax.get_ylim()[0] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "name", ["network.classifier.fc{}", "encoder.layers.{}.self_attention.in_proj_weight", 99 * "a" + "{}"]
)
def test_the_names_of_densities_stand_in_the_axes_and_above_all_curves(name: str) -> None:
    ax = plot_densities({name.format(i): (GRID, 10.0**i * DENSITY) for i in range(5)})
    ax.figure.canvas.draw()
    box, axes = ax.get_legend().get_window_extent(), ax.get_window_extent()
    highest = max(np.nanmax(line.get_ydata()) for line in ax.lines)
    assert ax.transData.transform((0, highest))[1] < box.y0 < box.y1 < axes.y1
    assert axes.x0 < box.x0 < box.x1 < axes.x1


def test_densities_of_matrices_of_zeros_are_drawn_empty() -> None:
    ax = plot_densities({"unused": (0 * GRID, 0 * GRID)}, new_axes())
    ax.figure.canvas.draw()
    assert np.isnan(ax.lines[0].get_ydata()).all()
