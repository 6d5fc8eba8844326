"""The tables of a run on a terminal."""

from typing import Any

from lmc_lightning import Record, summarize
from lmc_lightning.summary import failed


class Callback:
    def __init__(self, *results: Record) -> None:
        self.results = results


def visit(name: str, step: int, value: float | None, stderr: float | None = None, **fields: Any) -> Record:
    return Record("test", step, step // 3, name, value, stderr, **fields)


def pair(metric: str, k1: int, later: int, value: float, child: int = 0, stderr: float | None = 0.01) -> Record:
    evidence = {"k1": k1, "later_epoch": later, "child": child}
    return Record("barrier", 3 * later, later, f"barrier/{metric}/k1_{k1:03d}", value, stderr, evidence=evidence)


def rows(text: str, title: str) -> list[list[str]]:
    """The cells of one table."""
    (table,) = [part for part in text.split("\n\n") if part.startswith(title)]
    return [line.split() for line in table.splitlines()[1:]]


def test_visits_are_rows_and_keys_are_columns_in_the_order_they_were_logged() -> None:
    text = summarize(
        [
            Callback(
                visit("hessian/lambda_max", 0, 12.3456789, evidence={"stderr_data": 0.5}),
                visit("hessian/trace", 0, 100.0, 2.0, evidence={"stderr_data": None}),
                visit("hessian/lambda_max", 6, 3.0, status="not_converged"),
                visit("hessian/trace", 6, None, status="undefined"),
            ),
            Callback(visit("sharpness/average", 6, 0.25, 0.125, status="unreliable")),
        ]
    )
    header, first, last = rows(text, "Visits")
    assert header == ["epoch", "step", "hessian/lambda_max", "hessian/trace", "sharpness/average"]
    assert first == ["0", "0", *["12.35", "±", "0.5"], *["100", "±", "2"]]
    assert last == ["2", "6", "3", "(not", "converged)", "–", *["0.25", "±", "0.12", "(unreliable)"]]
    assert "Barriers" not in text


PAIRS = [(0, 0, 0), (0, 0, 4), (0, 1, 4), (1, 0, 4)]
"""Branch point, child and later epoch."""


def test_pairs_are_rows_by_branch_point_child_and_later_epoch() -> None:
    metrics = ("train_loss", "val_error/mine")
    results = [pair(m, k1, later, 0.1 * later, child) for m in metrics for k1, child, later in reversed(PAIRS)]
    header, *table = rows(summarize([Callback(*results)]), "Barriers")
    assert header == ["k1", "child", "later", "epoch", "train_loss", "val_error/mine"]
    assert [tuple(map(int, row[:3])) for row in table] == PAIRS
    assert table[0][3:] == ["0", "±", "0.01", "0", "±", "0.01"]


def test_failures_are_counted_with_their_reasons() -> None:
    lost = [visit("test", step, None, status="failed", evidence={"reason": "no luck"}) for step in (0, 3)]
    other = Record("barrier", 3, 1, "barrier/k1_000", None, evidence={"reason": "gone"}, status="failed")
    callbacks = [Callback(*lost, visit("test/a", 6, 1.0)), Callback(other), object()]
    text = summarize(callbacks)
    assert text.split("\n\n")[-1].splitlines() == ["3 failed", "  2 × test: no luck", "  1 × barrier: gone"]
    assert len(rows(text, "Visits")) == 2
    assert failed(callbacks) == [*lost, other]


def test_a_run_without_results_has_no_tables() -> None:
    assert summarize([]) == summarize([object(), Callback()]) == ""


def test_siblings_and_branch_points_within_epochs_have_rows_and_other_conventions_have_none() -> None:
    evidence = {"k1": None, "branch_step": 500, "later_epoch": 4, "child": 0}
    step = Record("barrier", 12, 4, "barrier/val_loss/k1_step_000500", 0.5, evidence=evidence)
    evidence = evidence | {"k1": 1}
    both = evidence | {"child": "0 and 1"}
    siblings = Record("barrier", 12, 4, "barrier/val_loss/k1_001/siblings_0_1", 0.25, evidence=both)
    dip = Record("barrier", 12, 4, "barrier/val_loss/k1_001/dip", -9.0, evidence=evidence | {"definition": "dip"})
    distance = Record("barrier", 12, 4, "distance/l2/k1_001", 9.0, evidence=evidence | {"definition": "l2"})
    _, *table = rows(summarize([Callback(step, siblings, dip, distance)]), "Barriers")
    assert table == [["1", "0", "and", "1", "4", "0.25"], ["step", "500", "0", "4", "0.5"]]
