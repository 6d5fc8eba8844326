"""The cases of ``WandbLogger``."""

from html import escape
from typing import Any

import numpy as np

from lmc_lightning.loggers.items import Embedding, Mesh


def log_histogram(logger: Any, key: str, values: np.ndarray, step: int) -> None:
    """As a ``wandb.Histogram``."""
    import wandb

    logger.log_metrics({key: wandb.Histogram(values)}, step=step)


def log_picture(logger: Any, key: str, picture: np.ndarray, step: int) -> None:
    """As a ``wandb.Image``."""
    logger.log_image(key, [picture], step=step)


def log_mesh(logger: Any, key: str, mesh: Mesh, step: int) -> None:
    """As a ``wandb.Object3D`` of its points, which has no faces."""
    import wandb

    logger.log_metrics({key: wandb.Object3D(np.hstack([mesh.vertices, mesh.colors]))}, step=step)


def log_embedding(logger: Any, key: str, embedding: Embedding, step: int) -> None:
    """As a ``wandb.Table`` of columns and coordinates."""
    import wandb

    axes = [f"x{number}" for number in range(1, embedding.points.shape[1] + 1)]
    rows = [[*row, *point] for row, point in zip(embedding.rows, embedding.points.tolist(), strict=True)]
    logger.log_metrics({key: wandb.Table([*embedding.columns, *axes], rows)}, step=step)


def log_text(logger: Any, key: str, text: str, step: int) -> None:
    """As preformatted HTML."""
    import wandb

    logger.log_metrics({key: wandb.Html(f"<pre>{escape(text)}</pre>")}, step=step)
