"""Channels of a network that can be reordered together without changing its function, found in any module."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lmc_lightning.core.losstap import LossTap
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.structure import tensors_in
from lmc_lightning.landscape.alignment.channels import Channels, Product, Term, atoms, freeze, reason_of, resolve
from lmc_lightning.landscape.alignment.reordering import Permutations, index_of
from lmc_lightning.landscape.alignment.tracing import ChannelTracer, Operand, Trace
from lmc_lightning.landscape.alignment.tracing_rules import PRODUCTS, RULES

_EXAMPLES = 4
_TOLERANCE = 1e-8
"""Largest difference of float64 outputs, relative to the largest of them, that passes for rounding."""
_NOISE = 0.1
_EXPECTED = ("input", "output", "space", "stacked")
"""Reasons that every network has."""


@dataclass(frozen=True)
class Group:
    """Channels that are reordered together.

    Attributes:
        name: Of the first tensor that has them, and its axis: ``conv1.weight[0]``.
        channels: Their mark in the axes of all tensors.
        within: Blocks (heads of an attention, groups of a GroupNorm) inside each of which there is an order of its own.
        inside: Blocks that all have these channels in one order.
        places: Every tensor and axis that has them.
    """

    name: str
    channels: Channels = field(repr=False)
    within: Channels | None = field(repr=False, default=None)
    inside: Channels | None = field(repr=False, default=None)
    places: tuple[tuple[str, int], ...] = field(repr=False, default=())

    @property
    def size(self) -> int:
        """How many channels are in one order."""
        return self.channels.size

    @property
    def num_orders(self) -> int:
        """How many orders there are: one, or one for each block."""
        return 1 if self.within is None else self.within.size

    def random(self, generator: torch.Generator) -> Tensor:
        """A random order ``(size,)``, or one for each block ``(num_orders, size)``."""
        orders = [torch.randperm(self.size, generator=generator) for _ in range(self.num_orders)]
        return orders[0] if self.within is None else torch.stack(orders)

    def identity(self) -> Tensor:
        """The order as it is, in the shape of :meth:`random`."""
        order = torch.arange(self.size)
        return order if self.within is None else order.repeat(self.num_orders, 1)


@dataclass(frozen=True)
class Groups:
    """The permutations that a network allows.

    Attributes:
        groups: In the order in which the forward pass meets them.
        axes: What each parameter and buffer consists of, by any of its names.
        parameters: Names of the parameters in θ, on which weights are compared.
        operands: Data that the products of the forward pass take, with their channels.
        dropped: Channels that stay where they are by anything else than being inputs or outputs, and the reason: an
            operation that depends on their order, or a test on the function that failed.
    """

    groups: tuple[Group, ...]
    axes: Mapping[str, tuple[Term, ...]] = field(repr=False)
    parameters: tuple[str, ...] = field(repr=False)
    operands: tuple[Operand, ...] = field(repr=False, default=())
    dropped: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    @property
    def within(self) -> dict[Channels, Channels]:
        """The blocks of the groups that have an order in each."""
        return {g.channels: g.within for g in self.groups if g.within is not None}

    def random(self, generator: torch.Generator) -> Permutations:
        """A random order of every group."""
        return {g.channels: g.random(generator) for g in self.groups}

    def identity(self) -> Permutations:
        """The orders as they are."""
        return {g.channels: g.identity() for g in self.groups}

    def apply(self, tensors: Mapping[str, Tensor], permutations: Permutations) -> dict[str, Tensor]:
        """Reordered copies of parameters and buffers: channel i is the one that was at ``permutations[…][i]``.

        Names that the groups do not know are passed on as they are.
        """
        return {name: self.reorder(name, tensor, permutations) for name, tensor in tensors.items()}

    def reorder(self, name: str, tensor: Tensor, permutations: Permutations) -> Tensor:
        """A reordered copy of one tensor, in the shape of the parameter or buffer of that name."""
        moved = tensor
        for axis, term in enumerate(self.axes.get(name, ())):
            if any(atom in permutations for atom in atoms(term)):
                index = index_of(term, permutations, self.within)
                moved = moved.index_select(axis, index.to(tensor.device))
        return tensor.clone() if moved is tensor else moved


def permutation_groups(module: nn.Module, *inputs: Any) -> Groups:
    """The channels of a module that can be reordered without changing its outputs; see :func:`groups_of`.

    Args:
        module: any module; it is not changed, nor run itself.
        *inputs: a batch of a few examples, as ``module`` takes it.
    """
    return groups_of(Objective(module, [inputs], lambda m, batch: m(*batch), keep_batches=True))


def groups_of(objective: Objective, *, seed: int = 0) -> Groups:
    """The channels of the objective's module that can be reordered without changing its loss or outputs.

    One forward pass of a few examples in float64 is watched, operation by operation: parameters' axes that meet in an
    elementwise operation, a contraction or a normalisation are one set of channels; views, concatenations and groups of
    convolutions cut sets up; what any other operation touches stays in place, as do all axes of inputs and outputs, of
    frozen parameters and of those outside θ. Every group is then **tested**: at parameters and buffers with noise added
    (so that equal or zero initial values hide nothing) random permutations must leave loss and outputs as they are, to
    1e-8. Groups that fail are dropped by name. Blocks that contain channels (heads of an attention, groups of a
    GroupNorm) are tested for an order of their own in each. Costs G + 2 forward passes of 4 examples at most, for G
    groups and unless one is dropped only 2 and one for each kind of block.

    Args:
        objective: over the module; its first batch is used.
        seed: of noise and permutations.
    """
    objective = objective.excerpt(_EXAMPLES, dtype=torch.float64)
    trace = _traced(objective)
    layout = objective.layout
    movable = {*layout.names, *(name for name, b in objective.buffers.items() if b.is_floating_point())}
    for name in sorted(trace.axes.keys() - _aliases(trace, movable)):
        for term in trace.axes[name]:
            freeze(term, f"{name}, which is not among the parameters that move")
    axes = {name: tuple(map(resolve, terms)) for name, terms in trace.axes.items()}
    ordered = [name for name in dict.fromkeys([*trace.order, *axes]) if name in axes]
    groups = Groups(_groups(axes, ordered), axes, layout.names, tuple(_resolved(trace.operands)), _frozen(axes))
    return _tested(groups, _Function(objective, seed))


def _traced(objective: Objective) -> Trace:
    stacks: set[tuple[int, int]] = set()
    while True:
        tracer = _watched(objective, stacks)
        if tracer.views.found <= stacks:
            return tracer.trace
        stacks |= tracer.views.found


def _watched(objective: Objective, stacks: set[tuple[int, int]]) -> ChannelTracer:
    with objective.box(), watchable():
        module = objective.module_at(objective.theta())
        tracer = ChannelTracer(module, RULES, PRODUCTS, tensors_in(objective.batches[0]), stacks)
        for tensor in _response(objective, module, tracer):
            for axis in tracer.known(tensor).axes:
                freeze(axis, "output")
    return tracer


@contextmanager
def watchable() -> Iterator[None]:
    """A context in which all operations show, also in steps that differentiate: no fused transformer layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _response(objective: Objective, module: nn.Module, watcher: AbstractContextManager[Any]) -> list[Tensor]:
    """Everything that a permutation must leave as it is: the loss, what the module returns, and what the tap sees."""
    returned: list[Tensor] = []
    module.register_forward_hook(lambda _, inputs, output: returned.extend(tensors_in(output)))
    with LossTap() as tap, watcher:
        result = objective.step(module, objective.batches[0])
    tapped = tap.match(result) if isinstance(result, Tensor) and result.numel() == 1 else None
    return [t.detach() for t in [*tensors_in(result), *returned, *([tapped.outputs] if tapped else [])]]


