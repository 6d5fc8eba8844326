"""Files of a family: whether they are what was written, and how much there will be."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lmc_lightning.core.structure import tensors_in


class DamagedFileError(OSError):
    """A file of a family is not what was written."""


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verify(folder: Path, digests: Mapping[str, str]) -> None:
    """See to it that the files of a snapshot are what was written.

    Raises:
        DamagedFileError: one is missing or differs; the message names it.
    """
    for name, expected in digests.items():
        path = folder / name
        found = sha256_of(path) if path.is_file() else "no file"
        if found != expected:
            raise DamagedFileError(
                f"{path} is damaged: expected sha256 {expected[:12]}…, got {found[:12]}. Copy it again from where it "
                "was made, or take the snapshot again."
            )


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """A second name for a file that is never written again; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def weight_bytes(module: nn.Module) -> int:
    """Size of the parameters and buffers [bytes]."""
    return sum(value.nbytes for value in module.state_dict().values() if isinstance(value, Tensor))


def snapshot_bytes(module: nn.Module, optimizers: list[Any]) -> int:
    """Size of a snapshot to come [bytes]: weights, and as many tensors beside them as each optimizer will keep.

    Before the first step an optimizer keeps nothing: then two per parameter are expected where it has ``betas``, one
    where it has momentum.
    """
    total = weight_bytes(module)
    for optimizer in optimizers:
        kept = sum(tensor.nbytes for tensor in tensors_in(dict(optimizer.state)))
        if not kept:
            kept = sum(
                (2 if "betas" in group else 1 if group.get("momentum") else 0) * sum(p.nbytes for p in group["params"])
                for group in optimizer.param_groups
            )
        total += kept
    return total


def in_words(num_bytes: float) -> str:
    """A size with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def num_kept(trainer: Any, family: Any, plan: Any) -> int | None:
    """Sets of weights that trunk and children will keep; None if nobody knows when the run ends."""
    batches, last = trainer.num_training_batches, trainer.max_epochs
    if last is None or last < 0:
        if trainer.max_steps < 0 or batches == float("inf"):
            return None
        last = ceil(trainer.max_steps * trainer.accumulate_grad_batches / batches)
    wanted = [epoch for epoch in range(last + 1) if family.wants(epoch) or epoch == last]
    starts = [p.at if p.axis == "epoch" else int(p.at // batches) for p in plan.points]
    return len(wanted) + int(plan.children) * sum(epoch > start for start in starts for epoch in wanted)


def free_bytes(folder: Path) -> int:
    """What is free where ``folder`` is or will be [bytes]."""
    existing = next(f for f in (folder, *folder.absolute().parents) if f.is_dir())
    return shutil.disk_usage(existing).free


def disk_use(trainer: Any, family: Any, plan: Any, num_snapshots: int) -> tuple[str, bool]:
    """One line that says how much a family will write, and whether there is room for it.

    Args:
        trainer: of the trunk.
        family: that children will join.
        plan: for them.
        num_snapshots: to come.
    """
    module, folder, number = trainer.lightning_module, family.folder, num_kept(trainer, family, plan)
    snapshot, kept, free = snapshot_bytes(module, trainer.optimizers), weight_bytes(module), free_bytes(folder)
    line = f"CheckpointBranching: {num_snapshots} snapshots of {in_words(snapshot)}, "
    if number is None:
        return f"{line}and {in_words(kept)} per run and kept epoch; {in_words(free)} are free in {folder}.", True
    total = num_snapshots * snapshot + number * kept
    line += f"{number} sets of weights of {in_words(kept)}: about {in_words(total)} in all, {in_words(free)} are free"
    return f"{line} in {folder}.", total <= free
