"""From which branch point on children end in one basin with their trunk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

THRESHOLD = 0.02
"""Two points of error."""


@dataclass(frozen=True)
class Onset:
    """The onset of stability: the smallest branch point from which on instability stays small (arXiv 1912.05671).

    Attributes:
        k1: The smallest k₁ of the grid for which, and for all larger ones that were tested, the mean instability of the
            error at the end of training is below ``threshold``; ``None`` where there is none on the grid.
        threshold: Of the error, as a fraction.
        instability: Mean over the replicates of each tested k₁, in order.
        replicates: How many these were.
        monotone: Whether no k₁ below the onset is stable; bisection assumes it and tests it beside the onset only.
        complete: Whether the whole grid was tested.
    """

    k1: int | None
    threshold: float
    instability: Mapping[int, float]
    replicates: Mapping[int, int]
    monotone: bool
    complete: bool


def onset(instabilities: Mapping[int, Sequence[float]], threshold: float = THRESHOLD) -> Onset:
    """The onset from the instabilities of the error of all replicates at each k₁ of a grid.

    A replicate that is not a number makes the mean of its k₁ not a number, which is not below any threshold.

    Args:
        instabilities: at the end of training, by k₁.
        threshold: below which a mean counts as stable.

    Raises:
        ValueError: no k₁, or one without replicates.
    """
    if not instabilities or not all(instabilities.values()):
        raise ValueError("Expected the instability of at least one replicate for each of one or more k1.")
    means = {k1: sum(values) / len(values) for k1, values in sorted(instabilities.items())}
    return _onset(means, {k1: len(instabilities[k1]) for k1 in means}, threshold, complete=True)


def _onset(means: Mapping[int, float], replicates: Mapping[int, int], threshold: float, *, complete: bool) -> Onset:
    found: int | None = None
    for k1 in sorted(means, reverse=True):
        if not means[k1] < threshold:
            break
        found = k1
    below = [k1 for k1, mean in means.items() if mean < threshold and (found is None or k1 < found)]
    return Onset(found, threshold, dict(sorted(means.items())), replicates, not below, complete)


def bisect_onset(run_child: Callable[[int], float], grid: Sequence[int], threshold: float = THRESHOLD) -> Onset:
    """The onset by bisection: ⌈log₂(K+1)⌉ of the K points of a grid, and one more on either side of the answer.

    Bisection assumes that instability falls below the threshold once and stays there. Of that, the points next to the
    two between which it falls are tested: ``monotone`` is false where they contradict it, and the whole grid has to be
    run by :func:`onset`.

    Args:
        run_child: trains the children of one k₁ and returns their mean instability of the error at the end.
        grid: ascending k₁.
        threshold: below which a k₁ counts as stable.

    Raises:
        ValueError: the grid is empty or does not ascend.
    """
    if not grid or any(a >= b for a, b in pairwise(grid)):
        raise ValueError(f"Expected an ascending grid of k1, got {list(grid)}.")
    means: dict[int, float] = {}

    def is_stable(index: int) -> bool:
        k1 = grid[index]
        if k1 not in means:
            means[k1] = run_child(k1)
        return means[k1] < threshold

    low, high = 0, len(grid)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_stable(middle) else (middle + 1, high)
    for index in (low - 2, low + 1):
        if 0 <= index < len(grid):
            is_stable(index)
    return _onset(means, dict.fromkeys(sorted(means), 1), threshold, complete=len(means) == len(grid))
