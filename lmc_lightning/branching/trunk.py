"""The trunk's side of a family: what is kept while it trains, and its children after it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from lmc_lightning.branching.child import add_batch
from lmc_lightning.branching.children import Children
from lmc_lightning.branching.lineage import Family, Node, link_or_copy
from lmc_lightning.branching.snapshot import NoiseWatch, position, take_fork
from lmc_lightning.branching.spawn import Blueprint
from lmc_lightning.core.glassbox import preserved_rng
from lmc_lightning.core.random_vectors import derive_seed


@dataclass(frozen=True)
class Plan:
    """Which children there shall be: ``children`` from each of ``epochs``, under which noise."""

    epochs: tuple[int, ...]
    children: int
    noise: Literal["fresh", "same"]
    seed: int

    def nodes(self) -> list[Node]:
        """The children, none of them started."""
        return [self._node(k1, child) for k1 in self.epochs for child in range(self.children)]

    def _node(self, k1: int, child: int) -> Node:
        seed = derive_seed(self.seed, "branch", "epoch", k1, "child", child) if self.noise == "fresh" else None
        return Node(f"k1_{k1:03d}_child_{child}", k1=k1, child=child, noise_seed=seed)


class Trunk:
    """One ``fit`` that children will leave: its family grows with it.

    Args:
        trainer: in ``setup``.
        pl_module: its module.
        owner: the callback, for whose ``plan`` and ``make_trainer`` this is.
        place: which one of several such callbacks of the Trainer that is.

    Raises:
        ValueError: more than one device, a branch point past the end, a Trainer that cannot be read back.
        TypeError: something that children need cannot be copied.
    """

    def __init__(self, trainer: Any, pl_module: Any, owner: Any, place: int) -> None:
        self.trainer, self.module = trainer, pl_module
        self.plan = _reachable(owner.plan, trainer)
        log_dir = trainer.log_dir  # a broadcast: on every rank
        if trainer.world_size > 1:
            raise ValueError(f"CheckpointBranching needs a single device, got a Trainer of {trainer.world_size}.")
        blueprint = Blueprint(trainer, pl_module, owner, owner.make_trainer)
        suffix = f"_{place}" if place else ""
        root = None if trainer.fast_dev_run else _local(log_dir or trainer.default_root_dir)
        self.family = Family(root and root / "lmc" / f"family{suffix}")
        branches = (root or self.family.folder) / f"branches{suffix}"
        self._children = Children(self.family, blueprint, trainer, pl_module, branches)
        self._watch = NoiseWatch(trainer, pl_module)
        self._began: tuple[float, int] | None = None
        self._warned: set[str] = set()
        self._measured = False
        self.seconds_per_batch = 0.0

    @contextmanager
    def guarded(self, doing: str) -> Iterator[None]:
        """A measurement may fail, a training run may not: what goes wrong is recorded and warned of, once."""
        try:
            yield
        except Exception as error:
            reason = f"cannot {doing}: {type(error).__name__}: {error}"
            self.family.trunk.reason = reason
            if reason not in self._warned:
                self._warned.add(reason)
                rank_zero_warn(f"CheckpointBranching {reason}. The training goes on.")

    def begin(self, earlier: Path | None) -> None:
        """Start the family, or go on with the one of the run that this one was resumed from.

        Args:
            earlier: the folder of that family as the checkpoint names it.
        """
        resumed = self.trainer.global_step > 0
        folder = self.family.folder
        if resumed and earlier is not None and earlier != folder and (earlier / "lineage.json").is_file():
            set_aside(folder)
            copytree(earlier, folder, copy_function=link_or_copy)
        if not resumed:
            set_aside(folder)
        elif (folder / "lineage.json").is_file():
            self._adopt(Family.load(folder))
        known = {(node.name, node.noise_seed): node for node in self.family.children}
        self.family.children = [known.get((node.name, node.noise_seed), node) for node in self.plan.nodes()]
        self.family.configuration = {**vars(self.plan), "epochs": list(self.plan.epochs)}
        self.family.trunk.status, self.family.trunk.reason = "running", None
        self.family.end = position(self.trainer)
        self._began = (time.monotonic(), self.family.end.batches)
        if resumed:
            self._report_missing(f"training was resumed after {self.family.end.epoch} epochs, without it")
        self.family.save()

    def _adopt(self, family: Family) -> None:
        now = self.trainer.current_epoch
        self.family.trunk, self.family.children = family.trunk, family.children
        self.family.trunk.forget_after(now)
        # A fork at this very epoch stays, in case the checkpoint was saved after that epoch had begun.
        self.family.forks = {epoch: fork for epoch, fork in family.forks.items() if epoch <= now}
        for child in self.family.children:
            if child.k1 not in self.family.forks:
                child.status, child.branch_step = "pending", None

    def begin_epoch(self, saving: Callable[[], Any]) -> None:
        """Keep weights and take a fork, where either is due, in ``on_train_epoch_start``."""
        epoch = self.trainer.current_epoch
        self.family.end = position(self.trainer)
        due = epoch in self.plan.epochs
        if due or self._is_wanted(epoch):
            self.family.keep(self.family.trunk, epoch, self.trainer.global_step, self.module)
        if due:
            self._fork(epoch, saving)
        self.family.save()

    def _fork(self, epoch: int, saving: Callable[[], Any]) -> None:
        nodes = [child for child in self.family.children if child.k1 == epoch]
        try:
            self.family.forks[epoch] = take_fork(self.trainer, self.module, self._watch, self.family.folder, saving)
        except Exception as error:  # a fork may fail, the training may not
            reason = f"no snapshot: {type(error).__name__}: {error}"
            rank_zero_warn(f"CheckpointBranching cannot branch after {epoch} epochs, {reason}")
            _mark(nodes, "missing", reason)
        else:
            for node in nodes:
                node.status, node.reason, node.branch_step = "pending", None, self.trainer.global_step

    def _is_wanted(self, epoch: int) -> bool:
        readers = [callback for callback in self.trainer.callbacks if hasattr(callback, "measure_family")]
        return not readers or any(reader.schedule.is_due("epoch", epoch) for reader in readers)

    def see_batch(self, batch: Any, batch_idx: int) -> None:
        """Let the first batches of an epoch enter its digest."""
        add_batch(self.family.trunk, self.trainer.current_epoch, batch, batch_idx)

    def end_training(self) -> None:
        """Keep the last weights, in ``on_train_end``."""
        end = self.family.end = position(self.trainer)
        self.family.keep(self.family.trunk, end.epoch, end.step, self.module)
        if end.epoch != self.trainer.max_epochs and end.step != self.trainer.max_steps:
            self.family.trunk.reason = f"stopped early after {end.epoch} epochs, {end.step} steps"
        self._take_time()

    def complete(self) -> None:
        """Note that the trunk has come to its end, in ``on_fit_end``."""
        self.family.trunk.status = "completed"
        for child in self.family.children:
            if child.k1 == self.family.end.epoch and child.k1 not in self.family.forks:
                self.family.keep_trunks(child, child.k1)  # k1 = T: nothing is left to train
                child.status, child.branch_step = "completed", self.family.end.step
                child.end_step, child.exact_replay = child.branch_step, True if child.noise_seed is None else None
        self._report_missing(f"the trunk ended after {self.family.end.epoch} epochs")
        self.family.save()

    def break_off(self, error: BaseException) -> None:
        """Note why the trunk did not come to its end."""
        if self.family.trunk.status == "running":
            interrupted = not isinstance(error, Exception)
            self.family.trunk.status = "interrupted" if interrupted else "failed"
            self.family.trunk.reason = f"{type(error).__name__}: {error}"
            self._take_time()
            self.family.save()

    def close(self) -> None:
        """Take our hands off the trunk's loop."""
        self._watch.close()

    def _take_time(self) -> None:
        if self._began is not None:
            began, batches = self._began
            seconds = time.monotonic() - began
            self.family.trunk.seconds = seconds
            # Children do without the measuring callbacks, which say how long they took.
            measuring = sum(getattr(callback, "seconds", 0.0) for callback in self.trainer.callbacks)
            self.seconds_per_batch = max(0.0, seconds - measuring) / max(1, self.family.end.batches - batches)

    def _report_missing(self, reason: str) -> None:
        now = self.family.end.epoch
        over = self.family.trunk.status == "completed"
        lost = [c for c in self.family.children if c.status == "pending" and c.k1 not in self.family.forks]
        lost = [c for c in lost if over or (c.k1 or 0) < now]
        if lost:
            epochs = ", ".join(str(k1) for k1 in sorted({c.k1 for c in lost if c.k1 is not None}))
            rank_zero_warn(f"CheckpointBranching has no snapshot after epochs {epochs}: {reason}.")
            _mark(lost, "missing", reason)

    def run_children(self) -> None:
        """Train the children that are not where the trunk is, then let every reader measure the family."""
        if not self._children.unfinished() and self._measured:
            return
        self._children.run(self.seconds_per_batch)
        with preserved_rng():
            for callback in self.trainer.callbacks:
                if hasattr(callback, "measure_family"):
                    callback.measure_family(self.family, self.trainer, self.module)
        self._measured = True


def _reachable(plan: Plan, trainer: Any) -> Plan:
    """The plan, less what a ``fast_dev_run`` cannot reach."""
    last = trainer.max_epochs
    if trainer.fast_dev_run:
        return replace(plan, epochs=(0,))
    late = [epoch for epoch in plan.epochs if 0 <= last < epoch]
    if late:
        raise ValueError(
            f"Expected branch points of at most max_epochs={last} epochs, got {late} in epochs={list(plan.epochs)}. "
            "Leave them out, or train for longer."
        )
    return plan


def _local(folder: str) -> Path:
    if "://" in folder:
        raise ValueError(f"CheckpointBranching keeps weights in a local folder, got {folder}. Give the logger one.")
    return Path(folder)


def _mark(nodes: list[Node], status: Any, reason: str) -> None:
    for node in nodes:
        node.status, node.reason = status, reason


def set_aside(folder: Path) -> None:
    """Rename what an earlier run has left in ``folder`` to the first free ``<name>_old_<n>``."""
    if folder.is_dir() and any(folder.iterdir()):
        number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}_old_{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}_old_{number}"))
