"""What one pass over a probe set found: losses, errors and weights of chunks and examples, of all processes."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmc_lightning.core.collective import Collective
from lmc_lightning.core.losstap import TappedLoss


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

    def mean(self) -> float:
        """The weighted mean loss of this process's chunks."""
        losses, weights = self.chunks.T
        return float(losses[weights > 0] @ weights[weights > 0] / weights.sum())


def example_rows(tapped: list[TappedLoss], num_chunks: int) -> Tensor | None:
    """The rows of :class:`Parts`, unless the tap missed the loss of a chunk."""
    if len(tapped) < num_chunks:
        return None
    unknown = torch.tensor(math.nan, dtype=torch.float64)
    columns = [(t.weights, t.losses, t.errors, t.confidences) for t in tapped]
    return torch.cat(
        [torch.stack([unknown.expand(len(w)) if c is None else c.cpu() for c in (w, *rest)], 1) for w, *rest in columns]
    )


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
