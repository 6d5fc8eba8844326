import subprocess
import sys

import matplotlib as mpl
import pytest
from matplotlib.colors import to_rgba

from lmc_lightning.plotting.style import FIGURE_SIZE, figure_of, new_axes, set_heading, style


def test_style_is_the_packages_inside_and_the_callers_outside() -> None:
    with mpl.rc_context({"axes.grid": False, "lines.linewidth": 9.0, "figure.facecolor": "black"}):
        before = dict(mpl.rcParams)
        with style():
            assert mpl.rcParams["axes.grid"]
            assert mpl.rcParams["figure.facecolor"] == "white"
            assert mpl.rcParams["lines.markersize"] == mpl.rcParamsDefault["lines.markersize"]
        assert dict(mpl.rcParams) == before


def test_style_ends_with_an_exception() -> None:
    before = dict(mpl.rcParams)
    with pytest.raises(RuntimeError, match="inside"), style():
        raise RuntimeError("inside")
    assert dict(mpl.rcParams) == before


def test_a_figure_is_a_white_card_of_six_by_four_inches() -> None:
    with style():
        figure = figure_of(new_axes())
    figure.canvas.draw()
    assert tuple(figure.get_size_inches()) == FIGURE_SIZE
    assert figure.canvas.get_width_height() == (600, 400)
    assert to_rgba(figure.get_facecolor()) == (1, 1, 1, 1)


def test_figure_of_looks_through_subfigures() -> None:
    figure = figure_of(new_axes())
    assert figure_of(figure.subfigures(1, 2)[1].add_subplot()) is figure


def test_a_heading_keeps_its_lines_breaks_long_ones_and_stays_off_the_axes() -> None:
    with style():
        ax = new_axes()
        set_heading(ax, "Title", "one\n" + "long " * 30)
    (caption,) = ax.texts
    assert ax.get_title(loc="left") == "Title"
    assert [line.split()[0] for line in caption.get_text().splitlines()] == ["one", "long", "long"]
    ax.figure.canvas.draw()
    box = caption.get_window_extent()
    assert box.y0 >= ax.get_window_extent().y1
    assert box.x1 <= 600
    assert ax.title.get_window_extent().y1 <= 400


def test_pyplot_is_never_loaded() -> None:
    code = (
        "import sys, lmc_lightning.plotting.barriers, lmc_lightning.plotting.density as d; "
        "d.plot_density([0, 1], [1, 1]).figure.canvas.draw(); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
