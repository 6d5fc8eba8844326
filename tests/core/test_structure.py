from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lmc_lightning.core.structure import (
    NotSliceableError,
    clone,
    cut,
    digest,
    join,
    leading_size,
    tensors_in,
    walk,
    with_tensors,
)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Graph:
    nodes: Tensor
    edges: Tensor


def examples(count: int = 6) -> Tensor:
    return torch.arange(2.0 * count).reshape(count, 2)


def nested() -> dict[str, Any]:
    x = examples()
    return {"image": x, "more": [x[:, 0].clone(), Pair(x + 1, x + 2)], "name": "a", "scale": 2.0}


SLICEABLE = {
    "tensor": examples(),
    "tuple": (examples(), torch.arange(6)),
    "namedtuple": Pair(examples(), torch.arange(6)),
    "dict": {"x": examples(), "y": torch.arange(6)},
    "ordered": OrderedDict(x=examples(), y=torch.arange(6)),
    "user dict": UserDict(x=examples(), y=torch.arange(6)),
    "nested": nested(),
    "list of ids": {"x": examples(), "ids": list("abcdef")},
    "temperature": (examples(), torch.tensor(0.5)),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict | UserDict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("batch", SLICEABLE.values(), ids=SLICEABLE.keys())
def test_joining_the_pieces_gives_the_batch_back(batch: Any) -> None:
    assert leading_size(batch) == 6
    pieces = [cut(batch, 0, 4), cut(batch, 4, 5), cut(batch, 5, 6)]
    assert [leading_size(p) for p in pieces] == [4, 1, 1]
    assert same(join(pieces), batch)


def test_cutting_takes_the_same_examples_everywhere() -> None:
    piece = cut({"x": examples(), "ids": list("abcdef")}, 2, 4)
    assert piece["x"].tolist() == [[4, 5], [6, 7]]
    assert piece["ids"] == ["c", "d"]


@pytest.mark.parametrize(
    "batch",
    [
        (examples(6), examples(5)),
        Graph(examples(), examples()),
        {examples()},
        {"x": examples(), "fn": object()},
    ],
    ids=["lengths", "dataclass", "set", "object"],
)
def test_what_has_no_common_example_axis_is_not_cut(batch: Any) -> None:
    with pytest.raises(NotSliceableError, match="has no example axis of length 6"):
        cut(batch, 0, 2)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([examples(), (examples(),)], "differ in their types"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], "Tensor cannot be joined"),
        ([{"x": examples()}, {"y": examples()}], "dict cannot be joined"),
        ([(examples(),), (examples(), examples())], "tuple cannot be joined"),
        ([Graph(examples(), examples())] * 2, "Graph cannot be joined"),
    ],
    ids=["types", "widths", "keys", "lengths", "dataclass"],
)
def test_what_differs_in_structure_is_not_joined(batches: list[Any], message: str) -> None:
    with pytest.raises(NotSliceableError, match=message):
        join(batches)


@pytest.mark.parametrize("value", [*SLICEABLE.values(), Graph(examples(), examples())])
def test_a_clone_is_equal_and_shares_no_memory(value: Any) -> None:
    copied = clone(value)
    assert digest(copied) == digest(value)
    for tensor in tensors_in(copied):
        tensor.zero_()
    assert digest(copied) != digest(value)


def test_cloning_detaches_what_deepcopy_refuses() -> None:
    leaf = torch.ones(2, requires_grad=True)
    copied = clone({"hidden": leaf * 2})
    assert not copied["hidden"].requires_grad
    assert copied["hidden"].tolist() == [2, 2]


def test_aliases_stay_aliases() -> None:
    shared = examples()
    first, second = clone((shared, [shared]))
    assert first is second[0]


def test_with_tensors_keeps_the_types_of_containers() -> None:
    value = defaultdict(list, {"a": [torch.ones(1)], "b": (torch.ones(1),)})
    doubled = with_tensors(value, lambda t: 2 * t)
    assert type(doubled) is defaultdict
    assert type(doubled["b"]) is tuple
    assert [t.item() for t in tensors_in(doubled)] == [2, 2]
    assert [t.item() for t in tensors_in(value)] == [1, 1]


def test_walk_finds_tensors_behind_attributes_once_and_survives_cycles() -> None:
    graph = Graph(examples(), examples())
    graph.self = graph  # type: ignore[attr-defined]
    assert len(tensors_in([graph, graph.nodes])) == 2


def test_walk_does_not_enter_leaves() -> None:
    graph = Graph(examples(), examples())
    assert list(walk([graph], lambda v: isinstance(v, Graph)))[1:] == [graph]


def test_no_tensor_with_an_axis_has_no_size() -> None:
    assert leading_size({"a": 3, "b": torch.tensor(1.0)}) is None


@pytest.mark.parametrize(
    "other",
    [
        (examples().double(), torch.arange(6)),
        (examples().reshape(3, 4), torch.arange(6)),
        (examples() + 1e-6, torch.arange(6)),
        (torch.arange(6), examples()),
        (examples(),),
    ],
    ids=["dtype", "shape", "value", "order", "fewer"],
)
def test_digest_tells_apart(other: Any) -> None:
    assert digest((examples(), torch.arange(6))) != digest(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex64, torch.uint8])
def test_digest_takes_every_dtype_and_memory_layout(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    assert digest(tensor) == digest(tensor.T.contiguous().T)
    assert len(digest([tensor, torch.tensor(1), torch.zeros(0)])) == 64
