"""The loss around a module, or on the plane through two or three, without a trainer."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmc_lightning.callbacks.bridge.guards import check_alike, check_loss
from lmc_lightning.callbacks.bridge.objectives import objective_of
from lmc_lightning.callbacks.bridge.probes import read
from lmc_lightning.callbacks.loss_surface import NUM_EXAMPLES, LossSurface
from lmc_lightning.callbacks.offline.measure import with_checkpoint
from lmc_lightning.callbacks.pairs.reference import tensors_of
from lmc_lightning.callbacks.surface.options import check_surface
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.random_vectors import derive_seed
from lmc_lightning.landscape.paths.batchnorm import has_batch_norm
from lmc_lightning.landscape.paths.line import endpoint_of
from lmc_lightning.landscape.surface.directions import (
    Directions,
    Kind,
    directions_around,
    line_direction,
    plane_beside,
    plane_directions,
)
from lmc_lightning.landscape.surface.slices import NUM_POINTS, Surface, centred_grid, surface, window
from lmc_lightning.types import BatchWeight, LossFn, Progress


def loss_surface(
    module: nn.Module,
    dataloader: Iterable[Any],
    *,
    through: Sequence[nn.Module | str | Path] = (),
    directions: Kind | Tensor = "random",
    dimensions: Literal[1, 2] = 2,
    num_points: int = NUM_POINTS,
    span: float | None = None,
    biases: bool = False,
    batch_stats: Literal["endpoint", "recompute"] | None = None,
    path: str | Path | None = None,
    loss_fn: LossFn | None = None,
    train_dataloader: Iterable[Any] | None = None,
    num_examples: int | None = NUM_EXAMPLES,
    parameters: list[str] | None = None,
    batch_weight: BatchWeight | None = None,
    split: str = "train",
    seed: int = 0,
    progress: Progress | None = None,
) -> Surface:
    """Loss and error on a plane or line around ``module``, or on the one through it and one or two other states.

    Around a module it is what :class:`LossSurface` records, bit for bit on the same batches. The module and every
    random stream are left as they were. Costs ``num_points²`` forward passes over the data.

    Args:
        module: a LightningModule, or any ``nn.Module`` together with ``loss_fn``: the state A.
        dataloader: the examples that loss and error are measured on.
        through: one or two further states of the same architecture, B and C: modules, or checkpoint files. Then the
            plane (or with ``dimensions=1`` the line) goes through all, with A at (0, 0) and B at (1, 0), and each is
            marked with its own loss.
        directions: around a single state: ``"random"``, ``"hessian"``, or the columns of a tensor ``(P, k)``.
        dimensions: 2 for a plane, 1 for a line.
        num_points: along each direction, odd.
        span: half the width, in units of the directions, 1 by default; ``through`` states, in units of the largest
            extent of their positions, 0.75 by default.
        biases: whether random directions move biases, gains of normalisation layers and other vectors too.
        batch_stats: ``"endpoint"``: BatchNorm has the statistics of A at each point, the default around a single state;
            ``"recompute"``: those of training examples, the default ``through`` several.
        path: a file that keeps the points found so far; called again with it, the computation goes on from there.
        loss_fn: ``(module, batch) -> scalar mean loss`` in place of the module's own ``training_step``.
        train_dataloader: training examples for ``"recompute"``; by default ``dataloader``.
        num_examples: of each loader; ``None`` for all.
        parameters: name patterns of the parameters that move; the others stay at A's.
        batch_weight: ``batch -> float``, how much a batch counts; its number of examples by default.
        split: name of the data in the figures.
        seed: of random directions and of the loaders' private random stream.
        progress: ``(done, total, text)`` is told after each point.

    Raises:
        ValueError: states of another architecture, three that lie on one line, a file of another surface, or a plain
            module without ``loss_fn``.
    """
    check_loss(module, loss_fn)
    others = [with_checkpoint(module, other) if isinstance(other, str | Path) else other for other in through]
    _check_request(directions, dimensions, batch_stats, others)
    for other in others:
        check_alike(module, other, parameters)
    common: dict[str, Any] = {"loss_fn": loss_fn, "parameters": parameters, "batch_weight": batch_weight, "seed": seed}
    batches = read(dataloader, module, num_examples, seed)
    objective = objective_of(module, batches, **common)
    policy = batch_stats or ("recompute" if others else "endpoint")
    statistics = None
    if policy == "recompute" and has_batch_norm(module):
        if train_dataloader is not None:
            batches = read(train_dataloader, module, num_examples, seed)
        statistics = objective_of(module, batches, mode="train", keep_batches=True, **common)
    generator = torch.Generator().manual_seed(derive_seed(seed, LossSurface.kind))
    marks = {name: endpoint_of(objective, tensors_of(m)) for name, m in zip("BC", others, strict=False)}
    span = (0.75 if others else 1.0) if span is None else span
    if others:
        thetas = [objective.theta(), *(end.theta for end in marks.values())]
        found, grids = _through(objective, thetas, dimensions, generator, num_points, span, biases)
    else:
        options: dict[str, Any] = {"count": dimensions, "biases": biases, "progress": progress}
        found = directions_around(directions, objective, generator, **options)
        grids = [centred_grid(span, num_points)] * dimensions
    return surface(
        objective,
        found,
        *grids,
        label="A" if others else "θ",
        marks=marks,
        split=split,
        batch_stats=policy,
        stats_objective=statistics,
        path=path,
        progress=progress,
    )


def _through(
    objective: Objective,
    thetas: Sequence[Tensor],
    dimensions: int,
    generator: torch.Generator,
    num_points: int,
    span: float,
    biases: bool,
) -> tuple[Directions, list[Tensor]]:
    """The line or plane through some states, and a window around them."""
    first, second, *third = thetas
    if third:
        directions = plane_directions(first, second, third[0])
    elif dimensions == 1:
        directions = line_direction(first, second)
    else:
        directions = plane_beside(first, second, objective.layout, generator, biases=biases)
    positions = [directions.coordinates(theta.double() - first.double())[0] for theta in thetas]
    return directions, window(positions, num_points, span=span)


def _check_request(directions: Any, dimensions: int, batch_stats: str | None, others: Sequence[nn.Module]) -> None:
    check_surface(directions, dimensions, batch_stats)
    if len(others) > 2:
        raise ValueError(f"Expected one or two further states to span a plane, got {len(others)}.")
    if others and not (isinstance(directions, str) and directions == "random"):
        raise ValueError("The states that the plane goes through span it: leave directions out, or leave out through.")
    if len(others) == 2 and dimensions == 1:
        raise ValueError("A line goes through two states. Leave one of them out, or dimensions=1.")
