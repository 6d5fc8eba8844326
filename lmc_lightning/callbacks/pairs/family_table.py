"""All that was found of a family, or of several, as one table."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from lmc_lightning.core.files import slug, write_atomic
from lmc_lightning.landscape.paths.barrier import DEFINITIONS
from lmc_lightning.landscape.paths.onset import THRESHOLD, Onset, onset
from lmc_lightning.landscape.statistics.bands import seed_standard_error
from lmc_lightning.recording import Record

CELL = (
    "k1",
    "branch_step",
    "intervention",
    "later_epoch",
    "step",
    "pair",
    "split",
    "metric",
    "group",
    "rest",
    "definition",
    "policy",
    "align",
)
"""What the replicates of one number have in common."""

COLUMNS = (
    "family",
    "run",
    "parent",
    *CELL,
    "value",
    "stderr_data",
    "n",
    "unit",
    "peak_t",
    "barrier_lower",
    "distinguishable_from_zero",
    "num_points",
    "own_first",
    "own_second",
    "probe_digest",
    "status",
)
"""Of :func:`family_table`."""


def family_table(records: Iterable[Record], family: str = "") -> pd.DataFrame:
    """One row for each pair, later epoch, split, metric and definition; what is not known is NaN.

    Args:
        records: of an ``InterpolationBarrier``.
        family: names the repetition; tables of several, one under the other, need different names.
    """
    rows = [row for record in records if record.is_measured for row in _rows(record, family)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _rows(record: Record, family: str) -> Iterator[dict[str, Any]]:
    evidence = record.evidence
    definition = evidence.get("definition")
    common = {name: evidence.get(name) for name in COLUMNS} | {
        "family": family,
        "run": evidence.get("run", "run"),
        "parent": evidence.get("parent", evidence.get("reference")),
        "later_epoch": evidence.get("later_epoch", record.epoch),
        "step": record.step,
        "pair": evidence.get("pair", "reference"),
        "split": evidence.get("eval_split"),
        "policy": evidence.get("batch_stats"),
        "n": evidence.get("num_samples", evidence.get("num_examples")),
        "unit": evidence.get("sample_unit"),
        "status": record.status,
    }
    if definition == "barrier":
        own = dict(zip(("own_first", "own_second"), evidence["own_ends"], strict=True))
        for name in DEFINITIONS:
            numbers = {"definition": name, "value": evidence[name], "stderr_data": evidence["stderrs"][name]}
            yield common | own | numbers
    elif definition is not None and definition not in DEFINITIONS:
        yield common | {"value": record.value, "stderr_data": record.stderr}


def seed_means(table: pd.DataFrame) -> pd.DataFrame:
    """The mean over pairs of networks of every number, a row for each cell of ``CELL``.

    ``stderr_seed`` is the node jackknife of :func:`~lmc_lightning.landscape.statistics.bands.seed_standard_error`, NaN
    below 3 ``num_nodes``. ``stderr_data`` is the mean of those of the pairs: an upper bound, because all see the same
    examples.

    Args:
        table: from :func:`family_table`, or several under one another.
    """
    rows = []
    for cell, group in table.groupby(list(CELL), dropna=False, sort=True):
        nodes = [((r.family, r.parent), (r.family, r.run)) for r in group.itertuples()]
        stderr_seed, num_nodes = seed_standard_error(nodes, group["value"].astype(float).tolist())
        rows.append(
            dict(zip(CELL, cell, strict=True))
            | {
                "value": group["value"].astype(float).mean(skipna=False),
                "stderr_data": group["stderr_data"].astype(float).mean(skipna=False),
                "stderr_seed": stderr_seed,
                "num_nodes": num_nodes,
                "num_pairs": len(group),
                "n": group["n"].min(),
            }
        )
    columns = [*CELL, "value", "stderr_data", "stderr_seed", "num_nodes", "num_pairs", "n"]
    return pd.DataFrame(rows, columns=columns)


def write_tables(table: pd.DataFrame, folder: Path, name: str | None = None) -> None:
    """Write a table as ``barriers.csv`` and its means over pairs as ``barriers_mean.csv``, with the name in between."""
    stem = f"barriers_{slug(name)}" if name else "barriers"
    for file_name, rows in ((f"{stem}.csv", table), (f"{stem}_mean.csv", seed_means(table))):
        content = rows.to_csv(index=False).encode()
        write_atomic(folder / file_name, lambda file, content=content: file.write(content))  # type: ignore[misc]


def onset_of(table: pd.DataFrame, *, split: str, threshold: float = THRESHOLD, pair: str = "trunk") -> Onset:
    """The onset of stability of a family, or of several: instability of the error at the end of training.

    Branch points are named by ``k1``, or by ``branch_step`` where some are in the middle of an epoch.

    Args:
        table: from :func:`family_table`, or several under one another.
        split: whose error.
        threshold: of the error, as a fraction.
        pair: ``"trunk"`` or ``"siblings"``.

    Raises:
        ValueError: the table has no such numbers.
    """
    chosen = table[
        (table["definition"] == "instability")
        & (table["metric"] == "error")
        & (table["split"] == split)
        & (table["pair"] == pair)
        & table["group"].isna()
        & table["intervention"].isna()
        & table["align"].isna()
    ]
    if chosen.empty:
        known = sorted(set(table["split"].dropna()))
        raise ValueError(f"There is no instability of the error on {split!r} between {pair}. Splits: {known}.")
    last = chosen.groupby("family")["step"].transform("max")
    at_end = chosen[chosen["step"] == last]
    axis = "branch_step" if at_end["k1"].isna().any() else "k1"
    values: dict[int, list[float]] = {}
    for k1, value in zip(at_end[axis].astype(int).tolist(), at_end["value"].astype(float).tolist(), strict=True):
        values.setdefault(k1, []).append(value)
    return onset(values, threshold)
