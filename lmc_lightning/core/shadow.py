"""A copy of any module that shares its parameters and nothing else, to be run in place of the module."""

import copy
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lmc_lightning.core.structure import PLAIN, contents_of, is_closure, restore_contents, uncompiled, walk

Mode: TypeAlias = Literal["eval", "train"]

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_SHARED = (Dataset, DataLoader, Optimizer)
_SHARED_NAMES = {"Trainer", "LightningDataModule", "ProcessGroup"}  # this package does not import Lightning
_CONTAINERS = (list, tuple, set, frozenset, deque)
_MODULE_SLOTS = ("_parameters", "_buffers", "_modules")
LOW_PRECISION = (torch.float16, torch.bfloat16)


class Shadow:
    """A pristine copy of a module from which :meth:`at` makes modules with given parameters, each fresh.

    The copy keeps the module's own parameters, by reference, unless ``dtype`` asks for a conversion or the parameters
    are of 16 bits (then float32). Everything else, Python state included, is private to the copy, so that nothing that
    a measurement runs is visible in the module. Memory: buffers and attributes once, parameters only when converted.

    Args:
        module: any ``nn.Module``.
        replacements: attributes to set on the copy, e.g. a silent ``log``.
        dtype: floating dtype of parameters and buffers, or ``None``.
        keep_precision: leave parameters of 16 bits as they are.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        replacements: Mapping[str, object] | None = None,
        dtype: torch.dtype | None = None,
        keep_precision: bool = False,
    ) -> None:
        self.dtype = dtype if dtype or keep_precision else _full_precision(module)
        kept = {} if self.dtype else {id(p): p for p in module.parameters()}
        self._pristine = copy_module(module, kept)
        self._replacements = dict(replacements or {})
        if self.dtype:
            for tensor in [*self._pristine.parameters(), *self._pristine.buffers()]:
                tensor.data = cast(tensor.data, self.dtype)
        for submodule in self._pristine.modules():
            if isinstance(submodule, nn.Embedding | nn.EmbeddingBag):
                submodule.sparse = False  # sparse gradients have no second derivative
            for hooks in ("_backward_hooks", "_backward_pre_hooks"):  # what they do to gradients is not in the loss
                submodule.__dict__[hooks] = OrderedDict()
        self._attach(self._pristine)
        self._plan = copy_plan(self._pristine)

    @property
    def module(self) -> nn.Module:
        """The pristine copy; read it, never run it."""
        return self._pristine

    def at(
        self, tensors: Mapping[str, Tensor], *, buffers: Mapping[str, Tensor] | None = None, mode: Mode = "eval"
    ) -> nn.Module:
        """A fresh module that computes with ``tensors`` in place of its parameters of those names.

        Wherever the module holds one of these parameters (tied, in a list of aliases, in the flat weights of an RNN),
        the new module holds the given tensor. Other parameters and all buffers are clones. ``mode="train"`` keeps the
        training flag of every submodule but dropout, which is off, or, of a module that is all in eval mode, takes
        those that its ``train()`` sets; SyncBatchNorm has the statistics of its own process.
        """
        replaced: dict[int, object] = {}
        for name, parameter in self._pristine.named_parameters():
            replaced[id(parameter)] = tensors[name] if name in tensors else parameter.detach().clone()
        module = copy_module(self._pristine, replaced, self._plan)
        self._attach(module)
        for name, value in (buffers or {}).items():
            module.get_buffer(name).copy_(value)
        if mode == "eval":
            return module.eval()
        if not any(submodule.training for submodule in module.modules()):
            module.train()
        for submodule in module.modules():
            if isinstance(submodule, _DROPOUT):
                submodule.training = False
            elif isinstance(submodule, nn.SyncBatchNorm):  # the other processes may have other batches to wait with
                submodule.__dict__["forward"] = partial(_batch_norm, submodule)
            elif isinstance(submodule, nn.MultiheadAttention | nn.RNNBase):
                submodule.dropout = 0.0
        return module

    def _attach(self, module: nn.Module) -> None:
        """Set the replacements, which a LightningModule in part drops when it is copied."""
        replacements = copy.deepcopy(self._replacements)
        for submodule in module.modules():
            # Nested modules of the same kind (a LightningModule inside another) need the same replacements.
            if replacements and all(hasattr(submodule, name) for name in replacements):
                submodule.__dict__.update(replacements)


def _batch_norm(layer: Any, input: Tensor) -> Tensor:
    """What SyncBatchNorm computes on one process."""
    of_batch = layer.training or layer.running_mean is None
    statistics = (layer.running_mean, layer.running_var)
    return F.batch_norm(input, *statistics, layer.weight, layer.bias, of_batch, layer.momentum or 0.0, layer.eps)


def _full_precision(module: nn.Module) -> torch.dtype | None:
    dtypes = {p.dtype for p in module.parameters()}
    if dtypes.isdisjoint(LOW_PRECISION):
        return None
    return torch.float64 if torch.float64 in dtypes else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in the real floating ``dtype``, or in its complex counterpart, if it is not of integers."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class CopyPlan:
    """What a deep copy of a module must treat in its own way; the same for every copy of that module."""

    overrides: Mapping[int, object]
    """What stands for an object of this id: a clone for a tensor with a graph, itself for data and trainers."""
    closures: Mapping[int, types.FunctionType]
    """Functions, hooks above all, that may see the module through variables that they close over, by id.

    A compiled method stands for the method itself: its compiled code runs on the module that it was made for.
    """


def copy_plan(module: nn.Module) -> CopyPlan:
    """The plan for copies of ``module``."""
    reached = list(_walk(module))
    overrides: dict[int, object] = {id(v): v for v in reached if _is_shared(v)}
    overrides |= {id(v): v.detach().clone() for v in reached if isinstance(v, Tensor) and not v.is_leaf}
    closures = {id(v): v for v in reached if is_closure(v)}
    closures |= {id(v): _direct(inner) for v in reached if (inner := uncompiled(v)) is not None}
    return CopyPlan(overrides, closures)


def _direct(target: Callable[..., Any]) -> types.FunctionType:
    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    call.__wrapped__ = target  # type: ignore[attr-defined]  # for its signature
    return call  # type: ignore[return-value]


def copy_module(module: nn.Module, replaced: Mapping[int, object], plan: CopyPlan | None = None) -> nn.Module:
    """A deep copy in which the objects of the given ids are replaced, and what refuses to be copied is shared."""
    plan = plan or copy_plan(module)
    memo = {**plan.overrides, **replaced}
    try:
        return _deep_copy(module, plan.closures, memo)
    except Exception:
        # A failed deepcopy leaves half-built objects in its memo: find what refuses, then start afresh.
        return _deep_copy(module, plan.closures, memo | _refusing(module, memo))


def _deep_copy(module: nn.Module, closures: Mapping[int, types.FunctionType], memo: Mapping[int, object]) -> nn.Module:
    fresh = {key: _with_empty_cells(function) for key, function in closures.items()}
    memo = {**memo, **fresh}
    copied = copy.deepcopy(module, memo)
    for old, new in zip(module.modules(), copied.modules(), strict=True):
        if isinstance(old, torch.jit.ScriptModule):  # copied by rules of its own, which know no memo and no leaves
            for name, parameter in old.named_parameters(recurse=False):
                clone = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                new._parameters[name] = memo.get(id(parameter), clone)  # type: ignore[assignment]
    for key, function in closures.items():
        for cell, own in zip(fresh[key].__closure__ or (), function.__closure__ or (), strict=True):
            if own != types.CellType():  # not a variable that is not bound yet
                cell.cell_contents = copy.deepcopy(own.cell_contents, memo)
    return copied


def _with_empty_cells(function: types.FunctionType) -> types.FunctionType:
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    fresh = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    fresh.__kwdefaults__ = function.__kwdefaults__
    fresh.__dict__.update(function.__dict__)
    return fresh


def _walk(root: object) -> Iterator[object]:
    return walk(root, _is_shared, closures=True)


def _is_shared(value: object) -> bool:
    return isinstance(value, _SHARED) or any(c.__name__ in _SHARED_NAMES for c in type(value).__mro__)


def _refusing(module: nn.Module, overrides: Mapping[int, object]) -> dict[int, Any]:
    refusing: dict[int, Any] = {}
    for value in _walk(module):
        if isinstance(value, nn.Module | Tensor) or id(value) in overrides:
            continue
        try:
            copy.deepcopy(value, dict(overrides) | {id(m): m for m in module.modules()})
        except Exception:
            # A container that refuses does so for one of its members, which the walk visits too.
            if not isinstance(value, dict | list | tuple | set):
                refusing[id(value)] = value
    return refusing


def state_of(root: object) -> list[object]:
    """All that a step may change in a module or batch, comparable with ``==``; tensors by version and sum."""
    return [_state_of(value) for value in _walk(root)]


def _state_of(value: Any) -> object:
    if isinstance(value, Tensor):
        content = value.detach() if value.is_complex() else value.detach().double()
        return id(value), value._version, float(content.abs().sum())
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    attributes = getattr(value, "__dict__", {})
    members = [*value.values()] if isinstance(value, Mapping) else [*value] if isinstance(value, _CONTAINERS) else []
    return id(value), [v for v in [*members, *attributes.values()] if isinstance(v, PLAIN)]


@contextmanager
def preserved_state(module: nn.Module) -> Iterator[None]:
    """Python attributes and buffers of ``module`` are as before afterwards, even if a hook's closure reached them."""
    attributes = [(m, {k: v for k, v in vars(m).items() if k not in _MODULE_SLOTS}) for m in module.modules()]
    slots = [vars(m)[slot] for m in module.modules() for slot in _MODULE_SLOTS]
    reached = [*slots, *_walk([a for _, a in attributes])]
    contents = contents_of(reached)
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    try:
        yield
    finally:
        restore_contents(contents)
        for submodule, saved in attributes:
            for name in [k for k in vars(submodule) if k not in saved and k not in _MODULE_SLOTS]:
                del submodule.__dict__[name]
            submodule.__dict__.update(saved)
        with torch.no_grad():
            for buffer, content in buffers:
                # Not by version: the kernels of BatchNorm write running statistics without counting it.
                if not torch.equal(buffer, content):
                    buffer.copy_(content)
