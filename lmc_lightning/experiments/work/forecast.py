"""A study from its file to its records: what is left to do, how long it will take, and doing it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from lmc_lightning.branching.family.storage import free_bytes, in_words
from lmc_lightning.experiments.work.tasks import Kind, Outcome, Task, cell_folder, outcome_of


@dataclass(frozen=True)
class Forecast:
    """What a study will take, from the tasks of each kind that are done."""

    total: dict[Kind, int]
    done: dict[Kind, int]
    seconds: dict[Kind, float]
    """A task of each kind takes, on average."""
    bytes_per_cell: float | None
    free_bytes: int

    @property
    def left_seconds(self) -> float | None:
        """For what is left, one task at a time; None until a cell and, if there are any, a child are done."""
        left = {kind: total - self.done.get(kind, 0) for kind, total in self.total.items()}
        if any(left.get(kind) and kind not in self.seconds for kind in ("cell", "child")):
            return None
        return sum(count * self.seconds.get(kind, 0.0) for kind, count in left.items())

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {_PLURAL[kind]} ({self.done.get(kind, 0)} done)" for kind, n in self.total.items())
        left = self.left_seconds
        known = ", ".join(f"{s:.1f} s a {kind}" for kind, s in self.seconds.items())
        when = f"about {left:.0f} s are left, one task at a time" if left is not None else "time unknown"
        time = f"{when} ({known})" if known else f"{when}: `--time-one` runs a cell and its first child to tell"
        if self.bytes_per_cell is None:
            return f"{counts}; {time}."
        disk = self.bytes_per_cell * self.total.get("cell", 0)
        return f"{counts}; {time}; disk {in_words(disk)} in all, {in_words(self.free_bytes)} are free."


_PLURAL: dict[Kind, str] = {"cell": "cells", "child": "children", "family": "families", "pair": "pairs"}


def forecast(tasks: Sequence[Task], folder: Path) -> Forecast:
    """What is done and what is left of a study."""
    outcomes = [o for o in (outcome_of(folder, task.id) for task in tasks) if o is not None and o.status == "completed"]
    by_kind: dict[Kind, list[float]] = {}
    for outcome in outcomes:
        by_kind.setdefault(outcome.kind, []).append(outcome.seconds)
    homes = [cell_folder(folder, outcome.id) for outcome in outcomes if outcome.kind == "cell"]
    sizes = [sum(f.stat().st_size for f in home.rglob("*") if f.is_file()) for home in homes]
    return Forecast(
        total=dict(Counter(task.kind for task in tasks)),
        done={kind: len(seconds) for kind, seconds in by_kind.items()},
        seconds={kind: mean(seconds) for kind, seconds in by_kind.items()},
        bytes_per_cell=mean(sizes) if sizes else None,
        free_bytes=free_bytes(folder),
    )


def sample(tasks: Sequence[Task]) -> list[Task]:
    """The first task of each kind that can be done alone, and what it waits for: enough to tell what a study takes."""
    first = tasks[0]
    wanted = [task for task in tasks if task.kind == "child" and task.cells == first.cells][:1]
    return [first, *wanted]


def describe(outcome: Outcome) -> str:
    """An outcome as a line."""
    setting = ", ".join(f"{name}={value}" for name, value in outcome.hyperparameters.items())
    end = outcome.status if outcome.reason is None else f"{outcome.status}: {outcome.reason}"
    return f"{outcome.kind:<6} {outcome.id}  {end}  {outcome.seconds:.1f} s  {setting}"
