"""Where the tasks of a study run: in this process, or on Ray."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmc_lightning.experiments.plans.study import Study
from lmc_lightning.experiments.work.tasks import Outcome, Task, run_task

Told = Callable[[Outcome], None]


def run_inline(study: Study, tasks: Sequence[Task], folder: Path, told: Told) -> None:
    """One task after another, in this process.

    Args:
        study: whose tasks these are.
        tasks: each after those that it waits for.
        folder: of the study.
        told: hears of each outcome.
    """
    for task in tasks:
        told(run_task(study, task, folder))


def run_on_ray(
    study: Study,
    tasks: Sequence[Task],
    folder: Path,
    told: Told,
    *,
    address: str | None = None,
    workers: int | None = None,
    gpus_per_task: float = 0,
) -> None:
    """The tasks as a graph on Ray Core; tasks of a worker that dies are started again, and go on where it was.

    The folder has to be the same for all machines. Workers do not share state, so that the driver may die at any time:
    the next call does what is left.

    Args:
        study: whose tasks these are.
        tasks: each after those that it waits for.
        folder: of the study.
        told: hears of each outcome as it comes.
        address: of a running cluster, ``"auto"`` for the one that this machine belongs to; None: start one here.
        workers: processes at a time on a cluster started here; None: as Ray sees fit.
        gpus_per_task: GPUs that each task takes, e.g. ``0.25``.

    Raises:
        ModuleNotFoundError: Ray is not installed; the message says how to.
    """
    ray = _ray()
    began = not ray.is_initialized()
    if began:
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, configure_logging=False, runtime_env=_environment(), **local)
    try:
        run = ray.remote(_run_after).options(num_cpus=1, num_gpus=gpus_per_task, max_retries=3)
        waiting: dict[Any, Task] = {}
        references: dict[str, Any] = {}
        for task in tasks:
            references[task.id] = run.remote(study, task, str(folder), *[references[t] for t in task.after])
            waiting[references[task.id]] = task
        for outcome in _as_they_come(ray, waiting):
            told(outcome)
    finally:
        if began:
            ray.shutdown()


def _run_after(study: Study, task: Task, folder: str, *after: Outcome) -> Outcome:
    """A task on a worker; what it comes after is there only to order them."""
    return run_task(study, task, Path(folder))


def _as_they_come(ray: Any, waiting: dict[Any, Task]) -> Iterator[Outcome]:
    while waiting:
        (reference,), _ = ray.wait(list(waiting), num_returns=1)
        task = waiting.pop(reference)
        try:
            yield ray.get(reference)
        except ray.exceptions.RayError as error:
            reason = f"{type(error).__name__}: the worker died too often, or a task before this one was lost"
            yield Outcome(task.id, task.kind, "failed", task.cells, reason)


def _environment() -> dict[str, Any]:
    """What workers need to know of this process: where its packages are, and that cells share a machine."""
    path = os.pathsep.join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH", "")) if p)
    return {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}}


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The Ray executor needs ray: pip install 'lmc-lightning[ray]'.") from error
    return ray
