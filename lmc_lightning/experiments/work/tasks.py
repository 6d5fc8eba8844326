"""The tasks of a study: train a cell, train a child, measure a family, compare a pair; each once, whoever runs it."""

import hashlib
import json
import platform
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lmc_lightning.branching.children.isolation import isolated
from lmc_lightning.branching.elsewhere import finish_family
from lmc_lightning.branching.family.claims import claimed
from lmc_lightning.branching.family.lineage import Family, versions, write_json
from lmc_lightning.callbacks.checkpoint_branching import CheckpointBranching
from lmc_lightning.core.files import write_atomic
from lmc_lightning.experiments.plans.build import LAST, ResumableNoise, build
from lmc_lightning.experiments.plans.study import Cell, Study
from lmc_lightning.experiments.work.measures import IN_FILES, MEASURES, Trained, measured, trained
from lmc_lightning.recording import plain
from lmc_lightning.summary import failed

Kind: TypeAlias = Literal["cell", "child", "family", "pair"]
Status: TypeAlias = Literal["completed", "failed", "waiting", "running"]

WEIGHTS = "weights.pt"
"""The last parameters and buffers of a cell, in its folder."""


@dataclass(frozen=True)
class Task:
    """One piece of a study.

    Args:
        id: also the name of its record.
        kind: what it does.
        cells: the ids of the cells that it is about.
        after: the ids of the tasks that have to be completed before.
        child: the name of the child in the cell's family.
        measures: of a pair.
    """

    id: str
    kind: Kind
    cells: tuple[str, ...]
    after: tuple[str, ...] = ()
    child: str | None = None
    measures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a task ended: the content of its record."""

    id: str
    kind: Kind
    status: Status
    cells: tuple[str, ...] = ()
    reason: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)
    """Versions, device, threads."""


def tasks_of(study: Study) -> list[Task]:
    """All tasks, each after those that it waits for."""
    cells = study.cells
    tasks = [Task(cell.id, "cell", (cell.id,)) for cell in cells]
    if study.branches is not None:
        names = [node.name for node in CheckpointBranching(**{**study.branches, "when": "never"}).plan.nodes()]
        for cell in cells:
            children = [Task(f"{cell.id}.{name}", "child", (cell.id,), (cell.id,), name) for name in names]
            family = Task(f"{cell.id}.family", "family", (cell.id,), tuple(child.id for child in children))
            tasks += [*children, family]
    for first, second, pairing in study.paired():
        both = first.id, second.id
        digest = hashlib.sha256(json.dumps([both, pairing.measures], sort_keys=True).encode()).hexdigest()[:12]
        tasks.append(Task(f"pair_{digest}", "pair", both, both, measures=pairing.measures))
    return tasks


def record_path(folder: Path, task_id: str) -> Path:
    """The file of a task's outcome."""
    return folder / "records" / f"{task_id}.json"


def outcome_of(folder: Path, task_id: str) -> Outcome | None:
    """How a task ended, as far as its record says."""
    path = record_path(folder, task_id)
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    known = Outcome.__dataclass_fields__
    fields: dict[str, Any] = {k: v for k, v in content.items() if k in known}
    return Outcome(**{**fields, "cells": tuple(fields["cells"])})


def run_task(study: Study, task: Task, folder: Path) -> Outcome:
    """Do a task, unless it is done, is being done by another process, or waits for one that is not completed.

    The record is written when all is done, so that whoever is killed meanwhile leaves the task to be done again. An
    exception becomes a record too; such a task is tried again by the next call.
    """
    known = outcome_of(folder, task.id)
    if known is not None and known.status == "completed":
        return known
    missing = [t for t in task.after if (o := outcome_of(folder, t)) is None or o.status != "completed"]
    common: dict[str, Any] = {"id": task.id, "kind": task.kind, "cells": task.cells}
    if missing:
        return Outcome(status="waiting", reason=f"{missing[0]} is not completed", **common)
    with claimed(folder, task.id) as ours:
        if not ours:
            return Outcome(status="running", reason="by another process", **common)
        outcome = _run(study, task, folder, common)
        write_json(record_path(folder, task.id), plain(asdict(outcome)))
    return outcome


def _run(study: Study, task: Task, folder: Path, common: dict[str, Any]) -> Outcome:
    cells = {cell.id: cell for cell in study.cells}
    mine = [cells[i] for i in task.cells]
    about: dict[str, Any] = {"versions": versions(), "threads": study.threads, "device": _device()}
    common = {**common, "hyperparameters": _shared(mine)}
    started = time.perf_counter()
    try:
        about["child"] = task.child
        with isolated(), _threads(study.threads):
            metrics = _WORK[task.kind](task, mine, folder)
        end: dict[str, Any] = {"status": "completed", "metrics": metrics}
    except Exception as error:
        about["traceback"] = traceback.format_exc()
        end = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return Outcome(**common, **end, seconds=time.perf_counter() - started, about=about)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads for torch's kernels: sums depend on it in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cell_folder(folder: Path, cell_id: str) -> Path:
    """Where a cell logs and writes."""
    return folder / "cells" / cell_id


def pair_file(folder: Path, task_id: str, measure: str) -> Path:
    """What a measure of a pair writes beside its numbers."""
    return folder / "pairs" / task_id / f"{measure}.npz"


