"""The numbers read off a figure are those that were drawn."""

import numpy as np
from matplotlib.figure import Figure

from lmc_lightning.plotting.data import figure_data


def test_everything_that_is_drawn_can_be_read_off() -> None:
    x, y = np.array([0.0, 1.0, 2.0]), np.array([3.0, np.nan, 5.0])
    figure = Figure()
    left, right = figure.subplots(1, 2)
    left.plot(x, y, label="loss")
    left.plot(x, 2 * y, label="loss")
    left.plot(x, 3 * y)
    left.fill_between(x, y - 1, y + 1)
    left.scatter(x, x + 1, c=x, label="a/b")
    left.set_xlabel("step")
    left.set_title("A title", loc="left")
    right.bar([1, 2], [3, 4], width=0.5)
    right.imshow(np.ma.masked_equal(np.arange(6.0).reshape(2, 3), 4.0))
    found = figure_data(figure)
    for name, factor in (("loss", 1), ("loss_2", 2), ("line", 3)):
        np.testing.assert_array_equal(found[f"axes_0/{name}"], np.stack([x, factor * y], 1))
    np.testing.assert_array_equal(found["axes_0/a_b"], np.stack([x, x + 1], 1))
    np.testing.assert_array_equal(found["axes_0/a_b_colors"], x)
    assert {tuple(row) for row in found["axes_0/outline"]} >= {(0.0, 2.0), (0.0, 4.0), (2.0, 4.0), (2.0, 6.0)}
    assert found["axes_0/text"].tolist() == ["A title", "step", ""]
    np.testing.assert_array_equal(found["axes_1/bars"], [[0.75, 0, 0.5, 3], [1.75, 0, 0.5, 4]])
    np.testing.assert_array_equal(found["axes_1/map"], [[0, 1, 2], [3, np.nan, 5]])


def test_a_figure_of_one_axes_has_plain_names() -> None:
    figure = Figure()
    figure.subplots().plot([0, 1], [2, 3], label="λ")
    assert figure_data(figure).keys() == {"text", "λ"}
