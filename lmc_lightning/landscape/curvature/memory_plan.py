"""How a memory budget is shared out between gradient graphs and Lanczos vectors: by sizes alone, never by timing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmc_lightning.core.collective import Collective
from lmc_lightning.core.memory import FREE_MEMORY_SHARE, free_bytes
from lmc_lightning.core.objective import Objective
from lmc_lightning.core.structure import leading_size

BLOCK_SIZE = {"cpu": 1}
"""Vectors multiplied at a time by device type; elsewhere ``DEFAULT_BLOCK_SIZE``."""
DEFAULT_BLOCK_SIZE = 16

FEWEST_STEPS = 8
"""Products for each probe that are made even where their vectors exceed the budget."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a spectrum may keep between products.

    Attributes:
        budget: For all of it [bytes].
        graphs: Of it, for cached gradient graphs [bytes].
        max_basis: Most Lanczos vectors for the eigenvalues, by thick restarts; ``None`` for as many as there are
            products.
        num_steps: Products for each probe.
        block_size: Vectors multiplied at a time.
    """

    budget: int
    graphs: int
    max_basis: int | None
    num_steps: int
    block_size: int


def memory_plan(
    theta: Tensor,
    budget: int | None,
    collective: Collective,
    *,
    num_pairs: int,
    guard: int,
    max_products: int,
    num_probes: int,
    num_steps: int,
    block_size: int | None,
) -> MemoryPlan:
    """Up to half of the budget for vectors, but never fewer than the algorithms need; the rest for graphs.

    Args:
        theta: The point ``(P,)``.
        budget: [bytes]; by default a quarter of what is free. The least of all processes counts.
        collective: The processes that compute together, and so have to decide alike.
        num_pairs: Eigenpairs that are kept.
        guard: Further ones that have to converge.
        max_products: Most products for the eigenvalues.
        num_probes: Probes of the density.
        num_steps: Products wanted for each of them.
        block_size: Vectors to multiply at a time, if that is asked for.
    """
    asked = int(FREE_MEMORY_SHARE * free_bytes(theta.device)) if budget is None else budget
    least = int(collective.gather(lambda: torch.tensor([asked])).min())
    size = theta.numel() * theta.element_size()
    wanted = block_size or BLOCK_SIZE.get(theta.device.type, DEFAULT_BLOCK_SIZE)
    wanted = max(1, min(wanted, num_probes or num_pairs))
    rows = min(least // 2 // size, max(max_products, num_pairs + wanted * num_steps))
    free_rows = max(rows - num_pairs, 0)
    steps = min(num_steps, max(free_rows, FEWEST_STEPS))
    return MemoryPlan(
        budget=least,
        graphs=least - rows * size,
        max_basis=None if rows >= max_products else max(rows, 2 * (num_pairs + guard)),
        num_steps=steps,
        block_size=wanted if block_size is not None else max(1, min(wanted, free_rows // steps)),
    )


def chunk_size_of(objective: Objective) -> int | None:
    """Examples in the first chunk, of the process that has most; None where they cannot be counted."""
    own = torch.tensor([float(leading_size(objective.batches[0]) or 0)])
    return int(objective.collective.gather(lambda: own).max()) or None
