"""The cases of Lightning's other loggers."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lmc_lightning.core.files import name_at, write_atomic
from lmc_lightning.loggers.images import png
from lmc_lightning.loggers.items import Embedding, Mesh


class Folder:
    """``CSVLogger``: files in ``<log_dir>/media``, unless the callbacks' own folder is there already."""

    @staticmethod
    def log_histogram(logger: Any, key: str, values: np.ndarray, step: int) -> None:
        """The values as ``.npy``."""
        Folder._write(logger, name_at(key, step, "npy"), lambda file: np.save(file, values))

    @staticmethod
    def log_picture(logger: Any, key: str, picture: np.ndarray, step: int) -> None:
        """As ``.png``."""
        Folder._write(logger, name_at(key, step, "png"), lambda file: file.write(png(picture)))

    @staticmethod
    def log_text(logger: Any, key: str, text: str, step: int) -> None:
        """As ``.md``."""
        Folder._write(logger, name_at(key, step, "md"), lambda file: file.write(text.encode()))

    @staticmethod
    def _write(logger: Any, name: str, write: Callable[[BinaryIO], object]) -> None:
        folder = Path(logger.log_dir)
        if not (folder / "lmc").is_dir():
            write_atomic(folder / "media" / name, write)


class MLflow:
    """``MLFlowLogger``: artifacts of the run, under ``media``."""

    @staticmethod
    def log_histogram(logger: Any, key: str, values: np.ndarray, step: int) -> None:
        """The values as JSON."""
        logger.experiment.log_dict(logger.run_id, {"values": values.tolist()}, f"media/{name_at(key, step, 'json')}")

    @staticmethod
    def log_picture(logger: Any, key: str, picture: np.ndarray, step: int) -> None:
        """As PNG."""
        logger.experiment.log_image(logger.run_id, picture, f"media/{name_at(key, step, 'png')}")

    @staticmethod
    def log_text(logger: Any, key: str, text: str, step: int) -> None:
        """As Markdown."""
        logger.experiment.log_text(logger.run_id, text, f"media/{name_at(key, step, 'md')}")


class Wandb:
    """``WandbLogger``."""

    @staticmethod
    def log_histogram(logger: Any, key: str, values: np.ndarray, step: int) -> None:
        """As a ``wandb.Histogram``."""
        import wandb

        logger.log_metrics({key: wandb.Histogram(values)}, step=step)

    @staticmethod
    def log_picture(logger: Any, key: str, picture: np.ndarray, step: int) -> None:
        """As a ``wandb.Image``."""
        logger.log_image(key, [picture], step=step)

    @staticmethod
    def log_mesh(logger: Any, key: str, mesh: Mesh, step: int) -> None:
        """As a ``wandb.Object3D`` of its points, which has no faces."""
        import wandb

        logger.log_metrics({key: wandb.Object3D(np.hstack([mesh.vertices, mesh.colors]))}, step=step)

    @staticmethod
    def log_embedding(logger: Any, key: str, embedding: Embedding, step: int) -> None:
        """As a ``wandb.Table`` of columns and coordinates."""
        import wandb

        axes = [f"x{number}" for number in range(1, embedding.points.shape[1] + 1)]
        rows = [[*row, *point] for row, point in zip(embedding.rows, embedding.points.tolist(), strict=True)]
        logger.log_metrics({key: wandb.Table([*embedding.columns, *axes], rows)}, step=step)

    @staticmethod
    def log_text(logger: Any, key: str, text: str, step: int) -> None:
        """As preformatted HTML."""
        import wandb

        logger.log_metrics({key: wandb.Html(f"<pre>{escape(text)}</pre>")}, step=step)
