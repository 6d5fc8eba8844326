"""Nested data of any type: find its tensors, copy it, cut it, join it, name it by a digest."""

import copy
import functools
import hashlib
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

MAX_DEPTH = 12
PLAIN = (str, bytes, int, float, complex, bool, type(None), type)
"""Types of values that hold no others."""


def walk(root: object, is_leaf: Callable[[object], bool] | None = None, *, closures: bool = False) -> Iterator[object]:
    """Every object reachable from ``root`` through containers and attributes, each once, in a fixed order.

    Args:
        root: where to start.
        is_leaf: objects that are yielded but not entered.
        closures: whether functions are entered too, by what they hold.
    """
    seen: set[int] = set()
    stack: list[tuple[object, int]] = [(root, 0)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if depth < MAX_DEPTH and not (is_leaf and is_leaf(value)):
            children = [*_children(value), *(_behind(value) if closures else ())]
            stack.extend((child, depth + 1) for child in reversed(children))


def is_closure(value: object) -> TypeGuard[types.FunctionType]:
    """Whether ``value`` is a function that holds variables, other than torch's wrappers, which hold its caches."""
    if not isinstance(value, types.FunctionType) or not value.__closure__ or uncompiled(value) is not None:
        return False
    return not str(value.__module__).startswith("torch")


def uncompiled(value: object) -> Callable[..., Any] | None:
    """What ``torch.compile`` has wrapped, if ``value`` is such a wrapper of a function or method."""
    return vars(value).get("_torchdynamo_orig_callable") if isinstance(value, types.FunctionType) else None


def _behind(value: Any) -> list[object]:
    """What a callable sees besides its arguments: variables, the object of a method, the arguments of a partial."""
    if (inner := uncompiled(value)) is not None:
        return [inner]
    if is_closure(value):
        cells = value.__closure__ or ()
        return [c.cell_contents for c in cells if c != types.CellType()]  # not a variable that is not bound yet
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    return [value.__self__] if isinstance(value, types.MethodType) else []


def _children(value: object) -> list[object]:
    if isinstance(value, Tensor):
        return []
    is_code = callable(value) and not isinstance(value, torch.nn.Module)
    attributes = [] if is_code else list(getattr(value, "__dict__", {}).values())
    if isinstance(value, Mapping):
        return [*value.values(), *attributes]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return [*value, *attributes]
    return attributes


def contents_of(values: Iterable[object]) -> list[tuple[Any, Any]]:
    """Each list, deque, dict and set among ``values`` with what it holds now."""
    return [(v, _content(v)) for v in values if isinstance(v, list | deque | dict | set)]


def _content(container: Any) -> Any:
    kind = next(kind for kind in (dict, set, list) if kind is list or isinstance(container, kind))
    return kind(container)


def restore_contents(contents: Iterable[tuple[Any, Any]]) -> None:
    """Let each container hold again what it held."""
    for container, content in contents:
        if _differs(container, content):
            container.clear()
            container.extend(content) if isinstance(content, list) else container.update(content)


def _differs(now: Any, before: Any) -> bool:
    if isinstance(before, set):
        return bool(now != before)
    if isinstance(before, dict):
        return list(now) != list(before) or any(now[k] is not before[k] for k in before)
    return len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True))


def tensors_in(root: object) -> list[Tensor]:
    """The tensors reachable from ``root``, each once, in a fixed order."""
    return [value for value in walk(root) if isinstance(value, Tensor)]


def with_tensors(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """A deep copy of ``value`` in which every tensor ``t`` is ``replace(t)``; types of containers are kept."""
    tensors = tensors_in(value)
    return copy.deepcopy(value, {id(t): replace(t) for t in tensors})


def clone(value: Any) -> Any:
    """A deep copy whose tensors are detached clones (a plain deepcopy refuses tensors that carry a graph)."""
    return with_tensors(value, lambda t: t.detach().clone())


def leading_size(batch: Any) -> int | None:
    """The first dimension of the first tensor that has one: the number of examples, if anything is."""
    return next((t.shape[0] for t in tensors_in(batch) if t.ndim), None)


class NotSliceableError(ValueError):
    """The data have no common example axis along which they could be cut or joined."""


def cut(batch: Any, start: int, stop: int) -> Any:
    """Examples ``start`` to ``stop`` of a batch made of tensors and containers.

    Raises:
        NotSliceableError: a tensor or list of other length than the batch, or an object of unknown structure.
    """
    size = leading_size(batch)
    return _cut(batch, size, slice(start, stop))


def _cut(value: Any, size: int | None, part: slice) -> Any:
    if isinstance(value, Tensor):
        if value.ndim and value.shape[0] == size:
            return value[part]
        if value.ndim == 0:
            return value
    elif isinstance(value, PLAIN):
        return value
    elif isinstance(value, Mapping):
        return _rebuild(value, {k: _cut(v, size, part) for k, v in value.items()})
    elif isinstance(value, (list, tuple)):
        if value and all(isinstance(v, PLAIN) for v in value) and len(value) == size:
            return _rebuild(value, value[part])
        return _rebuild(value, [_cut(v, size, part) for v in value])
    raise NotSliceableError(f"{type(value).__name__} has no example axis of length {size}.")


def join(batches: Sequence[Any]) -> Any:
    """One batch with the examples of all, in order; leaves without an example axis are taken from the first.

    Raises:
        NotSliceableError: the batches differ in structure or in more than their first dimension.
    """
    return _join(list(batches), [leading_size(b) for b in batches])


def _join(values: list[Any], sizes: list[int | None]) -> Any:
    first = values[0]
    if any(type(v) is not type(first) for v in values):
        raise NotSliceableError("The batches differ in their types.")
    if isinstance(first, Tensor):
        if all(
            v.ndim and v.shape[0] == n and v.shape[1:] == first.shape[1:] for v, n in zip(values, sizes, strict=True)
        ):
            return torch.cat(values)
        if first.ndim == 0:
            return first
    elif isinstance(first, PLAIN):
        return first
    elif isinstance(first, Mapping):
        if all(v.keys() == first.keys() for v in values):
            return _rebuild(first, {k: _join([v[k] for v in values], sizes) for k in first})
    elif isinstance(first, (list, tuple)):
        if (
            first
            and all(isinstance(x, PLAIN) for x in first)
            and all(len(v) == n for v, n in zip(values, sizes, strict=True))
        ):
            return _rebuild(first, [x for v in values for x in v])
        if all(len(v) == len(first) for v in values):
            return _rebuild(first, [_join(list(parts), sizes) for parts in zip(*values, strict=True)])
    raise NotSliceableError(f"{type(first).__name__} cannot be joined along an example axis.")


def _rebuild(like: Any, content: Any) -> Any:
    if isinstance(like, Mapping):
        if type(like) is dict:
            return content
        fresh = copy.copy(like)
        for key, value in content.items():
            fresh[key] = value  # type: ignore[index]
        return fresh
    if hasattr(like, "_fields"):
        return type(like)(*content)
    return type(like)(content)


def digest(value: Any) -> str:
    """The sha256 of the tensors in ``value``, with their types and shapes, in a fixed order."""
    sha = hashlib.sha256()
    for tensor in tensors_in(value):
        flat = tensor.detach().cpu().contiguous()
        sha.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
        sha.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return sha.hexdigest()
