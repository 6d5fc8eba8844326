"""Run tasks on works and keep every trial; see README.md."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import works
from benchmarks.harness import Contender, Found, Trial, Values, compare, keep, summarise
from benchmarks.report import table
from benchmarks.tasks import barrier, eigenvalues, hvp, matching, radii, surfaces, together, trace
from benchmarks.works import RECIPES, Work


@dataclass(frozen=True)
class Task:
    """Who competes, and how far from the truth each is."""

    contenders: Callable[[Work], list[Contender]]
    errors: Callable[[Work, Found], Values]


TASKS = {
    "hvp": Task(hvp.contenders, hvp.errors),
    "lambda_max": Task(eigenvalues.defaults, eigenvalues.errors),
    "lambda_max_tuned": Task(eigenvalues.tuned, eigenvalues.errors),
    "top5": Task(eigenvalues.top_five, eigenvalues.errors),
    "trace": Task(trace.contenders, trace.errors),
    "together": Task(together.contenders, together.errors),
    "barrier": Task(barrier.contenders, barrier.errors),
    "surface": Task(surfaces.contenders, surfaces.errors),
    "radii": Task(radii.contenders, radii.errors),
    "matching": Task(matching.contenders, matching.errors),
    "matching_planted": Task(partial(matching.contenders, planted=True), matching.errors),
}


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--work", nargs="+", choices=RECIPES, default=["lenet5"])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["hvp"])
    parser.add_argument("--pairs", type=int, default=5, help="rounds in which ours and every peer run once each")
    parser.add_argument("--only", nargs="+", default=[], help="contenders whose names contain one of these, and ours")
    parser.add_argument("--data", type=Path, default=works.FOLDERS["data"], help="folder of the image sets")
    parser.add_argument("--cache", type=Path, default=works.FOLDERS["cache"], help="folder of weights and references")
    parser.add_argument("--output", type=Path, help="JSON lines; by default trials.jsonl in the cache")
    parser.add_argument("--no-warm-up", action="store_true", help="skip the round that is not counted")
    options = parser.parse_args(arguments)
    works.FOLDERS.update(data=options.data, cache=options.cache)
    torch.set_num_threads(1)
    for name in options.work:
        for task in options.task:
            run(Work(name), task, options)


def run(work: Work, name: str, options: argparse.Namespace) -> list[Trial]:
    """One task on one work: print the table, keep the trials."""
    task, path = TASKS[name], options.output or works.FOLDERS["cache"] / "trials.jsonl"
    wanted = [c for c in task.contenders(work) if c.ours or _is_wanted(c.name, options.only)]
    judge = partial(task.errors, work)
    trials = []
    for trial in compare(work.name, name, wanted, judge, rounds=options.pairs, warm_up=not options.no_warm_up):
        keep(trial, path)
        trials.append(trial)
        print(f"{name} {work.name} {trial.contender}: {trial.cpu:.3f} s {trial.failure}", file=sys.stderr, flush=True)
    print(f"\n### {name}, {work.name}\n\n{table(summarise(trials))}", flush=True)
    return trials


def _is_wanted(name: str, only: list[str]) -> bool:
    return not only or any(part in name for part in only)


if __name__ == "__main__":
    main()
