"""Initialisation under a seed of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Context in which modules built draw their weights from ``seed`` and leave the global generators untouched.

    Tensors are created on the CPU, whatever the default device: one seed gives one network on every machine.

    Example:
        >>> with seeded_init(3):
        ...     first = torch.nn.Linear(2, 1)
        >>> with seeded_init(3):
        ...     second = torch.nn.Linear(2, 1)
        >>> torch.equal(first.weight, second.weight)
        True
    """
    # torch.manual_seed would also reseed every accelerator, which fork_rng(devices=[]) does not restore.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
