"""The order of a training epoch as a function of (seed, epoch)."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream ``names`` of ``seed``: the leading bits of the SHA-256 of both.

    The same on every machine and in every process. 1 and ``"1"`` are different names.
    """
    digest = hashlib.sha256(json.dumps([int(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def derived_generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator at the start of the stream ``names`` of ``seed``."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The permutation ``(size,)`` in which epoch ``epoch`` (from 0) visits the examples."""
    return torch.randperm(size, generator=derived_generator(seed, "order", epoch))


@dataclass
class NoiseSeeds:
    """The seeds of the training noise: ``noise_seed`` for both streams unless a stream has its own."""

    noise_seed: int = 0
    order_seed: int | None = None
    augmentation_seed: int | None = None

    @property
    def order(self) -> int:
        """The seed of the order of the examples."""
        return self.noise_seed if self.order_seed is None else self.order_seed

    @property
    def augmentation(self) -> int:
        """The seed of the augmentation."""
        return self.noise_seed if self.augmentation_seed is None else self.augmentation_seed


class EpochOrder(DistributedSampler[int]):
    """The examples in the order of one epoch; draws from no global generator and keeps no state between epochs.

    It is told the epoch by ``set_epoch``. Lightning and Fabric call that themselves, after a resume too; in a loop of
    your own write ``loader.sampler.set_epoch(epoch)`` before each pass, or every pass is epoch 0. Process ``rank`` of
    ``num_replicas`` gets every ``num_replicas``-th example; the first ones are repeated to make the shares equal.

    Args:
        size: number of examples.
        seeds: read at the start of every pass, so that a change takes effect in the next one.
        num_replicas: number of processes that share the epoch.
        rank: which of them this one is.
    """

    # A `DistributedSampler` by descent, for Lightning shuffles any other sampler once more when it shards it.

    def __init__(self, size: int, seeds: NoiseSeeds, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(size), num_replicas=num_replicas, rank=rank)  # type: ignore[arg-type]  # needs a length
        self.size = size
        self.seeds = seeds
        self._current: tuple[NoiseSeeds, int] | None = None

    @property
    def current(self) -> tuple[NoiseSeeds, int]:
        """Seeds and epoch of the pass under way, whatever has been set since it began."""
        return (replace(self.seeds), self.epoch) if self._current is None else self._current

    def __iter__(self) -> Iterator[int]:
        # A generator on purpose: Lightning makes the first iterator of a process before it calls `set_epoch`,
        # and this body runs only at the first `next`.
        self._current = (replace(self.seeds), self.epoch)
        order = epoch_order(self.size, self.seeds.order, self.epoch)
        positions = torch.arange(self.rank, self.total_size, self.num_replicas)
        yield from order[positions % self.size].tolist()
