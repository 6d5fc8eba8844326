"""The children of a family: trained one after another, each recorded however it ends."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tqdm import tqdm  # type: ignore[import-untyped]

from lmc_lightning.branching.children.blueprint import Blueprint
from lmc_lightning.branching.children.child import Child
from lmc_lightning.branching.children.isolation import isolated
from lmc_lightning.branching.children.processes import LostProcessError, Meeting
from lmc_lightning.branching.family.claims import claimed
from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.branching.family.nodes import Fork, Node, Position
from lmc_lightning.branching.family.plan import Intervention
from lmc_lightning.branching.family.storage import verify
from lmc_lightning.branching.forks.noise import noise_state, set_noise_state
from lmc_lightning.branching.forks.replay import Replay
from lmc_lightning.branching.traces.evidence import judge


class Children:
    """Trains what is left to train of a family.

    Args:
        family: the trunk and its snapshots.
        blueprint: taken from the trunk before it was trained.
        branches: the folder of the children's curves.
        roots: where the trunk's random state may live, by name, to be put back afterwards.
        rank: of this process among those that train together.
        silent: without a progress bar.
    """

    def __init__(
        self,
        family: Family,
        blueprint: Blueprint,
        branches: Path,
        *,
        roots: Mapping[str, Any],
        rank: int = 0,
        silent: bool = False,
    ) -> None:
        self._family, self._blueprint, self._branches = family, blueprint, branches
        self._roots, self._rank, self._silent = roots, rank, silent
        self._processes = family.processes

    def run(self, children: Sequence[Node], end: Position | None, seconds_per_batch: float = 0.0) -> None:
        """Train children.

        One that fails is recorded and the next starts; one that another process trains is left to it. Whatever
        interrupts a child is recorded and raised.

        Args:
            children: those to train.
            end: where they end; None: where their Trainers end them.
            seconds_per_batch: of the trunk, to say how long it will take.
        """
        if not children:
            return
        if end is not None:
            self._announce(children, end, seconds_per_batch)
        roots = {**self._roots, **self._blueprint.sources}
        before = noise_state(roots)
        try:
            total = sum(self._batches(child, end) for child in children) or None
            with isolated(), tqdm(total=total, unit="batch", disable=self._silent) as bar:
                meeting = Meeting(self._processes)
                for child in children:
                    bar.set_description(child.name)
                    self._run(child, end, bar, meeting)
        finally:
            set_noise_state(before, roots)
        failed = [f"{child.name} failed, {child.reason}" for child in children if child.status == "failed"]
        if failed:
            rank_zero_warn(f"CheckpointBranching: {'; '.join(failed)}")

    def _batches(self, child: Node, end: Position | None) -> int:
        return 0 if end is None else end.batches - self._family.forks[child.label].position.batches

    def _announce(self, children: Sequence[Node], end: Position, seconds_per_batch: float) -> None:
        forks = [self._family.forks[child.label].position for child in children]
        epochs = sum(end.epoch - fork.epoch for fork in forks)
        seconds = seconds_per_batch * sum(self._batches(child, end) for child in children)
        points = {axis: sorted({c.point.at for c in children if c.point.axis == axis}) for axis in ("epoch", "step")}
        words = " and ".join(f"{', '.join(map(str, at))} {axis}s" for axis, at in points.items() if at)
        rank_zero_info(
            f"CheckpointBranching: {len(children)} children leave the trunk after {words} and train for "
            f"{epochs} epochs in all, about {seconds:.0f} s."
        )

    @contextmanager
    def _claimed(self, child: Node) -> Iterator[bool]:
        if not self._family.writes:
            yield self._processes.first(bool)
            return
        with claimed(self._family.folder, child.name) as ours:
            yield self._processes.first(lambda: ours)

    def _run(self, child: Node, end: Position | None, bar: Any, meeting: Meeting) -> None:
        with self._claimed(child) as ours:
            if not ours:
                child.status, child.reason = "running", "trained by another process"
                return
            with self._processes.agreed():
                if child.status != "pending" and self._family.writes:
                    shutil.rmtree(self._branches / child.name, ignore_errors=True)
                child.restart()
                self._family.save_child(child)
            began, last = time.monotonic(), bar.n + self._batches(child, end)
            try:
                with meeting.after():
                    self.train(child, end=end, advance=bar.update)
                child.status = "completed"
            except LostProcessError as error:
                child.status, child.reason = "failed", str(error)
                raise
            except Exception as error:
                child.status, child.reason = "failed", f"{type(error).__name__}: {error}"
            except BaseException as error:
                # The child's Lightning makes a SystemExit of a KeyboardInterrupt, as the trunk's will of ours.
                ctrl_c = isinstance(error.__context__, KeyboardInterrupt)
                child.status, child.reason = "interrupted", "KeyboardInterrupt" if ctrl_c else type(error).__name__
                if ctrl_c:
                    raise KeyboardInterrupt from None
                raise
            finally:
                child.seconds = time.monotonic() - began
                bar.update(max(0, last - bar.n))
                self._family.save_child(child)

    def train(
        self,
        child: Node,
        *,
        end: Position | None = None,
        extra: Sequence[Any] = (),
        advance: Any = lambda: None,
        at_fork: Intervention | None = None,
    ) -> None:
        """Train one child, in the process as it is, and compare what it saw with what the trunk saw.

        Args:
            child: its entry in the family.
            end: where it ends; None: where its Trainer ends it.
            extra: callbacks for this child alone.
            advance: called after each batch.
            at_fork: done when it leaves the trunk; by default what its entry says.

        Raises:
            DamagedFileError: a file of the snapshot is not what was written.
        """
        fork = self._family.forks[child.label]
        child.branch_step = fork.position.step
        # A child that was asked for afterwards may be without what is done to the others.
        intervention = at_fork if child.intervention is None else self._blueprint.intervention
        with self._processes.agreed():
            verify(self._family.folder / fork.folder, fork.digests)
            noise = torch.load(self._family.folder / fork.noise(self._rank), map_location="cpu", weights_only=True)
            replay = Replay(noise, child, self._rank)
            callback = Child(child, self._family, fork, replay, advance, end, intervention)
            fit = self._blueprint.build(callback, self._branches / child.name, extra)
        try:
            fit(self._family.folder / fork.checkpoint)
        finally:
            callback.close()
        judge(child, self._family.trunk, fork.first_batches)


def cut(child: Node, fork: Fork, end: Position) -> None:
    """Let a child that went on for longer than the trunk end where that has ended, if its weights were kept there."""
    is_longer = child.end_step not in (None, end.step) and fork.position.batches < end.batches
    if is_longer and child.epochs.get(end.epoch) == end.step:
        child.forget_after(end.epoch)
        child.end_step = end.step
