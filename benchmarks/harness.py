"""Contenders that do the same work, run in turn in one process: seconds, and how far each is from the truth."""

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

Values = Mapping[str, float]

Found = Mapping[str, Any]
"""What a run found or cost, by name; of this the numbers are kept."""

Run = Callable[[], Found]
"""The timed part of a contender's work."""


@dataclass(frozen=True)
class Contender:
    """One way to do a task. ``prepare(seed)`` makes ready what a user has before; what it returns is timed."""

    name: str
    prepare: Callable[[int], Run]
    ours: bool = False


@dataclass(frozen=True)
class Trial:
    """One run of one contender, or why there is none."""

    work: str
    task: str
    contender: str
    ours: bool
    round: int
    cpu: float = math.nan
    wall: float = math.nan
    values: Values = field(default_factory=dict)
    errors: Values = field(default_factory=dict)
    failure: str = ""


Judge = Callable[[Found], Values]
"""Errors of what was found."""


def compare(
    work: str, task: str, contenders: Iterable[Contender], judge: Judge, *, rounds: int, warm_up: bool = True
) -> Iterator[Trial]:
    """Every contender once per round, in an order that rotates; a contender that fails once is left out from then on.

    CPU seconds are those of the whole process, which runs on one thread. The seed of a round is its number.
    """
    running = list(contenders)
    for number in range(-1 if warm_up else 0, rounds):
        shift = number % max(1, len(running))
        for contender in running[shift:] + running[:shift]:
            trial = _trial(work, task, contender, judge, number)
            if trial.failure:
                running.remove(contender)
            if number >= 0 or trial.failure:
                yield trial


def _trial(work: str, task: str, contender: Contender, judge: Judge, number: int) -> Trial:
    seed = max(0, number)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # SciPy's eigsh starts from it
    about = {"work": work, "task": task, "contender": contender.name, "ours": contender.ours, "round": number}
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            run = contender.prepare(seed)
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            values = run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return Trial(**about, cpu=cpu, wall=wall, values=_numbers(values), errors=dict(judge(values)))  # type: ignore[arg-type]
    except Exception as error:
        return Trial(**about, failure=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}")  # type: ignore[arg-type]
    finally:
        gc.collect()


def _numbers(found: Found) -> Values:
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def keep(trial: Trial, path: Path) -> None:
    """Append a trial to a file of JSON lines, at once, so that an interrupted run loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(trial)) + "\n")


def kept(path: Path) -> list[Trial]:
    """All trials of a file."""
    return [Trial(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


@dataclass(frozen=True)
class Summary:
    """A contender's medians over rounds, and the ratio of its time to ours in the same round."""

    contender: str
    ours: bool
    rounds: int
    cpu: float
    wall: float
    ratio: float
    ratio_low: float
    ratio_high: float
    values: Values
    errors: Values
    failure: str


def summarise(trials: list[Trial]) -> list[Summary]:
    """One row per contender of one task on one work."""
    names = list(dict.fromkeys(t.contender for t in trials))
    reference = next((t.contender for t in trials if t.ours), names[0])
    by_round = {t.round: t.cpu for t in trials if t.contender == reference and not t.failure}
    rows = [_summary([t for t in trials if t.contender == name], by_round) for name in names]
    return sorted(rows, key=lambda row: (not row.ours, bool(row.failure), row.cpu))


def _summary(trials: list[Trial], reference: Mapping[int, float]) -> Summary:
    done = [t for t in trials if not t.failure]
    ratios = [t.cpu / reference[t.round] for t in done if t.round in reference] or [math.nan]
    failures = [t.failure for t in trials if t.failure]
    return Summary(
        contender=trials[0].contender,
        ours=trials[0].ours,
        rounds=len(done),
        cpu=_median([t.cpu for t in done]),
        wall=_median([t.wall for t in done]),
        ratio=_median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        values={k: _median([t.values[k] for t in done]) for k in (done[0].values if done else {})},
        errors={k: _median([t.errors[k] for t in done]) for k in (done[0].errors if done else {})},
        failure=failures[0] if failures else "",
    )


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan
