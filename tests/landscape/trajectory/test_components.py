"""Principal planes against a dense decomposition, the random walk's known shares, and losses on a plane."""

import pytest
import torch
from torch import Tensor

from lmc_lightning.landscape.trajectory.components import (
    Trajectory,
    pca_plane,
    plane_losses,
    principal_components,
    random_walk_shares,
    tsne,
)
from lmc_lightning.landscape.trajectory.convergence import convergence
from lmc_lightning.landscape.trajectory.sketch import count_sketch
from tests.problems import normal, quadratic, rotation, with_spectrum


def trajectory(num_points: int = 12, size: int = 50, seed: int = 1, name: str = "") -> Trajectory:
    """A random walk that drifts, far from the origin."""
    steps = normal(num_points, size, seed=seed) + 0.5 * normal(1, size, seed=seed + 1)
    return Trajectory(10 + steps.cumsum(0), range(num_points), name)


@pytest.mark.parametrize("about", ["mean", "last"])
def test_the_gram_matrix_gives_the_singular_vectors(about: str) -> None:
    walk = trajectory()
    found = principal_components([walk], 3, about=about)  # type: ignore[arg-type]
    centre = walk.points.mean(0) if about == "mean" else walk.points[-1]
    moved = walk.points - centre
    u, s, vh = torch.linalg.svd(moved, full_matrices=False)
    torch.testing.assert_close(found.centre, centre)
    torch.testing.assert_close(found.shares, s.square() / s.square().sum(), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found.coordinates[0].abs(), (u * s)[:, :3].abs())
    torch.testing.assert_close((found.directions.T @ vh[:3].T).abs(), torch.eye(3).double())
    torch.testing.assert_close(moved @ found.directions, found.coordinates[0])
    off_plane = moved - found.coordinates[0] @ found.directions.T
    torch.testing.assert_close(found.distances[0], off_plane.norm(dim=1))
    assert float(found.coordinates[0][-1, 0]) > float(found.coordinates[0][0, 0])


def test_the_last_state_is_the_centre_bit_for_bit() -> None:
    walk = Trajectory(trajectory().points.float(), range(12))
    assert torch.equal(pca_plane(walk, about="last").centre, walk.points[-1])


def test_wide_snapshots_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    walk = trajectory()
    whole = pca_plane(walk)
    monkeypatch.setattr("lmc_lightning.landscape.trajectory.components._BLOCK", 12 * 7)
    parts = pca_plane(walk)
    torch.testing.assert_close(parts.coordinates[0], whole.coordinates[0])
    torch.testing.assert_close(parts.directions, whole.directions)


def test_a_trajectory_in_a_plane_is_in_its_plane() -> None:
    basis = rotation(40)[:, :2]
    inside = normal(9, 2, seed=3) @ basis.T + 2.0
    found = principal_components([Trajectory(inside, range(9))], 5)
    assert found.coordinates[0].shape == (9, 2)
    assert float(found.distances[0].max()) < 1e-7
    assert float(found.shares[:2].sum()) == pytest.approx(1.0)
    projector = found.directions @ found.directions.T
    torch.testing.assert_close(projector, basis @ basis.T)


def test_a_random_walk_has_the_known_shares_and_cosines_for_coordinates() -> None:
    """In 20,000 dimensions; a walk of T steps has component j along cos(πjt/T)."""
    steps, size = 200, 20_000
    walk = Trajectory(normal(steps, size, seed=7).cumsum(0), range(steps))
    found = principal_components([walk], 3)
    torch.testing.assert_close(found.shares[:3], random_walk_shares(3), rtol=0.03, atol=0)
    assert random_walk_shares(10_000).sum() == pytest.approx(1.0, abs=1e-4)
    times = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    for j in range(3):
        cosine = torch.cosine_similarity(found.coordinates[0][:, j], torch.cos(torch.pi * (j + 1) * times), dim=0)
        assert abs(float(cosine)) > 0.99


def test_several_runs_share_one_plane() -> None:
    runs = [trajectory(seed=1, name="a"), trajectory(7, seed=5, name="b")]
    found = pca_plane(runs)
    joint = pca_plane(Trajectory(torch.cat([r.points for r in runs]), range(19)))
    assert [c.shape for c in found.coordinates] == [(12, 2), (7, 2)]
    torch.testing.assert_close(torch.cat([*found.coordinates]).abs(), joint.coordinates[0].abs())
    torch.testing.assert_close(torch.cat([*found.distances]), joint.distances[0])


def test_there_is_no_plane_of_a_line_a_point_or_different_networks() -> None:
    line = torch.arange(5.0).double()[:, None] * normal(1, 20, seed=1)
    with pytest.raises(ValueError, match="The 5 snapshots lie on one line"):
        pca_plane(Trajectory(line, range(5)))
    with pytest.raises(ValueError, match="All snapshots are equal"):
        pca_plane(Trajectory(torch.ones(3, 4), range(3)))
    with pytest.raises(ValueError, match=r"of one architecture, got points of lengths \[20, 50\]"):
        pca_plane([trajectory(), Trajectory(line, range(5))])


