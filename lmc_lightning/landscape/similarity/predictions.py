"""What a classifier says of each example: its log-probabilities, and the true classes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmc_lightning.core.objective import Objective


@dataclass(frozen=True)
class Outputs:
    """Outputs of a network on the examples of a probe set, in its order.

    Attributes:
        logits: What the loss was given, ``(N, C)`` float64 on the CPU.
        labels: The true class of each example ``(N,)``.
        weights: Its share in means ``(N,)``, summing to 1; 0 for targets that are ignored.
    """

    logits: Tensor
    labels: Tensor
    weights: Tensor

    @property
    def log_probabilities(self) -> Tensor:
        """``(N, C)``; of log-probabilities (``nll_loss``) themselves."""
        return self.logits.log_softmax(1)


def outputs_at(objective: Objective, theta: Tensor, buffers: Mapping[str, Tensor] | None = None) -> Outputs | None:
    """The outputs at θ, read off the loss call; one forward pass. ``None`` unless that is one class for each example.

    Args:
        objective: with ``cross_entropy`` or ``nll_loss`` of ``torch.nn.functional``.
        theta: the state's parameters ``(P,)``.
        buffers: the state's buffers by name; by default those of the objective's module.
    """
    collective = objective.collective
    if objective.baseline.confidence is None:
        return None
    # θ carries no gradient, so that nothing is recorded although a step may differentiate by its inputs.
    theta = theta.detach()
    with objective.box():
        rows = collective.agree(lambda: [_rows(objective, theta, buffers, i) for i in range(len(objective.batches))])
    known = [row for row in rows if row is not None]
    if not collective.everywhere(len(known) == len(rows)):
        return None
    logits, labels, weights = (torch.cat(column) for column in zip(*known, strict=True))
    total = collective.gather(lambda: weights)
    return Outputs(collective.gather(lambda: logits), collective.gather(lambda: labels), total / total.sum())


def _rows(
    objective: Objective, theta: Tensor, buffers: Mapping[str, Tensor] | None, index: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    tapped = objective.tap(objective.module_at(theta, buffers=buffers), objective.batches[index], seed=index)
    labels = tapped.labels
    if labels is None or tapped.outputs.ndim != 2:
        return None
    return tapped.outputs.detach().double().cpu(), labels.cpu(), tapped.weights.cpu()
