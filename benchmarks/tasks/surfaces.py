"""Loss and error on a grid of 11 × 11 points around a network, along two given directions."""

import copy
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.harness import Contender, Found, Run, Values
from benchmarks.tasks.eigenvalues import peer
from benchmarks.works import Batch, Work, mean_loss
from lmc_lightning import loss_surface
from lmc_lightning.landscape.surface.directions import given_directions
from lmc_lightning.landscape.surface.slices import surface

POINTS = 11
CENTRE = POINTS // 2
DISTANCE = 0.5
"""Half the width of the grid, roughly, in units of ‖θ‖."""

Score = Callable[[nn.Module], list[float]]
"""Loss, error or both at one point."""


def contenders(work: Work) -> list[Contender]:
    """Ours with both numbers in one call; peers with one, and with both."""
    made = [
        Contender("lmc_lightning", partial(_ours, work), ours=True),
        Contender("lmc_lightning, loss_surface()", partial(_ours_whole, work)),
    ]
    scores = {"loss": [[0]], "loss and error": [[0, 1]]}
    if peers.installed("loss-landscapes"):
        made += [peer(work, f"loss-landscapes, {n}", partial(_loss_landscapes, work, s)) for n, s in scores.items()]
    if peers.installed("landscaper"):
        # One number a call: it writes what it is given into an array of numbers.
        calls = {"loss": [[0]], "loss and error": [[0], [1]]}
        made += [peer(work, f"landscaper, {n}", partial(_landscaper, work, s)) for n, s in calls.items()]
    return made


def errors(work: Work, found: Found) -> Values:
    """Largest difference from float64 at the points that a user takes the numbers for."""
    difference = np.abs(np.asarray(found["values"]) - _truth(work)[..., : np.shape(found["values"])[-1]])
    return {name: float(difference[..., i].max()) for i, name in enumerate(("loss", "error")[: difference.shape[-1]])}


def _steps(work: Work) -> Tensor:
    """One step of the grid along each direction, ``(2, P)``.

    landscaper scales what it is given tensor by tensor, so the directions are such that this leaves them as they are.
    """
    parameters, generator = list(work.trained[0].parameters()), torch.Generator().manual_seed(0)
    norm = float(peers.as_vector(parameters).norm())
    rows = []
    for _ in range(2):
        parts = [torch.randn(p.shape, generator=generator) for p in parameters]
        row = peers.as_vector([part * (part.numel() ** 0.5 / part.norm()) for part in parts])
        rows.append(row * (norm * DISTANCE / (POINTS / 2) / row.norm()))
    return torch.stack(rows)


def _ours(work: Work, seed: int) -> Run:
    module, steps = work.module(), _steps(work)

    def run() -> Found:
        grid = torch.arange(POINTS, dtype=torch.float64) - CENTRE
        found = surface(work.objective(module), given_directions(steps.T), grid, grid)
        return {"values": np.stack([found.values["loss"], found.values["error"]], axis=-1)}

    return run


def _ours_whole(work: Work, seed: int) -> Run:
    module, steps = work.module(), _steps(work)

    def run() -> Found:
        found = loss_surface(
            module,
            [work.probe],
            directions=steps.T,
            span=CENTRE,
            num_points=POINTS,
            num_examples=None,
            loss_fn=mean_loss,
        )
        return {"values": np.stack([found.values["loss"], found.values["error"]], axis=-1)}

    return run


def _loss_landscapes(work: Work, scores: list[list[int]], module: nn.Module) -> Found:
    """Its plane goes from one corner to two others; rows are walked forth and back, from the second point on."""
    from loss_landscapes import planar_interpolation

    first, second = _steps(work)
    corner = peers.as_vector(list(module.parameters())) - CENTRE * first - (CENTRE + 1) * second
    ends = (corner, corner + POINTS * first, corner + POINTS * second)
    modules = [_moved(module, theta) for theta in ends]
    (wanted,) = scores
    metric = lambda wrapper: _score(wrapper.modules[0], work.chunks, wanted)  # noqa: E731
    return {"values": planar_interpolation(*modules, metric, steps=POINTS, deepcopy_model=True)}


def _landscaper(work: Work, scores: list[list[int]], module: nn.Module) -> Found:
    """A call for each number: its points are θ + (i − 5) steps, whatever coordinates it prints beside them."""
    from landscaper.compute import compute_loss_landscape

    found = []
    for wanted in scores:
        directions = [peers.as_list(row, module) for row in _steps(work)]
        score = lambda model, data, wanted=wanted: _score(model, data, wanted)[0]  # noqa: E731
        values, _ = compute_loss_landscape(
            module, work.chunks, directions, score, steps=POINTS, distance=DISTANCE, dim=2, device="cpu"
        )
        found.append(values)
    return {"values": np.stack(found, axis=-1)}


def _moved(module: nn.Module, theta: Tensor) -> nn.Module:
    moved = copy.deepcopy(module)
    for parameter, part in zip(moved.parameters(), peers.as_list(theta, moved), strict=True):
        parameter.data = part.clone()
    return moved


@torch.no_grad()
def _score(module: nn.Module, batches: list[Batch], wanted: list[int]) -> list[float]:
    totals, count = [0.0, 0.0], 0
    for images, labels in batches:
        outputs = module(images)
        count += len(labels)
        if 0 in wanted:
            totals[0] += float(F.cross_entropy(outputs, labels, reduction="sum"))
        if 1 in wanted:
            totals[1] += float((outputs.argmax(1) != labels).sum())
    return [totals[i] / count for i in wanted]


@lru_cache(maxsize=1)
def _truth(work: Work) -> NDArray[np.float64]:
    """``(11, 11, 2)``, in float64 by nothing but torch."""
    module, steps = work.module().double(), _steps(work).double()
    theta = peers.as_vector(list(module.parameters()))
    batches = [(images.double(), labels) for images, labels in work.chunks]
    found = np.empty((POINTS, POINTS, 2))
    for i in range(POINTS):
        for j in range(POINTS):
            point = theta + (i - CENTRE) * steps[0] + (j - CENTRE) * steps[1]
            found[i, j] = _score(_moved(module, point), batches, [0, 1])
    return found
