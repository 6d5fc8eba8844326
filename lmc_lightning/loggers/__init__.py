"""How a logger shows numbers, histograms, pictures, surfaces, point clouds, texts, charts and hyper-parameters.

Each function is a ``functools.singledispatch``: ``@log_picture.register`` a case for a logger class of your own.
Without a case, numbers go to ``log_metrics``, and of the rest nothing is shown; every picture and array is a file in
the run's folder too.
"""

from collections.abc import Callable, Sequence
from functools import singledispatch
from pkgutil import resolve_name
from typing import Any

import numpy as np

from lmc_lightning.loggers.images import png
from lmc_lightning.loggers.items import Band, Chart, Embedding, Layout, Mesh, Scalars

__all__ = [
    "Band",
    "Chart",
    "Embedding",
    "Layout",
    "Mesh",
    "Scalars",
    "log_embedding",
    "log_histogram",
    "log_hparams",
    "log_layout",
    "log_mesh",
    "log_picture",
    "log_scalars",
    "log_text",
    "png",
    "shows_pictures",
]

KNOWN = {
    "TensorBoardLogger": "tensorboard",
    "CSVLogger": "others.Folder",
    "WandbLogger": "others.Wandb",
    "MLFlowLogger": "others.MLflow",
}
"""Class -> what has its cases here, each called as the function of which it is one."""


def _known(logger: Any, function: str) -> Callable[..., None] | None:
    """The case of one of Lightning's own loggers."""
    # By name: `lightning` and `pytorch_lightning` have a class of each name, and either may be in use.
    for cls in type(logger).__mro__:
        if cls.__name__ in KNOWN:
            return getattr(resolve_name(f"lmc_lightning.loggers.{KNOWN[cls.__name__]}"), function, None)
    return None


def _show(logger: Any, function: str, *what: Any) -> None:
    case = _known(logger, function)
    if case is not None:
        case(logger, *what)


@singledispatch
def log_scalars(logger: Any, scalars: Scalars, step: int) -> None:
    """Numbers at ``step``, with their standard errors beside them; TensorBoard has the bands in place of the errors."""
    case = _known(logger, "log_scalars")
    if case is not None:
        case(logger, scalars, step)
    else:
        logger.log_metrics({**scalars.values, **scalars.errors}, step=step)


@singledispatch
def log_histogram(logger: Any, key: str, values: np.ndarray, step: int) -> None:
    """The distribution of ``values`` at ``step``."""
    _show(logger, "log_histogram", key, values, step)


@singledispatch
def log_picture(logger: Any, key: str, picture: np.ndarray, step: int) -> None:
    """A rendered figure ``(height, width, 3)`` uint8 at ``step``."""
    _show(logger, "log_picture", key, picture, step)


@singledispatch
def log_mesh(logger: Any, key: str, mesh: Mesh, step: int) -> None:
    """A surface at ``step``."""
    _show(logger, "log_mesh", key, mesh, step)


@singledispatch
def log_embedding(logger: Any, key: str, embedding: Embedding, step: int) -> None:
    """Points for the projector at ``step``."""
    _show(logger, "log_embedding", key, embedding, step)


@singledispatch
def log_text(logger: Any, key: str, text: str, step: int) -> None:
    """Markdown at ``step``."""
    _show(logger, "log_text", key, text, step)


@singledispatch
def log_layout(logger: Any, layout: Layout) -> None:
    """Which numbers belong in one chart; takes the place of an earlier layout."""
    _show(logger, "log_layout", layout)


@singledispatch
def log_hparams(logger: Any, metrics: Sequence[str]) -> None:
    """The hyper-parameters that a run has saved, beside the last values of some of its numbers."""
    _show(logger, "log_hparams", metrics)


def shows_pictures(logger: Any) -> bool:
    """Whether :func:`log_picture` has a case for this logger, so that figures are worth rendering."""
    registered = log_picture.dispatch(type(logger)) is not log_picture.dispatch(object)
    return registered or _known(logger, "log_picture") is not None
