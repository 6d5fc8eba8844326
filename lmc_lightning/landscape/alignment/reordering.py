"""Permutations of channels as indices along an axis."""

from collections.abc import Mapping, Set
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from lmc_lightning.landscape.alignment.channels import Channels, Product, Term

Permutations: TypeAlias = Mapping[Channels, Tensor]
"""Where each channel comes from: an order ``(size,)``, or one for each block ``(blocks, size)``."""

Blocks: TypeAlias = Mapping[Channels, Channels]
"""The blocks within each of which channels have an order of their own."""


def index_of(term: Term, permutations: Permutations, within: Blocks) -> Tensor:
    """Where each place of an axis comes from ``(n,)``; sets without a permutation stay.

    Orders within blocks are applied before the blocks themselves change places with them: row b of such an order is of
    the block that is at place b afterwards.
    """
    if isinstance(term, Channels):
        return permutations.get(term, torch.arange(term.size))
    if not isinstance(term, Product):
        starts = torch.tensor([0, *(part.size for part in term.parts)]).cumsum(0).tolist()
        moved = [index_of(part, permutations, within) for part in term.parts]
        return torch.cat([start + index for start, index in zip(starts, moved, strict=False)])
    sizes = [part.size for part in term.parts]
    index = torch.zeros([1] * len(sizes), dtype=torch.long)
    for axis, part in enumerate(term.parts):
        own = index_of(part, permutations, within)
        axes = [axis] if own.ndim == 1 else [term.parts.index(within[part]), axis]  # type: ignore[index]
        index = index + prod(sizes[axis + 1 :]) * own.reshape([n if i in axes else 1 for i, n in enumerate(sizes)])
    return index.expand(sizes).reshape(-1)


def positions(
    term: Term, channels: Channels, blocks: Channels | None = None, without: Set[Channels] = frozenset()
) -> Tensor:
    """Where on an axis each channel is: ``(size, m)``, or ``(blocks, size, m)`` for channels within blocks.

    Args:
        term: the axis.
        channels: whose places are wanted.
        blocks: the blocks that they have an order in.
        without: sets of channels; products with one of them are left out.
    """
    shape = [channels.size] if blocks is None else [blocks.size, channels.size]
    nothing = torch.empty([*shape, 0], dtype=torch.long)
    if isinstance(term, Channels):
        return torch.arange(term.size)[:, None] if term is channels and blocks is None else nothing
    if not isinstance(term, Product):
        starts = torch.tensor([0, *(part.size for part in term.parts)]).cumsum(0).tolist()
        found = [positions(part, channels, blocks, without) for part in term.parts]
        return torch.cat([start + p for start, p in zip(starts, found, strict=False)], dim=-1)
    if without & set(term.parts):
        return nothing
    grid = torch.arange(term.size).reshape([part.size for part in term.parts])
    if blocks is not None:
        if channels not in term.parts or blocks not in term.parts:
            return nothing
        axes = term.parts.index(blocks), term.parts.index(channels)
        return grid.movedim(axes, (0, 1)).reshape(*shape, -1)
    parts = [nothing]
    for axis, part in enumerate(term.parts):
        own = positions(part, channels, None, without)
        if own.shape[1]:
            parts.append(grid.index_select(axis, own.reshape(-1)).movedim(axis, 0).reshape(channels.size, -1))
    return torch.cat(parts, dim=1)
