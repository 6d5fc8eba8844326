"""The probe set as chunks: which examples are evaluated together, and with which weight."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from lmc_lightning.core.structure import NotSliceableError, cut, join, leading_size
from lmc_lightning.types import Batch

ADDITIVITY_TOLERANCE = 1e-5
"""Largest relative difference between a batch's loss and the weighted mean of its chunks' losses."""

_CHECKED_BATCHES = 4

Weighting: TypeAlias = Literal["examples", "targets", "batches", "batch_weight"]


@dataclass(frozen=True)
class Chunks:
    """Batches to be evaluated one at a time, and whether the user's own batches could be cut into them."""

    batches: tuple[Batch, ...]
    additive: bool


def rechunk(batches: Sequence[Batch], size: int, mean_loss: Callable[[Sequence[Batch]], float]) -> Chunks:
    """The examples of all batches in chunks of ``size``, so that numbers do not depend on the loader's batch size.

    A loss that is no mean over examples (contrastive, batch statistics) or data that cannot be cut keep their batches.

    Args:
        batches: what the loader gave.
        size: examples a chunk.
        mean_loss: the weighted mean loss of a list of batches; called on the first few, before and after.
    """
    sizes = [leading_size(b) for b in batches]
    if all(n == size for n in sizes[:-1]) and sizes[-1] is not None and sizes[-1] <= size:
        half = -(-(sizes[0] or 2) // 2)
        return Chunks(tuple(batches), _is_additive(batches[:1], half, mean_loss))
    try:
        chunks = _split(_joined(batches), size)
    except NotSliceableError:
        return Chunks(tuple(batches), additive=False)
    additive = _is_additive(batches[:_CHECKED_BATCHES], size, mean_loss)
    return Chunks(tuple(chunks) if additive else tuple(batches), additive)


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
