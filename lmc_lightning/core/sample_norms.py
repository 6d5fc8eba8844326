"""Squared norms of the gradients of single examples, from backward passes that stop at the layers' outputs.

The gradient of an example by a weight matrix is δaᵀ, with a what came into the layer and δ what the backward pass
brings to its output. Its norm needs no pass to the weight and, where few positions share the weight, not even the
gradient itself: ‖δaᵀ‖² = ⟨δᵀδ, aᵀa⟩ over positions (arXiv 1510.01799).
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

_BLOCK_BYTES = 1 << 25
"""Of derivatives that are collected before they are multiplied."""


class SampleNorms:
    """Watches one forward pass of a module, for the gradient norms of its examples by the tensors of known layers.

    Known are linear layers, convolutions over one and two axes, batch, layer and group normalisation and embeddings,
    called once or several times on inputs whose first axis is that of the examples, or of rows that belong to them in
    their order. Use it in a ``with`` block around the forward pass.

    Args:
        module: whose parameters require gradients; tensors that several layers own are left out.
        names: of the tensors that are asked for.
    """

    def __init__(self, module: nn.Module, names: Collection[str]) -> None:
        owners = Counter(id(t) for m in module.modules() for t in m.parameters(recurse=False))
        wanted = {id(t): n for n, t in module.named_parameters() if n in names and owners[id(t)] == 1}
        layers = [_layer(m, wanted) for m in module.modules()]
        self._layers = [layer for layer in layers if layer is not None]
        self._handles: list[Any] = []

    def __enter__(self) -> "SampleNorms":
        self._handles = [x.module.register_forward_hook(x.record, with_kwargs=True) for x in self._layers]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def squares(self, outputs: Tensor, cotangents: Iterable[Tensor]) -> tuple[dict[str, Tensor], int]:
        """Σ_k ‖J_nᵀ s_kn‖² of each example ``(n,)`` float64 by tensor, one backward pass for each cotangent s_k.

        With it the bytes that the layers' inputs took in the form in which they were kept.

        Raises:
            ValueError: a layer was called on other rows than those of the examples.
        """
        called = [layer for layer in self._layers if layer.calls]
        for layer in called:
            if not layer.is_known(len(outputs)):
                raise ValueError(f"{type(layer.module).__name__} was called on rows that are not those of the examples")
        held = sum(layer.prepare(len(outputs)) for layer in called)
        sums: dict[str, Tensor] = {}
        for block in self._blocks(outputs, cotangents, called):
            for number, layer in enumerate(called):
                for name, squares in layer.squares([passes[number] for passes in block]).items():
                    sums[name] = sums.get(name, 0) + squares.double()
        return {name: total.cpu() for name, total in sums.items()}, held

    def _blocks(
        self, outputs: Tensor, cotangents: Iterable[Tensor], called: list["_Layer"]
    ) -> Iterator[list[list[list[Tensor]]]]:
        """What backward passes bring to the calls of each layer, as many passes at a time as make one product large."""
        edges = [call.edge for layer in called for call in layer.calls]
        block: list[list[list[Tensor]]] = []
        size = 0
        for cotangent in cotangents if edges else ():
            found = iter(torch.autograd.grad(outputs, edges, cotangent, retain_graph=True, allow_unused=True))
            block.append([[call.delta(next(found)) for call in layer.calls] for layer in called])
            size += sum(d.numel() * d.element_size() for deltas in block[-1] for d in deltas)
            if size > _BLOCK_BYTES:
                yield block
                block, size = [], 0
        if block:
            yield block


@dataclass(frozen=True)
class _Call:
    inputs: Tensor
    like: Tensor
    """Empty, of the dtype and device of the outputs."""
    shape: torch.Size
    edge: GradientEdge

    def delta(self, found: Tensor | None) -> Tensor:
        return self.like.new_zeros(self.shape) if found is None else found


class _Layer(ABC):
    """A layer, its tensors that are asked for, and its calls in one forward pass."""

    def __init__(self, module: nn.Module, names: Mapping[str, str]) -> None:
        self.module: Any = module
        self.names = names
        self.calls: list[_Call] = []

    def record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if output.requires_grad:
            inputs: Tensor = next(iter([*args, *kwargs.values()]))
            # The edge, for the output itself may be overwritten by the next layer.
            self.calls.append(_Call(inputs.detach(), output.new_empty(0), output.shape, get_gradient_edge(output)))

    def is_known(self, num_examples: int) -> bool:
        return all(self.has_examples(c.inputs) and len(c.inputs) % num_examples == 0 for c in self.calls)

    @abstractmethod
    def has_examples(self, inputs: Tensor) -> bool:
        """Whether an input of so many axes has one of examples."""

    @abstractmethod
    def prepare(self, num_examples: int) -> int:
        """Bring the inputs into the form that every backward pass needs; its size [bytes]."""

    @abstractmethod
    def squares(self, passes: list[list[Tensor]]) -> dict[str, Tensor]:
        """Squared gradient norms of each example ``(n,)`` by tensor, summed over passes.

        Args:
            passes: of each backward pass, what it brings to the output of each call.
        """


class _Matrix(_Layer):
    """Outputs that are a matrix (for each of g groups) times columns a, at L positions of an example."""

    _kept: Tensor
    """The columns ``(n, g, p, L)``, or their Gram matrices ``(n, g, L, L)``."""
    _is_gram: bool
    _num_examples: int

    @abstractmethod
    def rows(self, delta: Tensor) -> Tensor:
        """Derivatives by the outputs as ``(rows, g, o, L)``."""

    def squares(self, passes: list[list[Tensor]]) -> dict[str, Tensor]:
        # Rows of all passes in one matrix: its squares are summed anyway.
        delta = _cat([_cat([self._by_example(self.rows(d)) for d in deltas], -1) for deltas in passes], -2)
        found = {}
        if "weight" in self.names:
            weight = (delta.mT @ delta) * self._kept if self._is_gram else (delta @ self._kept.mT).square()
            found[self.names["weight"]] = weight.flatten(1).sum(1)
        if "bias" in self.names:
            found[self.names["bias"]] = delta.sum(-1).square().flatten(1).sum(1)
        return found

    def _by_example(self, matrices: Tensor) -> Tensor:
        if len(matrices) == self._num_examples:
            return matrices
        folded: Tensor = matrices.unflatten(0, (self._num_examples, -1))  # (n, rows of each, g, p, L)
        return folded.permute(0, 2, 3, 1, 4).flatten(3)


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


class _Dense(_Matrix):
    """A matrix that is applied to what comes in."""

    @abstractmethod
    def columns(self, inputs: Tensor) -> Tensor:
        """The inputs as ``(rows, g, p, L)``."""

    def prepare(self, num_examples: int) -> int:
        self._num_examples = num_examples
        self._kept = _cat([self._by_example(self.columns(call.inputs)) for call in self.calls], -1)
        # The Gram matrix over positions is smaller and quicker where these are few, as behind the convolutions.
        self._is_gram = self._kept.shape[-1] <= self._kept.shape[-2]
        if self._is_gram:
            self._kept = self._kept.mT @ self._kept
        return self._kept.numel() * self._kept.element_size()


class _Linear(_Dense):
    def has_examples(self, inputs: Tensor) -> bool:
        return inputs.ndim >= 2

    def columns(self, inputs: Tensor) -> Tensor:
        return inputs.reshape(len(inputs), 1, -1, inputs.shape[-1]).mT

    def rows(self, delta: Tensor) -> Tensor:
        return self.columns(delta)


class _Convolution(_Dense):
    def has_examples(self, inputs: Tensor) -> bool:
        return inputs.ndim == len(self.module.kernel_size) + 2

    def columns(self, inputs: Tensor) -> Tensor:
        conv = self.module
        if inputs.ndim == 4:
            unfolded = F.unfold(inputs, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        else:
            shape = {"kernel_size": (1, *conv.kernel_size), "dilation": (1, *conv.dilation)}
            unfolded = F.unfold(inputs.unsqueeze(2), **shape, padding=(0, *conv.padding), stride=(1, *conv.stride))
        columns: Tensor = unfolded.unflatten(1, (conv.groups, -1))
        return columns

    def rows(self, delta: Tensor) -> Tensor:
        rows: Tensor = delta.flatten(2).unflatten(1, (self.module.groups, -1))
        return rows


class _Embedding(_Matrix):
    """A matrix times unit vectors, whose Gram matrix says which positions hold the same token."""

    def has_examples(self, inputs: Tensor) -> bool:
        return True

    def prepare(self, num_examples: int) -> int:
        self._num_examples, self._is_gram = num_examples, True
        tokens = torch.cat([call.inputs.reshape(num_examples, -1) for call in self.calls], 1)
        padding = -1 if self.module.padding_idx is None else self.module.padding_idx
        same = (tokens[:, :, None] == tokens[:, None, :]) & (tokens != padding)[:, :, None]
        self._kept = same[:, None].to(self.module.weight.dtype)
        return self._kept.numel() * self._kept.element_size()

    def rows(self, delta: Tensor) -> Tensor:
        return delta.reshape(len(delta), 1, -1, delta.shape[-1]).mT


class _Normalisation(_Layer):
    """Outputs that are a scale times the normalised inputs, plus a shift."""

    def has_examples(self, inputs: Tensor) -> bool:
        return inputs.ndim >= 2

    def prepare(self, num_examples: int) -> int:
        self._num_examples = num_examples
        self._normalised = [self._normalise(call.inputs) for call in self.calls]
        return sum(t.numel() * t.element_size() for t in self._normalised)

    def squares(self, passes: list[list[Tensor]]) -> dict[str, Tensor]:
        found = {}
        for attribute, name in self.names.items():
            gradients = [self._total(deltas, attribute == "weight") for deltas in passes]
            found[name] = torch.stack(gradients).square().sum((0, 2))
        return found

    def _total(self, deltas: list[Tensor], scaled: bool) -> Tensor:
        """The gradient of each example, summed over calls, ``(n, size of the parameter)``."""
        pairs = zip(self._normalised, deltas, strict=True)
        return torch.stack([self._summed(x * d if scaled else d) for x, d in pairs]).sum(0)

    def _summed(self, summand: Tensor) -> Tensor:
        """Over all axes but those of the examples and of the parameter, ``(n, size of the parameter)``."""
        by_row = summand.flatten(2).sum(2) if summand.ndim > 2 else summand
        if isinstance(self.module, nn.LayerNorm):
            by_row = summand.reshape(len(summand), -1, self.module.weight.numel()).sum(1)
        by_example: Tensor = by_row.unflatten(0, (self._num_examples, -1))
        return by_example.sum(1)

    def _normalise(self, inputs: Tensor) -> Tensor:
        norm = self.module
        if isinstance(norm, nn.LayerNorm):
            return F.layer_norm(inputs, norm.normalized_shape, eps=norm.eps)
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(inputs, norm.num_groups, eps=norm.eps)
        return F.batch_norm(inputs, norm.running_mean, norm.running_var, training=norm.training, eps=norm.eps)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_KINDS: dict[type[nn.Module], Callable[[nn.Module, Mapping[str, str]], _Layer]] = {
    nn.Linear: _Linear,
    nn.Conv1d: _Convolution,
    nn.Conv2d: _Convolution,
    nn.Embedding: _Embedding,
    **dict.fromkeys((*_BATCH_NORMS, nn.LayerNorm, nn.GroupNorm), _Normalisation),
}


def _layer(module: Any, wanted: Mapping[int, str]) -> _Layer | None:
    """The layer that ``module`` is, if it is a known one that owns a wanted tensor."""
    kind = next((k for k in _KINDS if isinstance(module, k) and type(module).forward is k.forward), None)
    held = module.named_parameters(recurse=False)
    names = {attribute: wanted[id(tensor)] for attribute, tensor in held if id(tensor) in wanted}
    if kind is None or not names or isinstance(getattr(module, "padding", None), str):
        return None
    if getattr(module, "padding_mode", "zeros") != "zeros" or getattr(module, "max_norm", None) is not None:
        return None
    if isinstance(module, _BATCH_NORMS) and (module.training or module.running_mean is None):
        return None
    return _KINDS[kind](module, names)
