"""The radius of low loss in shared random directions: forward passes of the secant search and of bisection."""

from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.harness import Contender, Found, Run, Values
from benchmarks.works import Work
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.volume.estimate import direction, minimum_volumes
from lmc_lightning.landscape.volume.radii import bisected
from lmc_lightning.landscape.volume.result import VolumeSettings

NUM_DIRECTIONS = 20
RISE = 0.1
TOLERANCE = 1e-3
_FARTHEST = 1e6


def contenders(work: Work) -> list[Contender]:
    """Ours, and bisection from the radius of the first direction and from a hundredth of ‖θ‖, of equal tolerance."""
    return [
        Contender("lmc_lightning", lambda seed: _ours(work), ours=True),
        Contender("bisection from the first radius", lambda seed: _bisection(work, from_first=True)),
        Contender("bisection from ‖θ‖/100", lambda seed: _bisection(work, from_first=False)),
    ]


def errors(work: Work, found: Found) -> Values:
    """The largest relative error of a radius, against bisection to 1e-6."""
    return {"radius": float((found["radii"] / _truth(work) - 1).abs().max())}


def _ours(work: Work) -> Run:
    objective = work.objective()
    settings = VolumeSettings((RISE,), "rise", num_directions=NUM_DIRECTIONS, rtol=TOLERANCE, num_checked=0)

    def run() -> Found:
        volume = minimum_volumes(objective, objective.theta(), settings)[RISE]
        return {"radii": volume.radii, "losses": volume.num_losses}

    return run


def _bisection(work: Work, *, from_first: bool) -> Run:
    objective = work.objective()

    def run() -> Found:
        radii, losses = _bisect(objective, TOLERANCE, from_first=from_first)
        return {"radii": radii, "losses": losses}

    return run


def _bisect(objective: Objective, tolerance: float, *, from_first: bool) -> tuple[Tensor, int]:
    theta = objective.theta()
    base, count, radii = objective.evaluate(theta).loss, 1, list[float]()
    for index in range(NUM_DIRECTIONS):
        step = direction(0, index, len(theta)).to(theta)

        def rise(radius: float, step: Tensor = step) -> float:
            nonlocal count
            count += 1
            return objective.evaluate(theta + radius * step).loss - base

        start = radii[0] if radii and from_first else 0.01 * float(theta.norm())
        radii.append(bisected(rise, RISE, start=start, r_max=_FARTHEST, rtol=tolerance).radius)
    return torch.tensor(radii, dtype=torch.float64), count


@lru_cache(maxsize=1)
def _truth(work: Work) -> Tensor:
    return _bisect(work.objective(), 1e-6, from_first=True)[0]
