"""Ways of weights that are already there: of the runs of a family, and the ends of many runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.callbacks.bridge.guards import check_loss
from lmc_lightning.callbacks.bridge.objectives import objective_of
from lmc_lightning.callbacks.bridge.probes import draw, to_device
from lmc_lightning.core.params import parameter_layout
from lmc_lightning.landscape.trajectory.components import Trajectory
from lmc_lightning.landscape.trajectory.convergence import Convergence, ReachedMetric, convergence
from lmc_lightning.types import LossFn


def family_trajectories(family: Family, module: nn.Module, parameters: Sequence[str] | None = None) -> list[Trajectory]:
    """The ways of the trunk and of its completed children through the weights that a family has kept.

    A child that left the trunk after an epoch begins at its branch point. Memory: all kept weights.

    Args:
        family: trunk and children.
        module: of their architecture, for the names of the parameters.
        parameters: name patterns of the parameters; all trainable ones by default.
    """
    layout, found = parameter_layout(module, parameters), []
    for node in (family.trunk, *family.children):
        epochs = sorted(node.epochs)
        if epochs and (node is family.trunk or node.status == "completed"):
            points = torch.stack([layout.flatten(family.state(node, epoch)).float() for epoch in epochs])
            found.append(Trajectory(points, [node.epochs[epoch] for epoch in epochs], node.name))
    return found


def convergence_statistics(
    modules: Sequence[nn.Module],
    dataloader: Iterable[Any],
    *,
    starts: Sequence[Mapping[str, Tensor]] | None = None,
    threshold: float | None = None,
    metric: ReachedMetric = "loss",
    loss_fn: LossFn | None = None,
    num_examples: int | None = 2048,
    parameters: Sequence[str] | None = None,
    seed: int = 0,
) -> Convergence:
    """Where runs from many initialisations have come to: losses, errors, distances, and how many are good enough.

    Args:
        modules: at the ends of the runs, of one architecture.
        dataloader: the examples that loss and error are measured on.
        starts: the ``state_dict`` that each began with; cosines are of displacements from there.
        threshold: of the ``metric``, at or below which a run counts as converged.
        metric: ``"loss"`` or ``"error"``.
        loss_fn: ``(module, batch) -> scalar mean loss`` in place of the modules' own ``training_step``.
        num_examples: ``None`` for all.
        parameters: name patterns of the parameters; all trainable ones by default.
        seed: of the loader's private random stream.

    Raises:
        ValueError: a plain module comes without ``loss_fn``, or errors are asked for that are not known.
    """
    batches, ends, losses, errors = draw(dataloader, num_examples, seed), list[Tensor](), list[float](), list[Any]()
    for module in modules:
        check_loss(module, loss_fn)
        objective = objective_of(module, to_device(batches, module), loss_fn=loss_fn, parameters=parameters, seed=seed)
        ends.append(objective.theta())
        losses.append(objective.baseline.loss)
        errors.append(objective.baseline.error)
    layout = parameter_layout(modules[0], parameters)
    begun = None if starts is None else [layout.flatten(state).to(ends[0]) for state in starts]
    known = None if None in errors else errors
    return convergence(ends, losses, known, starts=begun, threshold=threshold, metric=metric)
