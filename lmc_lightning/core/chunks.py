"""The probe set as chunks: which examples are evaluated together, and with which weight."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from torch import Tensor

from lmc_lightning.core.memory import CountBytes
from lmc_lightning.core.structure import NotSliceableError, cut, join, leading_size
from lmc_lightning.types import Batch

ADDITIVITY_TOLERANCE = 1e-5
"""Largest relative difference between a batch's loss and the weighted mean of its chunks' losses."""

_CHECKED_BATCHES = 4

SMALL_CHUNK, LARGE_CHUNK = 128, 1024
"""Examples a chunk: on a CPU, whose cache holds the activations of so many, and at most."""

_CACHED_WEIGHTS = 1 << 20
"""Bytes of weights that stay in a CPU's cache from one chunk to the next."""

_COUNTED = 16

Weighting: TypeAlias = Literal["examples", "targets", "batches", "batch_weight"]


@dataclass(frozen=True)
class Chunks:
    """Batches to be evaluated one at a time, and whether the user's own batches could be cut into them."""

    batches: tuple[Batch, ...]
    additive: bool


def suited_size(theta: Tensor, batch: Batch, evaluate: Callable[[Sequence[Batch]], float]) -> int:
    """Examples a chunk, from the device and from shapes alone, never by timing.

    Small chunks stay in a CPU's cache, but each of them also reads all weights and writes a gradient. Where that is
    more than the activations of ``SMALL_CHUNK`` examples, the chunk is as large as it takes for the two to balance.

    Args:
        theta: all weights ``(P,)``.
        batch: examples to count activations with, twice on a few.
        evaluate: one forward pass over batches.
    """
    if theta.device.type != "cpu":
        return LARGE_CHUNK
    size = SMALL_CHUNK
    if theta.nbytes > _CACHED_WEIGHTS:
        activations = _bytes_per_example(batch, evaluate)
        while activations and size < LARGE_CHUNK and size * activations < theta.nbytes:
            size *= 2
    return size


def _bytes_per_example(batch: Batch, evaluate: Callable[[Sequence[Batch]], float]) -> int:
    """What each further example of a forward pass adds to the tensors that it makes; 0 where that cannot be told."""
    many = min(leading_size(batch) or 0, _COUNTED)
    if many < 2:
        return 0
    counts = []
    for count in (many // 2, many):
        with CountBytes() as counted:
            loss = _mean_loss_if_possible(evaluate, [first_examples(batch, count)])
        counts.append(math.nan if math.isnan(loss) else counted.total)
    grown = (counts[1] - counts[0]) / (many - many // 2)
    return int(grown) if grown > 0 else 0


def rechunk(batches: Sequence[Batch], size: int, mean_loss: Callable[[Sequence[Batch]], float]) -> Chunks:
    """The examples of all batches in chunks of ``size``, so that numbers do not depend on the loader's batch size.

    A loss that is no mean over examples (contrastive, batch statistics) or data that cannot be cut keep their batches.

    Args:
        batches: what the loader gave.
        size: examples a chunk.
        mean_loss: the weighted mean loss of a list of batches; called on the first few, before and after.
    """
    first = leading_size(batches[0]) or 0
    if are_cut(batches, size):
        half = -(-(first or 2) // 2)
        return Chunks(tuple(batches), _is_additive(batches[:1], half, mean_loss))
    try:
        chunks = _split(_joined(batches), size)
    except NotSliceableError:
        return Chunks(tuple(batches), additive=False)
    if first > 2 * size:  # two chunks tell as well as many, where the step takes them
        few = [first_examples(batches[0], 2 * size)]
        additive = _is_additive(few, size, partial(_mean_loss_if_possible, mean_loss))
    else:
        additive = _is_additive(batches[:_CHECKED_BATCHES], size, mean_loss)
    return Chunks(tuple(chunks) if additive else tuple(batches), additive)


def are_cut(batches: Sequence[Batch], size: int) -> bool:
    """Whether batches are chunks of ``size`` already, but for a shorter last one."""
    *others, last = [leading_size(b) for b in batches]
    return all(n == size for n in others) and last is not None and last <= size


def _is_additive(batches: Sequence[Batch], size: int, mean_loss: Callable[[Sequence[Batch]], float]) -> bool:
    """Whether the mean loss of some batches is that of their examples in chunks of ``size``.

    Of batches larger than two chunks their first examples tell; a step that takes no such part keeps its batches.
    """
    given, batches = batches, [first_examples(b, 2 * size) for b in batches]
    try:
        trial = _split(_joined(batches), size)
    except NotSliceableError:
        return False
    whole = all(a is b for a, b in zip(given, batches, strict=True))
    before = mean_loss(batches) if whole else _mean_loss_if_possible(mean_loss, batches)
    after = _mean_loss_if_possible(mean_loss, trial)
    return abs(before - after) <= ADDITIVITY_TOLERANCE * abs(before)


def _joined(batches: Sequence[Batch]) -> Batch:
    return join(batches) if len(batches) > 1 else batches[0]


def equal_batches(batches: Sequence[Batch], size: int) -> list[Batch]:
    """The examples of all batches in batches of ``size``, in order, without those that are left over.

    Data that cannot be cut or joined keep their batches, and so do fewer examples than ``size``.
    """
    whole = [b for b in batches if leading_size(b) == size]
    if sum(leading_size(b) or size for b in batches) - size * len(whole) < size:
        return whole or list(batches)
    try:
        return [b for b in _split(join(batches), size) if leading_size(b) == size]
    except NotSliceableError:
        return list(batches)


def first_examples(batch: Batch, count: int) -> Batch:
    """The first examples of a batch, or all of them where there are no more or it cannot be cut."""
    if (leading_size(batch) or 0) <= count:
        return batch
    try:
        return cut(batch, 0, count)
    except NotSliceableError:
        return batch


def _mean_loss_if_possible(mean_loss: Callable[[Sequence[Batch]], float], trial: Sequence[Batch]) -> float:
    try:
        return mean_loss(trial)
    except Exception:
        return float("nan")  # a step that takes the user's own batches but not these: an axis that is no example axis


def _split(batch: Any, size: int) -> list[Any]:
    total = leading_size(batch)
    if total is None:
        raise NotSliceableError("The batch holds no tensor with an example axis.")
    edges = [*range(0, total, size), total]
    return [cut(batch, start, stop) for start, stop in pairwise(edges)]
