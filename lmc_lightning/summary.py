"""What a run's callbacks found, as tables for a terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from lmc_lightning.recording import Record


def summarize(callbacks: Iterable[Any]) -> str:
    """Tables of the curvature and sharpness at each visit and of all barriers, and a list of failed visits.

    Args:
        callbacks: those with ``results``, a list of records; others are ignored.
    """
    records = [r for c in callbacks for r in getattr(c, "results", ())]
    pairs = [r for r in records if "later_epoch" in r.evidence]
    visits = [r for r in records if r.status != "failed" and "later_epoch" not in r.evidence]
    parts = [_visit_table(visits), _pair_table(pairs), _failures(records)]
    return "\n\n".join(part for part in parts if part)


def failed(callbacks: Iterable[Any]) -> list[Record]:
    """The visits of all callbacks that failed."""
    return [r for c in callbacks for r in getattr(c, "results", ()) if r.status == "failed"]


def _visit_table(records: Sequence[Record]) -> str:
    if not records:
        return ""
    cells = pd.DataFrame([{"epoch": r.epoch, "step": r.step, "name": r.name, "cell": _number(r)} for r in records])
    order = list(dict.fromkeys(r.name for r in records))
    table = cells.pivot_table(index=["epoch", "step"], columns="name", values="cell", aggfunc="last")[order]
    return "Visits\n" + table.reset_index().rename_axis(columns=None).to_string(index=False, na_rep="")


def _pair_table(records: Sequence[Record]) -> str:
    if not records:
        return ""
    cells = pd.DataFrame(
        [
            {
                "k1": r.evidence["k1"],
                "later epoch": r.evidence["later_epoch"],
                "child": r.evidence["child"],
                "name": r.name.split("/k1_")[0].removeprefix("barrier/"),
                "cell": _number(r),
            }
            for r in records
        ]
    )
    table = cells.pivot_table(index=["k1", "child", "later epoch"], columns="name", values="cell", aggfunc="last")
    return "Barriers\n" + table.reset_index().rename_axis(columns=None).to_string(index=False, na_rep="")


def _number(record: Record) -> str:
    if record.value is None:
        return "–"
    over_data = record.evidence.get("stderr_data")
    spread = record.stderr if over_data is None else over_data
    stderr = "" if spread is None else f" ± {spread:.2g}"
    flag = "" if record.status == "ok" else f" ({record.status.replace('_', ' ')})"
    return f"{record.value:.4g}{stderr}{flag}"


def _failures(records: Sequence[Record]) -> str:
    lost = [r for r in records if r.status == "failed"]
    if not lost:
        return ""
    reasons = pd.Series([f"{r.kind}: {r.evidence.get('reason', r.name)}" for r in lost]).value_counts()
    return f"{len(lost)} failed\n" + "\n".join(f"  {count} × {reason}" for reason, count in reasons.items())
