"""How each kind of logger shows histograms, pictures, surfaces and point clouds; scalars go to all alike.

Each function is a ``functools.singledispatch``: register a case for a logger class of your own. Without a case nothing
is shown; every picture and array is a file in the run's folder too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Mesh:
    """A coloured triangle mesh; TensorBoard's viewer has y up and wants coordinates of about [−1, 1]."""

    vertices: np.ndarray
    """``(N, 3)`` float, at most 65,536 of them."""
    faces: np.ndarray
    """``(F, 3)`` int, indices of vertices."""
    colors: np.ndarray
    """``(N, 3)`` uint8."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Camera, lights and material, as three.js has them."""


@dataclass(frozen=True)
class Embedding:
    """Points with named columns of metadata, for TensorBoard's projector."""

    points: np.ndarray
    """``(N, D)`` float."""
    columns: Sequence[str]
    """Names of the columns; ``__next__`` holds the index of the following row and draws lines."""
    rows: Sequence[Sequence[Any]]
    """``N`` rows of metadata."""


def is_tensorboard(logger: Any) -> bool:
    """Whether a logger writes event files."""
    # By name: `lightning` and `pytorch_lightning` have a class of this name each, and either may be in use.
    return any(c.__name__ == "TensorBoardLogger" for c in type(logger).__mro__)


@singledispatch
def shows_pictures(logger: Any) -> bool:
    """Whether :func:`log_picture` has a case for this logger, so that figures are worth rendering."""
    return is_tensorboard(logger)


@singledispatch
def log_histogram(logger: Any, key: str, values: np.ndarray, step: int) -> None:
    """The distribution of ``values`` at ``step``."""
    if is_tensorboard(logger):
        logger.experiment.add_histogram(key, values, global_step=step)


@singledispatch
def log_picture(logger: Any, key: str, picture: np.ndarray, step: int) -> None:
    """A rendered figure ``(height, width, 3)`` uint8 at ``step``."""
    if is_tensorboard(logger):
        logger.experiment.add_image(key, picture, global_step=step, dataformats="HWC")


@singledispatch
def log_mesh(logger: Any, key: str, mesh: Mesh, step: int) -> None:
    """A surface at ``step``."""
    if is_tensorboard(logger):
        vertices, colors, faces = (torch.as_tensor(a)[None] for a in (mesh.vertices, mesh.colors, mesh.faces))
        logger.experiment.add_mesh(key, vertices, colors, faces, config_dict=dict(mesh.config), global_step=step)


@singledispatch
def log_embedding(logger: Any, key: str, embedding: Embedding, step: int) -> None:
    """Points for the projector at ``step``."""
    if is_tensorboard(logger):
        rows = [[str(entry) for entry in row] for row in embedding.rows]
        header = list(embedding.columns)
        logger.experiment.add_embedding(embedding.points, rows, global_step=step, tag=key, metadata_header=header)
