"""Figures of a spectrum."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmc_lightning.callbacks.visits.visit import Visit
from lmc_lightning.landscape.curvature.blocks import largest_blocks
from lmc_lightning.landscape.curvature.result import SpectrumResult
from lmc_lightning.linalg.density import gaussian_mixture
from lmc_lightning.plotting.density import plot_densities, plot_density
from lmc_lightning.plotting.style import figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID_POINTS = 512
BANDWIDTH_SHARE = 0.01
"""Bandwidth of the drawn density, as a share of the spectrum's width."""

NUM_SHOWN = 5
"""Blocks whose numbers and densities are shown, the largest ones; the table holds those of all."""

MATRICES = {"hessian": "Hessian", "ggn": "Gauss–Newton", "empirical_fisher": "Empirical Fisher"}
"""Operator -> what figures call it."""


def spectrum_pictures(
    result: SpectrumResult, key: Callable[[str], str], operator: str, visit: Visit
) -> dict[str, dict[str, Any]]:
    """Histograms and figures of a visit by key; none without a density."""
    if result.quadrature is None or result.eigenpairs is None:
        return {}
    shown = (result, operator, visit.epoch, visit.objective.num_examples)
    figures = {key("density"): partial(draw_density, *shown)}
    if result.blocks:
        figures[key("block_density")] = partial(draw_block_densities, *shown)
    return {"histograms": {key("ritz_values"): result.eigenpairs.ritz_values.numpy()}, "figures": figures}


def draw_density(result: SpectrumResult, operator: str, epoch: int, num_examples: int | None) -> "Figure":
    """The spectral density of one visit, smoothed by a hundredth of the spectrum's width."""
    quadrature = result.quadrature
    assert quadrature is not None
    grid, bandwidth = _grid(float(quadrature.nodes.min()), float(quadrature.nodes.max()))
    axes = plot_density(
        grid.numpy(),
        quadrature.density(grid, bandwidth).numpy(),
        eigenvalues=result.eigenvalues.numpy(),
        title=f"{MATRICES[operator]} spectral density, epoch {epoch}",
        caption=f"{num_examples} training examples, {len(quadrature.nodes)} probes, "
        f"bandwidth {bandwidth:.2g}, P = {result.num_params:,}",
    )
    return figure_of(axes)


def draw_block_densities(result: SpectrumResult, operator: str, epoch: int, num_examples: int | None) -> "Figure":
    """The spectral densities of the blocks of largest eigenvalue, each smoothed by a hundredth of its own width."""
    curves = {}
    for block in largest_blocks(result.blocks, NUM_SHOWN):
        grid, bandwidth = _grid(block.lambda_min, block.lambda_max)
        curves[block.name] = grid.numpy(), gaussian_mixture(grid, block.nodes, block.weights, bandwidth).numpy()
    axes = plot_densities(
        curves,
        title=f"{MATRICES[operator]} densities of the largest blocks, epoch {epoch}",
        caption=f"{num_examples} training examples, 1 probe each, bandwidth 1 % of each width",
    )
    return figure_of(axes)


def _grid(low: float, high: float) -> tuple[Tensor, float]:
    """Points over the spectrum and a little beyond, and the bandwidth of a density drawn at them."""
    width = max(high - low, 1e-12)
    grid = torch.linspace(low - 0.05 * width, high + 0.05 * width, GRID_POINTS, dtype=torch.float64)
    return grid, BANDWIDTH_SHARE * width