def test_the_loss_on_the_plane_is_the_true_loss() -> None:
    problem = quadratic(with_spectrum([3.0, 1.0, 0.5, 0.1]), theta=normal(4, seed=1))
    walk = Trajectory(normal(6, 4, seed=2), range(6))
    plane, objective = pca_plane(walk), problem.objective()
    found = plane_losses(objective, plane, num_points=5)
    low, high = (getattr(plane.coordinates[0], which)(0).values for which in ("min", "max"))
    assert float(found.xs[0]) == pytest.approx(float(low[0] - 0.2 * (high - low)[0]), rel=1e-6)
    assert float(found.ys[-1]) == pytest.approx(float(high[1] + 0.2 * (high - low)[1]), rel=1e-6)
    for i, y in enumerate(found.ys):
        for j, x in enumerate(found.xs):
            theta = plane.centre + plane.directions @ torch.stack([x, y])
            assert float(found.losses[i, j]) == pytest.approx(float(0.5 * theta @ problem.hessian @ theta), rel=1e-9)


def test_the_loss_of_sketches_is_not_known() -> None:
    problem = quadratic(with_spectrum([3.0, 1.0, 0.5, 0.1]))
    with pytest.raises(ValueError, match="a plane of 4 parameters, got 50"):
        plane_losses(problem.objective(), pca_plane(trajectory()))


def test_neighbours_stay_neighbours_under_tsne() -> None:
    runs = [Trajectory(trajectory(10, seed=1).points + shift, range(10)) for shift in (0.0, 500.0)]
    state = torch.random.get_rng_state()
    one, other = tsne(runs)
    assert one.shape == other.shape == (10, 2)
    assert torch.equal(one, tsne(runs)[0])
    assert torch.equal(state, torch.random.get_rng_state())
    nearest = torch.cdist(torch.cat([one, other]), torch.cat([one, other])).fill_diagonal_(torch.inf).argmin(1)
    assert bool((nearest[:10] < 10).all())
    assert bool((nearest[10:] >= 10).all())


# -- sketches ----------------------------------------------------------------------------------------------------------


def matrix(size: int, dimension: int, seed: int = 0) -> Tensor:
    """S ``(d, P)``, column by column."""
    return torch.stack([count_sketch(row, dimension, seed) for row in torch.eye(size, dtype=torch.float64)], dim=1)


def test_a_sketch_has_one_sign_a_column_and_is_linear() -> None:
    s = matrix(60, 8)
    assert torch.equal(s.abs().sum(0), torch.ones(60).double())
    assert set(s[s != 0].tolist()) == {-1.0, 1.0}
    theta = normal(60, seed=1)
    torch.testing.assert_close(count_sketch(theta, 8), s @ theta)
    torch.testing.assert_close(count_sketch(theta.float(), 8), (s @ theta).float(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(matrix(60, 8, seed=1), s)


def test_sketches_keep_squared_norms_with_the_known_variance() -> None:
    theta, d = normal(40, seed=2), 16
    norms = torch.stack([count_sketch(theta, d, seed).square().sum() for seed in range(2000)])
    mean, variance = theta.square().sum(), 2 / d * (theta.square().sum() ** 2 - theta.pow(4).sum())
    assert float(norms.mean()) == pytest.approx(float(mean), abs=4 * float(variance / 2000) ** 0.5)
    assert float(norms.var()) == pytest.approx(float(variance), rel=0.25)


def test_the_plane_of_sketches_is_nearly_that_of_the_weights() -> None:
    walk = trajectory(30, 3000)
    sketched = Trajectory(torch.stack([count_sketch(p, 512) for p in walk.points]), walk.steps)
    whole, small = (principal_components([t], 2) for t in (walk, sketched))
    torch.testing.assert_close(small.shares[:2], whole.shares[:2], atol=0.03, rtol=0)
    assert float(torch.cosine_similarity(small.coordinates[0], whole.coordinates[0], dim=0).min()) > 0.98


# -- ends of runs ------------------------------------------------------------------------------------------------------


def test_distances_and_cosines_are_of_all_pairs() -> None:
    starts = [normal(9, seed=i) for i in range(3)]
    ends = [s + m for s, m in zip(starts, torch.eye(9).double()[[0, 0, 1]] * 2.0, strict=True)]
    found = convergence(ends, [0.1, 0.2, 0.4], [0.0, 0.1, 0.5], starts=starts, threshold=0.25)
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    torch.testing.assert_close(found.cosines, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.distances, torch.cdist(torch.stack(ends), torch.stack(ends)), atol=1e-6, rtol=0)
    assert found.reached is not None
    assert found.reached.tolist() == [True, True, False]
    summary = found.summary()
    assert summary["fraction"] == pytest.approx(2 / 3)
    assert summary["loss_median"] == pytest.approx(0.2)
    assert summary["error_max"] == 0.5
    assert summary["cosine_mean"] == pytest.approx(1 / 3)


def test_the_interval_of_the_fraction_is_wilsons() -> None:
    """p̂ = 0 of n: from 0 to z²/(n + z²)."""
    summary = convergence([normal(2, seed=i) for i in range(10)], [1.0] * 10, threshold=0.5).summary()
    z2 = 1.959964**2
    assert (summary["fraction"], summary["fraction_low"]) == (0.0, 0.0)
    assert summary["fraction_high"] == pytest.approx(z2 / (10 + z2), rel=1e-6)


def test_thresholds_of_unknown_errors_and_uneven_lists_are_refused() -> None:
    ends = [normal(2, seed=0)] * 2
    with pytest.raises(ValueError, match="The errors of these runs are not known"):
        convergence(ends, [1.0, 1.0], threshold=0.1, metric="error")
    with pytest.raises(ValueError, match=r"one entry for each run, got \[2, 3\]"):
        convergence(ends, [1.0] * 3)