def _aliases(trace: Trace, names: set[str]) -> set[str]:
    """``names``, and the other names of the same tensors."""
    own = {id(trace.axes[name]) for name in names if name in trace.axes}
    return {name for name, axes in trace.axes.items() if id(axes) in own}


def _groups(axes: Mapping[str, Sequence[Term]], names: Sequence[str]) -> tuple[Group, ...]:
    places: dict[Channels, list[tuple[str, int]]] = {}
    for name in names:
        for axis, term in enumerate(axes[name]):
            for atom in dict.fromkeys(atoms(term)):
                if atom.reason is None and atom.size > 1:
                    places.setdefault(atom, []).append((name, axis))
    taken: dict[str, int] = {}
    return tuple(
        Group(_unique(f"{at[0][0]}[{at[0][1]}]", taken), atom, places=tuple(at)) for atom, at in places.items()
    )


def _unique(name: str, taken: dict[str, int]) -> str:
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}.{taken[name]}"


def _resolved(operands: Sequence[Operand]) -> Iterator[Operand]:
    for operand in operands:
        axes = tuple(map(resolve, operand.axes))
        if any(reason_of(axis) is None for axis in axes):
            yield replace(operand, axes=axes)


def _frozen(axes: Mapping[str, Sequence[Term]]) -> dict[str, str]:
    found = {}
    for name, terms in axes.items():
        for axis, term in enumerate(terms):
            reasons = {a.reason for a in atoms(term) if a.size > 1 and a.reason not in (None, *_EXPECTED)}
            if reasons:
                found[f"{name}[{axis}]"] = ", ".join(sorted(map(str, reasons)))
    return found


