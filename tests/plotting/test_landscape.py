"""Paths, radii and chains: what is drawn is what was measured."""

from typing import Any

import numpy as np
import pytest
import torch

from lmc_lightning.landscape.paths.barrier import Barrier, barrier
from lmc_lightning.landscape.paths.line import uniform_ts
from lmc_lightning.landscape.paths.profiles import Curve, Profile
from lmc_lightning.landscape.volume.llc import Langevin, LearningCoefficient
from lmc_lightning.landscape.volume.result import Volume, VolumeSettings
from lmc_lightning.plotting.barriers import plot_paths
from lmc_lightning.plotting.llc import plot_chains
from lmc_lightning.plotting.volume import plot_radii
from tests.problems import normal


def path(height: float, split: str = "train", samples: int = 0) -> Barrier:
    ts = uniform_ts(5)
    values = 1 + height * 4 * ts * (1 - ts)
    noise = 0.1 * normal(5, samples, seed=1) if samples else None
    weights = torch.full((samples,), 1 / samples).double() if samples else None
    unit: Any = "example" if samples else None
    parts = None if noise is None else values[:, None] + noise - noise.mean(1, keepdim=True)
    return barrier(Profile(ts, {"loss": Curve(values, (1.0, 1.0), parts, weights, unit)}, split))


def radii(tau: float, centre: float, *, cutoff: bool = False, **options: Any) -> Volume:
    values = torch.zeros(50).double() if cutoff else (centre + 0.1 * normal(50, seed=2)).exp()
    return Volume(tau, VolumeSettings(**options), 0.0, values, values > 1e9, 100, cutoff=cutoff)


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_paths_are_the_values_with_their_barriers_and_one_chord() -> None:
    line, curve = path(2.0, samples=40), path(0.5, samples=40)
    ax = plot_paths({"straight line": line, "bezier": curve}, title="two seeds", ends=("one", "two"))
    drawn = {str(drawn.get_label()).split(":")[0]: np.asarray(drawn.get_ydata()) for drawn in ax.lines}
    np.testing.assert_allclose(drawn["_chord"], line.chord)
    np.testing.assert_allclose(drawn["bezier"], curve.values)
    assert [text.split(" ±")[0] for text in texts(ax)] == ["straight line: 2", "bezier: 0.5"]
    assert len(ax.collections) == 2  # the bands
    assert ax.get_xlabel() == "t  (0 = one, 1 = two)"


def test_paths_of_different_splits_are_not_drawn_together() -> None:
    with pytest.raises(ValueError, match="one metric on one split"):
        plot_paths({"a": path(1.0), "b": path(1.0, "val")})
    assert len(texts(plot_paths({"a": path(1.0), "b": path(1.0, "")}))) == 2  # a split without a name may be the same
    with pytest.raises(ValueError, match="got none"):
        plot_paths({})
    with pytest.raises(ValueError, match="one to six paths, got 7"):
        plot_paths({str(i): path(1.0) for i in range(7)})


def test_radii_are_counted_for_each_threshold() -> None:
    volumes = {0.1: radii(0.1, 1.0), 0.01: radii(0.01, 0.0)}
    ax = plot_radii(volumes)
    assert [text.split(":")[0] for text in texts(ax)] == ["τ = 0.01", "τ = 0.1"]
    uprights = [c.get_segments()[0] for c in ax.collections if c.get_label() == "_median"]
    assert [float(points[0][0]) for points in uprights] == pytest.approx(
        [float(np.median(volumes[tau].radii)) for tau in (0.01, 0.1)]
    )
    tops = [max(patch.get_xy()[:, 1]) for patch in ax.patches if patch.get_label() == "_outline"]
    assert [float(points[1][1]) for points in uprights] == tops
    assert "{L ≤ τ} along 50 shared plain directions" in ax.texts[0].get_text()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"threshold": "rise"}, "{L ≤ L(θ) + τ}"),
        ({"metric": "accuracy"}, "{acc ≥ τ}"),
        ({"metric": "accuracy", "threshold": "rise", "coordinates": "filter"}, "{acc ≥ acc(θ) − τ} along 50 shared f"),
    ],
)
def test_the_caption_tells_the_set(options: dict[str, Any], text: str) -> None:
    assert plot_radii({0.1: radii(0.1, 0.0, **options)}).texts[0].get_text().startswith(text)


def test_volumes_without_radii_are_not_drawn() -> None:
    with pytest.raises(ValueError, match="none that is cut off"):
        plot_radii({0.1: radii(0.1, 0.0, cutoff=True)})


def test_chains_are_drawn_with_their_mean_and_diagnostics() -> None:
    traces = normal(3, 200, seed=4).abs()
    found = LearningCoefficient(traces, Langevin(num_burn_in=50, num_draws=150), 2.0)
    ax = plot_chains(found)
    thin = [line for line in ax.lines if line.get_label() == "_draws"]
    np.testing.assert_allclose(thin[0].get_ydata(), 2 * traces[0])
    smooth = [line for line in ax.lines if line.get_label() == "_mean"]
    assert float(smooth[0].get_ydata()[0]) == pytest.approx(float(2 * traces[0, :20].mean()))  # type: ignore[index]
    assert f"λ̂ = {found.value:.3g}" in texts(ax)[-1]
    assert "R̂" in ax.texts[0].get_text()


def test_chains_that_diverged_are_drawn_as_far_as_they_went() -> None:
    traces = normal(2, 60, seed=4)
    traces[1, 30:] = float("nan")
    ax = plot_chains(LearningCoefficient(traces, Langevin(num_burn_in=10, num_draws=50), 1.0))
    assert "diverged" in ax.texts[0].get_text()
