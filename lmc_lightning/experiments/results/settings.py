"""What a study found for each of its settings, over seeds, and which numbers go together."""

import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from lmc_lightning.experiments.collect import collect, hyperparameters, runs
from lmc_lightning.landscape.statistics.correlations import correlations, group_means

OF_RUNS = (
    "hessian/lambda_max",
    "hessian/trace",
    "hessian/effective_rank",
    "sharpness/*",
    "hessian/lambda_max/paper",
    "hessian/trace/paper",
    "trajectory/distance_from_start",
    "trajectory/path_length",
    "train_loss_epoch",
    "val_loss",
    "val_acc",
)
OF_PAIRS = (
    "barrier/*_loss",
    "barrier/*_error",
    "barrier/*_error/barrier_over_min",
    "aligned_barrier/*_loss",
    "aligned_barrier/*_error",
    "curve/*_loss/barrier",
    "curve/*_error/barrier",
    "curve/*_error/signed_deviation",
    "curve/*_error/signed_deviation/paper",
    "similarity/logits",
    "similarity/softmax",
    "distance/l2",
)
"""The numbers that summaries show, as patterns and in this order; a ``*`` is no ``/``."""

TARGETS = ("val_loss", "val_acc")
"""What the other numbers of runs are correlated with."""


def varied(table: pd.DataFrame) -> list[str]:
    """The hyper-parameters of a study, without the seed, that have several values, in the order of its file."""
    cells = table[table["kind"] == "cell"]
    names = [name for name in hyperparameters(table) if name != "seed"]
    return [name for name in names if cells[name].nunique(dropna=False) > 1]


class Summary:
    """The table of a study and what is made of it, each once, when somebody asks for it."""

    def __init__(self, folder: Path) -> None:
        self.table = collect(folder)

    @cached_property
    def means(self) -> pd.DataFrame:
        """See :func:`setting_means`."""
        return setting_means(self.table)

    @cached_property
    def correlations(self) -> pd.DataFrame:
        """See :func:`run_correlations`; seconds, for its resamples."""
        return run_correlations(self.table)


