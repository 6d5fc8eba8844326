"""Pictures of how alike the layers of two networks represent the same examples."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis

from lmc_lightning.landscape.similarity.cka import Similarity
from lmc_lightning.plotting.style import FIGURE_SIZE, INK, color_map, draw_cells, drawing

_MAX_WRITTEN = 12  # cells a side with their number
_MAX_LABELS = 24
_CELL = 0.55  # [inches]


def plot_similarity(
    similarity: Similarity,
    ax: Axes | None = None,
    *,
    names: tuple[str, str] = ("A", "B"),
    caption: str = "",
) -> Axes:
    """Linear CKA between every layer of two networks, from 0 (white) to 1; what is undefined stays grey.

    Args:
        similarity: of networks A (rows, the input at the bottom) and B (columns).
        ax: where to draw; by default in a new figure.
        names: of the networks.
        caption: data and policy.
    """
    cells = similarity.debiased.numpy()
    rows, columns = cells.shape
    size = (max(FIGURE_SIZE[0], 3 + _CELL * min(columns, _MAX_LABELS)), min(max(FIGURE_SIZE[1], 2 + 0.4 * rows), 8.0))
    data = f"{similarity.num_examples:,} examples"
    text = f"{data} · {caption}" if caption else data
    axes = {"x": f"layers of {names[1]}", "y": f"layers of {names[0]}"}
    with drawing(ax, "Similarity of representations", text, **axes, size=size) as ax:
        image = draw_cells(ax, cells, vmin=0, vmax=1, cmap=color_map("YlGnBu"), origin="lower")
        ax.tick_params(length=0)
        _label(ax.xaxis, similarity.layers_b)
        _label(ax.yaxis, similarity.layers_a)
        ax.figure.colorbar(image, ax=ax, label="linear CKA, debiased")
        if max(rows, columns) <= _MAX_WRITTEN:
            for (i, j), value in np.ndenumerate(cells):
                if np.isfinite(value):
                    color = "white" if value > 0.6 else INK
                    ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
    return ax


def _label(axis: Axis, layers: tuple[str, ...]) -> None:
    every = -(-len(layers) // _MAX_LABELS)
    places = range(0, len(layers), every)
    parts, shared = [layer.split(".") for layer in layers], 0
    while len({p[shared] for p in parts}) == 1 and min(map(len, parts)) > shared + 1:
        shared += 1  # what all names begin with says nothing
    texts = [".".join(parts[i][shared:]) for i in places]
    is_long = isinstance(axis, XAxis) and max(map(len, texts)) > 4
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
    axis.set_ticks(places, texts, fontsize=8.5, **turned)
