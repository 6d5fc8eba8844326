"""The children of a trunk that has ended: trained one after another, each recorded however it ends."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tqdm import tqdm  # type: ignore[import-untyped]

from lmc_lightning.branching.child import Child
from lmc_lightning.branching.isolation import isolated
from lmc_lightning.branching.lineage import Family, Node
from lmc_lightning.branching.noise import noise_state, set_noise_state
from lmc_lightning.branching.snapshot import Replay
from lmc_lightning.branching.spawn import Blueprint, remove_curves


class Children:
    """Trains what is left to train of a family.

    Args:
        family: whose trunk has ended.
        blueprint: taken from the trunk before it was trained.
        trainer: the trunk's.
        pl_module: its module.
        branches: the folder of the children's curves.
    """

    def __init__(self, family: Family, blueprint: Blueprint, trainer: Any, pl_module: Any, branches: Path) -> None:
        self._family, self._blueprint = family, blueprint
        self._trainer, self._module = trainer, pl_module
        self._branches = branches

    def unfinished(self) -> list[Node]:
        """The children that have a snapshot to start from and are not where the trunk is."""
        end = self._family.end
        return [
            child
            for child in self._family.children
            if child.k1 in self._family.forks
            and child.k1 < end.epoch
            and (child.status != "completed" or (child.reason is None and child.end_step != end.step))
        ]

    def run(self, seconds_per_batch: float) -> None:
        """Train the unfinished children.

        One that fails is recorded and the next starts. Whatever interrupts a child is recorded and raised; the next
        call begins with that child.

        Args:
            seconds_per_batch: of the trunk, to say how long it will take.
        """
        unfinished = self.unfinished()
        if not unfinished:
            return
        self._announce(unfinished, seconds_per_batch)
        roots = {"module": self._module, "datamodule": self._trainer.datamodule, **self._blueprint.sources}
        before = noise_state(roots)
        try:
            with isolated(), self._progress(unfinished) as bar:
                for child in unfinished:
                    bar.set_description(child.name)
                    self._run(child, bar)
        finally:
            set_noise_state(before, roots)
        failed = [f"{child.name} failed, {child.reason}" for child in unfinished if child.status == "failed"]
        if failed:
            rank_zero_warn(f"CheckpointBranching: {'; '.join(failed)}")

    def _batches(self, child: Node) -> int:
        assert child.k1 is not None
        return self._family.end.batches - self._family.forks[child.k1].position.batches

    def _announce(self, children: list[Node], seconds_per_batch: float) -> None:
        k1s = [child.k1 for child in children if child.k1 is not None]
        epochs = sum(self._family.end.epoch - k1 for k1 in k1s)
        seconds = seconds_per_batch * sum(map(self._batches, children))
        points = ", ".join(map(str, sorted(set(k1s))))
        rank_zero_info(
            f"CheckpointBranching: {len(children)} children leave the trunk after {points} epochs and train for "
            f"{epochs} epochs in all, about {seconds:.0f} s."
        )

    @contextmanager
    def _progress(self, children: list[Node]) -> Iterator[Any]:
        silent = self._trainer.progress_bar_callback is None
        with tqdm(total=sum(map(self._batches, children)), unit="batch", disable=silent) as bar:
            yield bar

    def _run(self, child: Node, bar: Any) -> None:
        folder = self._branches / child.name
        if child.status != "pending":
            remove_curves(folder)
        child.status, child.reason, child.exact_replay, child.end_step = "running", None, None, None
        child.epochs, child.batch_digests, child.state_digests = {}, {}, {}
        self._family.save()
        began, end = time.monotonic(), bar.n + self._batches(child)
        try:
            self._train(child, folder, bar)
            child.status = "completed"
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
            bar.update(end - bar.n)
            self._family.save()

    def _train(self, child: Node, folder: Path, bar: Any) -> None:
        assert child.k1 is not None
        fork = self._family.forks[child.k1]
        replay = Replay(self._family.folder / fork.noise, child.noise_seed)
        fit = self._blueprint.build(Child(child, self._family, replay, bar.update), folder)
        fit(self._family.folder / fork.checkpoint)
        if child.noise_seed is None:
            _judge_replay(child, self._family.trunk)


def _judge_replay(child: Node, trunk: Node) -> None:
    def first_difference(mine: dict[int, str], trunks: dict[int, str]) -> int | None:
        return next((e for e in sorted(mine) if e in trunks and mine[e] != trunks[e]), None)

    batches = first_difference(child.batch_digests, trunk.batch_digests)
    weights = first_difference(child.state_digests, trunk.state_digests)
    child.exact_replay = batches is None and weights is None
    if batches is not None:
        child.reason = f"the batches of epoch {batches} differ from the trunk's: the loader has state of its own"
    elif weights is not None:
        child.reason = f"the weights differ from the trunk's first after {weights} epochs, on the same batches"
