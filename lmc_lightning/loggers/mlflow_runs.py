"""The cases of ``MLFlowLogger``: artifacts of the run, under ``media``."""

from typing import Any

import numpy as np

from lmc_lightning.core.files import slug


def log_histogram(logger: Any, key: str, values: np.ndarray, step: int) -> None:
    """The values as JSON."""
    logger.experiment.log_dict(logger.run_id, {"values": values.tolist()}, _path(key, step, "json"))


def log_picture(logger: Any, key: str, picture: np.ndarray, step: int) -> None:
    """As PNG."""
    logger.experiment.log_image(logger.run_id, picture, _path(key, step, "png"))


def log_text(logger: Any, key: str, text: str, step: int) -> None:
    """As Markdown."""
    logger.experiment.log_text(logger.run_id, text, _path(key, step, "md"))


def _path(key: str, step: int, suffix: str) -> str:
    return f"media/{slug(key)}_{step:06d}.{suffix}"
