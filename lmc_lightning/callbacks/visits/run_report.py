"""A run's report in Markdown: what was measured, what the keys mean, and what it has cost."""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lmc_lightning.landscape.paths.barrier import DEFINITIONS
from lmc_lightning.recording import Record
from lmc_lightning.summary import number


def run_report(callbacks: Iterable[Any]) -> str:
    """Tables of visits and cost, and of each callback its last numbers and its definitions.

    Args:
        callbacks: measuring ones, in the order of the report.
    """
    measuring = list(callbacks)
    parts = ["# What was measured", _table(("callback", *COSTS), [_cost(callback) for callback in measuring])]
    for callback in measuring:
        shown = [r for r in callback.results if r.log != "none" and r.is_measured]
        parts += [f"## {title_of(callback)}", _first_line(type(callback))]
        if shown:
            parts += [_table(("key", "last", "unit", "step", "visits"), _last_numbers(shown))]
        meanings = list(_meanings(callback))
        if meanings:
            parts += ["**Definitions**", _table(("key", "meaning"), meanings)]
    return "\n\n".join(part for part in parts if part) + "\n"


PLACES = {
    r"\{definition\}": f"({'|'.join(DEFINITIONS)})",
    r"\{lr_x0\.5\}": r"(?!(k1|child|siblings|tau|r)_)[a-z][\w.]*_x?[\d.e-]+",
}
"""What stands in braces in tables of keys -> regular expression, where it is not any name."""

COSTS = ("visits", "failed", "skipped", "time [s]", "Hessian products", "gradients", "probe set")


def title_of(callback: Any) -> str:
    """The class, with the name of a second instance."""
    return type(callback).__name__ + (f" ({callback.name})" if callback.name else "")


def _cost(callback: Any) -> tuple[Any, ...]:
    # All records of a visit share its evidence, and no two visits take the same time to the last digit.
    visits = {(r.step, r.evidence.get("seconds")): r.evidence for r in callback.results if r.is_measured}
    spent = [sum(e.get(name) or 0 for e in visits.values()) for name in ("num_matvecs", "num_gradients")]
    lost = [sum(r.status == status for r in callback.results) for status in ("failed", "skipped")]
    digests = {e["probe_digest"][:8] for e in visits.values() if e.get("probe_digest")}
    sizes = {f"{e['num_examples']:,} examples" for e in visits.values() if e.get("num_examples")}
    data = " ".join([*sorted(sizes), *(f"`{digest}`" for digest in sorted(digests))])
    return title_of(callback), len(visits), *lost, f"{callback.seconds:.1f}", *(f"{n:,}" for n in spent), data


def _last_numbers(records: Sequence[Record]) -> Iterator[tuple[Any, ...]]:
    last = {r.name: r for r in records}
    counts = [r.name for r in records]
    for name, record in last.items():
        yield f"`{name}`", number(record), record.unit, record.step, counts.count(name)


def _meanings(callback: Any) -> Iterator[tuple[str, str]]:
    """The rows of the docstring's table of keys of which there are numbers or pictures."""
    names, cls = {r.name for r in callback.results} | callback.drawn, type(callback)
    for key, meaning in documented_keys(cls).items():
        given = key.replace(f"{cls.kind}/", f"{callback.kind}/", 1)
        pattern = re.sub(r"\\\{.*?\\\}", lambda found: PLACES.get(found[0], "[^/]+"), re.escape(given)).replace(
            "…", ".*"
        )
        if any(re.fullmatch(f"{pattern}(/.*)?", name) for name in names):
            yield f"`{given}`", meaning


def documented_keys(cls: type) -> dict[str, str]:
    """Key -> meaning, from the table in the docstring of a callback; nothing where docstrings are stripped."""
    table = re.search(r"^ *=+ +=+$\n(.*?)^ *=+ +=+$", inspect.getdoc(cls) or "", flags=re.DOTALL | re.MULTILINE)
    rows: dict[str, str] = {}
    for line in table[1].splitlines() if table else ():
        found = re.fullmatch(r" *(?:``(\S+)``)? +(\S.*)", line)
        if found is not None:
            key = found[1] or next(reversed(rows), "")
            rows[key] = f"{rows.get(key, '')} {_markdown(found[2])}".strip()
    return rows


def _first_line(cls: type) -> str:
    return _markdown((inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " "))


def _markdown(text: str) -> str:
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)
