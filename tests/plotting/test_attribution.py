import numpy as np
import pytest
import torch

from lmc_lightning.plotting.attribution import plot_attribution

SHARES = np.array([0.1, 0.5, -0.2, 0.6])
CLASSES = {0: (0.3, 0.5), 7: (0.7, 0.5)}


def test_bars_are_the_shares_of_the_classes_the_largest_on_top() -> None:
    figure = plot_attribution(SHARES, by_class=CLASSES, title="λ_max", caption="4 images")
    (ax,) = figure.axes
    assert [bar.get_width() for bar in ax.patches] == [0.7, 0.3]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["7", "0"]
    assert ax.lines[0].get_xdata().tolist() == [0.5, 0.5]
    assert ax.yaxis_inverted()
    assert ax.get_title(loc="left") == "λ_max"


def test_many_classes_are_cut_to_the_largest() -> None:
    figure = plot_attribution(SHARES, by_class={c: (c / 435, 1 / 30) for c in range(30)})
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == [str(c) for c in range(29, 9, -1)]


def test_without_classes_it_shows_how_few_examples_carry_it() -> None:
    (ax,) = plot_attribution(SHARES).axes
    assert ax.lines[0].get_xdata().tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert ax.lines[0].get_ydata() == pytest.approx([0, 0.6, 1.1, 1.2, 1.0])


@pytest.mark.parametrize("shape", [(6, 5, 5), (6, 1, 5, 5), (6, 3, 5, 5), (6, 2, 5, 5)])
def test_images_stand_beside_with_class_and_share(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    figure = plot_attribution(np.arange(10) / 45, by_class=CLASSES, images=images, labels=["a", "b"])
    first, *cells = figure.axes
    figure.canvas.draw()
    assert len(first.patches) == 2
    assert [c.get_title() for c in cells] == ["a: 20.0%", "b: 17.8%", "15.6%", "13.3%", "11.1%", "8.9%"]
    shown = cells[0].images[0].get_array()
    assert (shown.shape == (5, 5, 3)) == (shape[1:] == (3, 5, 5))
    assert (float(shown.min()), float(shown.max())) == (0.0, 1.0)
    assert all(c.get_position().x0 > first.get_position().x1 for c in cells)


def test_an_image_of_one_value_is_black() -> None:
    figure = plot_attribution(SHARES, images=np.full((1, 2, 2), 3.0))
    assert figure.axes[1].images[0].get_array().tolist() == [[0, 0], [0, 0]]
