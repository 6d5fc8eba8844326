"""Figures of the barriers between a trunk and its children."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lmc_lightning.branching.lineage import Family, Node
from lmc_lightning.landscape.barrier import Barrier
from lmc_lightning.plotting.barriers import plot_barrier_curves, plot_barrier_heatmap
from lmc_lightning.plotting.style import figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def label_of(family: Family, child: Node) -> str:
    """The last part of the keys of a child."""
    siblings = sum(other.k1 == child.k1 for other in family.children)
    return f"k1_{child.k1:03d}" + (f"/child_{child.child}" if siblings > 1 else "")


def family_figures(family: Family, barriers: Mapping[tuple[str, int], Barrier]) -> dict[str, Callable[[], "Figure"]]:
    """One figure of curves for each child, and one map of branch point × later epoch, for each metric.

    Args:
        family: whose completed children are drawn.
        barriers: by (key, later step).
    """
    figures: dict[str, Callable[[], Figure]] = {}
    completed = [child for child in family.children if child.status == "completed"]
    for key in sorted({key.rsplit("/k1_", 1)[0] for key, _ in barriers}):
        table: dict[int, dict[int, list[float]]] = {}
        for child in completed:
            full = f"{key}/{label_of(family, child)}"
            found = {epoch: barriers[full, s] for epoch, s in child.epochs.items() if (full, s) in barriers}
            if found:
                figures[full.replace("barrier/", "barrier_curves/", 1)] = partial(_curves, found, child)
            for epoch, result in found.items():
                table.setdefault(child.k1 or 0, {}).setdefault(epoch, []).append(result.barrier)
        figures[key.replace("barrier/", "barrier_map/", 1)] = partial(_map, table, key)
    return figures


def _curves(found: Mapping[int, Barrier], child: Node) -> "Figure":
    """The path between trunk and child at each later epoch."""
    curves = [(f"epoch {epoch}", result) for epoch, result in found.items()]
    return figure_of(plot_barrier_curves(curves, title=f"Branched at epoch {child.k1}", ends=("trunk", "child")))


def _map(table: Mapping[int, Mapping[int, Sequence[float]]], key: str) -> "Figure":
    """Branch point × later epoch, the mean over the children of a branch point."""
    k1s, epochs = sorted(table), sorted({epoch for row in table.values() for epoch in row})
    values = np.full((len(k1s), len(epochs)), np.nan)
    for i, k1 in enumerate(k1s):
        for j, epoch in enumerate(epochs):
            if epoch in table[k1]:
                values[i, j] = float(np.mean(table[k1][epoch]))
    return figure_of(plot_barrier_heatmap(values, k1s, epochs, title=f"{key}: child against trunk"))
