"""The relief to be turned has the numbers of the surface, in the scale of the other pictures."""

import sys

import numpy as np
import pytest
import torch

from lmc_lightning.landscape.surface.slices import Mark, Surface
from lmc_lightning.plotting.interactive import interactive_relief, plotly_program


def bowl(offset: float, *, plane: bool = True) -> Surface:
    """x² + 3y² + offset, five points by three; one of them not finite."""
    xs, ys = torch.linspace(-1, 1, 5).double(), torch.linspace(-2, 2, 3).double()
    losses = xs.square()[:, None] + 3 * ys.square() + offset
    losses[0, 0] = torch.inf
    marks = (Mark("θ", (0.0, 0.0), 0.0, {"loss": offset}),)
    return Surface(xs, ys if plane else None, {"loss": losses if plane else losses[:, 0]}, marks, ("a", "b"), "a bowl")


def test_heights_are_losses_with_rows_along_y_and_a_gap_where_they_are_not_finite():
    surface = bowl(5.0)
    relief, marks = interactive_relief(surface).data
    expected = surface.losses.T.numpy().copy()
    expected[0, 0] = np.nan
    np.testing.assert_allclose(relief.z, expected, rtol=1e-6)
    np.testing.assert_array_equal([relief.x[3], relief.y[2]], [0.5, 2.0])
    assert (marks.x[0], marks.y[0], marks.z[0]) == (0.0, 0.0, 5.0)


@pytest.mark.parametrize(("offset", "kind"), [(5.0, "linear"), (0.01, "log")])
def test_heights_and_colours_are_logarithmic_where_those_of_the_contours_are(offset, kind):
    surface = bowl(offset)
    figure = interactive_relief(surface)
    relief, losses = figure.data[0], surface.losses[surface.losses.isfinite()].numpy()
    shown = np.log10(losses) if kind == "log" else losses
    assert figure.layout.scene.zaxis.type == kind
    np.testing.assert_allclose([relief.cmin, relief.cmax], [shown.min(), shown.max()], rtol=1e-6)
    np.testing.assert_allclose(np.sort(relief.surfacecolor[np.isfinite(relief.z)]), np.sort(shown), rtol=1e-6)


def test_a_line_is_refused():
    with pytest.raises(ValueError, match="plot_profile"):
        interactive_relief(bowl(1.0, plane=False))


def test_without_plotly_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install 'lmc-lightning\[html\]'"):
        plotly_program()
