import pytest

from lmc_lightning.plotting.stability import StabilityCurve, plot_stability
from lmc_lightning.plotting.style import new_axes

FULL = StabilityCurve({10: 0.9, 0: 0.2, 20: 1.1}, {})
BATCH = StabilityCurve({0: 0.1, 10: 0.3, 20: 0.4}, {10: 0.05, 20: 0.1})


def labels(ax: object) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]  # type: ignore[attr-defined]


def test_the_curves_are_the_values_in_the_order_of_the_steps() -> None:
    ax = plot_stability({"full batch": FULL}, caption="4 batches of 8")
    curve = ax.containers[0].lines[0]
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([0, 10, 20], [0.2, 0.9, 1.1])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimizer steps", "λ / threshold")
    assert ax.get_title(loc="left") == "Curvature over the optimizer's threshold"
    assert ax.texts[0].get_text() == "4 batches of 8"


def test_the_limits_are_named_and_drawn_where_they_are() -> None:
    ax = plot_stability({"full batch": FULL, "mini-batch": BATCH}, small_batch_limit=0.1 / 1.9)
    assert labels(ax) == ["full-batch limit, 1", "small-batch limit, 0.0526", "full batch", "mini-batch"]
    assert [line.get_ydata()[0] for line in ax.lines[:2]] == [1.0, pytest.approx(0.0526, abs=1e-4)]


def test_without_momentum_both_limits_are_one_line() -> None:
    ax = plot_stability({"mini-batch": BATCH}, small_batch_limit=1.0)
    assert labels(ax) == ["full-batch limit, 1", "mini-batch"]


def test_whiskers_are_two_standard_errors() -> None:
    ax = plot_stability({"mini-batch": BATCH})
    (bars,) = ax.containers[0].lines[2]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx(pair) for pair in ([0.1, 0.1], [0.2, 0.4], [0.2, 0.6])]


def test_all_values_are_in_view_and_one_is_always() -> None:
    assert plot_stability({"full batch": StabilityCurve({0: 0.01}, {})}).get_ylim() == pytest.approx((0, 1.15))
    assert plot_stability({"full batch": StabilityCurve({0: -0.5, 1: 4.0}, {})}).get_ylim() == pytest.approx(
        (-0.5, 4.6)
    )


def test_an_axes_of_the_caller_is_used() -> None:
    ax = new_axes()
    assert plot_stability({"full batch": FULL}, ax) is ax
