"""Loss and gradient of one chunk of the data, for walks that look at a chunk a step."""

import torch
from torch import Tensor

from lmc_lightning.core.objective import Objective


def chunk_step(objective: Objective, index: int, theta: Tensor) -> tuple[float, Tensor] | None:
    """Mean loss of one chunk at θ and its gradient ``(P,)``; one forward and one backward pass over the chunk.

    ``None`` where the step skips the chunk or its loss does not depend on θ.
    """
    leaves = objective.leaves(theta)
    with objective.box(), torch.enable_grad():
        loss = objective.step(objective.module_at(leaves), objective.batches[index], seed=index)
        if loss is None or not loss.requires_grad:
            return None
        found = torch.autograd.grad(loss.reshape(()), leaves, allow_unused=True)
    parts = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
    return loss.item(), torch.cat(parts)
