"""Surfaces are drawn where they are: coordinates, colours and heights, marks, and what is not finite."""

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgba
from PIL import Image

from lmc_lightning.landscape.surface.slices import Mark, Surface
from lmc_lightning.plotting.animation import animate
from lmc_lightning.plotting.style import figure_of, pixels
from lmc_lightning.plotting.surfaces import (
    common_scale,
    mesh_arrays,
    plot_contours,
    plot_profile,
    plot_relief,
    surface_caption,
)

XS, YS = torch.linspace(-1, 1, 9, dtype=torch.float64), torch.linspace(-0.5, 1, 7, dtype=torch.float64)
RAMP = (1 + XS)[:, None] + 10 * (0.5 + YS)[None, :] + 1
"""Rises slowly along x and fast along y."""


def plane(values: torch.Tensor = RAMP, **changes: Any) -> Surface:
    marks = (Mark("A", (0.0, 0.0), 0.0, {"loss": float(values[4, 2])}), Mark("B", (0.5, 0.75), 0.0, {"loss": 12.0}))
    whole = Surface(
        XS, YS, {"loss": values}, marks, ("along", "across"), "random directions", "train", "recompute", 512
    )
    return replace(whole, **changes)


def line(values: torch.Tensor) -> Surface:
    marks = (Mark("θ", (0.0,), 0.0, {"loss": float(values[4])}),)
    return Surface(XS, None, {"loss": values, "error": values / 20}, marks, ("t",), "line through A and B", "val")


def brightness_at(ax: Axes, x: float, y: float) -> float:
    image = pixels(figure_of(ax)).astype(float)
    column, row = ax.transData.transform((x, y))
    return float(image[int(image.shape[0] - row), int(column)].sum())


def test_x_is_the_first_direction_and_y_the_second() -> None:
    ax = plot_contours(plane())
    corners = [brightness_at(ax, x, y) for x, y in ((-0.93, -0.45), (0.93, -0.45), (-0.93, 0.93), (0.93, 0.93))]
    assert corners[0] < corners[1] < corners[2] < corners[3]  # transposed, the two in the middle would change places
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("along", "across")
    assert (ax.get_xlim(), ax.get_ylim()) == ((-1, 1), (-0.5, 1))


def test_data_directions_and_batch_norm_policy_stand_in_the_heading() -> None:
    expected = "random directions\ntrain, 512 examples · 9 × 7 points · BatchNorm recomputed on training data"
    assert surface_caption(plane()) == expected
    assert "BatchNorm statistics of the centre" in surface_caption(plane(batch_stats="endpoint"))
    assert "BatchNorm" not in surface_caption(plane(batch_stats=None))
    ax = plot_contours(plane(), title="Epoch 3")
    assert ax.get_title(loc="left") == "Epoch 3"
    assert expected in [text.get_text() for text in ax.texts]
    assert expected in [text.get_text() for text in figure_of(plot_relief(plane())).texts]


def test_marks_are_drawn_at_their_coordinates_with_their_labels() -> None:
    ax = plot_contours(plane())
    drawn = [(float(x), float(y)) for line in ax.lines for x, y in line.get_xydata()]  # type: ignore[union-attr]
    assert drawn == [(0.0, 0.0), (0.5, 0.75)]
    assert {"A", "B"} <= {text.get_text() for text in ax.texts}


def test_losses_over_more_than_a_factor_of_twenty_are_logarithmic() -> None:
    wide, narrow, negative = plane(10 ** (RAMP / 5)), plane(), plane(RAMP - 5)
    assert isinstance(common_scale([wide]), LogNorm)
    assert not isinstance(common_scale([narrow]), LogNorm)
    assert not isinstance(common_scale([negative]), LogNorm)
    ax = plot_contours(wide)
    levels = ax.collections[0].levels  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.diff(np.log(levels)), np.diff(np.log(levels))[0], rtol=1e-9)
    assert levels[0] == pytest.approx(float(wide.losses.min()))
    assert levels[-1] == pytest.approx(float(wide.losses.max()))
    bar = figure_of(ax).axes[1]
    assert bar.get_ylabel() == "train loss"
    assert len(bar.get_yticks()) >= 3


