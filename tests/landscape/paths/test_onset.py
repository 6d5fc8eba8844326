import math

import pytest

from lmc_lightning.landscape.paths.onset import bisect_onset, onset

GRID = (0, 100, 250, 500, 1000, 2000, 4000, 8000)


def step_at(k1: int) -> dict[int, list[float]]:
    """Unstable below ``k1``, stable from there on."""
    return {k: [0.3, 0.2] if k < k1 else [0.01, 0.02] for k in GRID}


@pytest.mark.parametrize("k1", GRID)
def test_the_onset_is_where_the_mean_falls_below_the_threshold(k1: int) -> None:
    found = onset(step_at(k1))
    assert (found.k1, found.monotone, found.complete) == (k1, True, True)
    assert found.instability[GRID[-1]] == pytest.approx(0.015)
    assert set(found.replicates.values()) == {2}


def test_what_is_stable_once_is_no_onset_unless_all_later_ones_are() -> None:
    found = onset({0: [0.01], 1: [0.3], 2: [0.01], 5: [0.0]})
    assert (found.k1, found.monotone) == (2, False)
    assert onset({0: [0.3], 1: [0.01], 2: [0.3]}).k1 is None
    assert not onset({0: [0.3], 1: [0.01], 2: [0.3]}).monotone


def test_two_points_are_not_below_two_points_and_a_mean_counts_all_replicates() -> None:
    assert onset({3: [0.02]}).k1 is None
    assert onset({3: [0.0, 0.039]}).k1 == 3
    assert onset({3: [0.0, 0.041]}).k1 is None
    assert onset({3: [0.05]}, threshold=0.1).k1 == 3
    assert onset({3: [math.nan, 0.0], 4: [0.0]}).k1 == 4


@pytest.mark.parametrize("empty", [{}, {0: []}])
def test_an_onset_needs_replicates(empty: dict[int, list[float]]) -> None:
    with pytest.raises(ValueError, match="at least one replicate"):
        onset(empty)


@pytest.mark.parametrize("k1", [*GRID, 10_000])
def test_bisection_finds_it_with_at_most_six_children_of_eight(k1: int) -> None:
    asked: list[int] = []

    def run_child(k: int) -> float:
        asked.append(k)
        return sum(step_at(k1)[k]) / 2

    found = bisect_onset(run_child, GRID)
    assert found.k1 == (k1 if k1 in GRID else None)
    assert len(asked) == len(set(asked)) <= 6
    assert found.monotone
    assert not found.complete
    beside = [GRID[i] for i in (GRID.index(k1) - 2, GRID.index(k1) + 1) if 0 <= i < 8] if k1 in GRID else [4000]
    assert set(beside) <= set(asked)


def test_bisection_says_where_the_points_beside_contradict_it() -> None:
    values = {0: 0.01, 1: 0.3, 2: 0.01, 3: 0.3, 4: 0.01, 5: 0.01, 6: 0.0, 7: 0.0}
    found = bisect_onset(values.__getitem__, list(values))
    assert not found.monotone
    assert found.k1 == 4


@pytest.mark.parametrize("grid", [[], [1, 1], [2, 1]])
def test_a_grid_ascends(grid: list[int]) -> None:
    with pytest.raises(ValueError, match="an ascending grid of k1"):
        bisect_onset(lambda k1: 0.0, grid)


def test_a_grid_of_one_is_one_child() -> None:
    found = bisect_onset(lambda k1: 0.0, [3])
    assert (found.k1, found.complete) == (3, True)
