"""The strides of a walk against all its states at once, also of one that goes on."""

import math

import pytest
import torch

from lmc_lightning.landscape.trajectory.walk import Walk
from tests.problems import normal


def test_strides_are_those_of_the_whole_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmc_lightning.landscape.trajectory.walk._PIECE", 7)
    points, walk = normal(6, 40, seed=1).cumsum(0), Walk()
    for step, point in enumerate(points):
        walk.advance(10 * step, point)
    moved = points.diff(dim=0)
    for i, stride in enumerate(walk.strides):
        assert stride.norm == pytest.approx(float(points[i].norm()))
        assert stride.distance == pytest.approx(float((points[i] - points[0]).norm()))
        assert stride.path == pytest.approx(float(moved[:i].norm(dim=1).sum()))
        assert math.isnan(stride.length) if i == 0 else stride.length == pytest.approx(float(moved[i - 1].norm()))
        if i > 1:
            cosine = torch.cosine_similarity(moved[i - 1], moved[i - 2], dim=0)
            assert stride.cosine == pytest.approx(float(cosine))
        else:
            assert math.isnan(stride.cosine)
    assert walk.at(30) == (4, walk.strides[3])
    assert walk.at(31) is None


@pytest.mark.parametrize("known", [1, 2, 4])
def test_a_walk_that_goes_on_is_the_walk(known: int) -> None:
    points, whole, first, second = normal(6, 40, seed=2).cumsum(0), Walk(), Walk(), Walk()
    for step, point in enumerate(points):
        whole.advance(step, point)
    for step in range(known):
        first.advance(step, points[step])
    second.go_on(first.strides, points[0], points[known - 2] if known > 1 else None, points[known - 1])
    for step in range(known, 6):
        second.advance(step, points[step])
    assert repr(second.strides) == repr(whole.strides)


def test_who_stands_still_has_no_direction() -> None:
    walk = Walk()
    for step in range(4):
        walk.advance(step, torch.ones(5))
    assert walk.strides[-1].path == 0
    assert math.isnan(walk.strides[-1].cosine)
