"""How each kind of logger shows what was measured; register cases for loggers of your own."""

from lmc_lightning.loggers.cases import (
    log_embedding,
    log_histogram,
    log_layout,
    log_mesh,
    log_picture,
    log_scalars,
    log_text,
    shows_pictures,
)
from lmc_lightning.loggers.items import Band, Chart, Embedding, Layout, Mesh, Scalars
from lmc_lightning.loggers.png import png

__all__ = [
    "Band",
    "Chart",
    "Embedding",
    "Layout",
    "Mesh",
    "Scalars",
    "log_embedding",
    "log_histogram",
    "log_layout",
    "log_mesh",
    "log_picture",
    "log_scalars",
    "log_text",
    "png",
    "shows_pictures",
]
