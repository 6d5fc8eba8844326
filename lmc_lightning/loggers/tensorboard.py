"""The cases of ``TensorBoardLogger``."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import hparams

from lmc_lightning.loggers.images import png
from lmc_lightning.loggers.items import Band, Chart, Embedding, Layout, Mesh, Scalars

BINS = 100
"""More than the viewer draws; the default of torch takes six times the space."""


def log_scalars(logger: Any, scalars: Scalars, step: int) -> None:
    """The values, and of bands their ends, which are drawn around the value in one chart: errors get no cards."""
    low = {f"{key}/low": band[0] for key, band in scalars.bands.items()}
    high = {f"{key}/high": band[1] for key, band in scalars.bands.items()}
    logger.log_metrics({**scalars.values, **low, **high}, step=step)


def log_histogram(logger: Any, key: str, values: np.ndarray, step: int) -> None:
    """As it is, and on an axis on which both outliers and what is near 0 can be seen."""
    for name, shown in ((key, values), (f"{key}_symlog", symlog(values))):
        logger.experiment.add_histogram(name, shown, global_step=step, bins=BINS)


def symlog(values: np.ndarray) -> np.ndarray:
    """sign(x)·log₁₀(1 + abs(x)/s), s a thousandth of the largest abs(x): linear near 0, decades beyond."""
    scale = float(np.abs(values).max(initial=0.0)) / 1000 or 1.0
    return np.asarray(np.sign(values) * np.log10(1 + np.abs(values) / scale))


def log_picture(logger: Any, key: str, picture: np.ndarray, step: int) -> None:
    """With a palette, which ``add_image`` has not."""
    writer = getattr(logger.experiment, "file_writer", None)
    if writer is None:  # closed, until something is added
        logger.experiment.add_image(key, picture, global_step=step, dataformats="HWC")
        return
    height, width, _ = picture.shape
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png(picture))
    writer.add_summary(Summary(value=[Summary.Value(tag=key, image=image)]), step)


def log_mesh(logger: Any, key: str, mesh: Mesh, step: int) -> None:
    """For the mesh viewer."""
    vertices, colors, faces = (torch.as_tensor(a)[None] for a in (mesh.vertices, mesh.colors, mesh.faces))
    logger.experiment.add_mesh(key, vertices, colors, faces, config_dict=dict(mesh.config), global_step=step)


def log_embedding(logger: Any, key: str, embedding: Embedding, step: int) -> None:
    """For the projector."""
    rows = [[str(entry) for entry in row] for row in embedding.rows]
    header = list(embedding.columns)
    logger.experiment.add_embedding(embedding.points, rows, global_step=step, tag=key, metadata_header=header)


def log_text(logger: Any, key: str, text: str, step: int) -> None:
    """For the text tab."""
    logger.experiment.add_text(key, text, global_step=step)


def log_layout(logger: Any, layout: Layout) -> None:
    """For the tab of custom scalars; of several layouts of a run, TensorBoard shows the last."""
    given = {heading: dict(map(_chart, charts)) for heading, charts in _headings(layout) if charts}
    if given:
        logger.experiment.add_custom_scalars(given)


def _headings(layout: Layout) -> Iterator[tuple[str, list[Chart | Band]]]:
    """Bands under a heading of their own, the last one first: the viewer has them backwards, and below all others."""
    for heading, charts in layout.items():
        yield f"{heading}, with errors", [chart for chart in charts[::-1] if isinstance(chart, Band)]
        yield heading, [chart for chart in charts if not isinstance(chart, Band)]


def _chart(chart: Chart | Band) -> tuple[str, list[Any]]:
    if isinstance(chart, Band):
        return f"{chart.title} ± 2 standard errors", ["Margin", [chart.key, f"{chart.key}/low", f"{chart.key}/high"]]
    return chart.title, ["Multiline", [f"^(?:{tag})$" for tag in chart.tags]]


def log_hparams(logger: Any, metrics: Sequence[str]) -> None:
    """For the tab of hyper-parameters; with ``default_hp_metric``, Lightning has written them itself."""
    saved = getattr(logger, "hparams", None)
    if saved and not getattr(logger, "_default_hp_metric", False):
        write_hparams(Path(logger.log_dir), hparams(_flat(saved), dict.fromkeys(metrics, 0.0)))


def write_hparams(folder: Path, summaries: Sequence[Any]) -> None:
    """What the tab of hyper-parameters is told of a run or a study, in a file of its own in place of an earlier one."""
    suffix = ".hparams"
    for old in folder.glob(f"events.out.tfevents.*{suffix}"):
        old.unlink()
    writer = FileWriter(str(folder), filename_suffix=suffix)
    for summary in summaries:
        writer.add_summary(summary)
    writer.close()


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as ``a/b``; what is neither number nor text as its text."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{key}/")
        else:
            found[f"{before}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
