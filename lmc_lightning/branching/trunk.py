"""The trunk's side of a family: what is kept while it trains, and its children."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lmc_lightning.branching.checks import check_processes, local, refuse_persistent_workers, within_reach
from lmc_lightning.branching.children.blueprint import Blueprint
from lmc_lightning.branching.children.portable import BLUEPRINT, save_blueprint
from lmc_lightning.branching.children.processes import processes_of
from lmc_lightning.branching.children.training import Children, cut
from lmc_lightning.branching.family.claims import claimed, is_claimed
from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.nodes import Fork, Node, Point, Position, Status
from lmc_lightning.branching.family.plan import Plan, When, noise_of
from lmc_lightning.branching.family.start import start
from lmc_lightning.branching.family.storage import disk_use, link_or_copy
from lmc_lightning.branching.forks.snapshot import NoiseWatch, position, take_fork
from lmc_lightning.branching.forks.streams import check_separable
from lmc_lightning.branching.traces.averaging import LiveWeights, averaging
from lmc_lightning.branching.traces.curves import Curves
from lmc_lightning.branching.traces.evidence import DIGESTED_BATCHES, Evidence, chained, judge
from lmc_lightning.core.glassbox import preserved_rng
from lmc_lightning.core.structure import tensors_in


class Trunk:
    """One ``fit`` that children will leave: its family grows with it.

    Args:
        trainer: in ``setup``.
        pl_module: its module.
        owner: the callback, for whose ``plan``, ``when`` and ``make_trainer`` this is.
        place: which one of several such callbacks of the Trainer that is.

    Raises:
        ValueError: several processes without ``ddp``, a branch point past the end, a Trainer that cannot be read back.
        TypeError: something that children need cannot be copied.
    """

    def __init__(self, trainer: Any, pl_module: Any, owner: Any, place: int) -> None:
        self.trainer, self.module = trainer, pl_module
        self.plan: Plan = within_reach(owner.plan, trainer)
        self._when: When = owner.when
        log_dir = trainer.log_dir  # a broadcast: on every rank
        check_processes(trainer, self._when)
        self._processes = processes_of(trainer)
        with self._processes.agreed():
            self._set_up(owner, place, log_dir)

    def _set_up(self, owner: Any, place: int, log_dir: str | None) -> None:
        trainer, pl_module = self.trainer, self.module
        copies = self._when == "immediately"
        self._blueprint = Blueprint(trainer, pl_module, owner, owner.make_trainer, copy_loaders=copies)
        self._blueprint.intervention = self.plan.intervention
        suffix = f"_{place}" if place else ""
        root = None if trainer.fast_dev_run else local(log_dir or trainer.default_root_dir)
        self.family = Family(root and root / "lmc" / f"family{suffix}")
        self.family.processes, self.family.writes = self._processes, trainer.is_global_zero
        self.family.folder = self._processes.first(lambda: self.family.folder)
        self._branches = (root or self.family.folder) / f"branches{suffix}"
        self._children = Children(
            self.family,
            self._blueprint,
            self._branches,
            roots={"module": pl_module, "datamodule": trainer.datamodule},
            rank=trainer.global_rank,
            silent=trainer.progress_bar_callback is None or not trainer.is_global_zero,
        )
        self._evidence = Evidence(self.family.trunk, self._processes)
        self._watch = NoiseWatch(trainer, pl_module, self._loaders_are_ready, self._between_batches)
        self._live = LiveWeights(trainer.callbacks)
        self._open: list[Point] = []
        self._young: dict[str, int] = {}
        self._began: tuple[float, int] | None = None
        self._warned: set[str] = set()
        self._measured = False
        self._claim = ExitStack()
        self.curves = Curves(None)
        self.is_forking = False  # whether a checkpoint that is being saved is a snapshot
        self.seconds_per_batch = 0.0

    @contextmanager
    def guarded(self, doing: str, *, together: bool = True) -> Iterator["Trunk"]:
        """A measurement may fail, a training run may not: what goes wrong is recorded and warned of, once.

        On all processes, if they do it ``together``, which costs a sum over them.
        """
        try:
            with self._processes.agreed() if together else nullcontext():
                yield self
        except Exception as error:
            reason = f"cannot {doing}: {type(error).__name__}: {error}"
            self.family.trunk.reason = reason
            if reason not in self._warned:
                self._warned.add(reason)
                rank_zero_warn(f"CheckpointBranching {reason}. The training goes on.")

    # -- the start ---------------------------------------------------------------------------------------------------

    def _loaders_are_ready(self) -> None:
        check_separable(self.trainer, noise_of(self.plan.noise))
        if self._when == "immediately":
            refuse_persistent_workers(self.trainer)
        self._evidence.watch(self.trainer)

    def begin(self, earlier: str | None) -> None:
        """Start the family, or go on with the one of the run that this one was resumed from.

        Args:
            earlier: the folder of that family as the checkpoint names it.
        """
        resumed, here = self.trainer.global_step > 0, position(self.trainer)
        self._processes.first(lambda: self._start(here if resumed else None, earlier))
        self.family.share()
        self.family.configuration = {
            **self.plan.record(),
            "when": self._when,
            "keep": self._keeping(),
            "processes": self.trainer.world_size,
            "left_out": self._blueprint.left_out,
            "averaging": [type(callback).__name__ for callback in averaging(self.trainer.callbacks)],
            "branches": os.path.relpath(self._branches, self.family.folder),
        }
        self._open = [
            point for point in self.plan.points if point.label not in self.family.forks and not point.is_behind(here)
        ]
        self._began = (time.monotonic(), here.batches)
        if resumed:
            self._report_missing(f"training was resumed after {here.epoch} epochs, without it")
        if self.family.writes:
            self._claim.enter_context(claimed(self.family.folder, "trunk"))
            self.family.save()
            if not self.trainer.fast_dev_run:
                self._write_blueprint()
        path = self.family.curves_path(self.family.trunk) if self.family.writes else None
        self.curves = Curves(path, self.trainer.global_step)

    def _start(self, here: Position | None, earlier: str | None) -> None:
        if is_claimed(self.family.folder, "trunk"):
            raise RuntimeError(f"another process trains the trunk of the family in {self.family.folder}")
        start(self.family, self.plan, here, Path(earlier) if earlier else None)

    def _keeping(self) -> list[dict[str, Any]]:
        """At which epochs weights are kept, in plain values."""
        schedules = [r.schedule for r in self._readers() if r.schedule.axis == "epoch"]
        kept = [{"every": s.every, "points": sorted(s.points)} for s in schedules]
        if not self._readers():
            kept = [{"every": 1, "points": []}]
        return [*kept, {"every": None, "points": list(self.plan.epochs)}]

    def _readers(self) -> list[Any]:
        return [callback for callback in self.trainer.callbacks if hasattr(callback, "measure_family")]

    def _write_blueprint(self) -> None:
        """Say what will be on disk; write what children that are trained elsewhere are built from."""
        path = self.family.folder / BLUEPRINT
        path.unlink(missing_ok=True)
        try:
            save_blueprint(self._blueprint, path, self.trainer.world_size)
        except TypeError as error:
            self.family.configuration["blueprint"] = str(error)
            if self._when == "never":
                rank_zero_warn(f"CheckpointBranching takes snapshots for other processes, but {error}")
        line, fits = disk_use(self.trainer, self.family, self.plan, len(self._open))
        (rank_zero_info if fits else rank_zero_warn)(line if fits else f"{line} It will not fit.")

    # -- while it trains ---------------------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Keep weights and take forks, where either is due, in ``on_train_epoch_start``."""
        epoch, step = self.trainer.current_epoch, self.trainer.global_step
        self.family.end = position(self.trainer)
        due = [point for point in self._open if point.is_at(self.family.end)]
        if self._open:
            self._watch.begin_epoch()
        if self.family.wants(epoch):
            self.family.keep(self.family.trunk, epoch, step, self._live.between_epochs(self.module))
        for point in due:
            self._fork(point, mid_epoch=False)
        self.family.save()

    def _between_batches(self) -> None:
        here = self.trainer.global_step
        due = [p for p in self._open if p.axis == "step" and p.at <= here]
        if due and self.family.trunk.status == "running":
            with self.guarded("take a snapshot"):
                self.family.end = position(self.trainer)
                for point in due:
                    self._fork(point, mid_epoch=True)
                self.family.save()
        if any(p.axis == "step" for p in self._open):
            self._watch.before_fetch()

    def _fork(self, point: Point, *, mid_epoch: bool) -> None:
        self._open.remove(point)
        nodes = [child for child in self.family.children if child.label == point.label]
        fork = Fork(position(self.trainer), f"snapshots/{point.label}")
        self.is_forking = True
        try:
            with self._processes.agreed():
                take_fork(self.trainer, self._watch, fork, self.family.folder, self._processes, mid_epoch=mid_epoch)
        except Exception as error:  # a fork may fail, the training may not
            reason = f"no snapshot: {type(error).__name__}: {error}"
            rank_zero_warn(f"CheckpointBranching cannot branch after {point.at} {point.axis}s, {reason}")
            self._mark(nodes, "missing", reason)
            return
        finally:
            self.is_forking = False
        self.family.forks[point.label], self._young[point.label] = fork, 0
        for node in nodes:
            node.branch_step = fork.position.step
        self._mark(nodes, "pending", None)
        self._describe(fork)
        if self._when == "immediately":
            self.family.save()
            self._children.run(nodes, None)

    def _describe(self, fork: Fork) -> None:
        """Make the folder of a snapshot stand for itself."""
        folder, blueprint = self.family.folder / fork.folder, self.family.folder / BLUEPRINT
        if self.family.writes and blueprint.is_file():
            (folder / BLUEPRINT).unlink(missing_ok=True)
            link_or_copy(blueprint, folder / BLUEPRINT)
        self.family.save_fork(fork)

    def see_batch(self, batch: Any, batch_idx: int) -> None:
        """Let the first batches of an epoch, and after a fork, enter their digests."""
        self._evidence.see_batch(self.trainer.current_epoch, batch, batch_idx)
        grown: list[Fork] = []
        for label, seen in list(self._young.items()):
            fork = self.family.forks[label]
            if tensors_in(batch):
                fork.first_batches = chained(fork.first_batches or "", batch, self._processes)
            self._young[label] += 1
            if seen + 1 == DIGESTED_BATCHES:
                del self._young[label]
                grown.append(fork)
        for fork in grown:
            self.family.save_fork(fork)

    def end_epoch(self) -> None:
        """Digest what the epoch was, in ``on_train_epoch_end``."""
        self._live.end_epoch(self.module)
        self._evidence.end_epoch(self.trainer)
        self.curves.write()

    # -- the end -----------------------------------------------------------------------------------------------------

    def end_training(self) -> None:
        """Keep the last weights, in ``on_train_end``."""
        end = self.family.end = position(self.trainer)
        self.family.keep(self.family.trunk, end.epoch, end.step, self._live.between_epochs(self.module))
        if not 0 <= self.trainer.max_epochs <= end.epoch and end.step != self.trainer.max_steps:
            self.family.trunk.reason = f"stopped early after {end.epoch} epochs, {end.step} steps"
        self._take_time()

    def complete(self) -> None:
        """Note that the trunk has come to its end, in ``on_fit_end``."""
        with self._processes.agreed():
            self._complete()

    def _complete(self) -> None:
        end = self.family.end
        self.family.trunk.status = "completed"
        for point in self._open:
            if point.is_at(end):
                self._end_as_trunk([child for child in self.family.children if child.label == point.label])
        self._report_missing(f"the trunk ended after {end.epoch} epochs, {end.step} steps")
        for child in self.family.children:
            if child.status == "completed" and child.label in self.family.forks:
                cut(child, self.family.forks[child.label], end)
                judge(child, self.family.trunk, self.family.forks[child.label].first_batches)
                self.family.save_child(child)
        self.family.save()

    def _end_as_trunk(self, children: list[Node]) -> None:
        """k1 = T: nothing is left to train."""
        end = self.family.end
        for child in children:
            self.family.keep_trunks(child, end.epoch)
            child.status, child.branch_step, child.end_step = "completed", end.step, end.step
            child.exact_replay = True if child.is_replay else None
            self.family.save_child(child)

    def break_off(self, error: BaseException) -> None:
        """Note why the trunk did not come to its end."""
        self.close()
        with self.guarded("write the curves"):
            self.curves.write()
        if self.family.trunk.status == "running":
            interrupted = not isinstance(error, Exception)
            self.family.trunk.status = "interrupted" if interrupted else "failed"
            self.family.trunk.reason = f"{type(error).__name__}: {error}"
            self._take_time()
            self.family.save()

    def close(self) -> None:
        """Take our hands off the trunk's loop and loaders."""
        self._watch.close()
        self._evidence.close()
        self._claim.close()

    def _take_time(self) -> None:
        if self._began is not None:
            began, batches = self._began
            seconds = time.monotonic() - began
            self.family.trunk.seconds = seconds
            # Children do without the measuring callbacks, which say how long they took.
            measuring = sum(getattr(callback, "seconds", 0.0) for callback in self.trainer.callbacks)
            self.seconds_per_batch = max(0.0, seconds - measuring) / max(1, self.family.end.batches - batches)

    def _report_missing(self, reason: str) -> None:
        here, over = self.family.end, self.family.trunk.status == "completed"
        lost = [c for c in self.family.children if c.status == "pending" and c.label not in self.family.forks]
        lost = [c for c in lost if over or c.point.is_behind(here)]
        for axis in ("epoch", "step"):
            points = ", ".join(str(k1) for k1 in sorted({c.point.at for c in lost if c.point.axis == axis}))
            if points:
                rank_zero_warn(f"CheckpointBranching has no snapshot after {axis}s {points}: {reason}.")
        self._mark(lost, "missing", reason)

    def _mark(self, nodes: list[Node], status: Status, reason: str | None) -> None:
        for node in nodes:
            node.status, node.reason = status, reason
            self.family.save_child(node)

    def run_children(self) -> None:
        """Train the children that are not where the trunk is, then let every reader measure the family."""
        self.family.refresh()
        unfinished = self.family.unfinished(self.family.end)
        if not unfinished and self._measured:
            return
        self._children.run(unfinished, self.family.end, self.seconds_per_batch)
        self.family.refresh()
        ended = [child for child in self.family.children if child.variant and child.status == "completed"]
        idle = [child for child in ended if child.branch_step == child.end_step]
        self._mark(idle, "completed", "nothing was done to it: the trunk ended there")
        with preserved_rng(), self._processes.agreed():
            self.family.save()
            for callback in self._readers():
                callback.measure_family(self.family, self.trainer, self.module)
        self._measured = True
