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
        return Chunks(tuple(batches), additive=True)
    try:
        chunks = _split(join(batches) if len(batches) > 1 else batches[0], size)
        checked = list(batches[:_CHECKED_BATCHES])
        trial = _split(join(checked) if len(checked) > 1 else checked[0], size)
    except NotSliceableError:
        return Chunks(tuple(batches), additive=False)
    before, after = mean_loss(checked), _mean_loss_if_possible(mean_loss, trial)
    additive = abs(before - after) <= ADDITIVITY_TOLERANCE * abs(before)
    return Chunks(tuple(chunks) if additive else tuple(batches), additive)


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