# -- tests on the function ---------------------------------------------------------------------------------------------


class _Function:
    """Loss and outputs of a network in float64, at parameters and buffers with noise, after permutations."""

    def __init__(self, objective: Objective, seed: int) -> None:
        self._objective, self.generator = objective, torch.Generator().manual_seed(seed)
        self._tensors = {n: self._noisy(t) for n, t in objective.layout.unflatten(objective.theta()).items()}
        self._buffers = {n: self._noisy(b) for n, b in objective.buffers.items()}
        self._reference = self._at(Groups((), {}, ()), {})

    def _noisy(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        noise = torch.randn(tensor.shape, generator=self.generator, dtype=tensor.dtype).to(tensor.device)
        scale = tensor[tensor.isfinite()].square().mean().sqrt().nan_to_num()
        # Variances stay positive, and the infinite entries of masks what they are.
        noisy = tensor * (_NOISE * noise).exp() + (0 if bool((tensor > 0).all()) else _NOISE * noise * (scale or 0.1))
        return torch.where(tensor.isfinite(), noisy, tensor)

    def _at(self, groups: Groups, permutations: Permutations) -> list[Tensor]:
        objective = self._objective
        tensors, buffers = (groups.apply(of, permutations) for of in (self._tensors, self._buffers))
        with objective.box(), watchable():
            module = objective.module_at(objective.layout.flatten(tensors), buffers=buffers)
            return _response(objective, module, nullcontext())

    def is_kept_by(self, groups: Groups) -> bool:
        """Whether random permutations of all ``groups`` together leave it as it is."""
        found = self._at(groups, groups.random(self.generator))
        return len(found) == len(self._reference) and all(map(_equal, found, self._reference))


def _equal(found: Tensor, reference: Tensor) -> bool:
    if found.shape != reference.shape or not found.numel():
        return found.shape == reference.shape
    same = torch.isclose(found, reference, rtol=0, atol=_TOLERANCE * float(reference.abs().max()), equal_nan=True)
    return bool(same.all()) and bool(found.isfinite().any())


def _tested(groups: Groups, function: _Function) -> Groups:
    """The groups that keep the function, with an order in each block where that keeps it too."""
    if not function.is_kept_by(groups):
        kept: tuple[Group, ...] = ()
        dropped = dict(groups.dropped)
        for group in groups:
            if function.is_kept_by(replace(groups, groups=(*kept, group))):
                kept = (*kept, group)
            else:
                dropped[group.name] = "a random permutation changes the outputs"
        groups = replace(groups, groups=kept, dropped=dropped)
    for index, group in enumerate(groups):
        for blocks, everywhere in _blocks_of(groups, group):
            found = replace(group, within=blocks)
            if not everywhere or not function.is_kept_by(_with(groups, index, found)):
                found = replace(group, inside=blocks)
            groups = _with(groups, index, found)
    return groups


def _with(groups: Groups, index: int, group: Group) -> Groups:
    return replace(groups, groups=(*groups.groups[:index], group, *groups.groups[index + 1 :]))


def _blocks_of(groups: Groups, group: Group) -> Iterator[tuple[Channels, bool]]:
    """The first group that contains another one in all products, and whether that occurs in these only."""
    terms = [term for name, _ in group.places for term in groups.axes[name]]
    around = [set(p.parts) for term in terms for p in _products(term) if group.channels in p.parts]
    bare = any(group.channels is t for term in terms for t in _outside(term))
    for other in groups:
        if other is group or not around:
            return
        if other.within is None and other.inside is None and all(other.channels in parts for parts in around):
            yield other.channels, not bare
            return


def _products(term: Term) -> Iterator[Product]:
    if isinstance(term, Product):
        yield term
    if not isinstance(term, Channels):
        yield from chain.from_iterable(map(_products, term.parts))


def _outside(term: Term) -> Iterator[Term]:
    """Sets of channels that stand in no product."""
    if isinstance(term, Product):
        return
    if isinstance(term, Channels):
        yield term
    else:
        yield from chain.from_iterable(map(_outside, term.parts))
