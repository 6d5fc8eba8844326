"""The start of a family's trunk: from nothing, or from where an earlier run had come."""

from pathlib import Path
from shutil import copytree

from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.nodes import Node, Position
from lmc_lightning.branching.family.plan import Plan
from lmc_lightning.branching.family.storage import link_or_copy


def start(family: Family, plan: Plan, resumed_at: Position | None, earlier: Path | None) -> None:
    """Fill a family with the children of a plan, keeping what an earlier run has of them.

    Args:
        family: new, with a folder.
        plan: says which children there shall be.
        resumed_at: where the trunk goes on; None: it starts.
        earlier: the folder of the earlier run's family, which may be another one.
    """
    folder = family.folder
    if resumed_at is None:
        set_aside(folder)
    else:
        if earlier is not None and earlier != folder and (earlier / "lineage.json").is_file():
            set_aside(folder)
            copytree(earlier, folder, copy_function=link_or_copy, ignore=lambda *_: {"claims"})
        if (folder / "lineage.json").is_file():
            _adopt(family, Family.load(folder), resumed_at)
    known = {_identity(node): node for node in family.children}
    family.children = [known.get(_identity(node), node) for node in plan.nodes()]
    family.trunk.status, family.trunk.reason = "running", None
    family.end = resumed_at or Position()
    if resumed_at is not None:
        for child in family.children:
            family.save_child(child)


def _identity(node: Node) -> tuple[object, ...]:
    """What makes a child of an earlier run the one that is planned."""
    return node.name, node.noise_seed, str(node.intervention)


def _adopt(family: Family, earlier: Family, here: Position) -> None:
    vars(family.trunk).update(vars(earlier.trunk))
    family.trunk.forget_after(here.epoch)
    # A fork at this very moment stays, in case the checkpoint was saved after it.
    family.forks = {label: fork for label, fork in earlier.forks.items() if fork.position.batches <= here.batches}
    family.children = earlier.children
    for child in family.children:
        if child.label not in family.forks:
            child.status, child.branch_step = "pending", None


def set_aside(folder: Path) -> None:
    """Rename what an earlier run has left in ``folder`` to the first free ``<name>_old_<n>``."""
    if folder.is_dir() and any(folder.iterdir()):
        number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}_old_{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}_old_{number}"))