def test_errors_are_never_logarithmic() -> None:
    found = replace(plane(), values={"loss": RAMP, "error": 10 ** (RAMP / 5 - 4)})
    assert not isinstance(common_scale([found], "error"), LogNorm)


def test_one_scale_serves_several_surfaces() -> None:
    scale = common_scale([plane(), plane(RAMP + 4)])
    assert (scale.vmin, scale.vmax) == (float(RAMP.min()), float(RAMP.max()) + 4)


def holed() -> Surface:
    values = RAMP.clone()
    values[6:, 4:] = torch.nan
    values[0, 0] = torch.inf
    return plane(values)


def test_points_that_are_not_finite_are_grey_and_spoil_no_scale() -> None:
    ax = plot_contours(holed())
    image = pixels(figure_of(ax))
    column, row = ax.transData.transform((0.8, 0.8))
    assert image[int(image.shape[0] - row), int(column)].tolist() == [0xD4] * 3
    scale = common_scale([holed()])
    assert np.isfinite([scale.vmin, scale.vmax]).all()
    figure_of(plot_relief(holed())).canvas.draw()


@pytest.mark.parametrize("value", [torch.nan, 1.0, 0.0])
@pytest.mark.parametrize("plot", [plot_contours, plot_relief])
def test_surfaces_without_any_slope_or_number_can_be_drawn(plot: Any, value: float) -> None:
    values = torch.full((9, 7), value, dtype=torch.float64)
    marks = (Mark("θ", (0.0, 0.0), 0.0, {"loss": float(values[0, 0])}),)
    assert pixels(figure_of(plot(plane(values, marks=marks)))).std() > 0


def test_a_relief_has_the_heights_of_the_scale() -> None:
    surface = plane(10 ** (RAMP / 5))
    ax = plot_relief(surface)
    labels = [float(text.get_text()) for text in ax.get_zticklabels()]
    logs = np.log(surface.losses.numpy())
    expected = (np.log(labels) - logs.min()) / (logs.max() - logs.min())
    np.testing.assert_allclose(ax.get_zticks(), expected, atol=1e-9)
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_zlabel()) == ("along", "across", "train loss")


def test_a_profile_has_loss_error_and_marks() -> None:
    ax = plot_profile(line(1 + XS.square()))
    np.testing.assert_allclose(ax.lines[0].get_xydata(), np.stack([XS, 1 + XS.square()], axis=1))
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0, 1]])
    beside = figure_of(ax).axes[1]
    np.testing.assert_allclose(beside.lines[0].get_ydata(), (1 + XS.square()) / 20)
    assert ax.get_yscale() == "linear"
    assert plot_profile(line(10 ** (2 * XS))).get_yscale() == "log"


def test_planes_and_lines_have_pictures_of_their_own() -> None:
    flat = line(1 + XS.square())
    for plot in (plot_contours, plot_relief, mesh_arrays):
        with pytest.raises(ValueError, match=r"Expected a surface on a plane. Of one on a line, draw plot_profile"):
            plot(flat)
    with pytest.raises(ValueError, match=r"Expected a surface on a line. Of one on a plane, draw plot_contours or"):
        plot_profile(plane())


# -- triangles ---------------------------------------------------------------------------------------------------------


