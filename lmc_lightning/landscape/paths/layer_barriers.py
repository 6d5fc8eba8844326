"""Barriers of parts of a network: what happens when only some of its tensors move."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lmc_lightning.core.params import ParameterLayout
from lmc_lightning.landscape.paths.barrier import Barrier, NumPoints, barriers_on, line_profiles
from lmc_lightning.landscape.paths.line import NUM_POINTS, Endpoint
from lmc_lightning.landscape.paths.states import StateEvaluator

Barriers = Mapping[str, Mapping[str, Barrier]]
"""By split and metric."""


@dataclass(frozen=True)
class LayerBarriers:
    """Barriers of each group of parameters between networks A and B; every chord is between its own path's ends.

    Attributes:
        at_a: The group moves from A's tensors to B's, the rest stays A's (arXiv 2307.06966).
        at_b: The same with the rest B's.
        cumulative: The group and all before it move together, the rest stays A's; the last is the full barrier.
        order: Of the groups, as ``cumulative`` adds them.
    """

    at_a: Mapping[str, Barriers]
    at_b: Mapping[str, Barriers]
    cumulative: Mapping[str, Barriers]
    order: tuple[str, ...]


def module_groups(layout: ParameterLayout) -> dict[str, tuple[str, ...]]:
    """Parameters by the module that owns them, in the order of θ; those of the root are grouped under ``"."``."""
    groups: dict[str, tuple[str, ...]] = {}
    for name in layout.names:
        owner = name.rpartition(".")[0] or "."
        groups[owner] = (*groups.get(owner, ()), name)
    return groups


def mixed(base: Endpoint, other: Endpoint, names: Iterable[str]) -> Endpoint:
    """``base`` with the named parameters of ``other``, and with the buffers of the modules that own them.

    Raises:
        ValueError: the ends do not say where parameters lie in θ, or there is no such parameter.
    """
    layout, chosen = base.layout, set(names)
    if layout is None:
        raise ValueError("The ends do not name their parameters. Make them by endpoint_of(objective, state_dict).")
    unknown = sorted(chosen - set(layout.names))
    if unknown:
        raise ValueError(f"There is no parameter {unknown[0]!r}. The first names are: {', '.join(layout.names[:8])}.")
    # Sizes and not views, so that entries are copied bit for bit, whatever their dtypes.
    parts = zip(layout.names, base.theta.split(layout.sizes), other.theta.split(layout.sizes), strict=True)
    theta = torch.cat([theirs if name in chosen else own for name, own, theirs in parts])
    owners = {name.rpartition(".")[0] for name in chosen}
    buffers = {n: other.buffers[n] if n.rpartition(".")[0] in owners else b for n, b in base.buffers.items()}
    return Endpoint(theta, buffers, layout)


def layer_barriers(
    states: StateEvaluator,
    end_a: Endpoint,
    end_b: Endpoint,
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    num_points: NumPoints = NUM_POINTS,
) -> LayerBarriers:
    """Layer-wise and cumulative barriers between A (t = 0) and B (t = 1); costs up to 3G paths for G groups.

    Args:
        states: what evaluates each point.
        end_a: at t = 0.
        end_b: at t = 1.
        groups: names of parameters by group, in the order of the cumulative barriers; by default one for each module
            that owns parameters.
        num_points: equally spaced, both ends included, or ``"adaptive"``: refined around the peak of the loss.
    """
    layout = end_a.layout or states.objective.layout
    groups = groups or module_groups(layout)

    def between(a: Endpoint, b: Endpoint) -> Barriers:
        return barriers_on(line_profiles(states, a, b, num_points=num_points))

    moved: list[str] = []
    cumulative: dict[str, Barriers] = {}
    for name, members in groups.items():
        moved += members
        cumulative[name] = between(end_a, mixed(end_a, end_b, moved))
    return LayerBarriers(
        at_a={name: between(end_a, mixed(end_a, end_b, members)) for name, members in groups.items()},
        at_b={name: between(mixed(end_b, end_a, members), end_b) for name, members in groups.items()},
        cumulative=cumulative,
        order=tuple(groups),
    )
