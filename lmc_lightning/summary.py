"""What a run's callbacks found, as tables for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from lmc_lightning.recording import Record


def summarize(callbacks: Iterable[Any]) -> str:
    """Tables of the curvature and sharpness at each visit and of all barriers, and lists of failed and skipped visits.

    Args:
        callbacks: those with ``results``, a list of records; others are ignored.
    """
    records = [r for c in callbacks for r in getattr(c, "results", ())]
    pairs = [r for r in records if "child" in r.evidence and r.name.startswith("barrier/") and _is_main(r)]
    visits = [r for r in records if r.is_measured and r.log == "all" and "later_epoch" not in r.evidence]
    parts = [_visit_table(visits), _pair_table(pairs), _lost(records, "failed"), _lost(records, "skipped")]
    return "\n\n".join(part for part in parts if part)


def _branch_point(evidence: Mapping[str, Any]) -> int | str:
    k1: int | None = evidence["k1"]
    return f"step {evidence.get('branch_step')}" if k1 is None else k1


def _is_main(record: Record) -> bool:
    """Whether it is the barrier itself and not another convention of it."""
    return bool(record.evidence.get("definition", "barrier") == "barrier")


def failed(callbacks: Iterable[Any]) -> list[Record]:
    """The visits of all callbacks that failed."""
    return [r for c in callbacks for r in getattr(c, "results", ()) if r.status == "failed"]


def _visit_table(records: Sequence[Record]) -> str:
    if not records:
        return ""
    cells = pd.DataFrame([{"epoch": r.epoch, "step": r.step, "name": r.name, "cell": number(r)} for r in records])
    order = list(dict.fromkeys(r.name for r in records))
    table = cells.pivot_table(index=["epoch", "step"], columns="name", values="cell", aggfunc="last")[order]
    return "Visits\n" + table.reset_index().rename_axis(columns=None).to_string(index=False, na_rep="")


def _pair_table(records: Sequence[Record]) -> str:
    if not records:
        return ""
    cells = pd.DataFrame(
        [
            {
                "k1": _branch_point(r.evidence),
                "later epoch": r.evidence["later_epoch"],
                "child": str(r.evidence["child"]),
                "name": r.name.split("/k1_")[0].removeprefix("barrier/"),
                "cell": number(r),
            }
            for r in records
        ]
    )
    table = cells.pivot_table(index=["k1", "child", "later epoch"], columns="name", values="cell", aggfunc="last")
    return "Barriers\n" + table.reset_index().rename_axis(columns=None).to_string(index=False, na_rep="")


def number(record: Record) -> str:
    """A value with its error over examples, else over probes, and what is wrong with it."""
    if record.value is None:
        return "–"
    over_data = record.evidence.get("stderr_data")
    spread = record.stderr if over_data is None else over_data
    stderr = "" if spread is None else f" ± {spread:.2g}"
    flag = "" if record.status == "ok" else f" ({record.status.replace('_', ' ')})"
    return f"{record.value:.4g}{stderr}{flag}"


def _lost(records: Sequence[Record], status: str) -> str:
    lost = [r for r in records if r.status == status]
    if not lost:
        return ""
    reasons = pd.Series([f"{r.kind}: {r.evidence.get('reason', r.name)}" for r in lost]).value_counts()
    return f"{len(lost)} {status}\n" + "\n".join(f"  {count} × {reason}" for reason, count in reasons.items())
