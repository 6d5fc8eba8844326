"""Spectra of the diagonal blocks of a curvature matrix: one block for each module or parameter tensor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lmc_lightning.core.hvp import CurvatureProduct
from lmc_lightning.core.random_vectors import rademacher
from lmc_lightning.linalg.lanczos import KrylovSpace

Blocks = Literal["module", "tensor"]


@dataclass(frozen=True, eq=False)
class BlockSpectrum:
    """Spectrum of the block of H that belongs to the parameters of one module or tensor, by one Lanczos run.

    Attributes:
        name: Of the module or tensor.
        num_params: Its parameters.
        tensors: Their numbers in θ.
        lambda_max: Largest eigenvalue of the block, a lower bound of that of H.
        lambda_min: Its smallest one.
        residual: ‖H_bb u − λ_max u‖: some eigenvalue lies within that distance.
        nodes: Of the block's spectral density from one probe ``(m,)`` float64, descending.
        weights: Of the nodes ``(m,)``, summing to 1.
        converged: Whether ``residual`` is within the tolerance.
    """

    name: str
    num_params: int
    tensors: tuple[int, ...]
    lambda_max: float
    lambda_min: float
    residual: float
    nodes: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    converged: bool


def tensor_blocks(names: Sequence[str], blocks: Blocks) -> dict[str, tuple[int, ...]]:
    """Name of each block -> numbers of its tensors; a module owns the tensors directly in it, the root is ``root``."""
    found: dict[str, tuple[int, ...]] = {}
    for number, name in enumerate(names):
        owner = name if blocks == "tensor" else name.rpartition(".")[0] or "root"
        found[owner] = (*found.get(owner, ()), number)
    return found


def largest_blocks(spectra: Sequence[BlockSpectrum], count: int) -> list[BlockSpectrum]:
    """Those of largest eigenvalue, the largest first."""
    return sorted(spectra, key=lambda block: block.lambda_max, reverse=True)[:count]


def block_spectra(
    product: CurvatureProduct,
    blocks: Mapping[str, tuple[int, ...]],
    *,
    num_steps: int,
    tolerance: float,
    generator: torch.Generator,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[BlockSpectrum]:
    """Extreme eigenvalues and density of each diagonal block, from one Lanczos run with a Rademacher start.

    Cost: up to ``num_steps`` products for each block; one differentiates by the parameters of the block alone, which
    spares the layers before it.

    Args:
        product: The whole matrix.
        blocks: Numbers of the tensors of each block.
        num_steps: Products for each block.
        tolerance: Residual of the largest eigenvalue, relative to it, at which it counts as converged.
        generator: Source of the starts.
        should_stop: Asked after each block; True ends with those done.
    """
    for name, tensors in blocks.items():
        size = sum(product.sizes[number] for number in tensors)
        start = rademacher(size, generator).to(product.theta)
        space, matvec = KrylovSpace(start, rows_per_block=min(num_steps, size)), product.on_tensors(tensors)
        while space.size < num_steps and not space.breakdown:
            space.absorb(matvec(space.advance()))
        ritz = space.ritz()
        residual, value = float(ritz.residuals[0]), float(ritz.values[0])
        yield BlockSpectrum(
            name=name,
            num_params=size,
            tensors=tensors,
            lambda_max=value,
            lambda_min=float(ritz.values[-1]),
            residual=residual,
            nodes=ritz.values,
            weights=ritz.coordinates[0] ** 2,
            converged=residual <= max(tolerance * abs(value), space.rounding),
        )
        if should_stop is not None and should_stop():
            return
