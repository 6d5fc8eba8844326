"""Table files: a line of JSON for each number, and what all numbers of a visit share on the first of its lines."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

VISIT = "visit"
"""The evidence that holds for this line and for those below it, up to the next line that has such an entry."""


def to_lines(entries: Iterable[Mapping[str, Any]]) -> str:
    """Records as lines; what those of a step and a probe set share stands on the first of them, under ``visit``."""
    together = groupby(entries, key=lambda e: (e["step"], e["evidence"].get("probe_digest"), _is_bare(e)))
    lines = (line for _, group in together for line in _lines([*group]))
    return "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)


def _lines(group: Sequence[Mapping[str, Any]]) -> Iterator[Entry]:
    first, *others = (entry["evidence"] for entry in group)
    shared = {k: v for k, v in first.items() if others and all(k in o and _is_same(o[k], v) for o in others)}
    for number, entry in enumerate(group):
        own = {k: v for k, v in entry["evidence"].items() if k not in shared}
        yield {**entry, "evidence": own, **({} if number else {VISIT: shared})}


def _is_bare(entry: Mapping[str, Any]) -> bool:
    """Whether there is no evidence but the reason of a failure."""
    return bool(entry["evidence"].keys() == {"reason"})


def _is_same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def read_lines(text: str) -> Iterator[Entry]:
    """Records of a table file, each with all of its evidence; also of files that repeat it on every line.

    Raises:
        ValueError: a line is no JSON.
    """
    shared: Mapping[str, Any] = {}
    for line in text.split("\n"):  # reasons may hold other separators of lines
        if line:
            entry = json.loads(line)
            shared = entry.pop(VISIT, shared)
            yield {**entry, "evidence": {**shared, **entry.get("evidence", {})}}


def read_table(path: Path) -> list[Entry]:
    """The same of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is no JSON.
    """
    return list(read_lines(path.read_text(encoding="utf-8")))
