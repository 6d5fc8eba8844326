"""Permutations that bring a network close to another one by what their channels compute on training examples."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lmc_lightning.core.collective import Collective
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.alignment.assignment import Assignment, CorrelationEvidence
from lmc_lightning.landscape.alignment.channels import Channels, Product, Stacked, Term, atoms, product
from lmc_lightning.landscape.alignment.groups import Groups, watchable
from lmc_lightning.landscape.alignment.matching import Matching, matching_by
from lmc_lightning.landscape.alignment.tracing import Operand, Rule, Watcher
from lmc_lightning.landscape.alignment.tracing_rules import PRODUCTS, RULES
from lmc_lightning.landscape.paths.line import Endpoint

_CONSTANT = 1e-12
"""Variance of a channel, relative to its mean square, that is none."""


def activation_matching(
    groups: Groups, objective: Objective, end_a: Endpoint, end_b: Endpoint, *, restarts: int = 2, seed: int = 0
) -> Matching:
    """The permutations of B whose channels correlate most with those of A (arXiv 1511.07543; 2209.04836, §3.1).

    Compared are the inputs of all products that have channels of a group (what the next weights see of a layer, after
    activation function and normalisation), over examples and all places of space or time, by Pearson's correlation with
    sums streamed in float64. For one layer this is one exact assignment; where an input has several groups (heads and
    their widths) it is coordinate ascent as in :func:`~lmc_lightning.landscape.alignment.matching.weight_matching`.
    Costs two forward passes over the objective's batches, J² numbers for each input of J channels and J²
    multiplications for each of its vectors.

    Args:
        groups: from :func:`~lmc_lightning.landscape.alignment.groups.groups_of` of the same module.
        objective: on training examples, with ``mode="eval"``.
        end_a: the network that stays.
        end_b: the network to be permuted.
        restarts: further starts, in random orders.
        seed: of these.

    Raises:
        ValueError: the forward pass runs other operations than it did when the groups were found.
    """
    started = time.perf_counter()
    wanted = _inputs(groups)
    found = {place: _Correlations.none(of.channels.size) for place, of in wanted.items()}
    for index, batch in enumerate(objective.batches):
        ours, theirs = (_seen(objective, end, batch, index, wanted) for end in (end_a, end_b))
        for place, pool in found.items():
            pool.add(ours[place], theirs[place])
    evidence = [
        CorrelationEvidence(found[place].value(objective.collective), of.channels, groups)
        for place, of in wanted.items()
    ]
    return matching_by(Assignment(groups, evidence), "activations", restarts, seed, started)


@dataclass(frozen=True)
class _Input:
    """An input of a product, every axis of it cut into factors if any of these has channels of a group."""

    axes: tuple[tuple[Term, ...], ...]
    known: frozenset[Channels]

    @classmethod
    def of(cls, operand: Operand, known: frozenset[Channels]) -> "_Input":
        """From the axes that the trace has found."""
        parts = ((axis.parts if isinstance(axis, Product) else (axis,), axis) for axis in operand.axes)
        return cls(tuple((axis,) if known.isdisjoint(atoms(axis)) else factors for factors, axis in parts), known)

    @property
    def channels(self) -> Term:
        """The joint axis of everything that has channels; places of space and examples are what is averaged over."""
        return product([factor for factors in self.axes for factor in factors if self._has(factor)])

    def rows(self, tensor: Tensor) -> Tensor:
        """``(J, vectors)``: the entries of each place of the joint axis."""
        # The first factor of an axis is that of the examples, if any is: there are others than in the trace.
        sizes = [
            n
            for factors, length in zip(self.axes, tensor.shape, strict=True)
            for n in (length // prod(f.size for f in factors[1:]), *(f.size for f in factors[1:]))
        ]
        has = [self._has(factor) for factors in self.axes for factor in factors]
        order = sorted(range(len(has)), key=lambda i: not has[i])
        rows = tensor.detach().reshape(sizes).permute(order)
        return rows.reshape(self.channels.size, -1).clone()

    def _has(self, factor: Term) -> bool:
        return not self.known.isdisjoint(atoms(factor))


def _inputs(groups: Groups) -> dict[tuple[int, int], _Input]:
    known = frozenset(group.channels for group in groups)
    of = {operand.place: _Input.of(operand, known) for operand in groups.operands}
    stacked = {o.place for o in groups.operands if any(isinstance(axis, Stacked) for axis in o.axes)}
    return {place: one for place, one in of.items() if place not in stacked and one.channels.size > 1}


class _Recorder(Watcher):
    """Keeps the wanted inputs of products."""

    def __init__(self, wanted: Mapping[tuple[int, int], _Input]) -> None:
        super().__init__(RULES)
        self._wanted, self._num_products = wanted, 0
        self.seen: dict[tuple[int, int], Tensor] = {}

    def saw(self, rule: Rule | None, func: Any, arguments: Mapping[str, Any], result: Any) -> None:
        """An operation has run."""
        names = PRODUCTS.get(func.overloadpacket, ())
        for index, name in enumerate(names):
            place = self._num_products, index
            if place in self._wanted:
                self.seen[place] = self._wanted[place].rows(arguments[name])
        self._num_products += bool(names)


def _seen(
    objective: Objective, end: Endpoint, batch: Any, seed: int, wanted: Mapping[tuple[int, int], _Input]
) -> dict[tuple[int, int], Tensor]:
    """The wanted inputs of one network on one batch."""
    recorder = _Recorder(wanted)
    with objective.box(), watchable():
        module = objective.module_at(end.theta, buffers=end.buffers)
        with recorder:
            objective.step(module, batch, seed=seed)
    if recorder.seen.keys() != wanted.keys():
        raise ValueError(
            "The forward pass runs other operations on these examples than on those that the permutations were found "
            "on, so activations cannot be compared. Use weight matching."
        )
    return recorder.seen


@dataclass
class _Correlations:
    """Sums over vectors of activations of two networks, float64."""

    count: int
    sums: Tensor
    """Of each channel, its square in A and in B: ``(4, J)``."""
    cross: Tensor
    """Of products of channels of A and B, ``(J, J)``."""

    @classmethod
    def none(cls, size: int) -> "_Correlations":
        """Before the first vector."""
        return cls(0, torch.zeros(4, size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64))

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Take the vectors of one batch, ``(J, vectors)`` each."""
        a, b = ours.double(), theirs.double()
        self.count += a.shape[1]
        self.sums += torch.stack([a.sum(1), b.sum(1), a.square().sum(1), b.square().sum(1)]).cpu()
        self.cross += (a @ b.T).cpu()

    def value(self, collective: Collective) -> Tensor:
        """Pearson's correlation of each channel of A with each of B, 0 where one is constant, over all processes."""
        count = collective.total(lambda: torch.tensor(float(self.count), dtype=torch.float64))
        sums = collective.total(lambda: self.sums) / count
        covariance = collective.total(lambda: self.cross) / count - sums[0, :, None] * sums[1]
        variances = sums[2:] - sums[:2].square()
        deviations = variances.where(variances > _CONSTANT * sums[2:], 0).sqrt()
        return (covariance / (deviations[0, :, None] * deviations[1])).nan_to_num(0, 0, 0)
