"""The sharpness family of an objective whose examples lie on two processes."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lmc_lightning.core.collective import Collective, ProcessGroup
from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.sharpness.family import MEASURES, SharpnessSettings, sharpness
from tests.problems import ConvNet, cross_entropy, images, split

SIZES = (48, 22)
"""Examples of each process."""
SETTINGS = SharpnessSettings(num_steps=2, num_samples=2, num_draws=2, radii=(0.05,))


def family(processes: tuple[int, ...], collective: Collective) -> dict[str, Any]:
    """Value, error, samples and cost of every measure on the examples of some processes, in chunks of 16."""
    parts = split(images(), SIZES)
    objective = Objective(ConvNet(), [parts[p] for p in processes], cross_entropy, chunk_size=16, collective=collective)
    found = sharpness(objective, objective.theta(), MEASURES, SETTINGS)
    return {n: (m.value, m.stderr, m.num_samples, m.num_losses, m.flags) for n, m in found.measures.items()}


def of_both(rank: int) -> dict[str, Any]:
    """The family on both processes' examples."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    return family((rank,), ProcessGroup(torch.device("cpu")))
