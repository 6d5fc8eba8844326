"""Children trained in another process than the trunk's: the rest of a family, or one from a snapshot."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmc_lightning.branching.children.portable import BLUEPRINT, load_blueprint
from lmc_lightning.branching.children.training import Children
from lmc_lightning.branching.family.claims import is_claimed
from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.nodes import Fork, Node, Point, Position
from lmc_lightning.branching.family.plan import Noise, child_of, noise_of


def finish_family(folder: Path, only: Sequence[str] | None = None) -> Family:
    """Train the children of a family that are not finished and that no other process is training.

    They end where the trunk has ended or was interrupted; while it is still being trained, where their Trainers end.
    Barriers are not measured here: `measure_family` needs the trunk's callbacks.

    Args:
        folder: of the family.
        only: names of children; None: all.

    Raises:
        FileNotFoundError: there is no family, or its trunk could not be pickled.
        DamagedFileError: a file is not what was written; the message names it.
        ValueError: the trunk was trained by several processes.
    """
    family = Family.load(folder)
    _refuse_several(family.configuration, folder)
    left = family.unfinished(_end_of(family))
    _train(family, [child for child in left if only is None or child.name in only], folder)
    return family


def train_from_snapshot(
    folder: Path, noise: Noise = "fresh", noise_seed: int = 0, output: Path | None = None
) -> tuple[Family, str]:
    """Train one child from a snapshot, unless it is finished or another process trains it.

    Args:
        folder: of the snapshot: one of a family's ``snapshots``, or a copy of it anywhere.
        noise: which of the trunk's noise it has.
        noise_seed: what its own noise follows from.
        output: the family that it belongs to; None: the snapshot's own, or ``children`` in a copied snapshot.

    Returns:
        The family, and the name of the child.

    Raises:
        FileNotFoundError: the folder is no snapshot, or the trunk could not be pickled.
        DamagedFileError: a file is not what was written; the message names it.
        ValueError: the trunk was trained by several processes.
    """
    about = _about(folder)
    _refuse_several(about["configuration"], folder)
    fork = Fork.from_dict(about["fork"])
    home = folder.parent.parent
    if output is None and (home / "lineage.json").is_file():
        family = Family.load(home)
    else:
        family = _family_of_one(folder, output or folder / "children", fork, about)
    suffix = f"child_seed{noise_seed}" if "fresh" in noise_of(noise).values() else "child_same"
    planned = child_of(Point.of(about["label"]), suffix, noise, noise_seed)
    node = next((child for child in family.children if child.name == planned.name), planned)
    if node is planned:
        family.children.append(node)
    _train(family, [node] if node.status != "completed" else [], folder)
    return family, node.name


def _train(family: Family, children: Sequence[Node], folder: Path) -> None:
    """Train children by the blueprint in a folder; put together what processes have written, unless the trunk does."""
    end = _end_of(family)
    branches = family.folder / family.configuration["branches"]
    # Without a terminal a progress bar fills a log.
    silent = not sys.stderr.isatty()
    Children(family, load_blueprint(folder / BLUEPRINT), branches, roots={}, silent=silent).run(children, end)
    family.refresh()
    if end is not None or family.trunk.status == "missing":
        family.save()


def _refuse_several(configuration: dict[str, Any], folder: Path) -> None:
    processes = configuration.get("processes", 1)
    if processes > 1:
        raise ValueError(
            f"{folder} is of a trunk that {processes} processes trained, each with random states of its own: only "
            "these train its children, at the end of the run or by `CheckpointBranching.run_children`. Resume the run "
            "to train what is left."
        )


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "snapshot.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected the folder of a family (with lineage.json) or of a snapshot (with snapshot.json), got {folder}."
        )
    about: dict[str, Any] = json.loads(path.read_text())
    return about


def _family_of_one(folder: Path, output: Path, fork: Fork, about: dict[str, Any]) -> Family:
    if (output / "lineage.json").is_file():
        family = Family.load(output)
    else:
        family = Family(output)
        family.trunk.status, family.trunk.reason = "missing", f"trained elsewhere; its snapshot is {folder.resolve()}"
        family.configuration = {**about["configuration"], "branches": "branches"}
    fork.folder = str(folder.resolve())
    family.forks[about["label"]] = fork
    family.save()
    return family


def _end_of(family: Family) -> Position | None:
    lives = family.trunk.status == "running" and is_claimed(family.folder, "trunk")
    return None if lives or family.trunk.status == "missing" else family.end