def test_a_mesh_covers_the_plane_with_triangles_y_up() -> None:
    surface = plane(marks=())
    vertices, faces, colors = mesh_arrays(surface)
    assert vertices.shape == colors.shape == (63, 3)
    assert faces.shape == (2 * 8 * 6, 3)
    assert (vertices.dtype, faces.dtype, colors.dtype) == (np.float32, np.int32, np.uint8)
    assert np.abs(vertices).max() == 1
    corners = vertices[faces][:, :, [0, 2]]
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    areas = np.abs(first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]) / 2
    assert areas.sum() == pytest.approx(4, rel=1e-6)
    heights = vertices[:, 1].reshape(9, 7)
    np.testing.assert_allclose(heights, (RAMP - RAMP.min()) / (RAMP.max() - RAMP.min()) - 0.5, atol=1e-6)
    assert colors[0].tolist() == [68, 1, 84]  # viridis from its lowest
    assert colors[-1].tolist() == [253, 231, 37]  # to its highest


def test_a_mesh_has_no_triangles_where_there_are_no_numbers_and_an_octahedron_for_each_mark() -> None:
    vertices, faces, colors = mesh_arrays(holed())
    assert np.isfinite(vertices).all()
    unknown = np.flatnonzero(~np.isfinite(holed().losses.numpy().reshape(-1)))
    assert not np.isin(faces, unknown).any()
    added = vertices[63:].reshape(2, 6, 3).mean(axis=1)
    np.testing.assert_allclose(added[:, [0, 2]], [[0.0, 1 / 3], [0.5, -2 / 3]], atol=1e-6)
    assert (colors[63:] == np.round(255 * np.array(to_rgba("#d7263d")[:3]))).all()
    assert len(mesh_arrays(plane())[1]) == 96 + 16


# -- films -------------------------------------------------------------------------------------------------------------


def frames_of(path: Path) -> list[np.ndarray]:
    with Image.open(path) as film:
        found = []
        for number in range(film.n_frames):  # type: ignore[attr-defined]
            film.seek(number)
            found.append(np.asarray(film.convert("RGB")).astype(int))
        return found


@pytest.mark.parametrize("style", ["contours", "relief"])
def test_a_film_has_a_frame_for_each_visit_in_one_scale(style: Any, tmp_path: Path) -> None:
    visits = {0: plane(RAMP + 30), 40: plane(RAMP)}
    path = animate(visits, tmp_path / "deep" / "film.gif", style=style)
    first, second = frames_of(path)
    assert first.shape == second.shape
    assert np.abs(first - second).mean() > 1
    plot = plot_contours if style == "contours" else plot_relief
    scale = common_scale(list(visits.values()))
    alone = pixels(figure_of(plot(visits[40], scale=scale, title="Loss surface, step 40"))).astype(int)
    assert np.abs(second - alone).mean() < 4  # but for the palette of 256 colours


def test_a_single_surface_turns_around(tmp_path: Path) -> None:
    found = frames_of(animate(plane(), tmp_path / "film.gif", turning_frames=4))
    assert len(found) == 4
    assert all(np.abs(a - b).mean() > 1 for a, b in pairwise(found))


def test_lines_over_data_sets(tmp_path: Path) -> None:
    sets = {"train": line(1 + XS.square()), "val": line(2 + XS.square())}
    assert len(frames_of(animate(sets, tmp_path / "film.gif", frames_per_second=1))) == 2
    assert len(frames_of(animate(list(sets.values()), tmp_path / "other.gif"))) == 2
    with Image.open(tmp_path / "film.gif") as film:
        assert film.info["duration"] == 1000


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_a_film_as_mp4(tmp_path: Path) -> None:
    path = animate([plane(), plane(RAMP + 1)], tmp_path / "film.mp4", style="contours")
    assert path.read_bytes()[4:8] == b"ftyp"


def test_films_of_nothing_or_of_another_kind_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Expected at least one surface, got none"):
        animate({}, tmp_path / "film.gif")
    with pytest.raises(ValueError, match=r"Expected a path that ends in .gif or .mp4, got 'film.avi'"):
        animate(plane(), tmp_path / "film.avi")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"An .mp4 needs the program ffmpeg, which is not installed.* write a .gif"):
        animate(plane(), tmp_path / "film.mp4")
