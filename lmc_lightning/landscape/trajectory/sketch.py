"""Random projections of weight vectors that keep distances, regenerated from a seed wherever they are needed."""

import torch
from torch import Tensor

from lmc_lightning.core.random_vectors import derive_seed

_PIECE = 1 << 22
"""Entries whose places are drawn at a time; part of what a seed means."""


def count_sketch(theta: Tensor, dimension: int, seed: int = 0) -> Tensor:
    """Sθ ``(d,)`` on the CPU: every entry of θ is added, with a random sign, to one of d random places.

    Linear in θ, E‖Sθ‖² = ‖θ‖² and Var ‖Sθ‖² = (2/d)(‖θ‖₂⁴ − ‖θ‖₄⁴), so distances hold to about √(2/d) (Charikar et al.
    2002; arXiv 0902.2206). S has one entry a column and is drawn anew at each call: P draws and additions, and memory
    for a piece of it. Equal seeds and sizes give the same S in every run.

    Args:
        theta: ``(P,)``.
        dimension: d.
        seed: of S.
    """
    if dimension < 1:
        raise ValueError(f"Expected dimension of at least 1, got {dimension}.")
    generator = torch.Generator().manual_seed(derive_seed(seed, "sketch", dimension))
    sums = torch.zeros(
        2 * dimension, dtype=torch.float64
    )  # of the entries with a minus and with a plus, place by place
    for piece in theta.detach().cpu().split(_PIECE):
        draw = torch.randint(2 * dimension, (len(piece),), generator=generator)
        sums += torch.bincount(draw, piece.double(), minlength=2 * dimension)
    return (sums[1::2] - sums[::2]).to(theta.dtype)
