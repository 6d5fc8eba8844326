"""Permutations of the channels of one network that bring it close to another one."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lmc_lightning.landscape.alignment.assignment import Ascent, Assignment, WeightEvidence
from lmc_lightning.landscape.alignment.channels import atoms
from lmc_lightning.landscape.alignment.groups import Group, Groups
from lmc_lightning.landscape.alignment.reordering import Permutations
from lmc_lightning.landscape.paths.line import Endpoint

Method: TypeAlias = Literal["weights", "activations"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Matching:
    """Permutations π of a network B that bring it close to a network A, without changing its function.

    Attributes:
        groups: What can be permuted, and what was dropped.
        permutations: Where each channel of πB is in B, by the channels of a group.
        method: What was compared.
        objective: ⟨θ_A, πθ_B⟩ = ½(‖θ_A‖² + ‖θ_B‖² − ‖θ_A − πθ_B‖²), or the sum of the correlations of activations.
        identity_objective: The same without a permutation; never larger.
        objectives: Of all starts, the best of which was taken.
        agreement: Share of the channels that the other starts put in the same place, their mean; NaN without others.
        converged: Whether no single group could be improved further.
        seconds: For everything but finding the groups.
    """

    groups: Groups
    permutations: Permutations = field(repr=False)
    method: Method
    objective: float
    identity_objective: float
    objectives: tuple[float, ...]
    agreement: float
    converged: bool
    seconds: float

    def __getitem__(self, name: str) -> Tensor:
        """The order of the group of this name, ``(n,)`` or ``(blocks, n)``."""
        return next(self.permutations[g.channels] for g in self.groups if g.name == name)

    @property
    def num_channels(self) -> int:
        """Channels that can be permuted."""
        return sum(g.size * g.num_orders for g in self.groups)

    @property
    def moved(self) -> float:
        """Share of these channels that are elsewhere than before; 0 where there are none."""
        return 1 - _same(self.groups, self.permutations, self.groups.identity())

    def apply(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Permuted copies of parameters and buffers by name, e.g. of a state dict; other names are passed on."""
        return self.groups.apply(tensors, self.permutations)

    def apply_to_endpoint(self, end: Endpoint) -> Endpoint:
        """The permuted state.

        Raises:
            ValueError: the state does not say which tensors it is made of.
        """
        if end.layout is None:
            raise ValueError("The state has no layout, so its tensors are not known. Take it from endpoint_of().")
        return replace(
            end, theta=end.layout.flatten(self.apply(end.layout.unflatten(end.theta))), buffers=self.apply(end.buffers)
        )

    def apply_to_optimizer(self, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """The state dict of an optimizer whose momenta and moments follow their parameters.

        Args:
            state: ``optimizer.state_dict()``, or one of a checkpoint's ``optimizer_states``.
            names: of the parameters in the order in which the optimizer got them, e.g. those of
                ``module.named_parameters()``.

        Raises:
            ValueError: there are not as many names, or a tensor of the state is of another shape than its parameter.
        """
        indices = [index for group in state["param_groups"] for index in group["params"]]
        if len(indices) != len(names):
            raise ValueError(f"The optimizer has {len(indices)} parameters, and {len(names)} names were given.")
        of = dict(zip(indices, names, strict=True))
        moved = {i: {k: self._follow(of[i], k, v) for k, v in kept.items()} for i, kept in state["state"].items()}
        return {**state, "state": moved}

    def _follow(self, name: str, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.ndim == 0:
            return value.clone()  # a count of steps, which optimizers change in place
        axes = self.groups.axes.get(name, ())
        if any(atom in self.permutations for term in axes for atom in atoms(term)) and (
            list(value.shape) != [term.size for term in axes]
        ):
            raise ValueError(
                f"{key!r} of {name!r} is of shape {list(value.shape)} in the optimizer's state, so it is not known how "
                f"it follows a permutation of the parameter. Start the optimizer anew."
            )
        return self.groups.reorder(name, value, self.permutations)

    def report(self) -> dict[str, Any]:
        """What a record of a measurement says about the alignment."""
        return {
            "align": self.method,
            "align_groups": len(self.groups),
            "align_channels": self.num_channels,
            "align_moved": self.moved,
            "align_objective": self.objective,
            "align_identity_objective": self.identity_objective,
            "align_objectives": list(self.objectives),
            "align_agreement": self.agreement,
            "align_converged": self.converged,
            "align_dropped": dict(self.groups.dropped),
            "align_seconds": self.seconds,
        }

    def __str__(self) -> str:
        dropped = len(self.groups.dropped)
        return (
            f"{len(self.groups)} groups of {self.num_channels:,} channels, {self.moved:.0%} of them moved; "
            f"{self.method} objective {self.objective:.5g} against {self.identity_objective:.5g} without; "
            f"{self.agreement:.0%} the same from {len(self.objectives) - 1} other starts"
            + (f"; {dropped} axes stay: {next(iter(self.groups.dropped.items()))}" if dropped else "")
        )


def weight_matching(
    groups: Groups,
    parameters_a: Mapping[str, Tensor],
    parameters_b: Mapping[str, Tensor],
    *,
    restarts: int = 2,
    seed: int = 0,
) -> Matching:
    """The permutations of B with the smallest ‖θ_A − πθ_B‖ that coordinate ascent finds (arXiv 2209.04836, §3.2).

    Each step is the exact linear assignment of one group with the others held; blocks (heads) are assigned together
    with the orders inside them. The first start assigns the groups once in the order from the input, by what joins each
    to earlier groups; the source starts from the identity and visits groups in random order, as the further starts here
    do. The best end is taken, or the identity if that is better. A lower bound of the maximum. Costs about n·p
    multiplications and one assignment, O(n³), for a group of n channels on p parameters, a sweep; some 3–6 sweeps a
    start.

    Args:
        groups: from :func:`~lmc_lightning.landscape.alignment.groups.groups_of`.
        parameters_a: of the network that stays, by name; buffers among them are not compared.
        parameters_b: of the network to be permuted.
        restarts: further starts.
        seed: of their random orders.
    """
    started = time.perf_counter()
    evidence = [
        WeightEvidence(parameters_a[name].detach(), parameters_b[name].detach(), groups.axes[name], groups)
        for name in groups.parameters
        if name in groups.axes
    ]
    return matching_by(Assignment(groups, evidence), "weights", restarts, seed, started)


def matching_by(assignment: Assignment, method: Method, restarts: int, seed: int, started: float) -> Matching:
    """The best of several ascents, and how far they agree."""
    groups, identity = assignment.groups, assignment.groups.identity()
    lowest = Ascent(identity, assignment.objective(identity), True)
    ascents = [assignment.ascend(assignment.forward())]
    for start in range(restarts):
        generator = torch.Generator().manual_seed(seed + start)
        ascents.append(assignment.ascend(identity, generator))
    best = max([*ascents, lowest], key=lambda a: a.objective)
    others = [a for a in ascents if a is not best]
    same = [_same(groups, a.permutations, best.permutations) for a in others]
    return Matching(
        groups=groups,
        permutations=best.permutations,
        method=method,
        objective=best.objective,
        identity_objective=lowest.objective,
        objectives=tuple(a.objective for a in ascents),
        agreement=sum(same) / len(same) if same else nan,
        converged=best.converged,
        seconds=time.perf_counter() - started,
    )


def _same(groups: Groups, one: Permutations, other: Permutations) -> float:
    """Share of the channels that two permutations take from the same place."""
    equal = [int(_sources(g, one).eq(_sources(g, other)).sum()) for g in groups]
    return sum(equal) / sum(g.size * g.num_orders for g in groups) if equal else 1.0


def _sources(group: Group, permutations: Permutations) -> Tensor:
    """Where each channel comes from, its block included."""
    order = permutations[group.channels]
    return order if group.within is None else permutations[group.within][:, None] * group.size + order
