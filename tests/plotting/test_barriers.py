import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from lmc_lightning.landscape.paths.barrier import Barrier, barrier
from lmc_lightning.landscape.paths.line import uniform_ts
from lmc_lightning.landscape.paths.profiles import Curve, Profile
from lmc_lightning.plotting.barriers import barrier_caption, plot_barrier_curves, plot_barrier_heatmap, plot_gap_curves
from lmc_lightning.plotting.style import BLANK, new_axes

NAN = math.nan


def bump(height: float, *, metric: str = "loss", num_samples: int = 20) -> Barrier:
    """A parabola over a chord from 1 to 2 with examples that scatter around it."""
    ts = uniform_ts(5)
    scatter = 1 + 0.1 * torch.linspace(-1, 1, num_samples, dtype=torch.float64)
    samples = (1 + ts)[:, None] + (4 * height * ts * (1 - ts))[:, None] * scatter
    weights = torch.full((num_samples,), 1 / num_samples, dtype=torch.float64)
    curve = Curve(samples @ weights, (1.0, 2.0), samples, weights, "example")
    return barrier(Profile(ts, {metric: curve}, split="train", batch_stats="recompute"), metric)


def test_the_caption_states_data_and_policy() -> None:
    assert barrier_caption(bump(1.0)) == "train, 20 examples · 5 points · BatchNorm recomputed on training data"
    bare = barrier(Profile(uniform_ts(3), {"loss": Curve(torch.zeros(3), (0.0, 0.0))}))
    assert barrier_caption(bare) == "data · 3 points"


def test_a_curve_has_its_chord_its_barrier_and_its_band() -> None:
    result = bump(0.5)
    ax = plot_barrier_curves([("epoch 4", result)], title="k₁ = 0", ends=("trunk", "child"))
    lines = {line.get_label(): line for line in ax.lines}
    stderr = result.stderr_data["barrier"]
    curve = lines[f"epoch 4: 0.5 ± {stderr:.1g}"]
    np.testing.assert_array_equal(curve.get_ydata(), result.values)
    np.testing.assert_array_equal(lines["_chord"].get_ydata(), result.chord)
    assert lines["_chord"].get_linestyle() == "--"
    np.testing.assert_array_equal(lines["_gap"].get_xdata(), [0.5, 0.5])
    np.testing.assert_allclose(lines["_gap"].get_ydata(), [1.5, 2.0])
    (band,) = ax.collections
    top = band.get_paths()[0].vertices[:, 1].max()
    assert top >= 2 + result.band_quantile * result.gap_stderr[2] - 1e-12
    assert ax.get_xlabel() == "t  (0 = trunk, 1 = child)"
    assert ax.get_ylabel() == "train loss"
    assert ax.get_title(loc="left") == "k₁ = 0"
    assert "chord (dashed) · shaded: 95 % sup-t band" in ax.texts[0].get_text()
    assert barrier_caption(result) in ax.texts[0].get_text()


def test_colours_follow_the_order_and_distinguish_first_from_last() -> None:
    ax = plot_barrier_curves([(f"epoch {e}", bump(0.1 * e)) for e in (1, 2, 4)])
    curves = [line for line in ax.lines if not line.get_label().startswith("_")]
    lightness = [np.dot(to_rgba(line.get_color())[:3], (0.299, 0.587, 0.114)) for line in curves]
    assert lightness == sorted(lightness)
    assert lightness[-1] - lightness[0] > 0.4
    assert [t.get_text().split(":")[0] for t in ax.get_legend().get_texts()] == ["epoch 1", "epoch 2", "epoch 4"]


def test_many_curves_stay_legible() -> None:
    ax = plot_barrier_curves([(f"epoch {e}", bump(0.1 * e)) for e in range(1, 41)])
    labels = [t.get_text().split(":")[0] for t in ax.get_legend().get_texts()]
    assert (len(labels), labels[0], labels[-1]) == (12, "epoch 1", "epoch 40")
    assert not ax.collections
    assert "shaded" not in ax.texts[0].get_text()
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().x1 <= 600
    assert ax.get_window_extent().width > 250


def test_no_barrier_has_no_upright_and_a_curve_without_parts_no_band() -> None:
    flat = barrier(Profile(uniform_ts(3), {"loss": Curve(torch.zeros(3).double(), (0.0, 0.0))}))
    ax = plot_barrier_curves([("epoch 1", flat)])
    assert [line.get_label() for line in ax.lines] == ["epoch 1: 0", "_chord"]
    assert not ax.collections
    assert ax.get_title(loc="left") == "Loss on the line"


def test_what_is_not_finite_is_drawn_without_complaint() -> None:
    values = torch.tensor([0, torch.inf, torch.nan, 0], dtype=torch.float64)
    spoiled = barrier(Profile(uniform_ts(4), {"loss": Curve(values, (0.0, 0.0))}))
    ax = plot_barrier_curves([("epoch 1", spoiled)])
    ax.figure.canvas.draw()
    assert ax.get_legend().get_texts()[0].get_text() == "epoch 1: nan"


