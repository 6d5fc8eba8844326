"""Trials as Markdown tables.

python -m benchmarks.report data/benchmarks/trials.jsonl
"""

import math
import sys
from itertools import groupby
from pathlib import Path

from benchmarks.harness import Summary, Trial, kept, summarise


def table(rows: list[Summary]) -> str:
    """One row per contender: medians of the rounds, and CPU seconds as a multiple of ours in the same round."""
    values = [name for name in ("products", "cached_chunks", "losses") if any(name in row.values for row in rows)]
    errors = list(dict.fromkeys(name for row in rows for name in row.errors))
    header = ["", "CPU s", "wall s", "× ours (range)", *values, *(f"error: {name}" for name in errors)]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    lines += [_cells(row, values, errors) for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def tables(trials: list[Trial]) -> str:
    """A section for each task on each work."""
    ordered = sorted(trials, key=lambda t: (t.task, t.work))
    sections = []
    for (task, work), group in groupby(ordered, key=lambda t: (t.task, t.work)):
        found = list(group)
        rounds = max(t.round for t in found) + 1
        sections.append(f"### {task}, {work} ({rounds} rounds)\n\n{table(summarise(found))}")
    return "\n\n".join(sections)


def _cells(row: Summary, values: list[str], errors: list[str]) -> list[str]:
    name = f"**{row.contender}**" if row.ours else row.contender
    if not row.rounds:
        return [name, f"fails: {row.failure}", *[""] * (2 + len(values) + len(errors))]
    ratio = f"{row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})"
    counts = [_number(row.values.get(v), ".0f") for v in values]
    return [
        name,
        f"{row.cpu:.3g}",
        f"{row.wall:.3g}",
        ratio,
        *counts,
        *(_number(row.errors.get(e), ".1e") for e in errors),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


if __name__ == "__main__":
    print(tables(kept(Path(sys.argv[1]))))