def setting_means(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds of each setting, and of numbers of pairs over its pairs, with standard errors.

    Those of pairs take them for independent, which pairs that share a network are not: their errors are too small.

    Args:
        table: from :func:`~lmc_lightning.experiments.collect.collect`.

    Returns:
        Columns setting, value (the number's name), mean, stderr, n; settings in the order of the study.
    """
    by = varied(table)
    cells, pairs = runs(table), _pairs(table)
    parts = []
    for rows, patterns in ((cells, OF_RUNS), (pairs, OF_PAIRS)):
        names = _matching(rows.columns, patterns)
        if names and by and set(by) <= set(rows.columns):
            parts.append(group_means(rows.dropna(subset=by, how="all"), names, by))
    if not parts:
        return pd.DataFrame(columns=["setting", "value", "mean", "stderr", "n"])
    found = pd.concat(parts, ignore_index=True)
    found = found[found["n"] > 0]
    text = setting_texts(table)
    found["setting"] = [text.get(tuple(row), "") for row in found[by].itertuples(index=False)]
    return found.assign(stderr=found["mean"] - found["low"])[["setting", "value", "mean", "stderr", "n"]]


def setting_table(means: pd.DataFrame) -> pd.DataFrame:
    """Means as texts ``mean ± stderr``, a row for each number and a column for each setting."""
    texts = [
        f"{_digits(m, e)} ± {e:.1g}" if e == e and e > 0 else f"{m:.4g}"
        for m, e in means[["mean", "stderr"]].to_numpy()
    ]
    wide = means.assign(text=texts).pivot_table(
        index="value", columns="setting", values="text", aggfunc="first", sort=False
    )
    return wide.fillna("").reset_index().rename_axis(columns=None)


def _digits(mean: float, stderr: float) -> str:
    """A mean to the digit of its standard error."""
    places = max(0, -int(np.floor(np.log10(stderr))))
    return f"{mean:.{places}f}" if places <= 6 and abs(mean) < 1e6 else f"{mean:.3g}"


def _pairs(table: pd.DataFrame) -> pd.DataFrame:
    """One row a pair, with the hyper-parameters that its two networks share."""
    pairs = table[(table["kind"] == "pair") & table["value"].notna()]
    by = [name for name in varied(table) if name in pairs]
    wide = pairs.assign(value=pairs["value"].astype(float)).pivot_table(index="task", columns="name", values="value")
    return pairs.drop_duplicates("task").set_index("task")[by].join(wide).reset_index()


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    known = [name for name in names if isinstance(name, str)]
    found = [n for p in patterns for n in known if fnmatchcase(n, p) and n.count("/") - p.count("/") in (0, 1)]
    return [*dict.fromkeys(n for n in found if "/r_" not in n)]


def setting_texts(table: pd.DataFrame) -> dict[tuple[object, ...], str]:
    """The values of :func:`varied` of each setting as a text; of mappings only what not all settings have."""
    by, cells = varied(table), runs(table)
    rows = [tuple(row) for row in cells[by].drop_duplicates().itertuples(index=False)]
    columns = [_texts(values) for values in zip(*rows, strict=True)]
    names = [f"{by[0]} "] if len(by) == 1 else [""] * len(by)
    texts = [" ".join(name + v for name, v in zip(names, own, strict=True) if v) for own in zip(*columns, strict=True)]
    return dict(zip(rows, texts, strict=True))


def _texts(values: Sequence[object]) -> list[str]:
    parsed = [json.loads(v) if isinstance(v, str) and v.startswith("{") else v for v in values]
    pairs = [set(map(str, v.items())) for v in parsed if isinstance(v, dict)]
    common = set.intersection(*pairs) if pairs else set()
    return [
        " ".join(f"{key} {part}" for key, part in v.items() if str((key, part)) not in common)
        if isinstance(v, dict)
        else f"{v:g}"
        if isinstance(v, float)
        else str(v).strip("[]")
        for v in parsed
    ]


def run_correlations(table: pd.DataFrame, *, num_resamples: int = 200) -> pd.DataFrame:
    """Spearman's rank correlation of each number of runs with validation loss and accuracy; empty below five runs.

    Args:
        table: from :func:`~lmc_lightning.experiments.collect.collect`.
        num_resamples: see :func:`~lmc_lightning.landscape.statistics.correlations.correlations`, which says what the
            columns are.
    """
    rows, by = runs(table), varied(table)
    targets = [name for name in TARGETS if name in rows]
    metrics = [n for n in _matching(rows.columns, OF_RUNS) if n not in targets and rows[n].nunique() > 1]
    if len(rows) < 5 or not metrics or not targets:
        return pd.DataFrame()
    return correlations(rows, metrics, targets, cells=by, methods=("spearman",), num_resamples=num_resamples)


def size_volumes(table: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Volumes of networks against the hyper-parameter that tells them from the one whose landscape it is.

    Args:
        table: from :func:`~lmc_lightning.experiments.collect.collect`, of a study with the measure ``volume``.

    Returns:
        The name of the hyper-parameter and columns size, level (``"tau_0.1"``), value (``"log_volume"``,
        ``"mean_log_r"``), mean, stderr, n (over seeds); none where there are no volumes.
    """
    own = table[
        (table["kind"] == "pair") & table["name"].astype(str).str.fullmatch(r"volume/(log_volume|mean_log_r)/.*")
    ]
    across = [c.removesuffix("_b") for c in own.columns if str(c).endswith("_b") and own[c].notna().any()]
    if own.empty or len(across) != 1:
        return "", pd.DataFrame()
    (name,) = across
    sizes = own[f"{name}_b"].fillna(own[name]) if name in own else own[f"{name}_b"]
    parts = own["name"].str.split("/", expand=True)
    rows = pd.DataFrame(
        {"size": sizes.astype(float), "level": parts[2], "value": parts[1], "of": own["value"].astype(float)}
    )
    grouped = rows.groupby(["value", "level", "size"])["of"]
    return name, grouped.agg(mean="mean", stderr="sem", n="count").reset_index()