def _train(task: Task, cells: Sequence[Cell], folder: Path) -> dict[str, Any]:
    (cell,) = cells
    home = cell_folder(folder, cell.id)
    write_atomic(home / "config.yaml", lambda file: file.write(yaml.safe_dump(cell.config).encode()))
    objects = build(cell.config, home)
    last = home / LAST
    objects.trainer.fit(objects.model, objects.datamodule, ckpt_path=_usable(last), weights_only=False)
    kept = next((c.metrics for c in objects.trainer.callbacks if isinstance(c, ResumableNoise)), {})  # type: ignore[attr-defined]
    metrics = kept | {name: float(value) for name, value in objects.trainer.callback_metrics.items()}
    metrics |= {"epochs": objects.trainer.current_epoch, "steps": objects.trainer.global_step}
    metrics |= _with_best_weights(objects)
    state = {name: value.detach().cpu() for name, value in objects.model.state_dict().items()}
    write_atomic(home / WEIGHTS, lambda file: torch.save(state, file))
    last.unlink(missing_ok=True)
    if cell.measured:
        metrics |= measured(Trained(objects.model, objects.datamodule), cell.measured)
    lost = failed(objects.trainer.callbacks)  # type: ignore[attr-defined]
    return metrics | ({"failed_visits": len(lost)} if lost else {})


def _with_best_weights(objects: Any) -> dict[str, float]:
    """The weights of a ``ModelCheckpoint`` with a ``monitor``, if there is one; what they give on validation data."""
    callbacks = [c for c in objects.trainer.callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    if not callbacks or not callbacks[0].best_model_path:
        return {}
    content = torch.load(callbacks[0].best_model_path, map_location="cpu", weights_only=False)
    objects.model.load_state_dict(content["state_dict"])
    best = callbacks[0].best_model_score
    found: dict[str, float] = {"kept_epoch": content["epoch"] + 1, str(callbacks[0].monitor): float(best)}  # type: ignore[arg-type]
    if objects.trainer.enable_validation:
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        alone = pl.Trainer(**quiet, accelerator=objects.trainer.accelerator, devices=1)
        found |= dict(alone.validate(objects.model, objects.datamodule, verbose=False)[0])
    return found


def _usable(checkpoint: Path) -> str | None:
    """A checkpoint to go on from; a torn one is put aside, and the run starts anew."""
    if not checkpoint.is_file():
        return None
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=False)
    except Exception:
        checkpoint.replace(checkpoint.with_suffix(".damaged"))
        return None
    return str(checkpoint)


def _family_folder(folder: Path, cell: Cell) -> Path:
    return cell_folder(folder, cell.id) / "lmc" / "family"


def _train_child(task: Task, cells: Sequence[Cell], folder: Path) -> dict[str, Any]:
    assert task.child is not None
    family = finish_family(_family_folder(folder, cells[0]), only=[task.child])
    node = family.node(task.child)
    if node.status != "completed":
        raise RuntimeError(f"{node.name} is {node.status}: {node.reason}")
    return {"steps": node.end_step, "exact_replay": node.exact_replay, "noise_seed": node.noise_seed}


class _MeasuresFamily(Callback):
    """Lets the callbacks of a Trainer that does not train measure a family that is complete."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        for callback in trainer.callbacks:
            if hasattr(callback, "measure_family"):
                callback.draw_probes(trainer, pl_module)
                callback.measure_family(self.family, trainer, pl_module)


def _measure_family(task: Task, cells: Sequence[Cell], folder: Path) -> dict[str, Any]:
    (cell,) = cells
    home = cell_folder(folder, cell.id)
    objects = build(cell.config, home, resumable=False, limit_train_batches=0, enable_checkpointing=False)
    trainer: Any = objects.trainer
    trainer.callbacks.append(_MeasuresFamily(Family.load(_family_folder(folder, cell))))
    trainer.fit(objects.model, objects.datamodule)
    failures = failed(trainer.callbacks)
    if failures:
        raise RuntimeError(f"{len(failures)} failed, the first: {failures[0].evidence['reason']}")
    records = [r for c in trainer.callbacks for r in getattr(c, "results", ()) if r.value is not None]
    return {f"{r.name}@{r.step}": r.value for r in records}


def _compare(task: Task, cells: Sequence[Cell], folder: Path) -> dict[str, Any]:
    first, second = (trained(cell.config, cell_folder(folder, cell.id), WEIGHTS) for cell in cells)
    found: dict[str, Any] = {}
    for name, options in task.measures.items():
        if name not in MEASURES:
            raise ValueError(f"A pair is measured by {', '.join(MEASURES)}, not by {name!r}.")
        place = {"path": pair_file(folder, task.id, name)} if name in IN_FILES else {}
        found |= MEASURES[name](first, second, **options, **place)
    return found


_WORK = {"cell": _train, "child": _train_child, "family": _measure_family, "pair": _compare}


def _shared(cells: Sequence[Cell]) -> dict[str, Any]:
    """Of one cell its hyper-parameters; of a pair those in common, the others as ``<name>_a`` and ``<name>_b``."""
    if len(cells) == 1:
        return cells[0].hyperparameters
    a, b = (cell.hyperparameters for cell in cells)
    same = {name: a[name] for name in a if a[name] == b.get(name)}
    return same | {f"{n}_{side}": own[n] for side, own in (("a", a), ("b", b)) for n in own if n not in same}


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
