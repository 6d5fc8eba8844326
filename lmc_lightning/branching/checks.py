"""What the trunk of a family has to be, checked in its ``setup``."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmc_lightning.branching import internals
from lmc_lightning.branching.family.plan import Plan, When


def within_reach(plan: Plan, trainer: Any) -> Plan:
    """The plan, less what a ``fast_dev_run`` cannot reach.

    Raises:
        ValueError: a branch point past the end.
    """
    if trainer.fast_dev_run:
        return replace(plan, epochs=(0,), steps=())
    for name, last in (("epochs", trainer.max_epochs), ("steps", trainer.max_steps)):
        points = getattr(plan, name)
        late = [at for at in points if 0 <= last < at]
        if late:
            raise ValueError(
                f"Expected branch points of at most max_{name}={last} {name}, got {late} in {name}={list(points)}. "
                "Leave them out, or train for longer."
            )
    return plan


def refuse_same_names(plan: Plan, others: Iterable[Plan], callbacks: Iterable[Any]) -> None:
    """Refuse plans whose children any of the callbacks would log under the same keys.

    Raises:
        ValueError: naming a child that two of them have.
    """
    for other in others if any(hasattr(callback, "measure_family") for callback in callbacks) else ():
        shared = {node.name for node in plan.nodes()} & {node.name for node in other.nodes()}
        if shared:
            raise ValueError(
                f"Two CheckpointBranching callbacks have children called {min(shared)}, whose barriers would share "
                "their keys. Use other branch points or sizes, or children= of one of them."
            )


def check_processes(trainer: Any, when: When) -> None:
    """Refuse several processes that do not each hold the whole module, or that would train children amid the trunk.

    Raises:
        ValueError: saying what to use.
    """
    if trainer.world_size == 1:
        return
    if all(kind.__name__ != "DDPStrategy" for kind in type(trainer.strategy).__mro__):
        raise ValueError(
            f"CheckpointBranching needs a single device or strategy='ddp', got a Trainer of {trainer.world_size} "
            f"under {type(trainer.strategy).__name__}."
        )
    if when == "immediately":
        raise ValueError(
            "when='immediately' trains children amid the trunk, whose processes wait for each other. Use when='end'."
        )


def refuse_persistent_workers(trainer: Any) -> None:
    """Refuse loaders that children beside the trunk cannot use.

    Raises:
        ValueError: saying what to use.
    """
    if any(getattr(loader, "persistent_workers", False) for loader in internals.loaders(trainer.fit_loop)):
        raise ValueError(
            "when='immediately' trains children beside the trunk, whose persistent workers they would take over. Use "
            "when='end', or loaders without persistent_workers."
        )


def local(folder: str) -> Path:
    """The folder of a run.

    Raises:
        ValueError: it is none of this machine.
    """
    if "://" in folder:
        raise ValueError(f"CheckpointBranching keeps weights in a local folder, got {folder}. Give the logger one.")
    return Path(folder)
