"""What a run shows of a loss surface: figures, and a mesh that TensorBoard's viewer shows in its own colours."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmc_lightning.landscape.surface.slices import Surface
from lmc_lightning.loggers import Mesh
from lmc_lightning.plotting.style import deferred
from lmc_lightning.plotting.surfaces import mesh_arrays, plot_contours, plot_profile, plot_relief

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MESH_CONFIG = {
    # The viewer's own material is grey and lit, which turns viridis to mud, and its camera looks at the edge. The lower
    # part of its wide card is below the edge of a screen, hence the view of a point below the surface.
    "camera": {"cls": "PerspectiveCamera", "fov": 45, "position": [3.1, 2.6, 3.1], "lookAt": [0, -1.0, 0]},
    "material": {"cls": "MeshBasicMaterial", "side": 2, "color": "#ffffff"},
}


def surface_figures(surface: Surface, epoch: int, key: Callable[[str], str]) -> dict[str, Callable[[], "Figure"]]:
    """The figures of one visit by key: contours and relief of a plane, the profile of a line."""
    planes: dict[str, Callable[..., Any]] = {"contours": plot_contours, "relief": plot_relief}
    drawn = {"profile": plot_profile} if surface.ys is None else planes
    title = f"Loss on {'a line' if surface.ys is None else 'a plane'}, epoch {epoch}"
    return {key(name): deferred(plot, surface, title=title) for name, plot in drawn.items()}


def surface_mesh(surface: Surface) -> Mesh:
    """The loss on a plane as a coloured mesh."""
    return Mesh(*mesh_arrays(surface), config=MESH_CONFIG)
