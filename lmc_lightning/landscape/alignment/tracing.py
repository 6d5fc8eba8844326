"""Which channels every tensor of a forward pass carries, found by watching the operations that it runs."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lmc_lightning.landscape.alignment.channels import Channels, Term, freeze, regroup, resolve, unify

Axes: TypeAlias = list[Term]
"""One term for each axis of a tensor."""

Rule: TypeAlias = Callable[["Call"], None]
"""What an operation does to channels; it names the axes of the results and unifies those of the operands."""


@dataclass
class Known:
    """A tensor that the trace has met."""

    tensor: Tensor  # kept, so that its memory is not given to another one
    axes: Axes
    is_data: bool
    """Whether it depends on the batch, or on anything else than parameters and buffers."""


@dataclass(frozen=True)
class Operand:
    """A tensor of data that a matrix product or convolution takes: what the next weights see of a layer."""

    place: tuple[int, int]
    """Which product in the order of execution, and which of its operands."""
    axes: tuple[Term, ...]


@dataclass
class Trace:
    """What is known of channels after a forward pass.

    Attributes:
        axes: of parameters and buffers by name.
        order: names of parameters in the order in which they were first used.
        operands: data that products took.
    """

    axes: dict[str, Axes]
    order: list[str] = field(default_factory=list)
    operands: list[Operand] = field(default_factory=list)


class Views:
    """The views of a forward pass, and which of the axes that they make are then cut into single places.

    Parts that are stacked along such an axis, as the queries, keys and values of a packed projection, need no common
    order. That is known too late, when the first pass has cut them; a further one takes the stacks apart.

    Args:
        stacks: the number of a view and the size of an axis of it along which parts are stacked.
    """

    def __init__(self, stacks: Collection[tuple[int, int]] = ()) -> None:
        self._stacks, self._made = stacks, 0
        self._origins: dict[Channels, tuple[int, int]] = {}
        self.found: set[tuple[int, int]] = set()
        """Stacks that have been cut."""

    def view(self, axes: Axes, shape: Sequence[int]) -> Axes:
        """The axes after a view."""
        number, self._made = self._made, self._made + 1
        viewed = regroup(axes, shape, [size for of, size in self._stacks if of == number])
        self._origins |= {axis: (number, axis.size) for axis in viewed if isinstance(axis, Channels)}
        return viewed

    def cut(self, axis: Term) -> None:
        """An axis is cut."""
        if isinstance(axis, Channels) and axis.reason is None and axis in self._origins:
            self.found.add(self._origins[axis])


class Watcher(TorchDispatchMode):
    """Sees the operations that run inside the ``with`` block, those without a rule as the ones that they are made of.

    Args:
        rules: by operation, and one for all that are pointwise.
    """

    def __init__(self, rules: Mapping[Any, Rule]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rules = rules
        self._decompositions: Mapping[Any, Callable[..., Any]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and tell what it was."""
        kwargs = dict(kwargs or {})
        rule = self._rules.get(func.overloadpacket)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = self._rules[torch.Tag.pointwise]
        if rule is None:
            result = self._decomposed(func, args, kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self.saw(rule, func, _bound(func, args, kwargs), result)
        return result

    def _decomposed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func._schema.is_mutable:
            return NotImplemented
        with self:
            result = func.decompose(*args, **kwargs)
            if result is NotImplemented:
                if self._decompositions is None:
                    self._decompositions = torch.export.default_decompositions()
                if func in self._decompositions:
                    result = self._decompositions[func](*args, **kwargs)
        return result

    def saw(self, rule: Rule | None, func: Any, arguments: Mapping[str, Any], result: Any) -> None:
        """An operation has run; ``rule`` is ``None`` for one that is neither known nor made of known ones."""
        raise NotImplementedError


class ChannelTracer(Watcher):
    """Follows channels through the operations that run inside the ``with`` block.

    Tensors are recognised by where and how they lie in memory. An operation that has no rule keeps all channels that it
    touches where they are, by its name.

    Args:
        module: whose parameters and buffers are followed.
        rules: by operation.
        products: names of the operands of the operations that take data and weights.
        inputs: the tensors of the batch.
        stacks: what an earlier trace has found to be cut, see :class:`Views`.
    """

    def __init__(
        self,
        module: nn.Module,
        rules: Mapping[Any, Rule],
        products: Mapping[Any, Sequence[str]],
        inputs: Sequence[Tensor],
        stacks: Collection[tuple[int, int]] = (),
    ) -> None:
        super().__init__(rules)
        self.views = Views(stacks)
        self._products, self._num_products = products, 0
        self._known: dict[tuple[Any, ...], Known] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self.trace = Trace({})
        for tensor in inputs:
            self._known[_key(tensor)] = Known(tensor, [Channels(n, "input") for n in tensor.shape], True)
        for tensors in (module.named_parameters, module.named_buffers):
            for name, tensor in tensors(remove_duplicate=False):
                if tensor.numel():
                    fresh = Known(tensor, [Channels(n) for n in tensor.shape], False)
                    self.trace.axes[name] = self._known.setdefault(_key(tensor), fresh).axes
                    self._names.setdefault(_key(tensor), name)

    def saw(self, rule: Rule | None, func: Any, arguments: Mapping[str, Any], result: Any) -> None:
        """Apply the rule of an operation."""
        call = Call(self, func, arguments, result)
        operands = self._products.get(func.overloadpacket)
        if operands is not None:
            self._take([arguments[name] for name in operands])
        (rule or _unknown)(call)

    def known(self, tensor: Tensor) -> Known:
        """What is known of a tensor; one that no operation has made, a constant, keeps its places."""
        key = _key(tensor)
        if key in self._names and self._names[key] not in self.trace.order:
            self.trace.order.append(self._names[key])
        if key not in self._known:
            self._known[key] = Known(tensor, [Channels(n, "a constant") for n in tensor.shape], True)
        return self._known[key]

    def name(self, tensor: Tensor, axes: Axes, is_data: bool) -> None:
        """These are the axes of a result; of one that lies where a known one does, they are the same as before."""
        known = self._known.get(_key(tensor))
        if known is None or not tensor.numel():
            self._known[_key(tensor)] = Known(tensor, axes, is_data)
            return
        known.is_data = known.is_data or is_data
        for one, other in zip(known.axes, axes, strict=True):
            unify(one, other)

    def _take(self, operands: Sequence[Tensor]) -> None:
        for index, tensor in enumerate(operands):
            if self.known(tensor).is_data:
                self.trace.operands.append(Operand((self._num_products, index), tuple(self.known(tensor).axes)))
        self._num_products += 1


@dataclass(frozen=True)
class Call:
    """An operation that has run."""

    tracer: ChannelTracer
    func: Any
    arguments: Mapping[str, Any]
    result: Any

    def __getitem__(self, name: str) -> Any:
        """An argument."""
        return self.arguments.get(name)

    @property
    def operator(self) -> str:
        """The name of the operation, e.g. ``aten.convolution``."""
        return str(self.func.overloadpacket)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, those in lists too."""
        return list(tensors_of(self.arguments.values()))

    def axes(self, tensor: Tensor) -> Axes:
        """The axes of an operand, each in its present meaning."""
        return [resolve(axis) for axis in self.tracer.known(tensor).axes]

    def gives(self, axes: Axes, result: Tensor | None = None) -> None:
        """Name the axes of a result, the first by default."""
        found = next(tensors_of([self.result])) if result is None else result
        self.tracer.name(found, axes, any(self.tracer.known(t).is_data for t in self.tensors))

    def gives_fixed(self, result: Tensor) -> None:
        """The places of a result mean something to this operation."""
        self.gives([Channels(n, self.operator) for n in result.shape], result)

    def freeze(self, *terms: Term) -> None:
        """The operation depends on the order of these channels."""
        for term in terms:
            freeze(term, self.operator)


def tensors_of(values: Any) -> Iterator[Tensor]:
    """The tensors in some arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


def _unknown(call: Call) -> None:
    for tensor in call.tensors:
        call.freeze(*call.axes(tensor))
    for result in tensors_of([call.result]):
        call.gives_fixed(result)


def _bound(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    schema = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema}
    return defaults | dict(zip(defaults, args, strict=False)) | dict(kwargs)


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
