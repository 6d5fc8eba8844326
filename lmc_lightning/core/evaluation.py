"""What one pass over a probe set found: losses, errors and weights of chunks and examples, of all processes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from lmc_lightning.core.collective import Collective
from lmc_lightning.core.losstap import TappedLoss
from lmc_lightning.core.structure import leading_size
from lmc_lightning.types import Batch, BatchWeight

ChunkEvaluation: TypeAlias = tuple[float, float, Tensor | None]
"""Mean loss and weight of one chunk and, where the tap sees them, the rows of its examples for :class:`Parts`."""


@dataclass(frozen=True)
class Evaluation:
    """One pass over the probe set at one θ. Means are over examples, in float64."""

    loss: float
    error: float | None
    """1 − accuracy, where the loss is a classification loss that the tap can see."""
    confidence: float | None
    """Mean largest predicted probability."""
    chunk_losses: Tensor
    """``(B,)``"""
    weights: Tensor
    """Share of each chunk ``(B,)``, summing to 1."""
    local_weights: Tensor = field(repr=False)
    """The shares of this process's own chunks."""
    example_losses: Tensor | None = field(default=None, repr=False)
    """``(N,)``, where the tap sees them."""
    example_errors: Tensor | None = field(default=None, repr=False)
    """``(N,)``"""
    example_weights: Tensor | None = field(default=None, repr=False)
    """Share of each example ``(N,)``, summing to 1."""


@dataclass(frozen=True)
class Parts:
    """What one process saw in one pass."""

    chunks: Tensor
    """Mean loss and weight of each chunk ``(B, 2)``."""
    examples: Tensor | None
    """Weight, loss, error and confidence of each example ``(N, 4)``, NaN where unknown, if the tap saw all losses."""

    @classmethod
    def of(cls, chunks: Sequence[ChunkEvaluation | None]) -> "Parts":
        """The parts from the chunks of one process, ``None`` for those without a loss."""
        rows = [(0.0, 0.0) if chunk is None else chunk[:2] for chunk in chunks]
        examples = [chunk[2] for chunk in chunks if chunk is not None]
        seen = [e for e in examples if e is not None]
        return cls(torch.tensor(rows, dtype=torch.float64), torch.cat(seen) if len(seen) == len(examples) else None)

    def mean(self) -> float:
        """The weighted mean loss of this process's chunks."""
        losses, weights = self.chunks.T
        return float(losses[weights > 0] @ weights[weights > 0] / weights.sum())


def chunk_weight(batch: Batch, tapped: TappedLoss | None, batch_weight: BatchWeight | None) -> float:
    """How much a chunk counts: what the user says, or its targets that are not ignored, or its examples."""
    if batch_weight is not None:
        return float(batch_weight(batch))
    if tapped is not None and tapped.kind in ("cross_entropy", "nll_loss"):
        return float(tapped.weights.sum())
    return float(leading_size(batch) or 1)


def example_rows(tapped: TappedLoss) -> Tensor:
    """Weight, loss, error and confidence of each example ``(n, 4)`` on the CPU, NaN where unknown."""
    unknown = torch.full_like(tapped.losses, math.nan)
    columns = (tapped.weights, tapped.losses, tapped.errors, tapped.confidences)
    return torch.stack([unknown if c is None else c for c in columns], 1).cpu()


def combined(parts: Parts, collective: Collective) -> Evaluation:
    """The evaluation of the whole probe set, from what each process saw of it."""
    losses, weights = collective.gather(lambda: parts.chunks).T
    shares = weights / weights.sum()
    loss = float(losses[shares > 0] @ shares[shares > 0])
    local_weights = parts.chunks[:, 1] / weights.sum()
    common = {"loss": loss, "chunk_losses": losses, "weights": shares, "local_weights": local_weights}
    if not collective.everywhere(parts.examples is not None):
        return Evaluation(error=None, confidence=None, **common)
    rows = collective.gather(lambda: torch.empty(0, 4) if parts.examples is None else parts.examples)
    share = rows[:, 0] / rows[:, 0].sum()
    error, confidence = float(share @ rows[:, 2]), float(share @ rows[:, 3])
    return Evaluation(
        error=None if math.isnan(error) else error,
        confidence=None if math.isnan(confidence) else confidence,
        example_losses=rows[:, 1],
        example_errors=None if math.isnan(error) else rows[:, 2],
        example_weights=share,
        **common,
    )
