"""The runs of a study in TensorBoard's HPARAMS: a table and parallel coordinates."""

from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd
from torch.utils.tensorboard.summary import hparams

from lmc_lightning.callbacks.visits.reporting import HEADLINES, chosen
from lmc_lightning.experiments.collect import collect, hyperparameters, runs
from lmc_lightning.experiments.work.tasks import cell_folder
from lmc_lightning.loggers.tensorboard import write_hparams as replace_hparams

METRICS = ("val_acc", "val_loss", "test_acc", "test_loss", "train_loss", *HEADLINES)
"""Regular expressions of the scalars that are shown where a study has them."""

ABSENT_NUMBER, ABSENT_TEXT = -1.0, "–"
"""Where a run has no such hyper-parameter: TensorBoard leaves runs with a gap out of the parallel coordinates."""


def write_hparams(
    folder: Path | str, metrics: Sequence[str] = METRICS, *, table: pd.DataFrame | None = None
) -> list[str]:
    """Tell TensorBoard the hyper-parameters of each completed run, and once for the study which metrics it shows.

    Called again, it replaces what it wrote. The values of the metrics are the last ones that the runs logged under
    these tags themselves.

    Args:
        folder: of the study; ``tensorboard --logdir`` it.
        metrics: regular expressions of tags.
        table: what :func:`~lmc_lightning.experiments.collect.collect` gave, where it has been read.

    Returns:
        The metrics that the study has.

    Raises:
        FileNotFoundError: there are no records in the folder.
    """
    folder = Path(folder)
    table = collect(folder) if table is None else table
    wide = runs(table)
    done = wide[wide["task_status"] == "completed"]
    names = [name for name in hyperparameters(table) if done[name].notna().any()]  # those of pairs are not of runs
    of_families = table.loc[(table["kind"] == "family") & table["value"].notna(), "name"]
    shown = chosen({*map(str, done.columns), *of_families}, metrics)
    filled = {name: _filled(done[name]) for name in names}
    settings = [{name: filled[name][row] for name in names} for row in range(len(done))]
    if not settings:
        return []
    for cell, setting in zip(done["cell"], settings, strict=True):
        _, start, end = hparams(setting, dict.fromkeys(shown, 0.0))
        replace_hparams(cell_folder(folder, cell), [start, end])
    domains = {name: sorted(set(values)) for name, values in filled.items()}
    experiment, *_ = hparams(settings[0], dict.fromkeys(shown, 0.0), domains)
    replace_hparams(folder, [experiment])
    return shown


def _filled(column: pd.Series) -> list[Any]:
    """Numbers as float where all are numbers, else texts; no gaps."""
    known = column.dropna()
    if known.map(lambda v: isinstance(v, Real) and not isinstance(v, bool)).all():
        return [float(v) for v in column.fillna(ABSENT_NUMBER)]
    return [ABSENT_TEXT if pd.isna(v) else str(v) for v in column]
