"""A surface is the loss at the points whose coordinates it prints, its centre is L(θ), and no point is lost."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.paths.batchnorm import running_statistics
from lmc_lightning.landscape.paths.line import Endpoint, endpoint_of
from lmc_lightning.landscape.surface.directions import (
    given_directions,
    hessian_directions,
    line_direction,
    plane_directions,
    random_directions,
)
from lmc_lightning.landscape.surface.slices import Surface, centred_grid, load_surface, surface, window
from tests import oracles
from tests.callbacks.runs import batches
from tests.callbacks.runs import conv_net as smooth_net
from tests.callbacks.runs import cross_entropy as image_loss
from tests.landscape.surfaces import along_line, conv_net
from tests.problems import (
    ConvNet,
    cross_entropy,
    double_well,
    generator,
    images,
    normal,
    quadratic,
    split,
    with_spectrum,
)

XS, YS = torch.tensor([-1.5, -0.5, 0.0, 1.0]).double(), torch.tensor([-0.25, 0.0, 2.0]).double()


# -- values ------------------------------------------------------------------------------------------------------------


def test_of_a_quadratic_it_is_the_closed_form_at_the_printed_coordinates() -> None:
    """X ≠ Y, no symmetry: a transposed or mislabelled grid would differ."""
    hessian, theta, slope = with_spectrum([6.0, 3.0, 1.0, -0.5]), normal(4, seed=3), normal(4, seed=4)
    columns = normal(4, 2, seed=5)
    found = surface(quadratic(hessian, theta, slope).objective(), given_directions(columns), XS, YS)
    for i, x in enumerate(XS):
        for j, y in enumerate(YS):
            point = theta + x * columns[:, 0] + y * columns[:, 1]
            expected = float(0.5 * point @ hessian @ point + slope @ point)
            assert float(found.losses[i, j]) == pytest.approx(expected, rel=1e-12)
    assert found.losses.shape == (4, 3)
    assert found.losses.dtype == torch.float64


def test_it_is_the_loss_and_error_of_the_moved_network() -> None:
    objective = conv_net()
    directions = random_directions(objective.theta(), objective.layout, generator(0))
    found = surface(objective, directions, XS, YS)
    loss = oracles.mean_loss(ConvNet(), split(images(), [64, 6]), cross_entropy, [64.0, 6.0])
    theta = oracles.flat_parameters(ConvNet())
    for (i, j), value in np.ndenumerate(found.losses.numpy()):
        point = theta + XS[i] * directions.vectors[0] + YS[j] * directions.vectors[1]
        assert value == pytest.approx(float(loss(point)), rel=1e-12)
        assert (
            found.values["error"][i, j] == objective.evaluate(directions.point(objective.theta(), (XS[i], YS[j]))).error
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_centre_is_the_loss_bit_for_bit(dtype: torch.dtype) -> None:
    objective = conv_net(dtype)
    found = surface(objective, random_directions(objective.theta(), objective.layout, generator(0)), XS, YS)
    expected = float(objective.loss(objective.theta()))
    assert found.centre["loss"] == expected
    assert float(found.losses[2, 1]) == expected
    assert float(found.values["error"][2, 1]) == found.centre["error"] == objective.baseline.error
    assert (found.rises[2, 1], found.batch_stats, found.num_examples) == (0, "endpoint", 70)


def test_along_a_line_there_is_one_coordinate() -> None:
    found = surface(double_well(-1.0).objective(), given_directions(torch.ones(1).double()), centred_grid(2.0, 9))
    theta = -1 + found.xs
    torch.testing.assert_close(found.losses, (theta**2 - 1) ** 2)
    assert found.ys is None


def test_values_that_are_not_finite_stay_as_they_are() -> None:
    def loss(theta: Tensor) -> Tensor:
        return torch.where(theta > 1, theta / 0, torch.where(theta < 0, theta.sqrt(), theta))

    found = surface(along_line(loss, 1.0), given_directions(torch.ones(1).double()), centred_grid(2.0, 5))
    np.testing.assert_array_equal(found.losses.numpy(), [math.nan, 0.0, 1.0, math.inf, math.inf])


def test_a_grid_for_each_direction() -> None:
    directions = given_directions(normal(4, 2, seed=5))
    with pytest.raises(ValueError, match="Expected a grid for each of 2 directions, got 1"):
        surface(quadratic(with_spectrum([1.0, 2.0, 3.0, 4.0])).objective(), directions, XS)


# -- curvature ---------------------------------------------------------------------------------------------------------


def test_the_second_difference_along_eigenvectors_is_the_eigenvalue() -> None:
    module = smooth_net().double()
    objective = Objective(module, batches(double=True), image_loss)
    loss = oracles.mean_loss(module, batches(double=True), image_loss, [8.0] * 3)
    top = torch.linalg.eigvalsh(oracles.dense_hessian(loss, oracles.flat_parameters(module))).flip(0)
    grid = centred_grid(1e-3, 3)
    found = surface(objective, hessian_directions(objective, generator(0)), grid, grid)
    assert found.curvature(0) == pytest.approx(float(top[0]), rel=1e-5)
    assert found.curvature(1) == pytest.approx(float(top[1]), rel=1e-5)


def test_of_a_quadratic_the_second_difference_is_exact_at_any_width() -> None:
    hessian, columns = with_spectrum([6.0, 3.0, 1.0, -0.5]), normal(4, 2, seed=5)
    objective = quadratic(hessian, normal(4, seed=3)).objective()
    found = surface(objective, given_directions(columns), centred_grid(2.0, 5), centred_grid(3.0, 7))
    for axis in (0, 1):
        expected = float(columns[:, axis] @ hessian @ columns[:, axis])
        assert found.curvature(axis) == pytest.approx(expected, rel=1e-10)


def test_without_neighbours_at_equal_distances_there_is_no_second_difference() -> None:
    objective, directions = quadratic(with_spectrum([1.0] * 4)).objective(), given_directions(normal(4, 2, seed=5))
    found = surface(objective, directions, XS, YS)
    assert found.curvature(0) is None  # −0.5, 0, 1
    assert surface(objective, directions, centred_grid(1.0, 3), YS[1:]).curvature(1) is None  # at the edge
    assert surface(objective, directions, centred_grid(1.0, 3), YS[::2]).curvature(0) is None  # not on the grid


# -- marks and BatchNorm -----------------------------------------------------------------------------------------------


def states_of(objective: Objective, count: int = 3) -> dict[str, Endpoint]:
    theta = objective.theta()
    moved = [theta + 0.2 * index * normal(len(theta), seed=40 + index).to(theta) for index in range(count)]
    ends = [Endpoint(t, {n: b + 0.1 * i for n, b in objective.buffers.items()}) for i, t in enumerate(moved)]
    return dict(zip("ABC", ends, strict=False))


def others(ends: dict[str, Endpoint]) -> dict[str, Endpoint]:
    return {label: end for label, end in ends.items() if label != "A"}


def test_states_are_marked_where_they_are_with_their_own_loss() -> None:
    objective = conv_net()
    ends = states_of(objective)
    directions = plane_directions(*(end.theta for end in ends.values()))
    found = surface(objective, directions, XS, YS, centre=ends["A"], label="A", marks=others(ends))
    assert [mark.label for mark in found.marks] == ["A", "B", "C"]
    assert [mark.position for mark in found.marks[:2]] == [(0.0, 0.0), pytest.approx((1.0, 0.0), abs=1e-14)]
    for mark, end in zip(found.marks, ends.values(), strict=True):
        assert mark.values["loss"] == objective.evaluate(end.theta, buffers=end.buffers).loss
        torch.testing.assert_close(directions.point(ends["A"].theta, mark.position), end.theta, rtol=0, atol=1e-12)
        assert mark.distance < 1e-12


def test_the_statistics_are_the_centres_everywhere_or_recomputed_everywhere() -> None:
    objective, training = conv_net(), conv_net(mode="train", keep_batches=True)
    ends = states_of(objective, 2)
    directions = line_direction(ends["A"].theta, ends["B"].theta)
    grid = torch.tensor([0.0, 0.4, 1.0]).double()
    common: dict[str, Any] = {"centre": ends["A"], "label": "A", "marks": others(ends), "stats_objective": training}
    kept, anew = (
        surface(objective, directions, grid, batch_stats=policy, **common) for policy in ("endpoint", "recompute")
    )
    for index, t in enumerate(grid.tolist()):
        theta = directions.point(ends["A"].theta, (t,))
        assert kept.losses[index] == objective.evaluate(theta, buffers=ends["A"].buffers).loss
        statistics = running_statistics(training, theta, ends["A"].buffers)
        assert anew.losses[index] == objective.evaluate(theta, buffers=statistics).loss
    assert (kept.batch_stats, anew.batch_stats) == ("endpoint", "recompute")
    assert kept.marks[1].values["loss"] == objective.evaluate(ends["B"].theta, buffers=ends["B"].buffers).loss
    assert kept.marks[1].values["loss"] != pytest.approx(float(kept.losses[-1]))  # with A's statistics
    assert anew.marks[1].values["loss"] == pytest.approx(float(anew.losses[-1]), rel=1e-12)


def test_recomputed_statistics_need_training_batches_and_without_batch_norm_there_is_no_policy() -> None:
    objective = conv_net()
    directions = random_directions(objective.theta(), objective.layout, generator(0))
    with pytest.raises(ValueError, match=r"batch_stats='recompute' needs training batches"):
        surface(objective, directions, XS, YS, batch_stats="recompute")
    found = surface(double_well(0.0).objective(), given_directions(torch.ones(1).double()), XS, batch_stats="recompute")
    assert found.batch_stats is None


# -- grids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("span", "num_points"), [(1.0, 25), (0.3, 7), (1e-3, 3), (math.pi, 101)])
def test_zero_is_a_point_of_a_centred_grid_and_the_ends_are_exact(span: float, num_points: int) -> None:
    grid = centred_grid(span, num_points)
    assert (grid[num_points // 2], grid[0], grid[-1]) == (0, -span, span)
    torch.testing.assert_close(grid.diff(), torch.full((num_points - 1,), 2 * span / (num_points - 1)).double())


@pytest.mark.parametrize(("span", "num_points"), [(1.0, 24), (1.0, 1), (0.0, 5), (-1.0, 5), (math.inf, 5)])
def test_a_grid_without_centre_or_width_is_refused(span: float, num_points: int) -> None:
    with pytest.raises(ValueError, match="Expected an odd num_points of at least 3, so that the centre is one of them"):
        centred_grid(span, num_points)


def test_a_window_is_square_around_its_positions() -> None:
    xs, ys = window([(0.0, 0.0), (1.0, 0.0), (0.5, 0.4)], 25)
    assert (xs[0], xs[-1], ys[0], ys[-1]) == pytest.approx((-0.25, 1.25, -0.55, 0.95))
    xs, ys = window([(0.0, 0.0), (1.0, 0.0)], 25)
    assert {0.0, 1.0} <= set(xs.tolist())
    assert 0.0 in ys.tolist()


# -- on disk -----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stopped_after(points: int) -> Any:
    def progress(done: int, total: int, text: str) -> None:
        assert (total, text) == (12, "points")
        if done == points:
            raise Stopped

    return progress


def net() -> Objective:
    return Objective(ConvNet(), split(images(), [64, 6]), cross_entropy)


def taken(objective: Objective, **options: Any) -> Surface:
    return surface(objective, random_directions(objective.theta(), objective.layout, generator(0)), XS, YS, **options)


def assert_same(a: Surface, b: Surface) -> None:
    assert {k: v.tolist() for k, v in a.values.items()} == {k: v.tolist() for k, v in b.values.items()}
    assert (a.xs.tolist(), a.marks, a.labels, a.description) == (b.xs.tolist(), b.marks, b.labels, b.description)
    assert (None if a.ys is None else a.ys.tolist()) == (None if b.ys is None else b.ys.tolist())
    assert (a.split, a.batch_stats, a.num_examples) == (b.split, b.batch_stats, b.num_examples)


def test_an_interrupted_surface_goes_on_where_it_was_and_equals_one_that_was_not(tmp_path: Path) -> None:
    path, whole = tmp_path / "surface.npz", taken(net())
    with pytest.raises(Stopped):
        taken(net(), path=path, progress=stopped_after(5))
    with pytest.raises(ValueError, match=r"surface.npz has 5 of 12 points. Call the same function again"):
        load_surface(path)
    told: list[int] = []
    assert_same(taken(net(), path=path, progress=lambda done, total, text: told.append(done)), whole)
    assert told == [6, 7, 8, 9, 10, 11, 12]  # only those that were missing
    told.clear()
    assert_same(taken(net(), path=path, progress=lambda done, total, text: told.append(done)), whole)
    assert told == []
    assert_same(load_surface(path), whole)
    assert [file.name for file in tmp_path.iterdir()] == ["surface.npz"]


def test_points_are_on_disk_before_the_computation_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed has no last word."""
    path = tmp_path / "surface.npz"
    monkeypatch.setattr("lmc_lightning.landscape.surface.slices._SAVE_EVERY", 4)
    seen = []

    def progress(done: int, total: int, text: str) -> None:
        if path.is_file():
            with np.load(path) as arrays:
                seen.append(int(arrays["done"].sum()))

    taken(net(), path=path, progress=progress)
    assert sorted(set(seen)) == [4, 8, 12]