def test_gaps_start_and_end_on_the_chord_and_are_coloured_by_epoch() -> None:
    curves = [(epoch, bump(0.1 * epoch)) for epoch in (1, 2, 8)]
    ax = plot_gap_curves(curves, title="k₁ = 0", ends=("trunk", "child"))
    lines = {line.get_label(): line for line in ax.lines}
    for epoch, result in curves:
        np.testing.assert_array_equal(lines[f"epoch {epoch}"].get_ydata(), result.gaps)
        assert set(lines[f"epoch {epoch}"].get_ydata()[[0, -1]]) == {0}
    near, far = (np.subtract(*(to_rgba(lines[f"epoch {e}"].get_color()) for e in pair)) for pair in ((1, 2), (2, 8)))
    assert np.abs(near).sum() < np.abs(far).sum()  # by the epoch's number, not its place
    assert len([c for c in ax.collections if len(c.get_paths())]) == 1  # the band of the last
    assert ax.figure.axes[1].get_ylabel() == "later epoch (total)"
    assert "largest height above the chord" in ax.texts[0].get_text()
    ax.figure.canvas.draw()
    assert ax.get_window_extent().width > 350
    assert plot_gap_curves(curves[:1]).get_title(loc="left") == "Gap of the loss on the line"


@pytest.mark.parametrize("curves", [[], [(1, bump(1.0)), (2, bump(1.0, metric="error"))]])
def test_gaps_of_different_quantities_do_not_share_an_axis(curves: list[tuple[int, Barrier]]) -> None:
    with pytest.raises(ValueError, match="one metric on one split"):
        plot_gap_curves(curves)


@pytest.mark.parametrize("curves", [[], [("a", bump(1.0)), ("b", bump(1.0, metric="error"))]])
def test_curves_of_different_quantities_do_not_share_an_axis(curves: list[tuple[str, Barrier]]) -> None:
    with pytest.raises(ValueError, match="one metric on one split"):
        plot_barrier_curves(curves)


def test_a_heat_map_writes_its_numbers_and_leaves_blanks_grey() -> None:
    values = [[0.0, 0.25, 1.5], [NAN, 0.0, 0.0004]]
    ax = plot_barrier_heatmap(values, [0, 2], [1, 4, 8], title="Loss barrier", caption="25 points")
    cells = {t.get_position(): t.get_text() for t in ax.texts if t.get_text() != "25 points"}
    assert cells == {(0, 0): "0", (1, 0): "0.25", (2, 0): "1.50", (1, 1): "0", (2, 1): "0.0004"}
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array().filled(NAN), values)
    assert image.cmap(image.norm(image.get_array()))[1, 0].tolist() == pytest.approx(to_rgba(BLANK))
    assert (image.norm.vmin, image.norm.vmax) == (0, 1.5)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "4", "8"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "2"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("later epoch (total)", "branch point k₁ [epochs]")
    steps = plot_barrier_heatmap([[1.0]], ["step 500"], [4], title="t")
    assert (steps.get_ylabel(), steps.get_yticklabels()[0].get_text()) == ("branch point k₁", "step 500")
    assert ax.get_title(loc="left") == "Loss barrier"


def test_numbers_contrast_with_their_cells() -> None:
    ax = plot_barrier_heatmap([[0.0, 0.3, 0.6, 1.0]], [0], [1, 2, 4, 8], title="t")
    (image,) = ax.images
    for text in ax.texts[:-1]:
        column = int(text.get_position()[0])
        cell = np.dot(image.cmap(image.norm(image.get_array()[0, column]))[:3], (0.299, 0.587, 0.114))
        ink = np.dot(to_rgba(text.get_color())[:3], (0.299, 0.587, 0.114))
        assert abs(cell - ink) > 0.4


def test_negative_values_get_a_scale_symmetric_about_zero() -> None:
    (image,) = plot_barrier_heatmap([[-0.5, 0.2]], [0], [1, 2], title="t").images
    assert (image.norm.vmin, image.norm.vmax) == (-0.5, 0.5)


def test_a_wide_map_is_a_wide_figure_and_its_numbers_fit_their_cells() -> None:
    ax = plot_barrier_heatmap(np.full((3, 30), -0.123), [0, 1, 2], list(range(30)), title="t")
    ax.figure.canvas.draw()
    cell = ax.get_window_extent().width / 30
    assert max(t.get_window_extent().width for t in ax.texts[:-1]) < cell
    assert min(t.get_fontsize() for t in ax.texts) >= 6


@pytest.mark.parametrize(("largest", "text"), [(1234.5, "1234"), (0.05, "0.0500"), (2e-5, "2.0e-05"), (3e7, "3.0e+07")])
def test_the_largest_number_sets_the_digits(largest: float, text: str) -> None:
    ax = plot_barrier_heatmap([[largest, math.inf]], [0], [1, 2], title="t")
    assert [t.get_text() for t in ax.texts][:2] == [text, "∞"]


@pytest.mark.parametrize("value", [NAN, 0.0])
def test_a_map_of_nothing_is_drawn(value: float) -> None:
    ax = plot_barrier_heatmap([[value, value]], [0], [1, 2], new_axes(), title="t")
    ax.figure.canvas.draw()
    assert ax.images[0].norm.vmax == 1


def test_the_shape_must_fit_its_labels() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3\).*got \(1, 2\)"):
        plot_barrier_heatmap([[1, 2]], [0], [1, 2, 3], title="t")
