"""A loss on a plane as a plotly figure, to be turned in a browser; needs the extra ``html``."""

from importlib import import_module
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm

from lmc_lightning.landscape.surface.slices import Surface
from lmc_lightning.plotting.style import FAINT, INK
from lmc_lightning.plotting.surfaces import MARK, common_scale, surface_caption

HEIGHT = 460
"""Of a figure [pixels]."""


def interactive_relief(surface: Surface, *, title: str = "") -> Any:
    """The loss on a plane as a ``plotly.graph_objects.Figure``, on white, in the scale and colours of ``plot_relief``.

    Args:
        surface: on a plane.
        title: of the figure.

    Raises:
        ValueError: the surface is a line.
        ImportError: plotly is not installed.
    """
    if surface.ys is None:
        raise ValueError("Expected a surface on a plane. Of one on a line, draw plot_profile.")
    objects = _plotly("graph_objects")
    scale = common_scale([surface])
    logarithmic = isinstance(scale, LogNorm)
    values = surface.losses.numpy().T.astype(np.float32)  # rows are along y in plotly
    values[~np.isfinite(values)] = np.nan
    colors, ends = values, np.array([scale.vmin, scale.vmax], dtype=float)
    if logarithmic:
        colors, ends = np.log10(values), np.log10(ends)
    relief = objects.Surface(
        x=surface.xs.numpy().astype(np.float32),
        y=surface.ys.numpy().astype(np.float32),
        z=values,
        surfacecolor=colors,
        cmin=ends[0],
        cmax=ends[1],
        colorscale="Viridis",
        showscale=False,
        hovertemplate="%{x:.3g}, %{y:.3g}: loss %{z:.4g}<extra></extra>",
    )
    marks = objects.Scatter3d(
        x=[mark.position[0] for mark in surface.marks],
        y=[mark.position[1] for mark in surface.marks],
        z=[mark.values["loss"] for mark in surface.marks],
        text=[f"<b>{mark.label}</b>" for mark in surface.marks],
        mode="markers+text",
        marker={"size": 7, "color": MARK, "line": {"color": "white", "width": 2}},
        textfont={"color": MARK, "size": 15},
        hovertemplate="%{text}: loss %{z:.4g}<extra></extra>",
    )
    heading = f"<b>{title or 'Loss surface'}</b><br>" + surface_caption(surface).replace("\n", "<br>")
    height = {"title": f"{surface.split} loss".strip(), "type": "log" if logarithmic else "linear", "nticks": 6}
    layout = {
        "title": {"text": heading, "font": {"size": 12}, "x": 0.03, "y": 0.96, "yanchor": "top"},
        "font": {"color": INK, "size": 11},
        "height": HEIGHT,
        "margin": {"l": 0, "r": 0, "t": 60, "b": 0},
        "paper_bgcolor": "white",
        "scene": {
            "xaxis": {"title": surface.labels[0], "color": FAINT, "nticks": 6},
            "yaxis": {"title": surface.labels[1], "color": FAINT, "nticks": 6},
            "zaxis": {**height, "color": FAINT},
            "aspectratio": {"x": 1, "y": 1, "z": 0.66},
            "camera": {"eye": {"x": 1.05, "y": -1.3, "z": 0.8}, "center": {"x": 0, "y": 0, "z": -0.17}},
        },
        "template": "none",
    }
    return objects.Figure([relief, marks], layout)


def plotly_program() -> str:
    """The JavaScript that draws such figures, 5 MB.

    Raises:
        ImportError: plotly is not installed.
    """
    program: str = _plotly("offline").get_plotlyjs()
    return program


def _plotly(part: str) -> Any:
    """A module of plotly, which is slow to import, and optional."""
    try:
        return import_module(f"plotly.{part}")
    except ImportError as error:
        raise ImportError("Reliefs to turn are drawn by plotly: pip install 'lmc-lightning[html]'.") from error
