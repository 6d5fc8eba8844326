"""Where runs from many initialisations end: how good they are, how far apart, and how many are good enough."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from scipy.stats import binomtest
from torch import Tensor

ReachedMetric = Literal["loss", "error"]


@dataclass(frozen=True, eq=False)
class Convergence:
    """The ends of R runs.

    Attributes:
        losses: Final loss of each ``(R,)``, float64.
        errors: Final error (1 − accuracy) of each ``(R,)``, where it is known.
        distances: ‖θ_i − θ_j‖₂ of their weights ``(R, R)``.
        cosines: Of the displacements from their starts, or of the weights themselves where these are not known
            ``(R, R)``; independent runs are nearly orthogonal.
        threshold: What counts as good enough, if anything.
        metric: What the threshold is on.
    """

    losses: Tensor
    errors: Tensor | None
    distances: Tensor = field(repr=False)
    cosines: Tensor = field(repr=False)
    threshold: float | None = None
    metric: ReachedMetric = "loss"

    @property
    def reached(self) -> Tensor | None:
        """Which runs are at or below the threshold ``(R,)``; those with a loss of NaN are not."""
        values = self.losses if self.metric == "loss" else self.errors
        return None if self.threshold is None or values is None else values <= self.threshold

    def summary(self) -> dict[str, float]:
        """Mean, standard deviation, least, median and greatest of each, and the fraction that reached the threshold.

        Distances and cosines are over pairs. The fraction has Wilson's 95 % interval, ``fraction_low`` to
        ``fraction_high``.
        """
        pairs = torch.ones_like(self.distances, dtype=torch.bool).triu(1)
        values = {"loss": self.losses, "distance": self.distances[pairs], "cosine": self.cosines[pairs]}
        if self.errors is not None:
            values["error"] = self.errors
        found = {f"{name}_{key}": number for name, of in values.items() for key, number in _distribution(of).items()}
        if self.reached is not None:
            test = binomtest(int(self.reached.sum()), len(self.reached))
            interval = test.proportion_ci(0.95, method="wilson")
            found |= {"fraction": test.statistic, "fraction_low": interval.low, "fraction_high": interval.high}
        return {name: float(value) for name, value in found.items()}


def _distribution(values: Tensor) -> dict[str, float]:
    if not len(values):
        return {}
    spread = values.std() if len(values) > 1 else torch.nan
    low, middle, high = values.quantile(torch.tensor([0.0, 0.5, 1.0], dtype=values.dtype)).tolist()
    return {"mean": float(values.mean()), "std": float(spread), "min": low, "median": middle, "max": high}


def convergence(
    ends: Sequence[Tensor],
    losses: Sequence[float],
    errors: Sequence[float] | None = None,
    *,
    starts: Sequence[Tensor] | None = None,
    threshold: float | None = None,
    metric: ReachedMetric = "loss",
) -> Convergence:
    """Where R runs have come to. R²P operations in float64, for two networks at a time.

    Args:
        ends: final weights of each, ``(P,)``.
        losses: final losses.
        errors: final errors.
        starts: the weights that each began with.
        threshold: of the ``metric``, at or below which a run counts as converged.
        metric: ``"loss"`` or ``"error"``.

    Raises:
        ValueError: a threshold of errors that are not known, or numbers of runs that differ.
    """
    counts = [len(of) for of in (ends, losses, errors, starts) if of is not None]
    if len(set(counts)) != 1:
        raise ValueError(f"Expected one entry for each run, got {counts}.")
    if threshold is not None and metric == "error" and errors is None:
        raise ValueError("The errors of these runs are not known. Give a threshold of the loss.")
    size = len(ends)
    distances, cosines = torch.zeros(size, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    for i in range(size):
        own, moved = ends[i].double(), _moved(ends, starts, i)
        for j in range(i):
            distances[i, j] = distances[j, i] = (own - ends[j].double()).norm()
            cosines[i, j] = cosines[j, i] = torch.cosine_similarity(moved, _moved(ends, starts, j), dim=0)
    known = None if errors is None else torch.as_tensor(errors, dtype=torch.float64)
    return Convergence(torch.as_tensor(losses, dtype=torch.float64), known, distances, cosines, threshold, metric)


def _moved(ends: Sequence[Tensor], starts: Sequence[Tensor] | None, index: int) -> Tensor:
    return ends[index].double() if starts is None else ends[index].double() - starts[index].double()
