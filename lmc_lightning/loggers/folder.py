"""The cases of ``CSVLogger``: files in ``<log_dir>/media``, unless the callbacks' own folder is there already."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lmc_lightning.core.files import slug, write_atomic
from lmc_lightning.loggers.png import png


def log_histogram(logger: Any, key: str, values: np.ndarray, step: int) -> None:
    """The values as ``.npy``."""
    _write(logger, f"{slug(key)}_{step:06d}.npy", lambda file: np.save(file, values))


def log_picture(logger: Any, key: str, picture: np.ndarray, step: int) -> None:
    """As ``.png``."""
    _write(logger, f"{slug(key)}_{step:06d}.png", lambda file: file.write(png(picture)))


def log_text(logger: Any, key: str, text: str, step: int) -> None:
    """As ``.md``."""
    _write(logger, f"{slug(key)}_{step:06d}.md", lambda file: file.write(text.encode()))


def _write(logger: Any, name: str, write: Callable[[BinaryIO], object]) -> None:
    folder = Path(logger.log_dir)
    if not (folder / "lmc").is_dir():
        write_atomic(folder / "media" / name, write)
