"""Coordinate ascent over the permutations of a network, one linear assignment at a time."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lmc_lightning.landscape.alignment.channels import Channels, Term, atoms
from lmc_lightning.landscape.alignment.groups import Group, Groups
from lmc_lightning.landscape.alignment.reordering import Permutations, index_of, positions

MAX_SWEEPS = 100

_RELATIVE_GAIN = 1e-9
"""Smallest rise of the objective, relative to ‖A‖‖B‖, that is none of rounding."""

Rows = Callable[[Term], Tensor]
"""The places on an axis that belong to each of R rows, ``(R, m)``."""


class Evidence:
    """What says which channels of two networks A and B belong together: a number that is linear in each permutation.

    Args:
        axes: the terms of the axes that are permuted.
        groups: of which they may consist.
    """

    scale: float
    """A bound of the number."""

    def __init__(self, axes: Sequence[Term], groups: Groups) -> None:
        known = {group.channels for group in groups}
        self.axes, self._within = tuple(axes), groups.within
        self.channels = frozenset(atom for term in axes for atom in atoms(term) if atom in known)

    def value(self, permutations: Permutations) -> float:
        """The number itself, with B permuted."""
        raise NotImplementedError

    def gram(self, rows: Rows, permutations: Permutations, free: Set[Channels]) -> Tensor | None:
        """``(R, R)``: what row i of A and row j of B together give, float64; ``None`` if there are no such rows.

        All of B but the channels that are ``free`` on the axis of the rows is permuted.
        """
        raise NotImplementedError

    def _index(self, term: Term, permutations: Permutations, free: Set[Channels] = frozenset()) -> Tensor:
        return index_of(term, {c: order for c, order in permutations.items() if c not in free}, self._within)


class WeightEvidence(Evidence):
    """The inner product of a tensor of A with that of B."""

    def __init__(self, one: Tensor, other: Tensor, axes: Sequence[Term], groups: Groups) -> None:
        super().__init__(axes, groups)
        self._one, self._other = one, other.to(one)
        self.scale = float(one.norm() * other.norm())

    def value(self, permutations: Permutations) -> float:
        """⟨A, πB⟩."""
        return float((self._one * self._moved(permutations)).sum(dtype=torch.float64))

    def gram(self, rows: Rows, permutations: Permutations, free: Set[Channels]) -> Tensor | None:
        """Inner products of slices of A and B."""
        total: Tensor | None = None
        for axis, term in enumerate(self.axes):
            places = rows(term).to(self._one.device)
            if places.numel():
                found = self._slices(self._one, axis, places) @ (
                    self._slices(self._moved(permutations, axis, free), axis, places).T
                )
                total = found.double() if total is None else total + found
        return total

    def _moved(self, permutations: Permutations, free_axis: int = -1, free: Set[Channels] = frozenset()) -> Tensor:
        moved = self._other
        for axis, term in enumerate(self.axes):
            if not self.channels.isdisjoint(atoms(term)):
                index = self._index(term, permutations, free if axis == free_axis else frozenset())
                moved = moved.index_select(axis, index.to(moved.device))
        return moved

    @staticmethod
    def _slices(tensor: Tensor, axis: int, places: Tensor) -> Tensor:
        return tensor.index_select(axis, places.reshape(-1)).movedim(axis, 0).reshape(len(places), -1)


class CorrelationEvidence(Evidence):
    """The sum of the correlations of channels of A with those of B, ``(J, J)`` over the places of one axis."""

    def __init__(self, correlations: Tensor, axis: Term, groups: Groups) -> None:
        super().__init__([axis], groups)
        self._correlations, self.scale = correlations, float(len(correlations))

    def value(self, permutations: Permutations) -> float:
        """Σ_j corr(A_j, B_π(j))."""
        index = self._index(self.axes[0], permutations)
        return float(self._correlations[torch.arange(len(index)), index].sum())

    def gram(self, rows: Rows, permutations: Permutations, free: Set[Channels]) -> Tensor | None:
        """Sums of correlations."""
        places = rows(self.axes[0])
        if not places.numel():
            return None
        moved = self._correlations[:, self._index(self.axes[0], permutations, free)]
        return torch.stack([moved[at][:, at] for at in places.T]).sum(0)


@dataclass(frozen=True)
class Ascent:
    """Permutations at which no single group can be improved."""

    permutations: Permutations
    objective: float
    converged: bool


class Assignment:
    """The search for the permutations of B that the evidence speaks for most.

    Args:
        groups: what may be permuted.
        evidence: whose sum is maximised.
    """

    def __init__(self, groups: Groups, evidence: Sequence[Evidence]) -> None:
        self.groups, self.evidence = groups, list(evidence)

    def objective(self, permutations: Permutations, evidence: Sequence[Evidence] | None = None) -> float:
        """The sum of all evidence, or of some."""
        return sum(e.value(permutations) for e in (self.evidence if evidence is None else evidence))

    def forward(self) -> Permutations:
        """Groups assigned once in the order from the input, each by what joins it to those before only.

        What joins it to later groups, which are not in their order yet, is noise: with it, planted permutations of
        residual networks are missed.
        """
        permutations = dict(self.groups.identity())
        settled: set[Channels] = set()
        for group in self.groups:
            settled |= {group.channels, *(child.channels for child in self._children[group.channels])}
            evidence = [e for e in self.evidence if e.channels <= settled and group.channels in e.channels]
            permutations |= self._best(group, permutations, evidence or self.evidence)
        return permutations

    def ascend(self, start: Permutations, generator: torch.Generator | None = None) -> Ascent:
        """Improve one group after the other until none can be, in forward order or in random ones."""
        permutations, improved = dict(start), [True]
        for _ in range(MAX_SWEEPS):
            order = list(range(len(self.groups)))
            if generator is not None:
                order = torch.randperm(len(order), generator=generator).tolist()
            improved = [self._improve(self.groups.groups[index], permutations) for index in order]
            if not any(improved):
                break
        return Ascent(permutations, self.objective(permutations), not any(improved))

    def _improve(self, group: Group, permutations: dict[Channels, Tensor]) -> bool:
        touched = {group.channels, *(child.channels for child in self._children[group.channels])}
        evidence = [e for e in self.evidence if not e.channels.isdisjoint(touched)]
        proposed = permutations | self._best(group, permutations, evidence)
        if all(torch.equal(proposed[c], permutations[c]) for c in touched):
            return False
        # A group on two axes of one tensor is assigned with the other axis held, which need not be a rise.
        gain = self.objective(proposed, evidence) - self.objective(permutations, evidence)
        if gain <= _RELATIVE_GAIN * sum(e.scale for e in evidence):
            return False
        permutations |= proposed
        return True

    @cached_property
    def _children(self) -> dict[Channels, list[Group]]:
        """The groups inside each block of another one, with an order in each or with one for all."""
        return {g.channels: [c for c in self.groups if g.channels in (c.within, c.inside)] for g in self.groups}

    def _best(self, group: Group, permutations: Permutations, evidence: Sequence[Evidence]) -> dict[Channels, Tensor]:
        """The best order of one group with all others held; blocks together with the orders inside them."""
        if group.within is not None:
            scores = self._block_scores(group, permutations, evidence)
            blocks = permutations[group.within].tolist()
            return {group.channels: torch.stack([assigned(scores[h, :, b]) for h, b in enumerate(blocks)])}
        children = self._children[group.channels]
        inside = {child.channels for child in children}
        rows = lambda term: positions(term, group.channels, without=inside)  # noqa: E731
        scores = self._sum(evidence, rows, permutations, {group.channels, *inside}, group.size)
        inner = {}
        for child in children:
            of_child = self._block_scores(child, permutations, evidence)
            best = torch.stack(
                [torch.stack([assigned(of_child[h, :, b]) for b in range(group.size)]) for h in range(group.size)]
            )
            scores = scores + of_child.gather(3, _columns(best)).sum((1, 3))
            inner[child] = best
        orders = {group.channels: assigned(scores)}
        for child, best in inner.items():
            # One order for all blocks cannot be the best for each, which is what their places were found by.
            separate = child.within is not None
            order = best[torch.arange(group.size), orders[group.channels]] if separate else None
            known = {**permutations, **orders}
            orders |= self._best(child, known, evidence) if order is None else {child.channels: order}
        return orders

    def _block_scores(self, group: Group, permutations: Permutations, evidence: Sequence[Evidence]) -> Tensor:
        """``(blocks, size, blocks, size)``: of each channel in each block of A with each in each block of B."""
        blocks = group.within or group.inside
        if blocks is None:
            raise ValueError(f"{group.name} has no blocks.")
        shape, count = (blocks.size, group.size), blocks.size * group.size
        rows = lambda term: positions(term, group.channels, blocks).reshape(count, -1)  # noqa: E731
        return self._sum(evidence, rows, permutations, {group.channels, blocks}, count).reshape(*shape, *shape)

    @staticmethod
    def _sum(
        evidence: Sequence[Evidence], rows: Rows, permutations: Permutations, free: Set[Channels], size: int
    ) -> Tensor:
        total = torch.zeros(size, size, dtype=torch.float64)
        for part in evidence:
            found = part.gram(rows, permutations, free)
            if found is not None:
                total += found.cpu()
        return total


def _columns(orders: Tensor) -> Tensor:
    """``(A, B, n)`` orders as an index into the last axis of ``(A, n, B, n)`` scores."""
    return orders.transpose(1, 2).unsqueeze(-1)


def assigned(scores: Tensor) -> Tensor:
    """The order with the largest sum of ``scores[i, order[i]]``; the order as it is where that is as good."""
    columns = linear_sum_assignment(scores.numpy(), maximize=True)[1]
    order = torch.from_numpy(columns.astype("int64"))
    own = torch.arange(len(order))
    return order if scores[own, order].sum() > scores[own, own].sum() else own
