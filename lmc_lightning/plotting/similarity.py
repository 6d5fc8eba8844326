"""Pictures of how alike the layers of two networks represent the same examples."""

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from lmc_lightning.landscape.similarity.cka import Similarity
from lmc_lightning.plotting.style import BLANK, FIGURE_SIZE, INK, new_axes, set_heading, style

_MAX_WRITTEN = 12  # cells a side with their number
_MAX_LABELS = 24
_CELL = 0.55  # [inches]


def plot_similarity(
    similarity: Similarity,
    ax: Axes | None = None,
    *,
    names: tuple[str, str] = ("A", "B"),
    biased: bool = False,
    title: str = "Similarity of representations",
    caption: str = "",
) -> Axes:
    """Linear CKA between every layer of two networks, from 0 (white) to 1; what is undefined stays grey.

    Args:
        similarity: of networks A (rows, the input at the bottom) and B (columns).
        ax: where to draw; by default in a new figure.
        names: of the networks.
        biased: draw the biased estimate.
        title: of the figure.
        caption: data and policy.
    """
    cells = (similarity.biased if biased else similarity.debiased).numpy()
    rows, columns = cells.shape
    norm, cmap = mpl.colors.Normalize(0, 1), mpl.colormaps["YlGnBu"].with_extremes(bad=BLANK)
    with style():
        size = (max(FIGURE_SIZE[0], 3 + _CELL * min(columns, _MAX_LABELS)), max(FIGURE_SIZE[1], 2 + 0.4 * rows))
        ax = ax if ax is not None else new_axes((size[0], min(size[1], 8.0)))
        image = ax.imshow(np.ma.masked_invalid(cells), norm=norm, cmap=cmap, aspect="auto", origin="lower")
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        _label(ax, "x", similarity.layers_b, names[1])
        _label(ax, "y", similarity.layers_a, names[0])
        ax.figure.colorbar(image, ax=ax, label=f"linear CKA, {'biased' if biased else 'debiased'}")
        if max(rows, columns) <= _MAX_WRITTEN:
            for (i, j), value in np.ndenumerate(cells):
                if np.isfinite(value):
                    color = "white" if value > 0.6 else INK
                    ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
        data = f"{similarity.num_examples:,} examples"
        set_heading(ax, title, f"{data} · {caption}" if caption else data)
    return ax


def _label(ax: Axes, axis: str, layers: tuple[str, ...], name: str) -> None:
    every = -(-len(layers) // _MAX_LABELS)
    places = range(0, len(layers), every)
    parts, shared = [layer.split(".") for layer in layers], 0
    while len({p[shared] for p in parts}) == 1 and min(map(len, parts)) > shared + 1:
        shared += 1  # what all names begin with says nothing
    texts = [".".join(parts[i][shared:]) for i in places]
    if axis == "x":
        turned: dict[str, Any] = (
            {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, texts)) > 4 else {}
        )
        ax.set_xticks(places, texts, fontsize=8.5, **turned)
        ax.set_xlabel(f"layers of {name}")
    else:
        ax.set_yticks(places, texts, fontsize=8.5)
        ax.set_ylabel(f"layers of {name}")
