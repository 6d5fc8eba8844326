"""Pictures of ways: one run by its steps, several by colour, losses below, and the random walk beside."""

import numpy as np
import pytest
import torch

from lmc_lightning.landscape.trajectory.components import (
    Components,
    PlaneLosses,
    Trajectory,
    pca_plane,
    random_walk_shares,
)
from lmc_lightning.landscape.trajectory.convergence import convergence
from lmc_lightning.plotting.style import figure_of, pixels
from lmc_lightning.plotting.trajectory import plot_convergence, plot_trajectories, plot_tsne, plot_variance_shares
from tests.problems import normal


def plane(num_runs: int = 1) -> Components:
    runs = [normal(9, 30, seed=s).cumsum(0) for s in range(num_runs)]
    return pca_plane([Trajectory(points, range(0, 90, 10), f"run {s}") for s, points in enumerate(runs)])


def test_one_run_is_coloured_by_its_steps() -> None:
    found = plane()
    ax = plot_trajectories(found, caption="digits")
    (dots,) = ax.collections
    np.testing.assert_allclose(np.asarray(dots.get_offsets()), found.coordinates[0].numpy())
    assert list(np.asarray(dots.get_array())) == list(range(0, 90, 10))
    assert f"({float(found.shares[0]):.0%} of the variance)" in ax.get_xlabel()
    assert any("that of a random walk 76%" in t.get_text() and "digits" in t.get_text() for t in ax.texts)


def test_several_runs_have_a_legend_and_many_a_colour_scale_only() -> None:
    few, many = plot_trajectories(plane(3)), plot_trajectories(plane(12))
    legend = few.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["run 0", "run 1", "run 2"]
    assert not any("random walk" in t.get_text() for t in few.texts)
    assert many.get_legend() is None
    pixels(figure_of(few))
    pixels(figure_of(many))


@pytest.mark.parametrize("low", [0.01, -1.0, float("inf")], ids=["positive", "negative", "infinite"])
def test_losses_of_any_sign_are_drawn_below(low: float) -> None:
    losses = torch.linspace(0.5, 3.0, 25, dtype=torch.float64).reshape(5, 5)
    losses[2, 2] = low
    axis = torch.linspace(-1, 1, 5)
    ax = plot_trajectories(plane(), losses=PlaneLosses(axis, axis, losses))
    assert pixels(figure_of(ax)).std() > 0


def test_shares_are_drawn_beside_the_random_walk() -> None:
    found = plane()
    ax = plot_variance_shares(found)
    own, walk = ax.lines
    np.testing.assert_allclose(own.get_ydata(), found.shares[:8].numpy())
    np.testing.assert_allclose(walk.get_ydata(), random_walk_shares(8).numpy())


def test_neighbourhoods_have_no_scale() -> None:
    found = plane(2)
    ax = plot_tsne(found.trajectories, found.coordinates)
    assert not [*ax.get_xticks(), *ax.get_yticks()]


def test_ends_are_drawn_as_a_distribution_with_the_share_that_reached_the_threshold() -> None:
    ends = [normal(3, seed=s) for s in range(4)]
    ax = plot_convergence(convergence(ends, [0.3, 0.1, 0.2, 0.4], threshold=0.25))
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0.1, 0.2, 0.3, 0.4])
    legend = ax.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["50% reach 0.25"]
    assert plot_convergence(convergence(ends, [0.3, 0.1, 0.2, 0.4])).get_legend() is None
