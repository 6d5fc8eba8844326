"""What each of two processes does in the tests of forks of a distributed run."""

import contextlib
import copy
import os
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lmc_lightning import CheckpointBranching, InterpolationBarrier
from lmc_lightning.branching.children import processes
from lmc_lightning.branching.family.lineage import Family
from lmc_lightning.core.glassbox import rng_state, seed_everything
from tests.branching.runs import Augmented, Net, sha
from tests.scripts.distributed import examples


class Steps(pl.Callback):
    """Weights, buffers, optimizer and random states after every batch, of trunk and children alike."""

    runs: ClassVar[list[dict[Any, tuple[Any, ...]]]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.mine: dict[Any, tuple[Any, ...]] = {}
        self.runs.append(self.mine)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.mine[trainer.fit_loop.total_batch_idx] = (
            trainer.global_step,
            sha(list(pl_module.parameters())),
            sha(list(pl_module.buffers())),
            sha([optimizer.state_dict() for optimizer in trainer.optimizers]),
            sha(rng_state()),
            sha(batch),
        )


class Shared(Net):
    """BatchNorm and dropout; every process takes its share of one augmented set by a ``DistributedSampler``."""

    def train_dataloader(self) -> Any:
        return DataLoader(Augmented(), batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Augmented(), batch_size=4)


class Own(Shared):
    """Every process has data, batches and an order of its own; one starts its order from a generator."""

    def train_dataloader(self) -> Any:
        size = (6, 3)[self.global_rank]
        inputs, labels = examples(5 * size, seed=self.global_rank)
        generator = torch.Generator().manual_seed(self.global_rank)
        return DataLoader(TensorDataset(inputs[:, :4], labels % 2), batch_size=size, shuffle=True, generator=generator)


def fit(rank: int, module: Any, callbacks: list[Any], *, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    root = Path(options.pop("root", "root"))
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "logger": CSVLogger(root, version=0),
        "default_root_dir": root,
        "strategy": DDPStrategy(timeout=timedelta(seconds=30), process_group_backend="gloo"),
        "use_distributed_sampler": not isinstance(module, Own),
        "enable_checkpointing": False,
    }
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", devices=2, callbacks=callbacks, **quiet, **{**defaults, **options})
    seed_everything(5 + rank)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def seeded(kind: type[Net]) -> Net:
    torch.manual_seed(7)
    return kind()


def told(family: Family) -> dict[str, Any]:
    """What a process knows of its family."""
    nodes = [{**copy.deepcopy(vars(node)), "seconds": None} for node in (family.trunk, *family.children)]
    return {"nodes": nodes, "end": family.end, "forks": family.forks}


def prints(rank: int, kind: type[Net], callbacks: list[Any], **options: Any) -> list[dict[Any, tuple[Any, ...]]]:
    """Of the trunk and each child."""
    Steps.runs.clear()
    fit(rank, seeded(kind), [*callbacks, Steps()], **options)
    return list(Steps.runs)


def forked(rank: int, kind: type[Net]) -> dict[str, Any]:
    """A run alone; with children that repeat it, from two epochs and two steps; twice with children that do not."""
    alone, after = prints(rank, kind, [])[0], sha(rng_state())
    same = CheckpointBranching(epochs=[0, 1], steps=[2, 6], noise="same")
    barrier = InterpolationBarrier(num_points=3, num_examples=20)
    runs = prints(rank, kind, [same, barrier], root="same")
    answer = {"alone": alone, "same": runs, "quiet": sha(rng_state()) == after, "told": told(same.family)}
    answer["barriers"] = [(r.name, r.step, r.value, r.status) for r in barrier.results]
    answer["failures"] = barrier.failures
    for name in ("fresh", "again"):
        fresh = CheckpointBranching(epochs=[1], steps=[2], seed=3)
        answer[name] = prints(rank, kind, [fresh], root=name)
        answer[f"told {name}"] = told(fresh.family)
    return answer


class Failing(pl.Callback):
    """Fails in children, at their second batch or at their start, on some processes."""

    def __init__(self, *ranks: int, at_start: bool = False) -> None:
        self.ranks, self.at_start, self.runs = ranks, at_start, 0

    def __deepcopy__(self, memo: Any) -> "Failing":
        twin = Failing(*self.ranks, at_start=self.at_start)
        twin.runs = self.runs + 1
        return twin

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._perhaps(trainer, self.at_start)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._perhaps(trainer, batch_idx == 1 and trainer.current_epoch == 0)

    def _perhaps(self, trainer: Any, now: bool) -> None:
        # The blueprint is a first copy, from which children are copied.
        if now and self.runs > 1 and trainer.global_rank in self.ranks:
            raise ValueError("no luck")


class InOrder(Shared):
    """The order of which no seed can change."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*examples(40, seed=0)), batch_size=4)

    def loss(self, batch: Any) -> Any:
        return super().loss((batch[0][:, :4], batch[1] % 2))


def failing(rank: int) -> dict[str, Any]:
    """Children that fail on both processes, in their training or by what both find out about them."""
    answer = {}
    runs: dict[str, tuple[type[Net], list[Any], dict[str, Any]]] = {
        "training": (Shared, [Failing(0, 1)], {"noise": "same"}),
        "noise": (InOrder, [], {}),
        "damage": (Shared, [Damaging()], {"noise": "same"}),
    }
    for name, (kind, callbacks, arguments) in runs.items():
        branching = CheckpointBranching(epochs=[0, 1], **arguments)
        fit(rank, seeded(kind), [*callbacks, branching], root=name, use_distributed_sampler=kind is Shared)
        answer[name] = [(child.status, child.reason) for child in branching.family.children]
    return answer


class Damaging(pl.Callback):
    """Damages what one process of a snapshot has written."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for path in Path(trainer.default_root_dir).rglob(f"k1_000/noise_{trainer.global_rank}.pt"):
            if trainer.global_rank == 1:
                path.write_bytes(path.read_bytes()[:-1])


def lost(rank: int) -> str:
    """A child that fails on one process alone, while the other waits for it in a step."""
    processes.PATIENCE = timedelta(seconds=2)
    try:
        fit(rank, seeded(Shared), [Failing(1), CheckpointBranching(epochs=[0, 1], noise="same")])
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "completed"


def resumed(rank: int) -> dict[str, Any]:
    """A run that is interrupted after its first epoch, and goes on elsewhere."""
    whole = CheckpointBranching(epochs=[0, 1], steps=[2], noise="same")
    fit(rank, seeded(Shared), [whole], root="whole")
    first = CheckpointBranching(epochs=[0, 1], steps=[2], noise="same")
    with contextlib.suppress(KeyError):
        fit(rank, seeded(Shared), [Interrupted(), first], root="first")
    told_before = told(first.family)
    second = CheckpointBranching(epochs=[0, 1], steps=[2], noise="same")
    fit(rank, seeded(Shared), [second], root="second", ckpt_path="first/last.ckpt")
    return {"whole": told(whole.family), "before": told_before, "after": told(second.family)}


class Interrupted(pl.Callback):
    """Saves at the end of the first epoch, and ends the run a little later."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint("first/last.ckpt")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.current_epoch == 1:
            raise KeyError("interrupted")


def script() -> None:
    """As a script that Lightning starts once more for the second process."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    answer = forked(rank, Shared)
    Path(f"answer_{rank}.pickle").write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    script()