def test_an_interruption_that_found_nan_is_not_mistaken_for_missing_points(tmp_path: Path) -> None:
    objective = along_line(lambda theta: theta.log(), 1.0)
    ask = {"xs": centred_grid(2.0, 5), "path": tmp_path / "s.npz"}
    first, again = (surface(objective, given_directions(torch.ones(1).double()), **ask) for _ in range(2))  # type: ignore[arg-type]
    np.testing.assert_array_equal(first.losses.numpy(), again.losses.numpy())
    assert [str(x) for x in first.losses[:3].tolist()] == ["nan", "-inf", "0.0"]


@pytest.mark.parametrize("change", ["weights", "buffers", "data", "directions", "grid", "policy", "loss", "file"])
def test_a_file_of_another_surface_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "surface.npz"
    taken(net(), path=path)
    module, data, loss_fn = ConvNet(), split(images(), [64, 6]), cross_entropy
    options: dict[str, Any] = {"seed": 0, "xs": XS, "batch_stats": None}
    if change == "weights":
        module.unused.weight.data += 1
    elif change == "buffers":
        module.body[1].running_var *= 1.01  # type: ignore[operator, index]
    elif change == "data":
        data[0][0][0, 0, 0, 0] += 1e-3
    elif change == "loss":
        loss_fn = lambda module, batch: 1.01 * cross_entropy(module, batch)  # noqa: E731
    elif change == "file":
        with np.load(path) as arrays:
            np.savez(path, **{name: value for name, value in arrays.items() if name != "identity"})
    else:
        options |= {"directions": {"seed": 1}, "grid": {"xs": 2 * XS}, "policy": {"batch_stats": "recompute"}}[change]
    objective = Objective(module, data, loss_fn)
    stats = Objective(module, data, loss_fn, mode="train")
    directions = random_directions(objective.theta(), objective.layout, generator(options.pop("seed")))
    with pytest.raises(ValueError, match=r"surface.npz belongs to another surface: .* Give a path of its own"):
        surface(objective, directions, options.pop("xs"), YS, path=path, stats_objective=stats, **options)


@pytest.mark.parametrize("ys", [None, YS])
def test_arrays_hold_everything_without_pickles(ys: Tensor | None, tmp_path: Path) -> None:
    directions = given_directions(normal(4, 1 if ys is None else 2, seed=5))
    found = surface(quadratic(with_spectrum([1.0, 2.0, 3.0, 4.0])).objective(), directions, XS, ys, split="val")
    np.savez(tmp_path / "s.npz", **found.to_arrays())  # type: ignore[arg-type]
    assert_same(load_surface(tmp_path / "s.npz"), found)
    assert json.loads(str(found.to_arrays()["about"]))["split"] == "val"


def test_the_module_is_left_as_it_was() -> None:
    module = ConvNet().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    objective = Objective(module, split(images(), [64, 6]), cross_entropy)
    taken(
        objective,
        batch_stats="recompute",
        stats_objective=Objective(module, split(images(), [64, 6]), cross_entropy, mode="train"),
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.training
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert endpoint_of(objective).theta.equal(objective.theta())
